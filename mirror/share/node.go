package share

import (
	"math"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	// staleAfter is how long a node counts in full without a report. Nodes report
	// every 50 ms as long as something changes, so while they work; and every 5 s.
	staleAfter = time.Second
	idleAfter  = 7 * time.Second
	staleSpan  = 500 * time.Millisecond // e-folding time of a stale node's capacity
	goneAfter  = 10 * time.Minute

	minInterval = 5 * time.Millisecond
	maxInterval = 2 * time.Second // between reports of which rates are made
	maxApart    = time.Second     // of a node's time line from ours
	maxDelay    = 2 * time.Second // counted of a node's
	maxCapacity = 1e7
)

// node is what is known of one.
type node struct {
	id     int // in the order in which nodes were heard of
	known  bool
	report load.Report   // the latest, without demands
	at     time.Duration // of its arrival
	offset time.Duration // our time line less its Uptime, at best
	told   float64       // exchanges a second that it can do, as it told last, of before it restarted too; 0: never
	rate   float64       // exchanges analysed a second
	gained bool          // has told two reports
	idle   bool          // did nothing between the last two

	since     time.Duration // when we heard of this epoch of it
	restarted bool
	pool
}

// advance takes a report. It tells whether that is later than what is known.
func (n *node) advance(r *load.Report, at time.Duration, faults map[Fault]uint64) bool {
	last := n.report
	restarted := n.known && r.Epoch != last.Epoch
	if restarted {
		faults[FaultEpoch]++
	}
	if !n.known || restarted {
		n.known, n.restarted, n.idle, n.since, n.at, n.offset = true, restarted, false, at, at, at-r.Uptime
		n.keep(r)
		return true
	}
	interval := r.Uptime - last.Uptime
	if interval < 0 {
		faults[FaultUptime]++
		return false
	}
	n.at = at
	n.offset += interval / 10_000 // clocks drift
	switch apart := at - r.Uptime - n.offset; {
	case apart < 0:
		n.offset += apart
	case apart > maxApart:
		n.offset += apart
		faults[FaultClock]++
	}
	n.keep(r)
	n.idle = n.gained && r.Analysed == last.Analysed && r.Discarded == last.Discarded && n.delay() == 0
	if interval < minInterval { // what was counted counts with the next one
		k := &n.report
		k.Uptime, k.Analysed, k.Discarded = last.Uptime, last.Analysed, last.Discarded
		return true
	}
	n.gained = true
	if interval > maxInterval {
		return true
	}
	rate := float64(r.Analysed-last.Analysed) / interval.Seconds()
	if r.Analysed < last.Analysed || r.Discarded < last.Discarded || rate > maxCapacity {
		faults[FaultCounter]++
		return true
	}
	n.rate = rate
	return true
}

func (n *node) keep(r *load.Report) {
	n.report = *r
	n.report.Node, n.report.Demands = n.name, nil
	if c := r.Capacity; c > 0 && c <= maxCapacity {
		n.told = c
	}
	n.report.Sockets.Backend = strings.Clone(r.Sockets.Backend[:min(len(r.Sockets.Backend), maxName)])
}

// delay of the node, bounded: garbage must not stop everybody for long.
func (n *node) delay() time.Duration {
	return min(max(n.report.Delay(), 0), maxDelay)
}

// presence is how much the node counts, 0 to 1.
func (n *node) presence(now time.Duration) float64 {
	if !n.known {
		return 0
	}
	p := math.Exp(-max(0, now-n.at-n.patience()).Seconds() / staleSpan.Seconds())
	if p < 0.01 {
		return 0
	}
	return p
}

// patience is how long the node may be silent.
func (n *node) patience() time.Duration {
	if n.idle {
		return idleAfter
	}
	return staleAfter
}

func (n *node) fresh(now time.Duration) bool { return n.known && now-n.at <= n.patience() }
