package main

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// lossReason is why exchanges are not analysed: a closed set.
type lossReason string

const (
	lossOff        lossReason = "off"
	lossExcluded   lossReason = "excluded"
	lossSampled    lossReason = "sampled_out"
	lossPlugin     lossReason = "plugin_error"
	lossLost       lossReason = "lost"   // between gateway and node
	lossStream     lossReason = "stream" // of ext_proc, to no end
	lossGuard      lossReason = "guard"
	lossRing       lossReason = "ring_overflow"
	lossRejected   lossReason = "rejected"
	lossLimited    lossReason = "limited" // known from the access log alone, and too many
	lossInspection lossReason = "inspection"
)

func lossReasons() []lossReason {
	return []lossReason{lossOff, lossExcluded, lossSampled, lossPlugin, lossLost, lossStream, lossGuard, lossRing, lossRejected, lossLimited, lossInspection}
}

// analysedCount stands among the reasons for what was analysed.
const analysedCount lossReason = "analysed"

// lossOf is what a series of the ledger counts.
func lossOf(series string) (reason lossReason, byPlugin bool) {
	metric, label, _ := strings.Cut(strings.TrimSuffix(series, `"}`), "{")
	_, value, _ := strings.Cut(label, `="`)
	switch metric {
	case "periscope_gateway_exchanges_total":
		return map[string]lossReason{"off": lossOff, "excluded": lossExcluded, "sampled_out": lossSampled, "errors": lossPlugin}[value], true
	case "periscope_extproc_exchanges_total":
		return map[string]lossReason{"off": lossOff, "excluded": lossExcluded, "sampled_out": lossSampled, "no_settings": lossStream,
			"busy": lossStream, "malformed": lossStream, "aborted": lossStream, "unauthorized": lossStream}[value], false
	case "periscope_node_access_log_entries_total":
		return map[string]lossReason{"off": lossOff, "limited": lossLimited, "dropped_ring_full": lossRing}[value], false
	case "periscope_ingest_events_total":
		return map[string]lossReason{"discarded": lossGuard, "dropped_ring_full": lossRing}[value], false
	case "periscope_ingest_rejected_events_total":
		return lossRejected, false
	case "periscope_detect_inspections_total":
		if value == "error" {
			return lossInspection, false
		}
		return analysedCount, false
	}
	return "", false
}

const (
	// lossSilent ends a rate: nodes report each second what has changed.
	lossSilent = 2500 * time.Millisecond
	// lossForget is how long a node that is away is known.
	lossForget = 10 * time.Minute
	// lossWindow is for how many looks something has to be missing to be lost: it
	// may be on its way, or told by another node a moment later.
	lossWindow = 4
)

// lossMeter makes rates of what nodes have counted:
//
//	ledger() what each counted, by reason; gateways' own counters of a single node alone
//	demand() what gateways mirrored and nodes got, by worker: what differs was lost
//
// What is seen for the first time counts from there on.
type lossMeter struct {
	total     map[lossReason]float64 // exchanges
	nodes     map[string]*lossNode
	reporting int // nodes

	workers  map[lossWorker]*lossDemand
	looked   time.Time
	missing  gap // mirrored, and not got
	skipped  gap // wanted, and not mirrored
	rejected float64
	rate     map[lossReason]float64 // of what demand tells
}

// lossNode is what a node reported last, and rates between its last two reports.
type lossNode struct {
	counts map[string]uint64
	at     time.Time
	plugin map[lossReason]float64 // rates of what gateways' plugins counted
	own    map[lossReason]float64
}

type lossWorker struct{ gateway, vm, policy string }

// lossDemand is a worker's counters, the highest that was told, and what nodes got.
type lossDemand struct {
	eligible, mirrored uint64
	from, got          uint64 // of mirrored, what had been when it was first seen, and what nodes got since
	received           []lossIntake
	since, told        time.Time
}

type lossIntake struct {
	node         string
	epoch, count uint64
}

// take gives how much more a node got. One that restarted counts from 0; what one
// counted before it told of the worker may be from before we knew that.
func (w *lossDemand) take(node string, epoch, count uint64) (more uint64) {
	i := slices.IndexFunc(w.received, func(n lossIntake) bool { return n.node == node })
	if i < 0 {
		w.received = append(w.received, lossIntake{strings.Clone(node), epoch, count})
		since := w.mirrored - w.from
		return min(count, since-min(since, w.got))
	}
	before := w.received[i]
	w.received[i].epoch, w.received[i].count = epoch, count
	if before.epoch == epoch {
		return count - min(before.count, count)
	}
	return count
}

// gap is a difference of two counters that are told at different times: what it has
// been for a while, it has grown by.
type gap struct {
	sum    float64
	recent []float64
	grown  float64
}

// look gives by how much the gap has grown for good.
func (g *gap) look() float64 {
	g.recent = append(g.recent, g.sum)
	g.recent = slices.Delete(g.recent, 0, max(0, len(g.recent)-lossWindow))
	if len(g.recent) < lossWindow {
		return 0
	}
	g.grown = min(g.grown, slices.Max(g.recent)) // else what falls would hide what is lost
	sure := slices.Min(g.recent)
	more := max(0, sure-g.grown)
	g.grown += more
	return more
}

