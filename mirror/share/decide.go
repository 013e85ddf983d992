package share

import (
	"maps"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	tick    = 50 * time.Millisecond
	minTick = 20 * time.Millisecond // where pushes are as fast, and at least between urgent ones
	warmUp  = 300 * time.Millisecond
	maxIdle = time.Second // counted between two ticks

	firstTau   = 100 * time.Millisecond // until it is measured
	minTau     = 5 * time.Millisecond
	maxTau     = 2 * time.Second
	maxEffect  = 10 * time.Second
	minHorizon = 100 * time.Millisecond

	underWay     = 5     // exchanges that by chance wait at a node that is used well, M/D/1 at headRoom: they are no backlog
	drainPart    = 0.1   // of the capacity, to work off what is late, that is told as the reason
	headRoom     = 0.92  // of the capacity is used
	priorityPart = 0.3   // of the capacity, for priority classes
	leastShare   = 0.002 // keeps demand in sight
	riseSpan     = 300 * time.Millisecond
	band         = 0.1  // changes of less are not told
	lateBand     = 0.05 // lower shares, while nodes are late
	staleFall    = 5 * time.Second
)

// Reason says what a share is bound by: a closed set.
type Reason string

const (
	ReasonCeiling  Reason = "ceiling"  // the policy's: there is room for all of it
	ReasonBudget   Reason = "budget"   // a fair part of a node's
	ReasonDrain    Reason = "drain"    // the same, while the node works off what is late
	ReasonFloor    Reason = "floor"    // the policy's
	ReasonRise     Reason = "rise"     // there is room for more; it rises gradually
	ReasonStale    Reason = "stale"    // no node has reported for 7 s: it falls slowly towards the floor
	ReasonPriority Reason = "priority" // priority classes alone are more than their part of the capacity
)

// Share is what a gateway mirrors of a policy.
type Share struct {
	Gateway     string `json:"gateway"`
	Workload    string `json:"workload,omitempty"`
	Policy      string `json:"policy"`
	PPM         int    `json:"ppm"`         // of routine exchanges, parts per million
	PriorityPPM int    `json:"priorityPPM"` // of those in a priority class
	Reason      Reason `json:"reason"`
}

// Default is the share of a policy at pods of a workload that Shares does not name;
// with Workload "", at pods of which nothing is known.
type Default struct {
	Workload string `json:"workload,omitempty"`
	Policy   string `json:"policy"`
	PPM      int    `json:"ppm"`
}

// Decision is the result of a tick. Its slices are shared with later decisions:
// leave them as they are.
type Decision struct {
	Ready    bool      // nodes were heard for long enough: shares may be pushed
	Urgent   bool      // nodes are late and shares fell: push without waiting for more
	NextTick time.Time // when to decide again
	Changed  int       // shares and defaults that differ from the decision before
	Shares   []Share   // by tenant, gateway, policy
	Defaults []Default // by workload, policy
	Totals   Totals
}

// Totals are what a decision was made of, over all nodes. Rates are exchanges a second.
type Totals struct {
	Capacity float64       `json:"capacity"` // of nodes that report; 0: unknown
	Demand   float64       `json:"demand"`   // of routine exchanges
	Priority float64       `json:"priority"` // demand of priority classes
	Drain    float64       `json:"drain"`    // left free to work off what is late
	Budget   float64       `json:"budget"`   // for routine exchanges; below 0: less than none
	Delay    time.Duration `json:"delay"`    // the worst node's
	Effect   time.Duration `json:"effect"`   // from a decision to its effect, measured
	Horizon  time.Duration `json:"horizon"`  // in which to work off what is late
	Fresh    int           `json:"fresh"`    // nodes
	Stale    int           `json:"stale"`    // nodes that still count, but less
	Frozen   bool          `json:"frozen"`   // no node is fresh: the figures are old
}

// output is a share: as it ought to be, as it has got by now, and as it is told.
type output struct {
	want    float64
	raw     float64
	sent    int // parts per million
	set     bool
	reason  Reason
	from    int // before the last change
	changed time.Duration
}

// inForce is what was told.
func (o *output) inForce() float64 { return float64(o.sent) / Everything }

// group is a workload's part of a policy.
type group struct {
	key   groupKey
	mean  mean
	share output
}

