package main

import (
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
)

const policyID = "shop/api"

// names of controls, as in the tables.
const (
	controlNone    = "none"
	controlBreaker = "breaker, 1,024 a gateway"
	controlSmall   = "breaker, 64 a gateway"
	controlAIMD    = "AIMD"
	controlBudget  = "**budget**"
)

func newControl(name string, s scenario) control {
	u := uniform{shares: ones(s.gateways)}
	u.cap(s)
	switch name {
	case controlNone:
		return &u
	case controlBreaker: // Envoy's default of max_requests, and as much as peers have
		u.limit = 1024 * float64(s.gateways)
		return &u
	case controlSmall:
		u.limit = 64 * float64(s.gateways)
		return &u
	case controlAIMD:
		return &aimd{uniform: u, share: 1}
	case controlBudget:
		return newBudget(s)
	}
	panic("no control " + name)
}

// uniform is a control that never decides anything.
type uniform struct {
	limit  float64
	shares []shares
}

// cap leaves priority classes the part of the capacity that they may have: the
// comparison is not about that.
func (u *uniform) cap(s scenario) {
	most := 0.3 / (priorityOf * s.multiple)
	for i := range u.shares {
		u.shares[i].priority = min(1, most)
	}
}

func (*uniform) observe(time.Duration, load.Report) bool { return false }
func (u *uniform) decide(now time.Duration) ([]shares, time.Duration) {
	return u.shares, now + reportMS*time.Millisecond
}
func (*uniform) effect(time.Duration, time.Duration) {}
func (u *uniform) admit() float64                    { return u.limit }

func ones(n int) []shares {
	out := make([]shares, n)
	for i := range out {
		out[i] = shares{1, 1}
	}
	return out
}

// aimd raises one share for all by 0.2 a second, and takes 30 % off it at each tick
// at which the node is late.
type aimd struct {
	uniform
	share float64
	delay time.Duration
}

func (a *aimd) observe(_ time.Duration, r load.Report) bool {
	a.delay = r.Delay()
	return false
}

func (a *aimd) decide(now time.Duration) ([]shares, time.Duration) {
	if a.delay > load.Target {
		a.share *= 0.7
	} else {
		a.share += 0.2 * reportMS / 1000
	}
	a.share = min(1, max(0.002, a.share))
	for i := range a.shares {
		a.shares[i].routine = a.share
	}
	return a.uniform.shares, now + reportMS*time.Millisecond
}

// budget is ours.
type budget struct {
	uniform
	c     *share.Controller
	index map[string]int
}

// epoch is when simulated time starts.
func epoch() time.Time { return time.Unix(1e9, 0) }

func newBudget(s scenario) *budget {
	c := share.Config{Policies: []share.Policy{{ID: policyID, Tenant: "shop", Ceiling: share.Everything}}}
	b := &budget{uniform: uniform{shares: ones(s.gateways)}, index: map[string]int{}}
	for i, g := range newPlant(s).gateways {
		c.Gateways = append(c.Gateways, share.Gateway{Pod: g.name, Workload: "ingress/gateway"})
		b.index[g.name] = i
	}
	b.c = share.New(c)
	return b
}

func (b *budget) observe(now time.Duration, r load.Report) bool {
	return b.c.Observe(r, epoch().Add(now))
}

func (b *budget) decide(now time.Duration) ([]shares, time.Duration) {
	d := b.c.Decide(epoch().Add(now))
	next := d.NextTick.Sub(epoch())
	if !d.Ready || d.Changed == 0 {
		return nil, next
	}
	for _, s := range d.Shares {
		b.shares[b.index[s.Gateway]] = shares{float64(s.PPM) / share.Everything, float64(s.PriorityPPM) / share.Everything}
	}
	return b.uniform.shares, next
}

func (b *budget) effect(pushed, seen time.Duration) {
	b.c.Effect(epoch().Add(pushed), epoch().Add(seen))
}
