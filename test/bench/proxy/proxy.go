// Package proxy runs real Envoys, child processes, as gateways under test.
//
// Benchmarks under test/bench may import it; it imports nothing of ours.
package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Pinned is where `make tools` puts the Envoy of this repository.
const Pinned = ".tools/envoy-1.40.0/envoy"

// Find gives the binary to measure: the flag, the environment, the
// repository's own, or the one on PATH, in this order.
func Find(flag string) (string, error) {
	for _, p := range []string{flag, os.Getenv("PERISCOPE_ENVOY")} {
		if p == "" {
			continue
		}
		if _, err := exec.LookPath(p); err != nil {
			return "", fmt.Errorf("envoy %s: %w", p, err)
		}
		return p, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find envoy: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		p := filepath.Join(dir, Pinned)
		if _, err := exec.LookPath(p); err == nil {
			return p, nil
		}
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil || dir == filepath.Dir(dir) {
			break
		}
	}
	p, err := exec.LookPath("envoy")
	if err != nil {
		return "", errors.New("no Envoy found: run `make tools`, or name one with -envoy or PERISCOPE_ENVOY")
	}
	return p, nil
}

// Version asks the binary: "…  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL".
func Version(ctx context.Context, bin string) (string, error) {
	out, err := exec.CommandContext(ctx, bin, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", bin, err)
	}
	_, v, _ := strings.Cut(string(out), "version: ")
	if parts := strings.Split(v, "/"); len(parts) > 1 {
		return parts[1], nil
	}
	return strings.TrimSpace(string(out)), nil
}

// Envoy is a gateway under test, a child process.
type Envoy struct {
	Addr string // of its listener, once it is ready

	cmd   *exec.Cmd
	log   string // file of its output
	admin string // file with the address of its admin interface
	http  *http.Client
	base  string // of its admin interface
}

// Start starts one with the configuration given, in a folder of its own. The
// calling goroutine must be locked to its thread: the child inherits that
// thread's CPUs, and dies with that thread.
func Start(bin, dir string, config []byte) (*Envoy, error) {
	file := filepath.Join(dir, "envoy.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return nil, fmt.Errorf("write envoy configuration: %w", err)
	}
	e := &Envoy{log: filepath.Join(dir, "envoy.log"), admin: filepath.Join(dir, "admin"), http: &http.Client{Timeout: 2 * time.Second}}
	out, err := os.Create(e.log)
	if err != nil {
		return nil, fmt.Errorf("create envoy log: %w", err)
	}
	defer out.Close()
	e.cmd = exec.Command(bin, "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "error", "--admin-address-path", e.admin)
	e.cmd.Stdout, e.cmd.Stderr = out, out
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := e.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	return e, nil
}

// Ready waits until it serves its only listener; if it doesn't, it is stopped.
func (e *Envoy) Ready(ctx context.Context) error {
	err := e.wait(ctx)
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, e.tail())
		e.Stop()
	}
	return err
}

// wait polls until the worker serves the listener.
func (e *Envoy) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if b, err := os.ReadFile(e.admin); err == nil && len(b) > 0 {
			e.base = "http://" + strings.TrimSpace(string(b))
			if body, err := e.get(ctx, "/ready"); err == nil && strings.TrimSpace(string(body)) == "LIVE" {
				return e.findListener(ctx)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("envoy is not ready: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func (e *Envoy) findListener(ctx context.Context) error {
	body, err := e.get(ctx, "/listeners?format=json")
	if err != nil {
		return err
	}
	var reply struct {
		Statuses []struct {
			Address struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &reply); err != nil || len(reply.Statuses) != 1 {
		return fmt.Errorf("envoy's list of listeners is not understood: %q (%v)", body, err)
	}
	a := reply.Statuses[0].Address.Socket
	e.Addr = a.Address + ":" + strconv.Itoa(a.Port)
	return nil
}

func (e *Envoy) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask envoy: %w", err)
	}
	resp, err := e.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask envoy: %w", err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("ask envoy: %w", err)
	}
	return b, nil
}