// Decide computes all shares anew.
func (c *Controller) Decide(now time.Time) Decision {
	at := c.since(now)
	dt := min(max(at-c.last, 0), maxIdle)
	if !c.decided {
		dt = 0
	}
	c.decided, c.last = true, max(at, c.last)
	at = c.last
	c.absorb()
	gained := c.prune(at)
	c.sort()
	if c.anyFresh(at) { // otherwise what is known is kept
		c.demands(at, dt)
	}
	t := c.totals(at)
	c.distribute(at, dt)
	late := t.Delay > 2*load.Target && !t.Frozen
	if !c.warm && gained && at >= warmUp {
		c.warm = true
		for _, l := range c.sorted { // what comes now is the first that counts
			l.share.set, l.prio.set = false, false
		}
	}
	changed, fell := 0, false
	switch {
	case t.Frozen && at-c.heard() <= idleAfter: // a moment's silence
	case t.Frozen:
		changed = c.decay(at, dt)
	default:
		c.divide()
		changed, fell = c.move(at, dt, late)
	}
	changed += c.defaults(at, late)
	d := Decision{Ready: c.warm, Urgent: c.warm && late && fell, NextTick: now.Add(c.tick()), Changed: changed, Shares: c.shown.Shares, Defaults: c.shown.Defaults, Totals: t}
	if changed > 0 || c.relist {
		c.list(&d)
	}
	c.shown = d
	return d
}

// tick is the time between decisions.
func (c *Controller) tick() time.Duration {
	if c.tau <= minTick {
		return minTick
	}
	return tick
}

// prune forgets nodes that are gone, and tells whether one has reported twice.
func (c *Controller) prune(now time.Duration) (gained bool) {
	for _, n := range c.byName {
		gained = gained || n.gained
	}
	if !c.anyFresh(now) {
		return gained
	}
	isGone := func(n *node) bool { return now-n.at > goneAfter }
	if !slices.ContainsFunc(c.byName, isGone) {
		return gained
	}
	for _, l := range c.leaves {
		for _, w := range l.workers {
			before := len(w.taken)
			w.taken = slices.DeleteFunc(w.taken, func(k intake) bool { return isGone(k.node) })
			c.taken -= before - len(w.taken)
		}
	}
	c.byName = slices.DeleteFunc(c.byName, isGone)
	maps.DeleteFunc(c.nodes, func(_ string, n *node) bool { return isGone(n) })
	return gained
}

func (c *Controller) anyFresh(now time.Duration) bool {
	return slices.ContainsFunc(c.byName, func(n *node) bool { return n.fresh(now) })
}

// totals finds out what nodes can do, and sums that up, and demand. Nodes whose
// capacity nobody knows count as the mean of the others.
func (c *Controller) totals(now time.Duration) Totals {
	t := Totals{Effect: c.tau, Horizon: max(3*(c.tau+c.tick()), minHorizon)}
	for _, n := range c.byName {
		if n.fresh(now) {
			t.Fresh++
		}
	}
	t.Frozen = t.Fresh == 0
	var known, count float64
	for _, n := range c.byName {
		n.present = n.presence(now)
		if t.Frozen && n.known {
			n.present = c.lastPresence(n)
		}
		if n.present == 0 {
			continue
		}
		if !n.fresh(now) {
			t.Stale++
		}
		t.Delay = max(t.Delay, n.delay())
		if n.told > 0 {
			known += n.present * n.told
			count += n.present
		}
	}
	for _, n := range c.byName {
		capacity := n.told
		if capacity == 0 && count > 0 {
			capacity = known / count
		}
		n.capacity = n.present * capacity
		n.drain = max(0, n.capacity*n.delay().Seconds()-underWay*n.present) / t.Horizon.Seconds()
		t.Capacity += n.capacity
		t.Drain += n.drain
	}
	for _, l := range c.sorted {
		t.Demand += l.routine
		t.Priority += l.priority
	}
	c.all.capacity, c.all.drain, c.all.priority = t.Capacity, t.Drain, t.Priority
	t.Budget = c.all.budget()
	return t
}

// lastPresence keeps the sum as it was while nobody reports: only the nodes that
// were there last count.
func (c *Controller) lastPresence(n *node) float64 {
	return n.presence(c.heard())
}

// heard is when a node was heard last.
func (c *Controller) heard() time.Duration {
	var latest time.Duration
	for _, n := range c.byName {
		latest = max(latest, n.at)
	}
	return latest
}
