package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// ledgerMetrics are the counters by which a node tells what became of
// exchanges.
func ledgerMetrics() map[string]bool {
	return map[string]bool{
		"periscope_gateway_exchanges_total": true, "periscope_gateway_batches_total": true, "periscope_extproc_exchanges_total": true,
		"periscope_ingest_batches_total": true, "periscope_ingest_refused_batches_total": true,
		"periscope_ingest_events_total": true, "periscope_ingest_rejected_events_total": true,
		"periscope_node_access_log_entries_total": true,
		"periscope_detect_inspections_total":      true,
		"periscope_store_hits_total":              true, "periscope_store_dropped_hits_total": true, "periscope_store_attacks_registered_total": true,
	}
}

// ledgerCounts reads them from a registry, by series as /metrics writes them.
func ledgerCounts(g prometheus.Gatherer) map[string]uint64 {
	wanted, out := ledgerMetrics(), map[string]uint64{}
	families, _ := g.Gather() // what could be gathered counts
	for _, f := range families {
		if !wanted[f.GetName()] {
			continue
		}
		for _, m := range f.GetMetric() {
			series := f.GetName()
			for _, l := range m.GetLabel() { // one at most
				series += fmt.Sprintf("{%s=%q}", l.GetName(), l.GetValue())
			}
			out[series] = uint64(m.GetCounter().GetValue())
		}
	}
	return out
}

// ledgerState is /debug/ledgerz.
type ledgerState struct {
	Note  string       `json:"note"`
	Nodes []ledgerNode `json:"nodes"`
	Steps []ledgerStep `json:"steps"`
}

type ledgerNode struct {
	Node       string    `json:"node"`
	ReportedAt time.Time `json:"reportedAt"`
}

// ledgerStep is how many there were, and what became of them. Difference is
// what nothing accounts for, and Reason why that may be.
type ledgerStep struct {
	Step       string            `json:"step"`
	Count      uint64            `json:"count"`
	Became     map[string]uint64 `json:"became"`
	Difference int64             `json:"difference"`
	Reason     string            `json:"reason,omitempty"` // of a difference
}

// newLedger adds up what nodes report. A difference is never hidden: it is
// shown even where it can't be.
func newLedger(nodes []xdsnode.Reporter) ledgerState {
	out := ledgerState{
		Note:  "Since each node's start, of the nodes that report now. What gateways sent to a node that was away is in Envoy's statistics.",
		Nodes: []ledgerNode{},
	}
	total := map[string]uint64{}
	for _, n := range nodes {
		out.Nodes = append(out.Nodes, ledgerNode{n.Node, n.ReportedAt})
		for series, v := range n.Counts {
			total[series] += v
		}
	}
	// of gives a metric's series by the value of their label.
	of := func(metric string, labels ...string) map[string]uint64 {
		m := map[string]uint64{}
		for series, v := range total {
			rest, ok := strings.CutPrefix(series, metric+"{")
			if _, value, labelled := strings.Cut(strings.TrimSuffix(rest, `"}`), `="`); ok && labelled {
				m[value] = v
			}
		}
		if len(labels) > 0 {
			some := map[string]uint64{}
			for _, l := range labels {
				some[l] = m[l]
			}
			return some
		}
		return m
	}
	step := func(name string, count uint64, became map[string]uint64, reason string) {
		s := ledgerStep{Step: name, Count: count, Became: became, Difference: int64(count - sum(became))}
		if s.Difference != 0 {
			s.Reason = reason
		}
		out.Steps = append(out.Steps, s)
	}
	exchanges := of("periscope_gateway_exchanges_total")
	events := of("periscope_ingest_events_total", "accepted", "discarded", "dropped_ring_full")
	events["rejected"] = sum(of("periscope_ingest_rejected_events_total"))
	streams := of("periscope_extproc_exchanges_total")
	if n := streams["seen"]; n > 0 { // each node counts those that came to it
		delete(streams, "seen")
		step("exchanges streamed by gateways", n, streams, "")
	}
	if len(nodes) <= 1 {
		step("exchanges seen by gateways' plugins", exchanges["seen"], of("periscope_gateway_exchanges_total", "mirrored", "off", "excluded", "sampled_out"),
			fmt.Sprintf("under way at the gateways, or not copied for an error of the plugin (%d)", exchanges["errors"]))
		step("batches sent by gateways", total["periscope_gateway_batches_total"], map[string]uint64{"received": sum(of("periscope_ingest_batches_total"))},
			"lost, or on their way; or received, but not as batches that could be read (a negative difference)")
		step("exchanges mirrored", exchanges["mirrored"]+streams["mirrored"], events, "lost with their batches, or on their way; or mirrored before the node's start (a negative difference)")
	} else {
		out.Note += " A gateway spreads its batches over its nodes, and each batch tells all that the gateway has counted: " +
			"with several nodes, only what nodes themselves did can be added up."
		step("exchanges received", sum(events), events, "")
	}
	// What Envoy refused before the plugin is in none of the steps above.
	entries := of("periscope_node_access_log_entries_total")
	step("entries of gateways' access logs", sum(entries), entries, "")
	step("exchanges taken", events["accepted"]+entries["event"], of("periscope_detect_inspections_total"), "waiting for analysis")
	hits := of("periscope_store_hits_total")
	for reason, n := range of("periscope_store_dropped_hits_total") {
		hits["dropped_"+reason] = n
	}
	step("hits", sum(hits), hits, "")
	return out
}

func sum(m map[string]uint64) (total uint64) {
	for _, v := range m {
		total += v
	}
	return total
}