// Counter is one of Envoy's.
type Counter struct {
	Name  string
	Value int64
}

// Stats gives the counters that were ever used and whose names match.
func (e *Envoy) Stats(ctx context.Context, filter string) ([]Counter, error) {
	b, err := e.get(ctx, "/stats?usedonly&filter="+url.QueryEscape(filter))
	if err != nil {
		return nil, err
	}
	var out []Counter
	for line := range strings.Lines(string(b)) {
		name, v, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if n, err := strconv.ParseInt(v, 10, 64); err == nil {
			out = append(out, Counter{name, n})
		}
	}
	return out, nil
}

// Sum adds up the counters whose names match.
func (e *Envoy) Sum(ctx context.Context, filter string) (int64, error) {
	counters, err := e.Stats(ctx, filter)
	var sum int64
	for _, c := range counters {
		sum += c.Value
	}
	return sum, err
}

// Stop ends the process and reaps it.
func (e *Envoy) Stop() {
	End(e.cmd)
	e.http.CloseIdleConnections()
}

// End ends a process and reaps it.
func End(cmd *exec.Cmd) {
	// Both signals may find it gone already, and its exit code means nothing here.
	_ = cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	_ = cmd.Wait()
}

// tail is the end of its log.
func (e *Envoy) tail() string {
	b, err := os.ReadFile(e.log)
	if err != nil {
		return ""
	}
	return string(b[max(0, len(b)-2000):])
}

// CPUTime is what all threads of a process have had, and wanted, so far.
type CPUTime struct {
	Run  time.Duration
	Wait time.Duration // ready to run, while others had the CPU
}

// Sub is what was added since u.
func (t CPUTime) Sub(u CPUTime) CPUTime { return CPUTime{t.Run - u.Run, t.Wait - u.Wait} }

// CPU reads its times.
func (e *Envoy) CPU() (CPUTime, error) {
	t, err := CPUOf(e.Pid())
	if err != nil {
		return t, fmt.Errorf("read envoy's CPU time: %w", err)
	}
	return t, nil
}

// Pid is the process's.
func (e *Envoy) Pid() int { return e.cmd.Process.Pid }

// CPUOf reads a process's times from the scheduler's statistics.
func CPUOf(pid int) (CPUTime, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		return CPUTime{}, fmt.Errorf("no threads (%v)", err)
	}
	var sum CPUTime
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue // a thread that has just ended
		}
		if err != nil {
			return CPUTime{}, err
		}
		t, err := parseSchedstat(string(b))
		if err != nil {
			return CPUTime{}, err
		}
		sum.Run += t.Run
		sum.Wait += t.Wait
	}
	return sum, nil
}

// parseSchedstat reads "RUN WAIT SLICES", the first two in nanoseconds.
func parseSchedstat(s string) (CPUTime, error) {
	f := strings.Fields(s)
	if len(f) != 3 {
		return CPUTime{}, fmt.Errorf("%q is not a schedstat", s)
	}
	run, err1 := strconv.ParseInt(f[0], 10, 64)
	wait, err2 := strconv.ParseInt(f[1], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return CPUTime{}, err
	}
	return CPUTime{time.Duration(run), time.Duration(wait)}, nil
}

// RSS is the resident set, in bytes: the largest so far, and now.
func (e *Envoy) RSS() (peak, now int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.cmd.Process.Pid))
	if err != nil {
		return 0, 0, fmt.Errorf("read envoy's memory: %w", err)
	}
	for name, to := range map[string]*int64{"VmHWM:": &peak, "VmRSS:": &now} {
		_, v, _ := strings.Cut(string(b), name)
		v, _, _ = strings.Cut(v, " kB")
		kb, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("read envoy's memory: %s %w", name, err)
		}
		*to = kb << 10
	}
	return peak, now, nil
}