func newLossMeter() *lossMeter {
	return &lossMeter{total: map[lossReason]float64{}, nodes: map[string]*lossNode{}, workers: map[lossWorker]*lossDemand{},
		rate: map[lossReason]float64{}}
}

// shared tells whether several nodes report: each tells all that gateways counted.
func (m *lossMeter) shared() bool { return m.reporting > 1 }

// ledger takes what nodes have reported.
func (m *lossMeter) ledger(now time.Time, nodes []xdsnode.Reporter) {
	m.reporting = len(nodes)
	for _, r := range nodes {
		n := m.nodes[r.Node]
		switch {
		case n == nil:
			m.nodes[r.Node] = &lossNode{counts: r.Counts, at: r.ReportedAt}
		case r.ReportedAt.After(n.at):
			m.advance(n, r)
		case now.Sub(n.at) > lossSilent:
			n.plugin, n.own = nil, nil
		}
	}
	for name, n := range m.nodes {
		if slices.ContainsFunc(nodes, func(r xdsnode.Reporter) bool { return r.Node == name }) {
			continue
		}
		n.plugin, n.own = nil, nil // it has gone
		if now.Sub(n.at) > lossForget {
			delete(m.nodes, name)
		}
	}
}

// advance takes a node's next report. One that counts less has started anew.
func (m *lossMeter) advance(n *lossNode, r xdsnode.Reporter) {
	passed := r.ReportedAt.Sub(n.at).Seconds()
	restarted := false
	for series, v := range n.counts {
		restarted = restarted || r.Counts[series] < v
	}
	n.plugin, n.own = map[lossReason]float64{}, map[lossReason]float64{}
	for series, v := range r.Counts {
		reason, byPlugin := lossOf(series)
		grown := float64(v)
		if !restarted {
			grown -= float64(n.counts[series])
		}
		switch {
		case reason == "":
		case !byPlugin:
			n.own[reason] += grown / passed
			m.total[reason] += grown
		default:
			n.plugin[reason] += grown / passed
			if !m.shared() {
				m.total[reason] += grown
			}
		}
		if reason == lossRejected {
			m.rejected += grown
		}
	}
	n.counts, n.at = r.Counts, r.ReportedAt
}

// demand takes what nodes have heard of gateways' workers, and got of them.
func (m *lossMeter) demand(now time.Time, reports []*load.Report) {
	passed := now.Sub(m.looked).Seconds()
	first := m.looked.IsZero()
	m.looked = now
	for _, r := range reports {
		for i := range r.Demands {
			m.hear(now, r, &r.Demands[i])
		}
	}
	maps.DeleteFunc(m.workers, func(_ lossWorker, w *lossDemand) bool { return w.told.Before(now) })
	m.missing.sum -= m.rejected // they were got, and nodes do not say by whom
	m.rejected = 0
	lost, skipped := m.missing.look(), m.skipped.look()
	m.total[lossLost] += lost
	if m.shared() {
		m.total[lossSampled] += skipped
	}
	clear(m.rate)
	if !first && passed > 0 && len(reports) > 0 {
		m.rate[lossLost], m.rate[lossSampled] = lost/passed, skipped/passed
	}
}

func (m *lossMeter) hear(now time.Time, r *load.Report, d *load.Demand) {
	key := lossWorker{d.Gateway, d.VM, d.Policy}
	w := m.workers[key]
	if w == nil {
		w = &lossDemand{since: now}
		// The strings may be parts of a whole report.
		m.workers[lossWorker{strings.Clone(d.Gateway), strings.Clone(d.VM), strings.Clone(d.Policy)}] = w
	}
	w.told = now
	mirrored, eligible := max(w.mirrored, d.Mirrored), max(w.eligible, d.Eligible)
	grown, more := mirrored-w.mirrored, eligible-w.eligible
	w.mirrored, w.eligible = mirrored, eligible
	if w.since.Equal(now) { // from here on
		w.from = mirrored
		w.take(r.Node, r.Epoch, d.Received)
		return
	}
	got := w.take(r.Node, r.Epoch, d.Received)
	w.got += got
	m.missing.sum += float64(grown) - float64(got)
	m.skipped.sum += float64(more) - float64(grown)
}

// rates gives exchanges a second by reason; of what nobody knows there is none.
func (m *lossMeter) rates() map[lossReason]float64 {
	out := map[lossReason]float64{}
	if m.reporting > 0 {
		for _, reason := range lossReasons() {
			out[reason] = 0
		}
	}
	for _, n := range m.nodes {
		for reason, v := range n.own {
			out[reason] += v
		}
		if m.shared() {
			continue
		}
		for reason, v := range n.plugin {
			out[reason] += v
		}
	}
	delete(out, analysedCount)
	lost, known := m.rate[lossLost]
	out[lossLost] = lost
	if m.shared() {
		out[lossSampled] += m.rate[lossSampled]
		maps.DeleteFunc(out, func(r lossReason, _ float64) bool {
			return r == lossOff || r == lossExcluded || r == lossPlugin || r == lossSampled && !known
		})
	}
	if !known {
		delete(out, lossLost)
	}
	return out
}

// analysed is how many exchanges a second nodes analyse.
func (m *lossMeter) analysed() (rate float64) {
	for _, n := range m.nodes {
		rate += n.own[analysedCount]
	}
	return rate
}
