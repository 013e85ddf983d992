package source

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/logtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// text is a policy document.
func text(name string, percent int) string {
	return fmt.Sprintf("apiVersion: periscope.dev/v1alpha1\nkind: MirrorPolicy\nmetadata: {name: %s}\nspec: {sampling: {percent: %d}}\n", name, percent)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newSource(t *testing.T, path, state string) (*Source, *logtest.Buffer) {
	t.Helper()
	l := &logtest.Buffer{}
	s, err := New(Config{Path: path, StateFile: state, Logger: slog.New(slog.NewTextHandler(l, nil))})
	must(t, err)
	s.reread = time.Hour // what the kernel does not tell is not found
	return s, l
}

func load(t *testing.T, s *Source) Set {
	t.Helper()
	set, err := s.Load()
	must(t, err)
	return set
}

// served shows a set's policies: "default/shop=50".
func served(s Set) string {
	var out []string
	for _, p := range s.Policies {
		out = append(out, fmt.Sprintf("%s=%v", p.ID(), p.Spec.Sampling.Percent))
	}
	return strings.Join(out, " ")
}

// states shows a set's statuses: "default/shop Refused serving".
func states(s Set) []string {
	var out []string
	for _, st := range s.Statuses {
		line := fmt.Sprintf("%s %s", st.ID, st.State)
		if st.Serving {
			line += " serving"
		}
		out = append(out, strings.TrimSpace(line))
	}
	return out
}

// run starts a source and gives the function that waits for a set which
// satisfies a condition.
func run(t *testing.T, s *Source) (await func(what string, ok func(Set) bool) Set) {
	t.Helper()
	sets := make(chan Set, 100)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(set Set) { sets <- set }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	var last Set
	return func(what string, ok func(Set) bool) Set {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			select {
			case last = <-sets:
				if ok(last) {
					return last
				}
			case <-deadline:
				t.Fatalf("%s: not in time; last: %s, %v", what, served(last), last.Refused())
			}
		}
	}
}

func serves(want string) func(Set) bool {
	return func(s Set) bool { return served(s) == want }
}

func TestNew(t *testing.T) {
	if _, err := New(Config{Logger: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("no path: accepted")
	}
	if _, err := New(Config{Path: "x"}); err == nil {
		t.Error("no logger: accepted")
	}
}

func TestLoadFile(t *testing.T) {
	tests := map[string]struct {
		content string
		served  string
		states  []string
		faults  int
	}{
		"one":       {text("shop", 50), "default/shop=50", []string{"default/shop Accepted serving"}, 0},
		"two":       {text("shop", 50) + "---\n" + text("api", 10), "default/api=10 default/shop=50", []string{"default/shop Accepted serving", "default/api Accepted serving"}, 0},
		"one bad":   {text("shop", 500) + "---\n" + text("api", 10), "default/api=10", []string{"default/shop Refused", "default/api Accepted serving"}, 1},
		"twice":     {text("shop", 50) + "---\n" + text("shop", 10), "default/shop=50", []string{"default/shop Accepted serving", "default/shop Refused"}, 1},
		"empty":     {"", "", []string{"Refused"}, 1},
		"comments":  {"# nothing\n", "", []string{"Refused"}, 1},
		"no yaml":   {"a: [", "", []string{"Refused"}, 1},
		"too large": {strings.Repeat("#", policy.MaxFileBytes+10), "", []string{"Refused"}, 1},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "policy.conf")
			write(t, path, tt.content)
			s, _ := newSource(t, path, "")
			set := load(t, s)
			if got := served(set); got != tt.served {
				t.Errorf("serves %q, want %q", got, tt.served)
			}
			if diff := cmp.Diff(tt.states, states(set)); diff != "" {
				t.Errorf("statuses differ (-want +got):\n%s", diff)
			}
			if faults := set.Refused(); len(faults) != tt.faults {
				t.Errorf("faults %v, want %d", faults, tt.faults)
			}
		})
	}
}

func TestLoadMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.yaml")
	s, l := newSource(t, path, "")
	faults := load(t, s).Refused()
	if len(faults) != 1 || faults[0].Error() != path+": does not exist; create it, or correct the path" {
		t.Errorf("faults %v", faults)
	}
	if l.Count("policy refused") != 1 {
		t.Errorf("log: %s", l)
	}
}

