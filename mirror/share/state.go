package share

import (
	"iter"
	"maps"
	"slices"
	"time"
)

// State is what the controller knows and decided, to be looked at. Rates are
// exchanges a second.
type State struct {
	At       time.Time        `json:"at"`
	Ready    bool             `json:"ready"`
	Totals   Totals           `json:"totals"`
	Nodes    []NodeState      `json:"nodes"`
	Shares   []ShareState     `json:"shares"`
	Defaults []Default        `json:"defaults"`
	Faults   map[Fault]uint64 `json:"faults,omitempty"` // since the start
	Workers  int              `json:"workers"`          // series of counters
}

// NodeState is a node, as it was reported last.
type NodeState struct {
	Name        string        `json:"name"`
	Age         time.Duration `json:"age"`    // of the last report
	Counts      float64       `json:"counts"` // how much of it is in the sum: 1 all, 0 nothing
	Kernel      time.Duration `json:"kernel"`
	Queue       time.Duration `json:"queue"`
	Lag         time.Duration `json:"lag"`
	Utilization float64       `json:"utilization"`
	Rate        float64       `json:"rate"`
	Capacity    float64       `json:"capacity"` // estimate; 0: unknown
	Sockets     string        `json:"sockets"`  // who counts them
}

// ShareState is a share with what it was made of.
type ShareState struct {
	Share
	Tenant   string        `json:"tenant"`
	Demand   float64       `json:"demand"`   // of routine exchanges
	Priority float64       `json:"priority"` // demand of priority classes
	Received float64       `json:"received"` // of both, by nodes
	Workers  int           `json:"workers"`
	From     int           `json:"from"` // PPM before the last change
	Since    time.Duration `json:"since"`
	Lies     bool          `json:"lies,omitempty"` // sends more than it counts
}

// State shows everything.
func (c *Controller) State(now time.Time) State {
	at := c.since(now)
	s := State{At: now, Ready: c.warm, Totals: c.shown.Totals, Defaults: c.shown.Defaults, Faults: maps.Clone(c.faults), Workers: c.workers}
	for _, n := range c.byName {
		r := &n.report
		s.Nodes = append(s.Nodes, NodeState{
			Name: n.name, Age: at - n.at, Counts: n.presence(at), Kernel: r.Kernel, Queue: r.Queue, Lag: r.Lag,
			Utilization: r.Utilization, Rate: n.rate, Capacity: n.rateCapacity(), Sockets: r.Sockets.Backend,
		})
	}
	s.Shares = slices.AppendSeq(s.Shares, c.Shares(now))
	return s
}

// Shares gives all shares in the order of Decision.Shares.
func (c *Controller) Shares(now time.Time) iter.Seq[ShareState] {
	at := c.since(now)
	return func(yield func(ShareState) bool) {
		for i, l := range c.sorted[:min(len(c.sorted), len(c.shown.Shares))] {
			s := ShareState{
				Share: c.shown.Shares[i], Tenant: l.policy.Tenant, Demand: l.routine, Priority: l.priority, Received: l.takenRate,
				Workers: len(l.workers), From: l.share.from, Since: at - l.share.changed, Lies: l.lies,
			}
			s.Reason = l.why()
			if !yield(s) {
				return
			}
		}
	}
}

// Totals are what the last decision was made of, and whether enough was heard for
// it.
func (c *Controller) Totals() (t Totals, ready bool) { return c.shown.Totals, c.warm }
