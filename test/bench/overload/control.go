// Package overload is what the benchmarks of overload have in common: the controls
// that they compare, and how results are written and drawn.
//
// Benchmarks under test/bench may import it; of ours it imports mirror/load and
// mirror/share.
package overload

import (
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
)

// Names of controls, as in the tables.
const (
	None    = "none"
	Breaker = "breaker, 1,024 a gateway"
	Small   = "breaker, 64 a gateway"
	AIMD    = "AIMD"
	Budget  = "**budget**"
)

// Controls are all names.
func Controls() []string { return []string{None, Breaker, Small, AIMD, Budget} }

// tick is between two decisions of the controls that aren't ours.
const tick = 50 * time.Millisecond

// Shares are those that a gateway mirrors, 0 to 1.
type Shares struct{ Routine, Priority float64 }

// Control decides shares, seeing reports. Times are since the start.
type Control interface {
	// Observe takes a report; urgent asks for a decision at once.
	Observe(now time.Duration, r load.Report) (urgent bool)
	// Decide gives the shares of gateways, or nil: as before; and when to be asked again.
	Decide(now time.Duration) (all []Shares, next time.Duration)
	// Effect tells when a decision that was pushed was seen to have an effect.
	Effect(pushed, seen time.Duration)
	// Limit says how much may be under way from a gateway; 0: anything.
	Limit() int
}

// Config is what a control needs to know.
type Config struct {
	Policy   string // all of the load is this one's: "namespace/name"
	Gateways []share.Gateway
	// Priority is the share of priority classes under all controls but the budget,
	// which finds it out: the comparison is not about that.
	Priority float64
	// Limit is how much may be under way from a gateway under AIMD and the budget; 0:
	// anything.
	Limit int
	// OnceLate has the budget decide nothing until a node has been late, as the
	// product has it: before that, nobody knows what nodes can do.
	OnceLate bool
}

// New makes the control of a name.
func New(name string, c Config) Control {
	f := newFixed(len(c.Gateways), Shares{1, min(1, c.Priority)})
	switch name {
	case None:
		return f
	case Breaker: // Envoy's default of max_requests, and as much as peers have
		f.limit = 1024
		return f
	case Small:
		f.limit = 64
		return f
	case AIMD:
		f.limit = c.Limit
		return &aimd{fixed: *f, share: 1}
	case Budget:
		return newBudget(c)
	}
	panic("no control " + name)
}

type fixed struct {
	limit  int
	shares []Shares
}

// Fixed is a control that never decides anything, with a limit of what may be under
// way from a gateway.
func Fixed(gateways int, s Shares, limit int) Control {
	f := newFixed(gateways, s)
	f.limit = limit
	return f
}

func newFixed(gateways int, s Shares) *fixed {
	f := &fixed{shares: make([]Shares, gateways)}
	for i := range f.shares {
		f.shares[i] = s
	}
	return f
}

func (*fixed) Observe(time.Duration, load.Report) bool { return false }
func (f *fixed) Decide(now time.Duration) ([]Shares, time.Duration) {
	return f.shares, now + tick
}
func (*fixed) Effect(time.Duration, time.Duration) {}
func (f *fixed) Limit() int                        { return f.limit }

// aimd raises one share for all by 0.2 a second, and takes 30 % off it at each tick
// at which the node is late.
type aimd struct {
	fixed
	share float64
	delay time.Duration
}

func (a *aimd) Observe(_ time.Duration, r load.Report) bool {
	a.delay = r.Delay()
	return false
}

func (a *aimd) Decide(now time.Duration) ([]Shares, time.Duration) {
	if a.delay > load.Target {
		a.share *= 0.7
	} else {
		a.share += 0.2 * tick.Seconds()
	}
	a.share = min(1, max(0.002, a.share))
	for i := range a.shares {
		a.shares[i].Routine = a.share
	}
	return a.shares, now + tick
}

// budget is ours.
type budget struct {
	fixed
	c      *share.Controller
	index  map[string]int
	wait   bool // for a node that is late
	pushed bool
}

// epoch is when time starts.
func epoch() time.Time { return time.Unix(1e9, 0) }

func newBudget(c Config) *budget {
	config := share.Config{Gateways: c.Gateways, Policies: []share.Policy{{ID: c.Policy, Tenant: "shop", Ceiling: share.Everything}}}
	b := &budget{fixed: *newFixed(len(c.Gateways), Shares{1, 1}), c: share.New(config), index: map[string]int{}, wait: c.OnceLate}
	b.limit = c.Limit
	for i, g := range c.Gateways {
		b.index[g.Pod] = i
	}
	return b
}

func (b *budget) Observe(now time.Duration, r load.Report) bool {
	return b.c.Observe(r, epoch().Add(now))
}

func (b *budget) Decide(now time.Duration) ([]Shares, time.Duration) {
	d := b.c.Decide(epoch().Add(now))
	next := d.NextTick.Sub(epoch())
	b.wait = b.wait && !(d.Ready && d.Totals.Delay > 2*load.Target)
	if b.wait || !d.Ready || d.Changed == 0 && b.pushed {
		return nil, next
	}
	b.pushed = true
	for _, s := range d.Shares {
		b.shares[b.index[s.Gateway]] = Shares{float64(s.PPM) / share.Everything, float64(s.PriorityPPM) / share.Everything}
	}
	return b.shares, next
}

func (b *budget) Effect(pushed, seen time.Duration) {
	b.c.Effect(epoch().Add(pushed), epoch().Add(seen))
}

// State is what a control knows, for whoever looks for reasons; nil: nothing.
func State(c Control, now time.Duration) *share.State {
	b, ok := c.(*budget)
	if !ok {
		return nil
	}
	s := b.c.State(epoch().Add(now))
	return &s
}
