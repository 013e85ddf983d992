package main

import (
	"context"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/ingest"
)

// What is measured elsewhere is filled in, and the rate follows the counter.
func TestLoadSource(t *testing.T) {
	ring, count := ingest.NewRing(2, 1<<20), uint64(500)
	s := &loadSource{name: "n", epoch: 7, started: time.Now().Add(-time.Minute), ring: ring, count: func() uint64 { return count },
		demands: func() []load.Demand { return []load.Demand{{Gateway: "g", VM: "v", Policy: "p", Eligible: 9}} },
		fill:    []func(*load.Report){func(r *load.Report) { r.Kernel, r.Sockets.Backend = time.Second, "ebpf" }}}
	received := time.Now().Add(-100 * time.Millisecond)
	ring.Push(&event.Batch{Events: []event.Event{{Class: "Suspicious"}, {}, {}}}, "g", received, 10)
	if _, ok := ring.Pop(context.Background()); !ok {
		t.Fatal("nothing is in the ring")
	}
	r, err := s.report()
	if err != nil || r.Node != "n" || r.Epoch != 7 || r.Uptime < time.Minute || r.Kernel != time.Second || r.Queue < 100*time.Millisecond || r.Analysed != 500 ||
		r.Priority != 1 || r.Overflown != 1 || len(r.Demands) != 1 || r.Sockets.Backend != "ebpf" {
		t.Errorf("report %+v", r)
	}
	now := time.Now().Add(time.Minute)
	s.measure(count, now)
	for range 100 {
		now, count = now.Add(50*time.Millisecond), count+50
		s.measure(count, now)
	}
	if rate := s.measure(count, now); rate < 980 || rate > 1020 {
		t.Errorf("the rate is %v, want 1000 a second", rate)
	}
}
