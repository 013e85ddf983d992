package source

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRestart starts a source anew, with its state file, after the policies
// went bad.
func TestRestart(t *testing.T) {
	tests := map[string]struct {
		change func(t *testing.T, path string)
		served string
		faults int
	}{
		"unchanged":   {func(t *testing.T, path string) {}, "default/api=2 default/shop=1", 0},
		"one bad":     {func(t *testing.T, path string) { write(t, path, text("shop", 500)+"---\n"+text("api", 3)) }, "default/api=3 default/shop=1", 1},
		"one removed": {func(t *testing.T, path string) { write(t, path, text("api", 3)) }, "default/api=3", 0},
		"no YAML":     {func(t *testing.T, path string) { write(t, path, "{") }, "default/api=2 default/shop=1", 1},
		"empty":       {func(t *testing.T, path string) { write(t, path, "") }, "default/api=2 default/shop=1", 1},
		"missing":     {func(t *testing.T, path string) { must(t, os.Remove(path)) }, "default/api=2 default/shop=1", 1},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path, state := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "state", "policies.json")
			write(t, path, text("shop", 1)+"---\n"+text("api", 2))
			s, _ := newSource(t, path, state)
			before := load(t, s)
			info, err := os.Stat(state)
			must(t, err)
			if info.Mode() != 0o600 {
				t.Errorf("state file has mode %v", info.Mode())
			}
			tt.change(t, path)
			s, _ = newSource(t, path, state)
			after := load(t, s)
			if served(after) != tt.served || len(after.Refused()) != tt.faults {
				t.Errorf("serves %q with faults %v, want %q and %d", served(after), after.Refused(), tt.served, tt.faults)
			}
			if name == "unchanged" {
				if diff := cmp.Diff(before, after); diff != "" {
					t.Errorf("set differs (-before +after):\n%s", diff)
				}
				again, err := os.Stat(state)
				must(t, err)
				if !os.SameFile(info, again) {
					t.Error("state file written although nothing changed")
				}
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "state", ".*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// TestRestartDirectory tells a file that is gone from one that is faulty,
// however the path is spelt.
func TestRestartDirectory(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(t.TempDir(), "state.json")
	for _, name := range []string{"a", "b", "c"} {
		write(t, filepath.Join(dir, name+".yaml"), text(name, 1))
	}
	s, _ := newSource(t, dir, state)
	load(t, s)
	must(t, os.Remove(filepath.Join(dir, "a.yaml")))
	write(t, filepath.Join(dir, "b.yaml"), "{")
	t.Chdir(dir)
	s, _ = newSource(t, ".", state)
	if set := load(t, s); served(set) != "default/b=1 default/c=1" {
		t.Errorf("serves %q", served(set))
	}
}

// TestUnusableState starts with state files that are of no use.
func TestUnusableState(t *testing.T) {
	dir := t.TempDir()
	path, state := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "state.json")
	write(t, path, text("shop", 1))
	s, _ := newSource(t, path, state)
	load(t, s)
	good, err := os.ReadFile(state)
	must(t, err)
	write(t, path, "{")
	tests := map[string]func(t *testing.T){
		"no JSON":         func(t *testing.T) { write(t, state, string(good[:len(good)/2])) },
		"another version": func(t *testing.T) { write(t, state, strings.Replace(string(good), `"version":1`, `"version":9`, 1)) },
		"another path": func(t *testing.T) {
			write(t, state, strings.Replace(string(good), `"source":"`, `"source":"/other`, 1))
		},
		"bad policy":  func(t *testing.T) { write(t, state, strings.Replace(string(good), `"percent":1`, `"percent":101`, 1)) },
		"a directory": func(t *testing.T) { must(t, os.Mkdir(state, 0o700)) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			must(t, os.RemoveAll(state))
			change(t)
			s, l := newSource(t, path, state)
			set := load(t, s)
			if len(set.Policies) > 0 || len(set.Refused()) != 1 {
				t.Errorf("serves %q with faults %v", served(set), set.Refused())
			}
			if n := l.Count(`doing="read policy state"`); n != 1 {
				t.Errorf("told %d times, want once:\n%s", n, l)
			}
		})
	}
}

// TestStateLater writes the state file as soon as that is possible.
func TestStateLater(t *testing.T) {
	dir := t.TempDir()
	path, state := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "sub", "state.json")
	write(t, path, text("shop", 1))
	write(t, filepath.Join(dir, "sub"), "in the way")
	s, l := newSource(t, path, state)
	s.reread = 10 * time.Millisecond
	await := run(t, s)
	await("start", serves("default/shop=1"))
	must(t, os.Remove(filepath.Join(dir, "sub")))
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := os.Stat(state); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no state file:\n%s", l)
		}
	}
	if n := l.Count(`doing="write policy state"`); n != 1 {
		t.Errorf("told %d times, want once", n)
	}
}
