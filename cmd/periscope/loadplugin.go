package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// loadTimeout bounds code that never comes to the end of its first run.
const (
	loadTimeout    = 10 * time.Second
	maxLoadedBytes = 256 << 10 // of what Envoy prints
)

// loadPlugin has an Envoy load a build, as a gateway would: syntax, LuaJIT's own
// limits and what runs while it loads are judged by the very thing that will
// run it.
func loadPlugin(ctx context.Context, envoy string, b lua.Build) error {
	dir, err := os.MkdirTemp("", "periscope-load-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	config, err := gateway.LoadBootstrap(b.Code)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "envoy.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, envoy, "--mode", "validate", "-c", file, "--log-level", "error", "--use-dynamic-base-id")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	var printed head
	cmd.Stdout, cmd.Stderr = &printed, &printed
	err = cmd.Run()
	out := printed.kept
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("not loaded by Envoy within %v: it runs for ever", loadTimeout)
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fmt.Errorf("not loaded by Envoy: %s", loadFault(out, err))
}

// loadFault finds Envoy's own reason in what it printed.
func loadFault(out []byte, err error) string {
	const mark = "script load error: "
	for line := range strings.Lines(string(bytes.ToValidUTF8(out, nil))) {
		if _, reason, ok := strings.Cut(strings.TrimSpace(line), mark); ok {
			return mark + reason[:min(len(reason), 1<<10)]
		}
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	last := lines[len(lines)-1]
	return fmt.Sprintf("%v: %s", err, last[:min(len(last), 1<<10)])
}

// head keeps the beginning of what is written: code can print without end.
type head struct{ kept []byte }

func (h *head) Write(b []byte) (int, error) {
	h.kept = append(h.kept, b[:min(len(b), maxLoadedBytes-len(h.kept))]...)
	return len(b), nil
}
