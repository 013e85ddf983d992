package ingest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/ingest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func exchange(n uint64, body []byte) *event.Event {
	return &event.Event{N: n, Policy: "default/default", SharePPM: 1e6, Request: event.Message{
		Headers: []event.Field{{Name: []byte(":method"), Value: []byte("POST")}, {Name: []byte(":path"), Value: []byte("/")}},
		Body:    body, BodyBytes: uint64(len(body)),
	}}
}

func batch(events ...*event.Event) []byte {
	b := event.AppendHeader(nil, &event.Header{Version: event.Version, Gateway: "ns/gw", VM: "vm", Seq: 1})
	for _, e := range events {
		b = event.Append(b, e)
	}
	return b
}

type rig struct {
	ring    *ingest.Ring
	handler *ingest.Handler
	reg     *prometheus.Registry
}

func newRig(t *testing.T, change func(*ingest.Config)) rig {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	cfg := ingest.Config{Ring: ingest.NewRing(4, 1<<20), Authenticator: ingest.Trusting{}, Registerer: reg, MaxBatchBytes: 256 << 10, MaxBodyBytes: 512 << 10}
	if change != nil {
		change(&cfg)
	}
	h, err := ingest.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return rig{cfg.Ring, h, reg}
}

func (r rig) post(body io.Reader, change func(*http.Request)) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodPost, ingest.Path, body)
	req.Header.Set("Content-Type", event.ContentType)
	if change != nil {
		change(req)
	}
	w := httptest.NewRecorder()
	r.handler.ServeHTTP(w, req)
	return w
}

func TestAccepted(t *testing.T) {
	r := newRig(t, nil)
	w := r.post(bytes.NewReader(batch(exchange(1, nil), exchange(2, []byte("x")))), nil)
	if w.Code != http.StatusAccepted || !strings.Contains(w.Body.String(), `"accepted":2`) {
		t.Fatalf("got %d %s", w.Code, w.Body)
	}
	for want := uint64(1); want <= 2; want++ {
		x, ok := r.ring.Pop(t.Context())
		if !ok || x.Event.N != want || x.Gateway != "ns/gw" || x.Header.VM != "vm" {
			t.Errorf("popped %+v, want n=%d", x, want)
		}
		x.Done()
	}
	if n := r.ring.Bytes(); n != 0 {
		t.Errorf("%d bytes are still charged", n)
	}
}

func TestRefused(t *testing.T) {
	good := batch(exchange(1, nil))
	for name, tc := range map[string]struct {
		body   io.Reader
		change func(*http.Request)
		status int
		reason string
	}{
		"truncated":                 {bytes.NewReader(good[:10]), nil, 400, "truncated"},
		"not MessagePack":           {strings.NewReader("<xml/>"), nil, 400, "not_msgpack"},
		"unknown version":           {bytes.NewReader(event.AppendHeader(nil, &event.Header{Version: 77, VM: "x"})), nil, 400, "version"},
		"empty":                     {strings.NewReader(""), nil, 400, "truncated"},
		"content type":              {bytes.NewReader(good), func(r *http.Request) { r.Header.Set("Content-Type", "application/json") }, 415, "request"},
		"no content type":           {bytes.NewReader(good), func(r *http.Request) { r.Header.Del("Content-Type") }, 415, "request"},
		"method":                    {bytes.NewReader(good), func(r *http.Request) { r.Method = http.MethodPut }, 405, "request"},
		"path":                      {bytes.NewReader(good), func(r *http.Request) { r.URL.Path = "/" }, 404, "request"},
		"oversized":                 {bytes.NewReader(make([]byte, 300<<10)), nil, 413, "too_large"},
		"oversized, length unknown": {io.LimitReader(zeros{}, 300<<10), func(r *http.Request) { r.ContentLength = -1 }, 413, "too_large"},
		"shorter than it says":      {bytes.NewReader(good), func(r *http.Request) { r.ContentLength = int64(len(good)) + 1 }, 400, "read"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, nil)
			w := r.post(tc.body, tc.change)
			if w.Code != tc.status {
				t.Errorf("status %d %s, want %d", w.Code, w.Body, tc.status)
			}
			if got := counter(t, r.reg, "periscope_ingest_refused_batches_total", tc.reason); got != 1 {
				t.Errorf("counted %v for %s, want 1", got, tc.reason)
			}
			if r.ring.Len() != 0 || r.ring.Bytes() != 0 {
				t.Error("something was queued")
			}
		})
	}
}

