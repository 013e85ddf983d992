package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/accesslog"
	"github.com/periscope-mesh/periscope/node/extproc"
	"github.com/periscope-mesh/periscope/node/ingest"
)

// caseHeader names the exchange in what is sent, so that its event is told.
const caseHeader = "x-case"

// node is the real endpoint and ring; its events are kept by exchange.
type node struct {
	addr string

	mu      sync.Mutex
	changed *sync.Cond
	events  map[string][]arrived
	known   map[string]bool // exchanges that were sent
	vms     map[string]*vm

	registry *prometheus.Registry
	settings map[string][]byte // of the gateway, by revision
	newest   string
}

type arrived struct {
	event.Event
	at time.Time
}

type vm struct {
	seqs     map[uint64]bool
	last     uint64
	counters map[string]uint64
}

func newNode(t testing.TB) *node {
	t.Helper()
	n := &node{events: map[string][]arrived{}, known: map[string]bool{}, vms: map[string]*vm{}, registry: prometheus.NewRegistry(), settings: map[string][]byte{}}
	n.changed = sync.NewCond(&n.mu)
	ring := ingest.NewRing(1<<16, 1<<30)
	log, err := accesslog.New(accesslog.Config{Ring: ring, Authenticator: ingest.Trusting{}, Registerer: n.registry})
	if err != nil {
		t.Fatal(err)
	}
	h, err := ingest.New(ingest.Config{Ring: ring, Joiner: log, Authenticator: ingest.Trusting{}, Registerer: n.registry, MaxBodyBytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	streams, err := extproc.New(extproc.Config{
		Settings: n.settingsOf, Queue: func(b *event.Batch, g string, at time.Time, size int) { h.Queue(b, g, at, size) },
		Authenticate: ingest.Trusting{}.Authenticate, Registerer: n.registry,
	})
	if err != nil {
		t.Fatal(err)
	}
	watched := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case accesslog.Path:
			log.ServeHTTP(w, r)
			return
		case extproc.Path:
			streams.ServeHTTP(w, r)
			return
		}
		if r.Header.Get("x-forwarded-for") != "" || r.Header.Get("traceparent") != "" {
			t.Errorf("the mirror call carries the user's headers: %v", r.Header)
		}
		rec := &statusRecorder{ResponseWriter: w}
		h.ServeHTTP(rec, r)
		if rec.status != http.StatusAccepted {
			t.Errorf("the node refused a batch: %d %s", rec.status, rec.body)
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.addr = l.Addr().String()
	s := ingest.Server(watched, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	wait.Go(func() { _ = s.Serve(l) })
	wait.Go(func() {
		for {
			x, ok := ring.Pop(ctx)
			if !ok {
				return
			}
			n.take(x)
			x.Done()
		}
	})
	t.Cleanup(func() { _ = s.Close(); cancel(); wait.Wait() })
	return n
}

type statusRecorder struct {
	http.ResponseWriter
	status int
	body   []byte
}

func (s *statusRecorder) WriteHeader(status int) {
	s.status = status
	s.ResponseWriter.WriteHeader(status)
}
func (s *statusRecorder) Write(b []byte) (int, error) {
	s.body = append(s.body, b...)
	return s.ResponseWriter.Write(b)
}

// learn gives the node the settings of its gateway.
func (n *node) learn(t testing.TB, s mirror.Settings) {
	t.Helper()
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.newest = s.Revision()
	n.settings[n.newest] = raw
}

// settingsOf gives the gateway's settings of a revision, or the newest.
func (n *node) settingsOf(_, revision string) (string, []byte, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.settings[revision] == nil {
		revision = n.newest
	}
	return revision, n.settings[revision], revision != ""
}

func (n *node) take(x ingest.Exchange) {
	if x.Event.Flags&event.FlagLogOnly != 0 {
		return // of what the plugin never saw: node/accesslog tests these
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if x.Header.Plugin != extproc.Plugin {
		v := n.vms[x.Header.VM]
		if v == nil {
			v = &vm{seqs: map[uint64]bool{}}
			n.vms[x.Header.VM] = v
		}
		v.seqs[x.Header.Seq] = true
		if x.Header.Seq >= v.last {
			v.last, v.counters = x.Header.Seq, x.Header.Counters
		}
	}
	id := ""
	for _, f := range x.Event.Request.Headers {
		if string(f.Name) == caseHeader {
			id = string(f.Value)
		}
	}
	n.events[id] = append(n.events[id], arrived{*x.Event, x.Received})
	n.changed.Broadcast()
}

// expect tells that an exchange is sent.
func (n *node) expect(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.known[id] = true
}

// of waits for so many events of an exchange, and gives those that there are.
func (n *node) of(id string, count int, within time.Duration) []arrived {
	deadline := time.AfterFunc(within, func() { n.mu.Lock(); defer n.mu.Unlock(); n.changed.Broadcast() })
	defer deadline.Stop()
	end := time.Now().Add(within)
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(n.events[id]) < count && time.Now().Before(end) {
		n.changed.Wait()
	}
	return n.events[id]
}

// missing are the exchanges without an event among ids, once so much time has
// passed or none is missing.
func (n *node) missing(ids []string, within time.Duration) []string {
	end := time.Now().Add(within)
	var out []string
	for _, id := range ids {
		if len(n.of(id, 1, time.Until(end))) == 0 {
			out = append(out, id)
		}
	}
	return out
}

func (n *node) counters() map[string]map[string]uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := map[string]map[string]uint64{}
	for name, v := range n.vms {
		out[name] = maps.Clone(v.counters)
	}
	return out
}

// streams counts those that came by ext_proc, by outcome.
func (n *node) streams() map[string]int {
	families, _ := n.registry.Gather()
	out := map[string]int{}
	for _, f := range families {
		if f.GetName() == "periscope_extproc_exchanges_total" {
			for _, m := range f.GetMetric() {
				out[m.GetLabel()[0].GetValue()] = int(m.GetCounter().GetValue())
			}
		}
	}
	return out
}

// gaps counts batches that were numbered and did not arrive.
func (n *node) gaps() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	missing := 0
	for _, v := range n.vms {
		missing += int(v.last) - len(v.seqs)
	}
	return missing
}

// strangers are events of exchanges that nobody sent.
func (n *node) strangers() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for id, list := range n.events {
		if !n.known[id] {
			out = append(out, fmt.Sprintf("%q, request %s", id, clip(fmt.Sprint(fieldsOf(list[0].Request.Headers)))))
		}
	}
	return out
}
