package proxy

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestEnvoyThatDoesNotStart(t *testing.T) {
	bin, err := Find("")
	if err != nil && os.Getenv("REQUIRE_REAL") == "1" {
		t.Fatal(err)
	}
	if err != nil {
		t.Skip(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	e, err := Start(bin, t.TempDir(), []byte(`{"no_such_field": 1}`))
	if err == nil {
		err = e.Ready(ctx)
	}
	if err == nil || !strings.Contains(err.Error(), "no_such_field") {
		t.Errorf("got %v, want the reason from Envoy's log", err)
	}
}

func TestFindEnvoy(t *testing.T) {
	t.Chdir(t.TempDir())
	t.Setenv("PERISCOPE_ENVOY", "")
	t.Setenv("PATH", t.TempDir())
	if _, err := Find(""); err == nil || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("got %v, want a remedy", err)
	}
	if _, err := Find("./nothing"); err == nil {
		t.Error("a flag that names nothing is accepted")
	}
	for _, p := range []string{"x/envoy", Pinned} {
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("go.mod", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir("x") // below the repository's root
	if got, err := Find(""); err != nil || !strings.HasSuffix(got, Pinned) {
		t.Errorf("got %q, %v; want the repository's own", got, err)
	}
	t.Setenv("PERISCOPE_ENVOY", "./envoy")
	if got, err := Find(""); err != nil || got != "./envoy" {
		t.Errorf("got %q, %v; want the environment's", got, err)
	}
}

func TestParseSchedstat(t *testing.T) {
	got, err := parseSchedstat("123 45 6\n")
	if want := (CPUTime{123, 45}); err != nil || got != want {
		t.Errorf("got %v, %v", got, err)
	}
	for _, s := range []string{"", "1 2", "1 x 3"} {
		if _, err := parseSchedstat(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}
