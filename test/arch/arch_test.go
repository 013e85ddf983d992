// Package arch keeps the table of docs/ARCHITECTURE.md: which package may
// import which of ours.
package arch

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/periscope-mesh/periscope/"

// anything marks packages without a rule: commands and tests.
var anything = []string{"*"}

// allowed is what each package may import of ours.
var allowed = map[string][]string{
	"policy":           {},
	"atomicfile":       {},
	"policy/source":    {"policy", "atomicfile"},
	"mirror":           {"policy"},
	"mirror/lua":       {},
	"mirror/event":     {},
	"mirror/mask":      {"policy"},
	"mirror/load":      {},
	"mirror/share":     {"mirror/load"},
	"mirror/topology":  {"mirror", "policy"},
	"mirror/rollout":   {},
	"xds":              {"mirror"},
	"xds/gateway":      {"xds", "mirror", "mirror/event", "policy"},
	"xds/istiod":       {},
	"xds/mcp":          {"xds", "xds/gateway", "mirror", "policy"},
	"xds/node":         {"xds", "xds/node/nodev1", "mirror", "policy"},
	"xds/node/nodev1":  {},
	"xds/debug":        {"xds", "localweb"},
	"xds/orca":         {"mirror/load", "localweb"},
	"xds/certs":        {},
	"localweb":         {},
	"node/policy":      {"xds/node/nodev1", "atomicfile"},
	"node/ingest":      {"mirror/event", "mirror/load"},
	"node/accesslog":   {"mirror/event"},
	"node/extproc":     {"mirror", "mirror/load", "mirror/event", "mirror/mask", "policy"},
	"node/pressure":    {"mirror/load"},
	"node/report":      {"xds/node/nodev1"},
	"node/orca":        {"mirror/load"},
	"node/sockstat":    {"node/cgroup"},
	"node/cgroup":      {},
	"node/decode":      {"mirror/event"},
	"node/detect":      {"mirror/event", "node/decode", "node/attack"},
	"node/attack":      {},
	"node/store":       {"node/attack"},
	"node/console":     {"node/attack", "localweb"},
	"cmd/periscope":    anything,
	"test/arch":        anything,
	"test/bench/*":     anything,
	"test/browsertest": anything,
	"test/conformance": anything,
	"test/e2e":         anything,
	"test/cgrouptest":  nil,
	"test/netnstest":   anything,
	"test/kubetest":    anything,
	"test/logtest":     {},
	"test/envoytest":   anything,
	"test/xdstest":     {"xds"},
}

type listed struct {
	ImportPath string
	Imports    []string
	Doc        string
}

func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Doc", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []listed
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var p listed
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

func rule(path string) ([]string, bool) {
	if r, ok := allowed[path]; ok {
		return r, true
	}
	for pattern, r := range allowed {
		if prefix, ok := strings.CutSuffix(pattern, "/*"); ok && strings.HasPrefix(path, prefix+"/") {
			return r, true
		}
	}
	return nil, false
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		path := strings.TrimPrefix(p.ImportPath, module)
		may, ok := rule(path)
		if !ok {
			t.Errorf("%s has no rule: add it here and to the table in docs/ARCHITECTURE.md", path)
			continue
		}
		for _, i := range p.Imports {
			dep, ours := strings.CutPrefix(i, module)
			if ours && !slices.Contains(may, dep) && !slices.Equal(may, anything) {
				t.Errorf("%s may not import %s", path, dep)
			}
		}
		if p.Doc == "" && !strings.HasPrefix(path, "test/") {
			t.Errorf("%s has no package comment", path)
		}
	}
}

// The table in the docs names every package of the rule.
func TestDocumented(t *testing.T) {
	raw, err := os.ReadFile("../../docs/ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	for path := range allowed {
		if !regexp.MustCompile("(?m)^\\| `" + regexp.QuoteMeta(strings.TrimSuffix(path, "/*")) + "` ").Match(raw) {
			t.Errorf("docs/ARCHITECTURE.md has no row for %s", path)
		}
	}
}

func TestNoInit(t *testing.T) {
	init := regexp.MustCompile(`(?m)^func init\(\)`)
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, ".pb.go") {
			return err
		}
		src, err := os.ReadFile(path)
		if init.Match(src) {
			t.Errorf("%s has a func init()", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// modernc.org/sqlite works with the very libc that its go.mod names.
func TestSQLiteLibc(t *testing.T) {
	version := func(dir string, args ...string) string {
		t.Helper()
		cmd := exec.Command("go", append([]string{"list", "-m", "-f", "{{.Version}} {{.GoMod}}"}, args...)...)
		cmd.Dir = dir
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	_, gomod, _ := strings.Cut(version("../..", "modernc.org/sqlite"), " ")
	libc, _, _ := strings.Cut(version("../..", "modernc.org/libc"), " ")
	raw, err := os.ReadFile(gomod)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(raw), "modernc.org/libc "+libc+"\n") {
		t.Errorf("modernc.org/libc is %s, not the version in %s: change them together", libc, gomod)
	}
}