func TestLoadDirectory(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	aged := strings.Replace(text("aged", 1), "{name: aged}", "{name: aged, creationTimestamp: 2026-01-02T00:00:00Z}", 1)
	older := strings.Replace(text("older", 1), "{name: older}", "{name: older, creationTimestamp: 2026-01-01T00:00:00Z}", 1)
	write(t, in("b.yaml"), text("shop", 50))
	write(t, in("a.yml"), text("api", 10)+"---\n"+aged)
	write(t, in("c.yaml"), text("shop", 60)+"---\n"+older)
	write(t, in("comments.yaml"), "# none\n")
	write(t, in("empty.yaml"), "\n")
	write(t, in(".hidden.yaml"), text("hidden", 1))
	write(t, in("notes.txt"), text("notes", 1))
	write(t, filepath.Join(outside, "x"), text("linked", 2))
	must(t, os.Symlink(filepath.Join(outside, "x"), in("linked.yaml")))
	must(t, os.Symlink("nowhere", in("dangling.yaml")))
	must(t, os.Mkdir(in("sub.yaml"), 0o700))
	must(t, syscall.Mkfifo(in("pipe.yaml"), 0o600))
	must(t, os.Symlink("/dev/zero", in("zero.yaml")))
	s, _ := newSource(t, dir, "")
	set := load(t, s)
	if got, want := served(set), "default/older=1 default/aged=1 default/api=10 default/linked=2 default/shop=50"; got != want {
		t.Errorf("serves %q, want %q", got, want)
	}
	var got []string
	for _, f := range set.Refused() {
		got = append(got, strings.ReplaceAll(f.Error(), dir+"/", ""))
	}
	want := []string{
		"c.yaml:1: metadata.name: default/shop is the name of two policies, this one and that of b.yaml:1; rename or remove one of the two",
		"dangling.yaml: does not exist; make it a readable file",
		"empty.yaml: is empty; write a policy, or remove the file",
		"pipe.yaml: is not a regular file; make it a readable file",
		"zero.yaml: is not a regular file; make it a readable file",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("faults differ (-want +got):\n%s", diff)
	}
}

func TestLoadTooMuch(t *testing.T) {
	dir := t.TempDir()
	many := strings.Repeat("--- no policy, but a document\n", policy.MaxDocuments)
	for i := range maxPolicies/policy.MaxDocuments + 1 {
		write(t, filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), many)
	}
	s, _ := newSource(t, dir, "")
	if faults := load(t, s).Refused(); len(faults) != 1 || !strings.Contains(faults[0].Problem, "more than 10000 policies") {
		t.Errorf("too many policies: %d faults, %v", len(faults), faults[:min(len(faults), 2)])
	}
	dir = t.TempDir()
	for i := range maxFiles + 1 {
		write(t, filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), "")
	}
	s, _ = newSource(t, dir, "")
	if faults := load(t, s).Refused(); len(faults) != 1 || !strings.Contains(faults[0].Problem, "more than 1000 files") {
		t.Errorf("too many files: %d faults, %v", len(faults), faults[:min(len(faults), 2)])
	}
}

// TestRunEdits edits one file in the ways that editors and programs do.
func TestRunEdits(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.yaml")
	write(t, path, text("shop", 1))
	s, l := newSource(t, path, "")
	await := run(t, s)
	first := await("start", serves("default/shop=1"))

	write(t, path, text("shop", 2))
	set := await("edit in place", serves("default/shop=2"))
	if set.Statuses[0].Hash == first.Statuses[0].Hash || !set.Statuses[0].Since.After(first.Statuses[0].Since) {
		t.Errorf("another version has status %+v, the first had %+v", set.Statuses[0], first.Statuses[0])
	}

	write(t, filepath.Join(dir, "4913.tmp"), text("shop", 3))
	must(t, os.Rename(filepath.Join(dir, "4913.tmp"), path))
	await("write by rename", serves("default/shop=3"))

	must(t, os.Rename(path, path+"~"))
	write(t, path, text("shop", 4))
	await("backup and write", serves("default/shop=4"))

	write(t, path, text("shop", 400))
	set = await("bad edit", func(s Set) bool { return len(s.Refused()) > 0 })
	if diff := cmp.Diff([]string{"default/shop Refused serving"}, states(set)); diff != "" || served(set) != "default/shop=4" {
		t.Errorf("bad edit: serves %s, statuses (-want +got):\n%s", served(set), diff)
	}
	if n := l.Count("level=WARN"); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, l)
	}

	write(t, path, "kind: [\n")
	set = await("not even YAML", func(s Set) bool { return len(s.Statuses) == 2 })
	if diff := cmp.Diff([]string{"Refused", "default/shop Refused serving"}, states(set)); diff != "" || served(set) != "default/shop=4" {
		t.Errorf("no YAML: serves %s, statuses (-want +got):\n%s", served(set), diff)
	}

	must(t, os.Remove(path))
	set = await("removed", func(s Set) bool {
		return len(s.Refused()) == 1 && strings.Contains(s.Refused()[0].Problem, "does not exist")
	})
	if served(set) != "default/shop=4" {
		t.Errorf("removed: serves %s", served(set))
	}

	write(t, path, text("api", 5))
	set = await("written again", serves("default/api=5"))
	if len(set.Refused()) > 0 {
		t.Errorf("written again: %v", set.Refused())
	}
}

