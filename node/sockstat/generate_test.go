package sockstat

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The committed programs are what their source compiles to, byte by byte.
func TestGenerated(t *testing.T) {
	if out, err := exec.Command("../../hack/tools/clang.sh", "-n").CombinedOutput(); err != nil {
		if os.Getenv("REQUIRE_REAL") != "" {
			t.Fatalf("%s", out)
		}
		t.Skipf("%s", out)
	}
	src, err := os.ReadFile("generate.go")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(src), "//go:generate go ")
	var args []string
	for _, m := range regexp.MustCompile(`"([^"]*)"|(\S+)`).FindAllStringSubmatch(line, -1) {
		args = append(args, m[1]+m[2])
	}
	i := len(args) - 2 // name and source
	dir := t.TempDir()
	args = append(args[:i:i], append([]string{"-output-dir", dir, "-go-package", "sockstat"}, args[i:]...)...)
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	for _, name := range []string{"sockets_bpfel.o", "sockets_bpfel.go"} {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what bpf/ compiles to: make generate-bpf (%v)", name, err)
		}
	}
}
