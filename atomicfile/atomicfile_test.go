package atomicfile_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/periscope-mesh/periscope/atomicfile"
)

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "state")
	for _, content := range []string{"one", "", "three, and longer"} {
		// What a crash left behind is no hindrance.
		if content != "one" {
			if err := os.WriteFile(filepath.Join(dir, ".state.new"), []byte("torn"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := atomicfile.Replace(name, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != content {
			t.Errorf("read %q, %v, want %q", got, err, content)
		}
	}
	info, err := os.Stat(name)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	for what, name := range map[string]string{"a directory": dir, "a file in no directory": filepath.Join(dir, "gone", "state")} {
		if err := atomicfile.Replace(name, nil); err == nil {
			t.Errorf("%s was replaced", what)
		}
	}
}
