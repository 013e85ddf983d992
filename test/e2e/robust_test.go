package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/test/envoytest"
)

// load is a steady stream of users' requests.
type load struct {
	once sync.Once
	stop chan struct{}
	wg   sync.WaitGroup
	mu   sync.Mutex
	took []time.Duration
	errs []error
}

// startLoad sends rate requests a second, evenly, from so many clients.
func startLoad(url string, rate, clients int) *load {
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	return startLoadOf(rate, clients, func() error { return request(transport, url) })
}

// startLoadOf does so by another way of asking.
func startLoadOf(rate, clients int, ask func() error) *load {
	l := &load{stop: make(chan struct{})}
	due := make(chan time.Time, rate)
	l.wg.Go(func() {
		defer close(due)
		tick := time.NewTicker(time.Second / time.Duration(rate))
		defer tick.Stop()
		for {
			select {
			case t := <-tick.C:
				due <- t
			case <-l.stop:
				return
			}
		}
	})
	for range clients {
		l.wg.Go(func() {
			for t := range due {
				l.add(t, ask())
			}
		})
	}
	return l
}

func request(transport http.RoundTripper, url string) error {
	req, _ := http.NewRequest("GET", url, nil)
	res, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	return nil
}

func (l *load) add(due time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.took = append(l.took, time.Since(due))
	if err != nil {
		l.errs = append(l.errs, err)
	}
}

// cut takes what was measured since the last cut.
func (l *load) cut() (took []time.Duration, errs []error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	took, errs = l.took, l.errs
	l.took, l.errs = nil, nil
	return took, errs
}

func (l *load) end() {
	l.once.Do(func() { close(l.stop) })
	l.wg.Wait()
}

func p99(took []time.Duration) time.Duration {
	slices.Sort(took)
	return took[len(took)*99/100]
}

// The node is killed and comes back under steady load: no user notices, and
// analysis resumes without anything being done to the gateway.
func TestNodeKilledUnderLoad(t *testing.T) {
	r := newRig(t)
	r.up(t, "--node", r.nodeListen)
	node := start(t, r.nodeArgs()...)
	node.waitFor("node started")
	view := start(t, "console", "--console", r.console, "--data", r.dataDir)
	view.waitFor("console started")

	l := startLoad("http://"+r.http+"/api/items", 200, 8)
	defer l.end()
	accepted := `periscope_ingest_events_total{outcome="accepted"}`
	envoytest.Eventually(t, 5*time.Second, "the node gets traffic", func() bool { return metric(t, r.nodeAdmin, accepted) > 50 })
	l.cut()
	time.Sleep(3 * time.Second) // a measurement's length, not a wait
	alive, errs := l.cut()
	if len(errs) > 0 {
		t.Fatalf("with the node alive: %d errors, such as %v", len(errs), errs[0])
	}

	node.stop(syscall.SIGKILL)
	time.Sleep(3 * time.Second) // likewise
	dead, errs := l.cut()
	if len(errs) > 0 {
		t.Errorf("with the node dead: %d errors, such as %v", len(errs), errs[0])
	}
	t.Logf("p99 alive %v (%d requests), dead %v (%d requests)", p99(alive), len(alive), p99(dead), len(dead))
	// Dead is cheaper than alive; the margin is for a noisy machine.
	if p99(dead) > 2*p99(alive)+10*time.Millisecond {
		t.Errorf("p99 with the node dead %v, alive %v", p99(dead), p99(alive))
	}

	again := start(t, r.nodeArgs()...)
	again.waitFor("node started")
	envoytest.Eventually(t, 5*time.Second, "analysis resumes", func() bool { return metric(t, r.nodeAdmin, accepted) > 50 })
	get(t, "http://"+r.http+"/etc/passwd")
	r.attack(t, "an attack after the restart", func(a attackRow) bool { return a.Path == "/etc/passwd" })
	if _, errs := l.cut(); len(errs) > 0 {
		t.Errorf("over the restart: %d errors, such as %v", len(errs), errs[0])
	}
}

// mirrored is how many exchanges the node has taken.
func (r *rig) mirrored(t *testing.T) float64 {
	t.Helper()
	return metric(t, r.nodeAdmin, `periscope_ingest_events_total{outcome="accepted"}`)
}

