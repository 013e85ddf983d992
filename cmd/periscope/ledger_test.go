package main

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

func TestLedger(t *testing.T) {
	reg := prometheus.NewRegistry()
	exchanges := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "periscope_gateway_exchanges_total"}, []string{"outcome"})
	batches := prometheus.NewCounter(prometheus.CounterOpts{Name: "periscope_gateway_batches_total"})
	events := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "periscope_ingest_events_total"}, []string{"outcome"})
	entries := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "periscope_node_access_log_entries_total"}, []string{"result"})
	other := prometheus.NewCounter(prometheus.CounterOpts{Name: "periscope_console_requests_total"})
	reg.MustRegister(exchanges, batches, events, entries, other)
	for outcome, n := range map[string]float64{"seen": 100, "mirrored": 40, "sampled_out": 50, "excluded": 7, "errors": 1} {
		exchanges.WithLabelValues(outcome).Add(n)
	}
	batches.Add(5)
	events.WithLabelValues("accepted").Add(30)
	events.WithLabelValues("dropped_ring_full").Add(4)
	entries.WithLabelValues("event").Add(2)
	entries.WithLabelValues("joined").Add(3)
	other.Add(9)
	counts := ledgerCounts(reg)
	if counts[`periscope_gateway_exchanges_total{outcome="seen"}`] != 100 || counts["periscope_gateway_batches_total"] != 5 || len(counts) != 10 {
		t.Errorf("counts: %v", counts)
	}
	streams := map[string]uint64{`periscope_extproc_exchanges_total{outcome="seen"}`: 9, `periscope_extproc_exchanges_total{outcome="mirrored"}`: 6, `periscope_extproc_exchanges_total{outcome="busy"}`: 3}
	l := newLedger([]xdsnode.Reporter{{Node: "one", Counts: streams}})
	if s := l.Steps[0]; s.Step != "exchanges streamed by gateways" || s.Count != 9 || s.Difference != 0 || l.Steps[3].Count != 6 {
		t.Errorf("of streams: %+v", l)
	}
	l = newLedger([]xdsnode.Reporter{{Node: "one", Counts: counts}, {Node: "two", Counts: counts}})
	if len(l.Nodes) != 2 || len(l.Steps) != 4 || l.Steps[0].Count != 68 || l.Steps[0].Became["accepted"] != 60 || l.Steps[2].Count != 64 {
		t.Fatalf("of two: %+v", l)
	}
	l = newLedger([]xdsnode.Reporter{{Node: "one", Counts: counts}})
	if len(l.Nodes) != 1 || len(l.Steps) != 6 {
		t.Fatalf("%+v", l)
	}
	for i, want := range []struct {
		count      uint64
		difference int64
		reason     string
	}{
		{100, 3, "an error of the plugin (1)"},
		{5, 5, "lost"},
		{40, 6, "lost with their batches"},
		{5, 0, ""},
		{32, 32, "waiting"},
		{0, 0, ""},
	} {
		s := l.Steps[i]
		if s.Count != want.count || s.Difference != want.difference || !strings.Contains(s.Reason, want.reason) || (want.difference == 0) != (s.Reason == "") {
			t.Errorf("%s: %+v, want %+v", s.Step, s, want)
		}
	}
}
