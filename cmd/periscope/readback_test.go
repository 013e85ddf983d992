package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The named file wins over the usual one, which counts only if it is there, and
// is read anew each time.
func TestReadToken(t *testing.T) {
	dir := t.TempDir()
	named, usual := filepath.Join(dir, "named"), filepath.Join(dir, "usual")
	if readToken("", usual) != nil {
		t.Error("a token out of nowhere")
	}
	for file, text := range map[string]string{named: "one\n", usual: "two\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ named, want string }{{named, "one"}, {"", "two"}} {
		if got, err := readToken(c.named, usual)(); err != nil || got != c.want {
			t.Errorf("--istiod-token %q gives %q, %v", c.named, got, err)
		}
	}
	read := readToken("", usual)
	if err := os.WriteFile(usual, []byte("renewed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := read(); err != nil || got != "renewed" {
		t.Errorf("after a renewal %q, %v", got, err)
	}
	if err := os.Remove(usual); err != nil {
		t.Fatal(err)
	}
	if got, err := read(); err == nil || !strings.Contains(err.Error(), "--istiod-token") {
		t.Errorf("without the file %q, %v", got, err)
	}
}