// TestRunTornWrite saves in steps, as a program does that empties a file and
// then writes it. No set may lack the policies or have half of them.
func TestRunTornWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	both := text("a", 1) + "---\n" + text("b", 1)
	write(t, path, both)
	s, _ := newSource(t, path, "")
	await := run(t, s)
	await("start", serves("default/a=1 default/b=1"))
	content := strings.ReplaceAll(both, "percent: 1", "percent: 2")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	must(t, err)
	defer f.Close()
	for part := range strings.SplitAfterSeq(content, "\n") {
		_, err := f.WriteString(part)
		must(t, err)
	}
	await("save", func(s Set) bool {
		if got := served(s); got != "default/a=1 default/b=1" && got != "default/a=2 default/b=2" {
			t.Errorf("serves %s in between", got)
		}
		return served(s) == "default/a=2 default/b=2"
	})

	must(t, os.Truncate(path, 0))
	set := await("left empty", func(s Set) bool { return len(s.Refused()) == 1 })
	if served(set) != "default/a=2 default/b=2" {
		t.Errorf("left empty: serves %q", served(set))
	}
	must(t, os.WriteFile(path, []byte(content[:len(content)-len("percent: 2}}\n")-30]), 0))
	set = await("half-written", func(s Set) bool { return !strings.Contains(s.Refused()[0].Problem, "empty") })
	if served(set) != "default/a=2 default/b=2" {
		t.Errorf("half-written: serves %q, %v", served(set), set.Refused())
	}
}

// TestRunConfigMap exchanges a directory as kubelet does with a mounted
// ConfigMap: files are links to ..data/, a link to a directory by time.
func TestRunConfigMap(t *testing.T) {
	for _, target := range []string{"directory", "file"} {
		t.Run(target, func(t *testing.T) {
			mount := t.TempDir()
			in := func(name string) string { return filepath.Join(mount, name) }
			swap := func(version, content string) {
				must(t, os.Mkdir(in(".."+version), 0o755))
				write(t, in(".."+version+"/policy.yaml"), content)
				must(t, os.Symlink(".."+version, in("..data_tmp")))
				must(t, os.Rename(in("..data_tmp"), in("..data")))
			}
			swap("1", text("shop", 1))
			must(t, os.Symlink("..data/policy.yaml", in("policy.yaml")))
			path := mount
			if target == "file" {
				path = in("policy.yaml")
			}
			s, _ := newSource(t, path, "")
			await := run(t, s)
			await("start", serves("default/shop=1"))
			for i := 2; i < 5; i++ {
				swap(fmt.Sprint(i), text("shop", i))
				must(t, os.RemoveAll(in(fmt.Sprintf("..%d", i-1))))
				set := await("swap", serves(fmt.Sprintf("default/shop=%d", i)))
				if len(set.Refused()) > 0 {
					t.Errorf("swap %d: %v", i, set.Refused())
				}
			}
		})
	}
}

