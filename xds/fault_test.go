package xds

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// TestFlood: a client that sends requests as fast as it can is read slowly, and
// costs another client nothing.
func TestFlood(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		set := func(i int) {
			f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {fmt.Sprint("l=", i)}, typeECDS: {"e=1", "f=1"}}))
		}
		set(0)
		start := time.Now()
		sent := f.flood(p)
		until(t, "the flood is held up", func() bool { return gather(t, f)["periscope_xds_late_requests_total{}"] > 10 })
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeLDS)
		c.accept(typeLDS, reply{names: "l=0"})
		for i := 1; i <= 50; i++ {
			from := time.Now()
			set(i)
			c.accept(typeLDS, reply{names: fmt.Sprint("l=", i)})
			if took := time.Since(from); took > time.Second {
				t.Errorf("edit %d reaches the other client after %v", i, took)
			}
		}
		n, took := sent.Load(), time.Since(start)
		t.Logf("%d requests in %v", n, took.Round(time.Millisecond))
		// Besides those that were read, some fill the windows of both sides.
		if most := requestBurst + requestPerSecond*took.Seconds() + 3*windowBytes/maxNameBytes; float64(n) > most {
			t.Errorf("the client sent %d requests within %v, more than %.0f", n, took, most)
		}
		if n := f.log.Count("too many requests"); n != 1 {
			t.Errorf("%d lines are logged", n)
		}
	})
}

// flood has a client subscribe to one thing and another in turn, until the test
// ends, and counts its requests.
func (f *fixture) flood(protocol string) *atomic.Int64 {
	f.t.Helper()
	c := f.dial(protocol, gatewayNode("a/b"))
	ctx, cancel := context.WithCancel(context.Background())
	sent, done := new(atomic.Int64), make(chan struct{})
	f.t.Cleanup(func() { cancel(); c.cancel(); <-done })
	long := strings.Repeat("n", maxNameBytes)
	go func() {
		defer close(done)
		node := gatewayNode("a/b")
		for ctx.Err() == nil {
			var err error
			if on := sent.Load()%2 == 0; protocol == protocolSotW {
				names := map[bool]string{true: "e", false: "f"}[on]
				err = c.sotw.Send(&discovery.DiscoveryRequest{Node: node, TypeUrl: typeECDS, ResourceNames: []string{names, long}})
			} else {
				r := &discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: typeECDS, ResourceNamesSubscribe: []string{"e", long}}
				if !on {
					r.ResourceNamesSubscribe, r.ResourceNamesUnsubscribe = nil, r.ResourceNamesSubscribe
				}
				err = c.delta.Send(r)
			}
			if err != nil {
				return
			}
			sent.Add(1)
		}
	}()
	go func() {
		for {
			select {
			case <-c.in: // answers are taken as they come
			case <-done:
				return
			}
		}
	}()
	return sent
}

// TestPace: a burst passes at once, then so many a second do; time without
// requests fills the bucket, to its brim.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		if err != nil {
			t.Fatal(err)
		}
		c := &connection{server: s, requests: rate.NewLimiter(requestPerSecond, requestBurst)}
		took := func(n int) time.Duration {
			start := time.Now()
			for range n {
				if err := c.pace(t.Context()); err != nil {
					t.Fatal("the stream has not ended:", err)
				}
			}
			return time.Since(start)
		}
		if d := took(requestBurst); d != 0 {
			t.Errorf("the burst took %v", d)
		}
		if d := took(10 * requestPerSecond).Round(10 * time.Millisecond); d != 10*time.Second {
			t.Errorf("ten seconds' requests took %v", d)
		}
		time.Sleep(time.Hour)
		if d := took(requestBurst); d != 0 {
			t.Errorf("the burst after a rest took %v", d)
		}
		if took(1) == 0 {
			t.Error("the bucket holds more than a burst")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if c.pace(ctx) == nil {
			t.Error("the end of the stream is not noticed")
		}
	})
}

// TestReaderThatStops: clients that take nothing off the wire, though they
// acknowledge, hold up nobody, and cost one answer each.
func TestReaderThatStops(t *testing.T) {
	const readers, edits, size = 5, 60, 256 << 10
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		big := strings.Repeat("x", size)
		set := func(i int) {
			f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {fmt.Sprintf("l=%d%s", i, big)}}))
		}
		set(0)
		ctx, cancel := context.WithCancel(context.Background())
		t.Cleanup(cancel)
		for range readers {
			f.acknowledgeUnread(ctx, p, edits)
		}
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeLDS)
		before := heap()
		for i := range edits {
			if i > 0 {
				set(i)
			}
			if m := c.next(typeLDS); m.err != nil || !strings.HasPrefix(m.names, fmt.Sprintf("l=%dx", i)) {
				t.Fatalf("edit %d: got %.10s, %v", i, m.names, m.err)
			} else {
				c.nonce[typeLDS], c.version[typeLDS] = m.nonce, m.version
				c.ack(typeLDS)
			}
		}
		grown := heap() - before
		t.Logf("%d MiB more after %d edits", grown>>20, edits)
		// Each may hold an answer as it was marshalled, and a snapshot; were they
		// all kept, it would be many times as much.
		if grown > (readers+1)*8*size {
			t.Errorf("memory grew by %d MiB", grown>>20)
		}
	})
}

// acknowledgeUnread subscribes, and acknowledges answers without reading them.
func (f *fixture) acknowledgeUnread(ctx context.Context, protocol string, answers int) {
	f.t.Helper()
	api := discovery.NewAggregatedDiscoveryServiceClient(f.conn)
	var send func(nonce string) error
	if protocol == protocolSotW {
		stream, err := api.StreamAggregatedResources(ctx)
		if err != nil {
			f.t.Fatal(err)
		}
		send = func(nonce string) error {
			return stream.Send(&discovery.DiscoveryRequest{Node: gatewayNode("a/b"), TypeUrl: typeLDS, ResponseNonce: nonce})
		}
	} else {
		stream, err := api.DeltaAggregatedResources(ctx)
		if err != nil {
			f.t.Fatal(err)
		}
		send = func(nonce string) error {
			return stream.Send(&discovery.DeltaDiscoveryRequest{Node: gatewayNode("a/b"), TypeUrl: typeLDS, ResponseNonce: nonce})
		}
	}
	nonce := ""
	for i := range answers {
		if err := send(nonce); err != nil {
			f.t.Fatal(err)
		}
		nonce = fmt.Sprint(i + 1)
	}
}

// heap is what is in use after garbage collection.
func heap() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// TestInvalidNonce: a reply to nothing that was sent is nobody's reply, and
// leaves the subscription as it is.
func TestInvalidNonce(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeLDS)
		c.want(typeLDS, reply{names: "l=1"})
		good := c.nonce[typeLDS]
		for _, bad := range []string{"99", "-1", strings.Repeat("n", 10<<10)} {
			c.nonce[typeLDS] = bad
			c.nack(typeLDS, "I was never sent that")
		}
		c.quiet(f)
		if s := f.server.Connections()[0].Types[typeLDS]; s.Acked != "" || s.LastError != "" {
			t.Errorf("the reply counts: %+v", s)
		}
		c.nonce[typeLDS] = good
		c.ack(typeLDS)
		until(t, "the true reply counts", func() bool { return f.server.Connections()[0].Types[typeLDS].Acked != "" })
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeLDS: {"l=2"}}))
		c.accept(typeLDS, reply{names: "l=2"})
		c.quiet(f)
	})
}