// effect sends probes until one is mirrored, or is not, as wanted. It gives the
// time after which that one was sent.
func (r *rig) effect(t *testing.T, want bool, probe func()) time.Duration {
	t.Helper()
	start := time.Now()
	for time.Since(start) < 10*time.Second {
		sent := time.Since(start)
		before := r.mirrored(t)
		probe()
		arrived := false
		for wait := time.Now(); time.Since(wait) < 150*time.Millisecond && !arrived; {
			arrived = r.mirrored(t) > before
		}
		if arrived == want {
			return sent
		}
	}
	t.Fatalf("no effect within 10 s")
	return 0
}

// A policy edit takes effect within a second, on a connection that stays open.
func TestPolicyEdit(t *testing.T) {
	r := newRig(t)
	file := filepath.Join(t.TempDir(), "policy.yaml")
	write := func(spec string) {
		t.Helper()
		doc := "apiVersion: periscope.dev/v1alpha1\nkind: MirrorPolicy\nmetadata: {name: shop}\nspec:\n" + spec
		if err := os.WriteFile(file, []byte(doc), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("  sampling: {percent: 100}\n")
	r.up(t, "--policy", file)

	// One connection for all of it: its end would be an error.
	conn, err := net.Dial("tcp", r.http)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	n := 0
	probe := func(path string) string { // a new endpoint each time, so that each is an attack of its own
		t.Helper()
		n++
		full := fmt.Sprintf("%s/probe%c%c/etc/passwd", path, 'a'+n/26%26, 'a'+n%26)
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", full, r.http)
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 4096)
		if k, err := conn.Read(buf); err != nil || !strings.HasPrefix(string(buf[:k]), "HTTP/1.1 404") {
			t.Fatalf("on the connection that was open all the time: %q %v", buf[:k], err)
		}
		return full
	}
	probe("/start")
	r.attack(t, "an attack at 100 %", func(a attackRow) bool { return strings.HasPrefix(a.Path, "/start") })
	for _, step := range []struct {
		name, spec, path string
		mirrored         bool
	}{
		{"sampling 0", "  sampling: {percent: 0}\n", "/zero", false},
		{"sampling 100", "  sampling: {percent: 100}\n", "/hundred", true},
		{"path excluded", "  exclude: [{paths: [{type: PathPrefix, value: /internal}]}]\n", "/internal", false},
		{"other paths are not", "  exclude: [{paths: [{type: PathPrefix, value: /internal}]}]\n", "/public", true},
		{"mode off", "  mode: \"Off\"\n", "/off", false},
		{"mode monitor", "  mode: Monitor\n", "/monitor", true},
	} {
		write(step.spec)
		took := r.effect(t, step.mirrored, func() { probe(step.path) })
		t.Logf("%s: in effect after %v", step.name, took.Round(time.Millisecond))
		if took > time.Second {
			t.Errorf("%s: took %v", step.name, took)
		}
	}
	// A bad edit changes nothing, is told once, and is shown.
	write("  sampling: {percent: 250}\n  mdoe: \"Off\"\n")
	envoytest.Eventually(t, 2*time.Second, "the fault is on /debug/policyz", func() bool {
		_, body := get(t, "http://"+r.debug+"/debug/policyz")
		return strings.Contains(body, "spec.sampling.percent") && strings.Contains(body, "mdoe")
	})
	before := r.mirrored(t)
	probe("/after")
	envoytest.Eventually(t, time.Second, "the last accepted policy goes on", func() bool { return r.mirrored(t) > before })
	if c := strings.Count(r.output(), "spec.sampling.percent"); c != 1 {
		t.Errorf("the fault was logged %d times", c)
	}
}

// A faulty policy stops up and check, but never control: it serves the last
// accepted plan, also after a restart.
func TestBadPolicy(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(bad, []byte("apiVersion: periscope.dev/v1alpha1\nkind: MirrorPolicy\nmetadata: {name: x}\nspec:\n  sampling: {percent: 101}\n  mode: Maybe\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", bad}, {"up", "--envoy", envoytest.Path(t), "--data", dir, "--policy", bad, "--http", envoytest.FreeAddr(t), "--https", "", "--console", envoytest.FreeAddr(t),
		"--xds", envoytest.FreeAddr(t), "--debug", envoytest.FreeAddr(t), "--node-listen", envoytest.FreeAddr(t), "--node-admin", envoytest.FreeAddr(t), "--node-orca", envoytest.FreeAddr(t)}} {
		p := start(t, args...)
		<-p.done
		out := p.output()
		if p.code != 1 || !strings.Contains(out, "bad.yaml:5") || !strings.Contains(out, "spec.sampling.percent") || !strings.Contains(out, "bad.yaml:6") || !strings.Contains(out, "spec.mode") {
			t.Errorf("%s: code %d\n%s", args[0], p.code, out)
		}
	}
	good := strings.Replace(mustRead(t, bad), "101", "50", 1)
	good = strings.Replace(good, "Maybe", "Monitor", 1)
	mustWrite(t, bad, good)
	xds, debug := envoytest.FreeAddr(t), envoytest.FreeAddr(t)
	args := []string{"control", "--upstream", "http://127.0.0.1:9", "--data", dir, "--policy", bad, "--xds", xds, "--debug", debug}
	first := start(t, args...)
	first.waitFor("control plane started")
	first.stop(syscall.SIGTERM)
	mustWrite(t, bad, "spec: [")
	second := start(t, args...)
	second.waitFor("control plane started")
	_, policies := get(t, "http://"+debug+"/debug/configz")
	_, status := get(t, "http://"+debug+"/debug/policyz")
	if !strings.Contains(policies, `"percent":50`) || !strings.Contains(status, "Refused") || !strings.Contains(status, "bad.yaml") {
		t.Errorf("after the restart: %s\n%s", policies, status)
	}
	if code, _ := get(t, "http://"+debug+"/ready"); code != 200 {
		t.Errorf("not ready: %d", code)
	}
}

func mustRead(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func mustWrite(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Whatever arrives at the node's port: it lives, its memory stays bounded, and
// it goes on detecting.
func TestHostileInput(t *testing.T) {
	r := newRig(t).up(t)
	url := "http://" + r.nodeListen + "/v1/events"
	post := func(body io.Reader) int {
		res, err := http.Post(url, event.ContentType, body)
		if err != nil {
			return 0 // refused by a closed connection
		}
		defer res.Body.Close()
		_, _ = io.Copy(io.Discard, res.Body)
		return res.StatusCode
	}
	head := event.AppendHeader(nil, &event.Header{Version: event.Version, Gateway: "g", VM: "v", Seq: 1})
	many := event.Event{N: 1, Policy: "default/default", SharePPM: 1e6, Request: event.Message{Headers: []event.Field{{Name: []byte(":method"), Value: []byte("GET")}, {Name: []byte(":path"), Value: []byte("/")}}}}
	for i := range 10_000 {
		many.Request.Headers = append(many.Request.Headers, event.Field{Name: fmt.Appendf(nil, "x-%d", i), Value: []byte("\xff\x00\xfe invalid")})
	}
	if code := post(bytes.NewReader(event.Append(head, &many))); code != http.StatusAccepted {
		t.Errorf("10,000 headers: %d", code)
	}
	if code := post(io.LimitReader(noise{}, 100<<20)); code != http.StatusRequestEntityTooLarge && code != 0 {
		t.Errorf("100 MiB: %d", code)
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for range 500 {
		b := make([]byte, rng.IntN(2000))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		framed := rng.IntN(2) == 0
		if framed {
			frame := binary.BigEndian.AppendUint32(append(bytes.Clone(head), 0xc6), uint32(len(b)))
			b = append(frame, b...)
		}
		// A node that is late after all this may discard an event unread.
		if code := post(bytes.NewReader(b)); code != http.StatusBadRequest && !(framed && code == http.StatusAccepted) {
			t.Fatalf("garbage is answered with %d: %x", code, b)
		}
	}
	// Through the gateway: binary bytes and a large body.
	send(t, http.DefaultClient, "POST", "http://"+r.http+"/up", "application/octet-stream", strings.Repeat("\x00\xff\xfe", 1<<20), map[string]string{"X-Bytes": "\xff\xfe"})
	// A node that is late may discard some: it is soon in time again.
	envoytest.Eventually(t, 5*time.Second, "an attack after all that is in the list of attacks", func() bool {
		get(t, "http://"+r.http+"/etc/passwd")
		time.Sleep(50 * time.Millisecond) // between two attacks
		return slices.ContainsFunc(r.attacks(t), func(a attackRow) bool { return a.Path == "/etc/passwd" })
	})
	if rss := residentMiB(t, r.cmd.Process.Pid); rss > 600 {
		t.Errorf("the process holds %d MiB", rss)
	} else {
		t.Logf("resident at most: %d MiB", rss)
	}
}

// noise never ends.
type noise struct{}

func (noise) Read(p []byte) (int, error) { return len(p), nil }

// residentMiB is the most memory that a process has had.
func residentMiB(t *testing.T, pid int) int {
	t.Helper()
	for line := range strings.Lines(mustRead(t, fmt.Sprintf("/proc/%d/status", pid))) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kib int
			_, _ = fmt.Sscan(v, &kib)
			return kib >> 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}