func TestRunDirectory(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "policies")
	in := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.Mkdir(dir, 0o755))
	write(t, in("a.yaml"), text("a", 1))
	write(t, in("b.yaml"), text("b", 1))
	s, _ := newSource(t, dir, "")
	await := run(t, s)
	await("start", serves("default/a=1 default/b=1"))

	write(t, in("c.yaml"), text("c", 1))
	await("another file", serves("default/a=1 default/b=1 default/c=1"))
	must(t, os.Remove(in("b.yaml")))
	await("a file less", serves("default/a=1 default/c=1"))
	write(t, in("c.yaml"), "# none\n")
	await("a policy less", serves("default/a=1"))
	write(t, in("a.yaml"), text("a", 1)+"---\n{\n")
	set := await("half a file", func(s Set) bool { return len(s.Refused()) == 1 })
	if served(set) != "default/a=1" {
		t.Errorf("half a file: serves %s", served(set))
	}

	outside := filepath.Join(parent, "outside.yaml")
	write(t, outside, text("linked", 1))
	must(t, os.Symlink("../outside.yaml", in("linked.yaml")))
	await("a link", serves("default/a=1 default/linked=1"))
	write(t, outside, text("linked", 2))
	await("its target", serves("default/a=1 default/linked=2"))

	must(t, os.Rename(dir, dir+".old"))
	set = await("directory gone", func(s Set) bool { return strings.HasSuffix(s.Statuses[0].File, "policies") })
	if served(set) != "default/a=1 default/linked=2" {
		t.Errorf("directory gone: serves %s", served(set))
	}
	must(t, os.Mkdir(dir, 0o755))
	write(t, in("z.yaml"), text("z", 1))
	await("another directory", serves("default/z=1"))
	write(t, in("z.yaml"), text("z", 2))
	await("watched anew", serves("default/z=2"))
}

// TestRunWithoutNotification finds changes although the kernel tells of none.
func TestRunWithoutNotification(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, path, text("shop", 1))
	s, l := newSource(t, path, "")
	s.newWatch = func() (*watch, error) { return nil, errors.New("too many open files") }
	s.reread = 50 * time.Millisecond
	await := run(t, s)
	await("start", serves("default/shop=1"))
	write(t, path, text("shop", 2))
	await("edit", serves("default/shop=2"))
	if n := l.Count("too many open files"); n != 1 {
		t.Errorf("told %d times, want once", n)
	}
}

// TestRunEndlessEdits changes a file more often than it can settle.
func TestRunEndlessEdits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, path, text("shop", 1))
	s, _ := newSource(t, path, "")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				temp := path + ".tmp"
				if os.WriteFile(temp, []byte(text("shop", 2+i%90)), 0o600) == nil {
					_ = os.Rename(temp, path)
				}
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	await := run(t, s)
	n := 0
	await("some of many edits", func(Set) bool { n++; return n == 5 })
}

// TestRunLatency measures how soon a change is out.
func TestRunLatency(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, path, text("shop", 1))
	s, _ := newSource(t, path, "")
	await := run(t, s)
	await("start", serves("default/shop=1"))
	best := time.Hour
	for i := 2; i < 7; i++ {
		begin := time.Now()
		write(t, path, text("shop", i))
		await("edit", serves(fmt.Sprintf("default/shop=%d", i)))
		best = min(best, time.Since(begin))
	}
	t.Logf("an edit is out after %v", best)
	if best > 200*time.Millisecond {
		t.Errorf("the fastest of five edits took %v", best)
	}
}

// What a version without transports has kept is served as before.
func TestStateWithoutTransport(t *testing.T) {
	dir := t.TempDir()
	path, state := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "state.json")
	write(t, path, text("shop", 1))
	s, _ := newSource(t, path, state)
	if _, err := s.Load(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(state)
	must(t, err)
	before := bytes.Replace(raw, []byte(`"transport":"Lua",`), nil, 1)
	if len(before) == len(raw) {
		t.Fatalf("no transport in %s", raw)
	}
	must(t, os.WriteFile(state, before, 0o600))
	write(t, path, text("shop", 400)) // no percentage
	s, _ = newSource(t, path, state)
	set, err := s.Load()
	must(t, err)
	if got := served(set); got != "default/shop=1" || set.Policies[0].Spec.Transport != policy.TransportLua {
		t.Errorf("serves %s, %+v", got, set.Policies)
	}
}

// What an accepted policy does less than it seems to is told with its line, and
// logged once. What defaults mask is no warning's matter.
func TestWarnings(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	write(t, path, "apiVersion: periscope.dev/v1alpha1\nkind: MirrorPolicy\nmetadata: {name: shop}\nspec:\n  transport: ExtProc\n  mask:\n    queryParameters: [token]\n")
	s, l := newSource(t, path, "")
	set, err := s.Load()
	must(t, err)
	list := set.Warnings()
	if len(list) != 1 || list[0].Path != "spec.mask.queryParameters" || list[0].File != path || list[0].Line != 7 {
		t.Errorf("warnings: %v", list)
	}
	if n := l.Count("does less than it seems to"); n != 1 {
		t.Errorf("%d log lines, want 1:\n%s", n, l)
	}
}
