// Package envoytest runs a real Envoy for tests.
//
// It never stands in for Envoy: without one, the test is skipped with what to
// run, or fails where REQUIRE_REAL is set. Only tests may import it.
package envoytest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Path finds Envoy: $PERISCOPE_ENVOY, the one that make tools installs, or one
// on PATH.
func Path(t testing.TB) string {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	root := filepath.Join(filepath.Dir(file), "..", "..")
	for _, p := range []string{os.Getenv("PERISCOPE_ENVOY"), filepath.Join(root, ".tools", "envoy-1.40.0", "envoy")} {
		if p == "" {
			continue
		}
		if abs, err := filepath.Abs(p); err == nil {
			if _, err := os.Stat(abs); err == nil {
				return abs
			}
		}
	}
	if p, err := exec.LookPath("envoy"); err == nil {
		return p
	}
	if os.Getenv("REQUIRE_REAL") != "" {
		t.Fatal("no Envoy: run make tools")
	}
	t.Skip("no Envoy: run make tools")
	return ""
}

// Envoy is a running Envoy.
type Envoy struct {
	Admin string // host:port of its admin interface
	t     testing.TB
	log   *bytes.Buffer
	cmd   *exec.Cmd
	ended chan struct{}
}

// baseID keeps the shared memory of Envoys on one host apart.
var baseID atomic.Int64

// Start runs Envoy with a bootstrap, of which it sets the admin address, and
// waits until it is live. It ends with the test.
func Start(t testing.TB, bootstrap map[string]any, args ...string) *Envoy {
	t.Helper()
	path := Path(t)
	e := &Envoy{t: t, Admin: FreeAddr(t), log: &bytes.Buffer{}, ended: make(chan struct{})}
	host, port, _ := net.SplitHostPort(e.Admin)
	bootstrap["admin"] = map[string]any{"address": map[string]any{"socket_address": map[string]any{"address": host, "port_value": json.Number(port)}}}
	raw, err := json.Marshal(bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	id := int64(os.Getpid())*16 + baseID.Add(1)
	e.cmd = exec.Command(path, append([]string{"-c", file, "--base-id", fmt.Sprint(id % (1 << 31)), "-l", "warning", "--concurrency", "1"}, args...)...)
	e.cmd.Stdout, e.cmd.Stderr = e.log, e.log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = e.cmd.Wait(); close(e.ended) }()
	t.Cleanup(func() {
		e.Kill()
		if t.Failed() {
			t.Logf("Envoy's log:\n%s", e.log.String())
		}
	})
	Eventually(t, 20*time.Second, "Envoy is live", func() bool {
		select {
		case <-e.ended:
			t.Fatalf("Envoy ended: %s", e.log.String())
		default:
		}
		body, err := e.get("/ready")
		return err == nil && strings.Contains(body, "LIVE")
	})
	return e
}

// Signal sends Envoy a signal, such as SIGSTOP, which has it say nothing.
func (e *Envoy) Signal(sig syscall.Signal) {
	e.t.Helper()
	if err := e.cmd.Process.Signal(sig); err != nil {
		e.t.Fatal(err)
	}
}

// Kill ends Envoy at once, as a crash would.
func (e *Envoy) Kill() {
	_ = e.cmd.Process.Kill()
	<-e.ended
}

func (e *Envoy) get(path string) (string, error) {
	res, err := http.Get("http://" + e.Admin + path)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// Stats lists the statistics below a name that are not 0.
func (e *Envoy) Stats(name string) string {
	e.t.Helper()
	body, err := e.get("/stats?usedonly&filter=^" + name)
	if err != nil {
		e.t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(body) {
		if !strings.HasSuffix(line, ": 0\n") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// Stat gives a counter or gauge, 0 when it does not exist.
func (e *Envoy) Stat(name string) int {
	e.t.Helper()
	body, err := e.get("/stats?filter=^" + name + "$")
	if err != nil {
		e.t.Fatal(err)
	}
	var n int
	if _, v, ok := strings.Cut(body, ": "); ok {
		_, _ = fmt.Sscan(v, &n)
	}
	return n
}

// FreeAddr gives a loopback address with a port that nobody listens on, and that
// is given to nobody else until the test ends: by a name that only one process
// on the host can have (an abstract socket, see unix(7)). It is below the
// kernel's ephemeral range, from which connections that other tests make
// meanwhile take their ports.
func FreeAddr(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(16000 + rand.IntN(16000))
		taken, err := net.Listen("unix", "@periscope-test-port-"+port)
		if err != nil {
			continue
		}
		addr := net.JoinHostPort("127.0.0.1", port)
		l, err := net.Listen("tcp", addr)
		if err != nil {
			taken.Close()
			continue
		}
		l.Close()
		t.Cleanup(func() { taken.Close() })
		return addr
	}
	t.Fatal("no free port from 16000 to 32000")
	return ""
}

// Eventually polls until ok or the deadline.
func Eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
		<-time.After(5 * time.Millisecond)
	}
}