// zeros never ends.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// counter finds a series by its only label's value.
func counter(t *testing.T, reg *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("no series %s{%s}", name, label)
	return 0
}

func TestBadEventKeepsNeighbours(t *testing.T) {
	r := newRig(t, nil)
	body := append(batch(exchange(1, nil)), 0xc6, 0, 0, 0, 1, 0xc0)
	body = event.Append(body, exchange(3, nil))
	w := r.post(bytes.NewReader(body), nil)
	var a struct {
		Accepted int
		Rejected []struct {
			Index  int
			Reason string
		}
	}
	if err := json.Unmarshal(w.Body.Bytes(), &a); err != nil {
		t.Fatal(err)
	}
	if w.Code != 400 || a.Accepted != 2 || len(a.Rejected) != 1 || a.Rejected[0].Index != 1 || a.Rejected[0].Reason != "not_msgpack" {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
	if r.ring.Len() != 2 {
		t.Errorf("%d neighbours queued, want 2", r.ring.Len())
	}
}

func TestFullRingDropsAndCounts(t *testing.T) {
	r := newRig(t, nil)
	var events []*event.Event
	for n := range uint64(6) {
		events = append(events, exchange(n, nil))
	}
	w := r.post(bytes.NewReader(batch(events...)), nil)
	if w.Code != 202 || !strings.Contains(w.Body.String(), `"accepted":4,"dropped":2`) {
		t.Fatalf("got %d %s", w.Code, w.Body)
	}
	if got := counter(t, r.reg, "periscope_ingest_events_total", "dropped_ring_full"); got != 2 {
		t.Errorf("counted %v drops", got)
	}
	if w := r.post(bytes.NewReader(batch(exchange(9, nil))), nil); !strings.Contains(w.Body.String(), `"accepted":0,"dropped":1`) {
		t.Errorf("got %s", w.Body)
	}
	for range 4 {
		x, _ := r.ring.Pop(t.Context())
		x.Done()
	}
	if r.ring.Bytes() != 0 {
		t.Errorf("%d bytes leaked", r.ring.Bytes())
	}
}

type halfGuard struct{ n int }

func (g *halfGuard) Discard(priority bool) (bool, float64) {
	if priority {
		return false, 1
	}
	g.n++
	return g.n%2 == 0, 2
}

// What the guard discards is counted, and what it lets pass stands for more, by
// whichever way it came.
func TestGuardDiscards(t *testing.T) {
	r := newRig(t, func(c *ingest.Config) { c.Guard, c.Ring = new(halfGuard), ingest.NewRing(100, 1<<20) })
	var events []*event.Event
	var values []event.Event
	for n := range uint64(5) {
		e := exchange(n+1, nil)
		if n == 4 {
			e.Class = "Suspicious"
		}
		events, values = append(events, e), append(values, *e)
	}
	w := r.post(bytes.NewReader(batch(events...)), nil)
	if w.Code != 202 || !strings.Contains(w.Body.String(), `"accepted":3,"dropped":0,"discarded":2`) {
		t.Fatalf("got %d %s", w.Code, w.Body)
	}
	r.handler.Queue(&event.Batch{Events: values}, "ns/gw", time.Now(), 100)
	var got []uint64
	for range 6 {
		x, _ := r.ring.Pop(t.Context())
		if want := map[bool]uint64{true: 1_000_000, false: 500_000}[x.Event.Class != ""]; x.Event.SharePPM != want {
			t.Errorf("event %d has share %d, want %d", x.Event.N, x.Event.SharePPM, want)
		}
		got = append(got, x.Event.N)
		x.Done()
	}
	if want := []uint64{1, 3, 5, 1, 3, 5}; !slices.Equal(got, want) {
		t.Errorf("let pass: %v, want %v", got, want)
	}
	if got := counter(t, r.reg, "periscope_ingest_events_total", "discarded"); got != 4 {
		t.Errorf("counted %v discarded", got)
	}
}

func TestRingAge(t *testing.T) {
	ring, start := ingest.NewRing(10, 1<<20), time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	push := func(ms int) { ring.Push(&event.Batch{Events: make([]event.Event, 1)}, "gw", at(ms), 1) }
	age := func(ms, want int) {
		t.Helper()
		if got := ring.Age(at(ms)); got != time.Duration(want)*time.Millisecond {
			t.Errorf("at %d ms: %v, want %d ms", ms, got, want)
		}
	}
	pop := func() {
		x, _ := ring.Pop(t.Context())
		x.Done()
	}
	age(0, 0)
	push(10)
	push(20)
	age(30, 20)
	pop()
	age(30, 20) // since the receipt of the one taken last
	pop()
	age(90, 0)
	push(100)
	age(105, 5)
	age(99, 0) // a clock that went back
	ring.Push(&event.Batch{Events: slices.Repeat([]event.Event{{Class: "Suspicious"}}, 12)}, "gw", at(110), 1)
	if ring.Priority() != 12 || ring.Overflown() != 3 {
		t.Errorf("%d are of a class, %d found no room", ring.Priority(), ring.Overflown())
	}
}

func TestRingBoundsBytes(t *testing.T) {
	r := newRig(t, func(c *ingest.Config) { c.Ring = ingest.NewRing(100, 100<<10) })
	big := batch(exchange(1, make([]byte, 60<<10)))
	r.post(bytes.NewReader(big), nil)
	if w := r.post(bytes.NewReader(big), nil); !strings.Contains(w.Body.String(), `"accepted":0,"dropped":1`) {
		t.Errorf("got %s", w.Body)
	}
	x, _ := r.ring.Pop(t.Context())
	x.Done()
	if w := r.post(bytes.NewReader(big), nil); !strings.Contains(w.Body.String(), `"accepted":1`) {
		t.Errorf("after it was freed: %s", w.Body)
	}
}

func TestBusy(t *testing.T) {
	r := newRig(t, nil) // room for two bodies of the largest size
	done := make(chan int, 2)
	var bodies []*io.PipeWriter
	for range 2 {
		pr, pw := io.Pipe()
		bodies = append(bodies, pw)
		go func() {
			done <- r.post(pr, func(q *http.Request) { q.ContentLength = -1 }).Code
		}()
	}
	for _, body := range bodies { // each is being read once it has lost a byte
		if _, err := body.Write([]byte{0x80}); err != nil {
			t.Fatal(err)
		}
	}
	w := r.post(bytes.NewReader(batch(exchange(1, nil))), nil)
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("got %d, Retry-After %q", w.Code, w.Header().Get("Retry-After"))
	}
	for _, body := range bodies {
		body.Close()
		<-done
	}
}

