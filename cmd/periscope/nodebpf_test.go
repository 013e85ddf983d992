package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Programs are loaded, shown and removed, on the real kernel.
func TestNodeBPF(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0755"); err != nil {
		if os.Getenv("REQUIRE_REAL") != "" {
			t.Fatalf("needs root: mount a BPF file system: %v", err)
		}
		t.Skipf("needs root: mount a BPF file system: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	pin := filepath.Join(dir, "node")
	for _, c := range []struct {
		args []string
		code int
		want []string // of stdout if the code is 0
	}{
		{[]string{"status"}, 1, []string{"nothing is loaded in " + pin}},
		{[]string{"load", "--port", port}, 0, []string{"version:  dev", "ports:    [" + port + "]", "listening 1, accepted 0", "readable: yes"}},
		{[]string{"status"}, 0, []string{"listening 1, accepted 0"}},
		{[]string{"unload"}, 0, []string{"removed from " + pin}},
		{[]string{"unload"}, 1, []string{"nothing is loaded in " + pin}},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), append(append([]string{"node", "bpf"}, c.args...), "--pin", pin), env{stdout: &stdout, stderr: &stderr, getenv: os.Getenv})
		out := stdout.String()
		if code != 0 {
			out = stderr.String()
		}
		if code != c.code {
			t.Fatalf("%v: %d\n%s", c.args, code, stderr.String())
		}
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%v: %q not in\n%s", c.args, want, out)
			}
		}
	}
}
