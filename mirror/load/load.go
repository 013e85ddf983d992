// Package load is what an analysis node tells of its load, and of the demand at
// gateways as far as it heard of it: the one feedback from nodes to the control
// plane, and how it travels, as an ORCA report. It is pure; anybody may import it,
// and it imports nothing of ours.
package load

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Target is the delay at which a node is well used and not late.
const Target = 5 * time.Millisecond

// Report is the state of one node at one time. Counters grow from the node's
// start on; a new Epoch starts them anew.
type Report struct {
	Node   string        // its name
	Epoch  uint64        // random, made at the node's start
	Uptime time.Duration // by the node's monotonic clock: what lies between two reports

	// Delays: how long what arrives now waits, at three places. The worst counts.
	Kernel time.Duration // oldest bytes in a socket of the node's, not yet read
	Queue  time.Duration // exchanges between reading and analysis
	Lag    time.Duration // from a batch's sending to its reading, beyond the least seen of late: clocks may disagree

	Utilization float64 // of the CPU time that the node may use, 0 to 1; above 1: counted too low
	Capacity    float64 // exchanges a second, the node's own estimate; 0: none yet
	Rate        float64 // exchanges analysed a second, of late

	Analysed  uint64 // exchanges
	Priority  uint64 // of those that arrived, the ones of a priority class
	Discarded uint64 // routine exchanges, by the node's guard
	Overflown uint64 // exchanges that found the node's queue full

	Sockets Sockets
	// Demands are sorted. Those of a partial report are the ones that have changed
	// since the report before.
	Demands []Demand
	Partial bool
}

// Delay is the worst of the three.
func (r *Report) Delay() time.Duration { return max(r.Kernel, r.Queue, r.Lag) }

// Sockets sums up the node's sockets for mirrored traffic.
type Sockets struct {
	Backend     string // who counts: "ebpf", "ebpf-pinned", "inet_diag", "siocinq"
	Connections int
	Bytes       int64 // received, not yet read
	Backlog     int   // connections that wait to be accepted
	BacklogMax  int
	ZeroWindows uint64 // times that a full socket stopped its peer, cumulative
	Drops       uint64 // segments or connections dropped for want of room, cumulative
	Retransmits uint64 // segments sent again, cumulative
}

// Demand is what a gateway's worker has counted for one policy by now, mirrored
// or not. Several nodes hear of one worker: the highest count is the newest.
type Demand struct {
	Gateway  string // "namespace/pod"; "namespace/name" of one that doesn't know its pod
	VM       string // the worker's plugin, as in mirror/event.Batch
	Policy   string // "namespace/name"
	Eligible uint64 // exchanges that the policy wants, before sampling
	Priority uint64 // of those, the ones of a priority class, which sampling spares
	Mirrored uint64 // exchanges put into batches

	Heard    time.Duration // the node's Uptime when it heard this; 0: the report's
	Received uint64        // exchanges of it that this node itself got, whatever the gateway says

	Share      uint32        // revision of the shares that the worker goes by (mirror.Shares), read as a number; 0: none
	ShareSince time.Duration // the node's Uptime at the first batch under it; 0: it can't be told
}

// ShareNumber reads a revision of shares, hexadecimal digits, as Demand.Share; what
// is none is 0.
func ShareNumber(revision string) uint32 {
	n, err := strconv.ParseUint(revision, 16, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// Compare orders demands by gateway, worker and policy.
func (d Demand) Compare(other Demand) int {
	return cmp.Or(strings.Compare(d.Gateway, other.Gateway), strings.Compare(d.VM, other.VM), strings.Compare(d.Policy, other.Policy))
}

// Changed gives those of now that are not the same in before; both are sorted.
func Changed(before, now []Demand) []Demand {
	var out []Demand
	for _, d := range now {
		for len(before) > 0 && before[0].Compare(d) < 0 {
			before = before[1:]
		}
		if len(before) == 0 || before[0] != d {
			out = append(out, d)
		}
	}
	return out
}

// Merge gives demands with those that have changed in their places, MaxDemands at most;
// both are sorted, and neither is written to.
func Merge(demands, changed []Demand) []Demand {
	if len(changed) == 0 {
		return demands[:min(len(demands), MaxDemands)]
	}
	out := make([]Demand, 0, len(demands)+len(changed))
	for _, c := range changed {
		i, found := slices.BinarySearchFunc(demands, c, Demand.Compare)
		out = append(append(out, demands[:i]...), c)
		if found {
			i++
		}
		demands = demands[i:]
	}
	out = append(out, demands...)
	return out[:min(len(out), MaxDemands)]
}

// Gain is the weight of a value that stood for an interval, in an exponentially
// weighted mean of this e-folding time.
func Gain(interval, span time.Duration) float64 {
	return -math.Expm1(-interval.Seconds() / span.Seconds())
}
