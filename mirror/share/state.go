package share

import (
	"iter"
	"maps"
	"math"
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

// NodeState is a node, as it was reported last, and its budget.
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
	Demand      float64       `json:"demand"`   // of routine exchanges of gateways that send there
	Priority    float64       `json:"priority"` // demand of priority classes
	Drain       float64       `json:"drain"`    // left free to work off what is late
	Budget      float64       `json:"budget"`   // for routine exchanges; below 0: less than none
	Bound       int           `json:"bound"`    // shares that are bound by it
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
	// Nodes is the part that each gets, without those that get less than 1 %; what is
	// missing is taken to be spread evenly.
	Nodes map[string]float64 `json:"nodes,omitempty"`
	Node  string             `json:"node,omitempty"` // by whose budget it is bound; empty: by that of all, if at all
}

// Summary shows everything but shares.
func (c *Controller) Summary(now time.Time) State {
	at := c.since(now)
	s := State{At: now, Ready: c.warm, Totals: c.shown.Totals, Faults: maps.Clone(c.faults), Workers: c.workers}
	bound := map[*pool]int{}
	for _, l := range c.sorted {
		if l.by != nil && l.isBound() {
			bound[l.by]++
		}
	}
	for _, n := range c.byName {
		r := &n.report
		s.Nodes = append(s.Nodes, NodeState{
			Name: n.name, Age: at - n.at, Counts: n.presence(at), Kernel: r.Kernel, Queue: r.Queue, Lag: r.Lag,
			Utilization: r.Utilization, Rate: n.rate, Capacity: n.told, Sockets: r.Sockets.Backend,
			Demand: n.demand, Priority: n.priority, Drain: n.drain, Budget: n.budget(), Bound: bound[&n.pool],
		})
	}
	return s
}

// State shows everything.
func (c *Controller) State(now time.Time) State {
	s := c.Summary(now)
	s.Defaults = c.shown.Defaults
	parts := map[*leaf]map[string]float64{}
	for _, n := range c.byName {
		for _, k := range n.parts {
			if parts[k.leaf] == nil {
				parts[k.leaf] = map[string]float64{}
			}
			if k.of >= 0.01 {
				parts[k.leaf][n.name] = math.Round(100*k.of) / 100
			}
		}
	}
	i := 0
	for share := range c.Shares(now) {
		l := c.sorted[i]
		share.Nodes = parts[l]
		s.Shares = append(s.Shares, share)
		i++
	}
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
			if l.by != nil && l.isBound() {
				s.Node = l.by.name
			}
			s.Reason = l.why()
			if !yield(s) {
				return
			}
		}
	}
}

// Faults is how often a fault was met, since the start.
func (c *Controller) Faults(of Fault) uint64 { return c.faults[of] }

// Totals are what the last decision was made of, and whether enough was heard for
// it.
func (c *Controller) Totals() (t Totals, ready bool) { return c.shown.Totals, c.warm }
