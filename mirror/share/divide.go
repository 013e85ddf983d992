package share

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

// divide shares the budgets out: over tenants, over the gateways of each, and over
// the policies of each of these.
func (c *Controller) divide() {
	for _, l := range c.sorted {
		l.share.want, l.prio.want = math.Inf(1), 1
		l.spare, l.by, l.share.reason = l.priority, nil, ReasonBudget
	}
	if c.all.capacity == 0 {
		return
	}
	if slices.ContainsFunc(c.byName, func(n *node) bool { return n.priority > priorityPart*n.capacity }) {
		c.allot((*leaf).priorities, (*pool).most)
		for _, l := range c.sorted {
			if l.bound.by != nil && l.priority > 0 {
				l.spare, l.by = l.bound.got, l.bound.by
				l.prio.want = l.spare / l.priority
			}
		}
	}
	c.allot((*leaf).claim, (*pool).room)
	for _, l := range c.sorted {
		p := l.bound.by
		if p == nil || l.routine == 0 {
			continue
		}
		l.share.want, l.by = max(0, l.bound.got-l.spare)/l.routine, p
		if p.drain > drainPart*p.capacity {
			l.share.reason = ReasonDrain
		}
	}
}

// claim of a leaf: what its ceiling lets through; and in any case what its priority
// classes have, which count towards its fair part, and what its floor does, as that
// comes whatever is decided.
func (l *leaf) claim() claim {
	return claim{min: l.spare + l.floor, max: l.spare + max(l.floor, l.ceiling()*l.routine)}
}

// priorities is the claim of its priority classes.
func (l *leaf) priorities() claim { return claim{max: l.priority} }

func (l *leaf) ceiling() float64 { return float64(l.policy.Ceiling) / Everything }

// least is the floor, and what it takes to keep demand in sight.
func (l *leaf) least() float64 {
	return min(max(float64(l.policy.Floor)/Everything, leastShare), l.ceiling())
}

// move lets shares follow what they ought to be: down at once, up gradually.
func (c *Controller) move(now, dt time.Duration, late bool) (changed int, fell bool) {
	for _, l := range c.sorted {
		if !l.share.set && !l.isKnown() && l.group.share.set {
			l.share.want = l.group.share.inForce() // until its demand is known
		}
		// Of many small gateways that happen to be heard of late, all shares would be too
		// high: it takes some exchanges to know how many there are.
		gain := load.Gain(dt, countSpan(l.routine, riseSpan))
		l.share.approach(dt, gain, l.least(), l.ceiling())
		before := l.share.sent
		if l.share.tell(now, l.ceiling(), late) {
			changed++
			fell = fell || l.share.sent < before
		}
		l.prio.reason = ReasonPriority
		l.prio.approach(dt, gain, leastShare, 1)
		if l.prio.tell(now, 1, late) {
			changed++
		}
	}
	return changed, fell
}

func (l *leaf) isKnown() bool {
	for _, w := range l.workers {
		if w.known {
			return true
		}
	}
	return l.lies
}

// approach moves a share towards what is wanted: down at once; up e-fold in riseSpan or,
// if that is more, by a part of the way.
func (o *output) approach(dt time.Duration, gain, least, ceiling float64) {
	target := o.want
	switch {
	case target >= ceiling:
		target, o.reason = ceiling, ReasonCeiling
	case target <= least:
		target, o.reason = least, ReasonFloor
	}
	if o.set {
		much := max(o.raw, leastShare)*math.Exp(dt.Seconds()/riseSpan.Seconds()) + leastShare*dt.Seconds()
		if most := max(much, o.raw+gain*(target-o.raw)); target > most {
			target, o.reason = most, ReasonRise
		}
	}
	o.raw = target
}

// tell decides whether the share is worth telling anew.
func (o *output) tell(now time.Duration, ceiling float64, late bool) bool {
	ppm := quantise(o.raw)
	if o.raw >= ceiling {
		ppm = int(math.Round(ceiling * Everything))
	}
	if o.set {
		change := math.Abs(float64(ppm-o.sent)) / float64(max(o.sent, 1))
		switch {
		case ppm == o.sent:
			return false
		case o.raw >= ceiling, change >= band, late && ppm < o.sent && change >= lateBand:
		default:
			return false
		}
	}
	changed := ppm != o.sent
	if changed {
		o.from, o.changed = o.sent, now
	}
	o.sent, o.set = ppm, true
	return changed
}

// quantise rounds to three digits, the last of them 0 or 5: replicas that mean
// almost the same mostly say the same.
func quantise(share float64) int {
	ppm := share * Everything
	if ppm < 100 {
		return int(math.Round(ppm))
	}
	step := 5 * math.Pow(10, math.Floor(math.Log10(ppm))-2)
	return int(math.Round(math.Round(ppm/step) * step))
}

// decay lowers all shares slowly, for want of anybody who knows better.
func (c *Controller) decay(now, dt time.Duration) (changed int) {
	keep := math.Exp(-dt.Seconds() / staleFall.Seconds())
	for _, l := range c.sorted {
		least := l.least()
		l.share.raw = least + max(0, l.share.raw-least)*keep
		l.share.reason = ReasonStale
		if l.share.tell(now, l.ceiling(), false) {
			changed++
		}
	}
	return changed
}

// defaults are the means of what pods of a workload have.
func (c *Controller) defaults(now time.Duration, late bool) (changed int) {
	for _, g := range c.groups {
		g.mean = mean{}
	}
	for _, p := range c.policies {
		p.mean = mean{}
	}
	for _, l := range c.sorted {
		l.group.mean.add(l.share.inForce(), l.routine)
		l.policy.mean.add(l.share.inForce(), l.routine)
	}
	for _, p := range c.policies {
		ceiling := float64(p.Ceiling) / Everything
		p.share.raw = p.mean.value(ceiling)
		if p.share.tell(now, ceiling, late) {
			changed++
		}
	}
	for key, g := range c.groups {
		p := c.policies[key.policy]
		g.share.raw = g.mean.value(p.share.raw)
		if g.share.tell(now, float64(p.Ceiling)/Everything, late) {
			changed++
		}
	}
	return changed
}

// list makes new slices of what is told.
func (c *Controller) list(d *Decision) {
	c.relist = false
	d.Shares = make([]Share, 0, len(c.sorted))
	for _, l := range c.sorted {
		d.Shares = append(d.Shares, Share{
			Gateway: l.key.gateway, Workload: l.group.key.workload, Policy: l.key.policy,
			PPM: l.share.sent, PriorityPPM: l.prio.sent, Reason: l.why(),
		})
	}
	d.Defaults = make([]Default, 0, len(c.policies)+len(c.groups))
	for id, p := range c.policies {
		d.Defaults = append(d.Defaults, Default{"", id, p.share.sent})
	}
	for key, g := range c.groups {
		if key.workload != "" {
			d.Defaults = append(d.Defaults, Default{key.workload, key.policy, g.share.sent})
		}
	}
	slices.SortFunc(d.Defaults, func(a, b Default) int {
		return cmp.Or(strings.Compare(a.Workload, b.Workload), strings.Compare(a.Policy, b.Policy))
	})
}

// isBound tells whether a budget binds its share.
func (l *leaf) isBound() bool { return l.share.want < l.ceiling() || l.prio.want < 1 }

// why says what binds the share.
func (l *leaf) why() Reason {
	if l.prio.sent < Everything {
		return ReasonPriority
	}
	return l.share.reason
}