func TestLedger(t *testing.T) {
	r := newRig(t, nil)
	send := func(vm string, seq, seen, mirrored uint64) {
		t.Helper()
		h := &event.Header{Version: event.Version, Gateway: "ns/gw", VM: vm, Seq: seq, Counters: map[string]uint64{event.CounterSeen: seen, event.CounterMirrored: mirrored, "unheard_of": 9}}
		if w := r.post(bytes.NewReader(event.AppendHeader(nil, h)), nil); w.Code != 202 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	send("a", 1, 10, 5)
	send("a", 4, 30, 9) // 2 and 3 are lost, or late
	send("a", 3, 25, 8) // late: told already
	send("a", 5, 20, 9) // goes back: ignored
	send("b", 7, 1000, 1000)
	send("b", 8, 1001, 1000)
	for series, want := range map[string]float64{"seen": 31, "mirrored": 9} {
		if got := counter(t, r.reg, "periscope_gateway_exchanges_total", series); got != want {
			t.Errorf("%s: %v, want %v", series, got, want)
		}
	}
	families, _ := r.reg.Gather()
	for _, f := range families {
		if f.GetName() == "periscope_gateway_batches_total" && f.GetMetric()[0].GetCounter().GetValue() != 7 {
			t.Errorf("batches sent: %v, want 7", f.GetMetric()[0].GetCounter().GetValue())
		}
	}
}

// The demand of each policy at each worker is the highest that was told;
// plugins from before tell it by what the whole VM has seen.
func TestDemands(t *testing.T) {
	start := time.Now()
	now := start.Add(time.Second)
	r := newRig(t, func(c *ingest.Config) { c.Now = func() time.Time { return now } })
	send := func(h event.Header, events ...*event.Event) {
		t.Helper()
		h.Version, h.Gateway = event.Version, "ns/gw"
		b := event.AppendHeader(nil, &h)
		for _, e := range events {
			b = event.Append(b, e)
		}
		if w := r.post(bytes.NewReader(b), nil); w.Code != 202 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	send(event.Header{VM: "new", Seq: 1, Policy: "ns/b", Eligible: 10, Priority: 1, Mirrored: 3})
	send(event.Header{Pod: "gw-0", VM: "new", Seq: 3, Policy: "ns/a", Eligible: 7})
	send(event.Header{VM: "new", Seq: 5, Policy: "ns/b", Eligible: 30, Priority: 2, Mirrored: 4})
	send(event.Header{VM: "new", Seq: 4, Policy: "ns/b", Eligible: 20, Priority: 1, Mirrored: 3}) // late
	send(event.Header{VM: "new", Seq: 6, Policy: "ns/b", Eligible: 3})                            // goes back
	before := map[string]uint64{event.CounterSeen: 100, event.CounterOff: 20, event.CounterExcluded: 30, event.CounterMirrored: 6, event.CounterSampled: 44}
	send(event.Header{VM: "before", Seq: 9, Counters: before})
	send(event.Header{VM: "before", Seq: 10, Counters: before}, exchange(1, nil))
	send(event.Header{VM: "lies", Seq: 1, Counters: map[string]uint64{event.CounterSeen: 1, event.CounterOff: 2}}, exchange(1, nil))
	want := []load.Demand{
		{Gateway: "ns/gw", VM: "before", Policy: "default/default", Eligible: 50, Mirrored: 6, Heard: time.Second, Received: 1},
		{Gateway: "ns/gw", VM: "lies", Policy: "default/default", Heard: time.Second, Received: 1},
		{Gateway: "ns/gw", VM: "new", Policy: "ns/b", Eligible: 30, Priority: 2, Mirrored: 4, Heard: time.Second},
		{Gateway: "ns/gw-0", VM: "new", Policy: "ns/a", Eligible: 7, Heard: time.Second},
	}
	if got := r.handler.Demands(start); !slices.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
	shares := func(ms int, seq uint64, revision string, since time.Duration) {
		t.Helper()
		now = now.Add(time.Duration(ms) * time.Millisecond)
		send(event.Header{VM: "shared", Seq: seq, Policy: "ns/b", ShareRev: revision})
		got := r.handler.Demands(start)
		if d := got[len(got)-2]; d.VM != "shared" || d.Share != load.ShareNumber(revision) && seq != 3 || d.ShareSince != since {
			t.Errorf("batch %d: %+v", seq, d)
		}
	}
	shares(0, 1, "0000000a", 0)
	shares(100, 2, "0000000b", 1100*time.Millisecond)
	shares(100, 4, "ffffffff", 1200*time.Millisecond)
	shares(10, 3, "0000000b", 1200*time.Millisecond) // late
	shares(100, 5, "ffffffff", 1200*time.Millisecond)
	shares(1000, 6, "0000000a", 0) // after a silence: nobody knows when
	shares(100, 7, "no number", 2410*time.Millisecond)
	// Counters are of the time at which they were sent, whatever waited where.
	timed := func(seq uint64, sentMS, receivedMS int, heard time.Duration) {
		t.Helper()
		now = start.Add(time.Minute + time.Duration(receivedMS)*time.Millisecond)
		send(event.Header{VM: "timed", Seq: seq, Policy: "ns/b", Eligible: seq, SentUS: 1e15 + uint64(sentMS)*1000})
		got := r.handler.Demands(start)
		if d := got[len(got)-2]; d.VM != "timed" || (d.Heard-time.Minute-heard).Abs() > 2*time.Millisecond {
			t.Errorf("batch %d: %+v", seq, d)
		}
	}
	timed(1, 0, 10, 10*time.Millisecond)
	timed(2, 100, 310, 110*time.Millisecond)
	timed(3, 200, 310, 210*time.Millisecond)
	timed(4, 400, 405, 405*time.Millisecond) // it can be that quick
	timed(5, 500, 905, 505*time.Millisecond)
	timed(6, 60_000, 1000, time.Second) // the gateway's clock was set
	timed(7, 60_100, 1300, 1100*time.Millisecond)
	timed(8, 1_000, 1400, 1400*time.Millisecond) // and back
	now = now.Add(10 * time.Minute)
	send(event.Header{Pod: "gw-0", VM: "new", Seq: 7, Policy: "ns/a", Eligible: 8})
	if got := r.handler.Demands(start); len(got) != 2 || got[1].Eligible != 8 {
		t.Errorf("after a silence: %v", got)
	}
	// Room runs out in two ways: of policies, and of workers, which make it.
	const workers = 300
	for i := range workers * 30 {
		send(event.Header{VM: fmt.Sprint("many", i/30), Seq: uint64(i%30) + 1, Policy: fmt.Sprint("ns/", i%30), Eligible: 1})
	}
	if got := r.handler.Demands(start); len(got) != load.MaxDemands { // those of workers that are silent make room
		t.Errorf("%d demands are told", len(got))
	}
	now = now.Add(time.Second)
	for i := range 4096 {
		send(event.Header{VM: fmt.Sprint("more", i), Seq: 1})
	}
	if got := r.handler.Demands(start); len(got) != load.MaxDemands { // nobody is silent: who comes last finds no room
		t.Errorf("%d demands are told while their workers are at work", len(got))
	}
	now = now.Add(20 * time.Second)
	send(event.Header{VM: "more4095", Seq: 2, Policy: "ns/a", Eligible: 9})
	if got := r.handler.Demands(start); len(got) != 1 || got[0].VM != "more4095" {
		t.Errorf("%d demands are told once their workers are silent and others come", len(got))
	}
}

type refusing struct{}

func (refusing) Authenticate(*http.Request, string) (string, error) { return "", errors.New("no") }
func (refusing) String() string                                     { return "refusing" }

// What each build of the plugin told is kept apart, as a gateway moves from one
// to another.
func TestGateways(t *testing.T) {
	r := newRig(t, nil)
	for _, h := range []event.Header{
		{Gateway: "ns/b", VM: "old", Plugin: "1+old", Seq: 1, Counters: map[string]uint64{event.CounterSeen: 10, event.CounterErrors: 1}},
		{Gateway: "ns/b", VM: "old", Plugin: "1+old", Seq: 2, Counters: map[string]uint64{event.CounterSeen: 30, event.CounterErrors: 1}},
		{Gateway: "ns/b", VM: "new", Plugin: "2+new", Seq: 1, Counters: map[string]uint64{event.CounterSeen: 5}},
		{Gateway: "ns/a", VM: "else", Plugin: "1+old", Seq: 9, Counters: map[string]uint64{event.CounterSeen: 500}}, // its first batch here: where it starts from
		{Gateway: "ns/a", VM: "else", Plugin: "1+old", Seq: 10, Counters: map[string]uint64{event.CounterSeen: 501}},
	} {
		h.Version = event.Version
		r.post(bytes.NewReader(event.AppendHeader(nil, &h)), nil)
	}
	var got []string
	for _, g := range r.handler.Gateways() {
		got = append(got, fmt.Sprint(g.Gateway, " ", g.Plugin, " ", g.Seen, " ", g.Errors, " ", !g.Last.IsZero()))
	}
	if want := "[ns/a 1+old 1 0 true ns/b 1+old 30 1 true ns/b 2+new 5 0 true]"; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestAuthentication(t *testing.T) {
	r := newRig(t, func(c *ingest.Config) { c.Authenticator = refusing{} })
	if w := r.post(bytes.NewReader(batch(exchange(1, nil))), nil); w.Code != http.StatusUnauthorized || r.ring.Len() != 0 {
		t.Errorf("got %d", w.Code)
	}
}

func TestListenRefusesNonLoopback(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", "[::]:0", ":0", "example.com:0", "nonsense"} {
		if l, err := ingest.Listen(t.Context(), addr, false); err == nil {
			l.Close()
			t.Errorf("%s was opened", addr)
		}
	}
	l, err := ingest.Listen(t.Context(), "0.0.0.0:0", true)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// Sockets that counters watch are plain TCP, and who counts gets at them.
func TestListenPlainTCP(t *testing.T) {
	wrapped := 0
	l, err := ingest.Listen(t.Context(), "127.0.0.1:0", false, func(l net.Listener) net.Listener {
		wrapped++
		raw, err := l.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.Control(func(fd uintptr) {
			if p, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || p != unix.IPPROTO_TCP {
				t.Errorf("protocol %d, %v", p, err)
			}
		})
		return l
	})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if wrapped != 1 {
		t.Errorf("wrapped %d times", wrapped)
	}
}

// A 100 MiB body over a real connection is refused without being held.
func TestServeHugeBody(t *testing.T) {
	r := newRig(t, nil)
	l, err := ingest.Listen(t.Context(), "127.0.0.1:0", false)
	if err != nil {
		t.Fatal(err)
	}
	server := ingest.Server(r.handler, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: node\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n", ingest.Path, event.ContentType)
	chunk := append(append([]byte("100000\r\n"), make([]byte, 1<<20)...), "\r\n"...)
	for range 100 {
		if _, err := conn.Write(chunk); err != nil {
			break // the node has closed the connection
		}
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 8<<20 {
		t.Errorf("allocated %d MiB for a body that is over the limit of 256 KiB", grown>>20)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	<-served
}

func BenchmarkIngest(b *testing.B) {
	ring := ingest.NewRing(64, 64<<20)
	h, err := ingest.New(ingest.Config{Ring: ring, Authenticator: ingest.Trusting{}})
	if err != nil {
		b.Fatal(err)
	}
	var events []*event.Event
	for n := range uint64(32) {
		events = append(events, exchange(n, make([]byte, 1024)))
	}
	body := batch(events...)
	b.ReportAllocs()
	for b.Loop() {
		req := httptest.NewRequest(http.MethodPost, ingest.Path, bytes.NewReader(body))
		req.Header.Set("Content-Type", event.ContentType)
		h.ServeHTTP(httptest.NewRecorder(), req)
		for range 32 {
			x, _ := ring.Pop(b.Context())
			x.Done()
		}
	}
	b.ReportMetric(float64(b.N)*32/b.Elapsed().Seconds(), "events/s")
}
