package share

import (
	"cmp"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	partSpan  = time.Second // smoothing of where exchanges go, if slowCount do so meanwhile; else it is slowestSpan
	leastPart = 0.0001      // of a leaf's exchanges, by a worker; what is less is taken to be spread evenly
	leastEven = 0.01        // the same; what is less is not worth it
	leastRest = 0.001       // of a budget; what is less is not worth it
	material  = 0.4         // the same: nodes that get so much bind the leaf
)

// pool is a capacity that is shared out: a node's, or that of all.
type pool struct {
	name     string  // of the node
	present  float64 // how much it counts, 0 to 1; all: the sum
	capacity float64 // exchanges a second, as far as it counts
	drain    float64 // left free to work off what is late
	demand   float64 // routine exchanges that would go there
	priority float64 // those of priority classes
	parts    []part  // in the order of leaves
	tight    bool    // claimed beyond the budget
	full     float64 // budget, without what comes spread evenly
	less     float64 // the same, less drain
}

// part of a leaf's exchanges.
type part struct {
	*leaf
	of    float64
	claim claim
}

// most gives what priority classes may have.
func (p *pool) most() (budget, less float64) {
	return priorityPart * p.capacity, priorityPart * p.capacity
}

// room gives what all may have; see fill.
func (p *pool) room() (budget, less float64) {
	return headRoom * p.capacity, headRoom*p.capacity - p.drain
}

// budget is for routine exchanges.
func (p *pool) budget() float64 {
	return headRoom*p.capacity - min(p.priority, priorityPart*p.capacity) - p.drain
}

func (p *pool) add(l *leaf, of float64) {
	p.demand += of * l.routine
	p.priority += of * l.priority
	if last := len(p.parts) - 1; last >= 0 && p.parts[last].leaf == l { // of another worker
		p.parts[last].of += of
		return
	}
	p.parts = append(p.parts, part{leaf: l, of: of})
}

// claims lets all parts claim what their leaves do, and sums that up. To have an even
// share on the whole, a leaf must have as much at a node as it sends there.
func (p *pool) claims() (sum float64) {
	for i := range p.parts {
		k := &p.parts[i]
		k.claim = claim{weight: k.of, min: k.of * k.whole.min, max: k.of * k.whole.max}
		sum += k.claim.max
	}
	return sum
}

// distribute finds out which part of each leaf's exchanges goes to which node, by
// what nodes got lately. What went to a node of which nothing is heard any more, and
// what nobody tells, is taken to be spread evenly.
func (c *Controller) distribute(now, dt time.Duration) {
	c.all = pool{capacity: c.all.capacity, drain: c.all.drain, parts: c.all.parts[:0]}
	for _, n := range c.byName {
		n.demand, n.priority, n.parts = 0, 0, n.parts[:0]
		c.all.present += n.present
	}
	least, most := 1-load.Gain(dt, partSpan), 1-load.Gain(dt, slowestSpan)
	var even pool
	for _, l := range c.sorted {
		c.all.add(l, 1)
		l.distribute(least, most, l.untold > 0 && now-l.untold < forgetAfter)
		even.demand += l.even * l.routine
		even.priority += l.even * l.priority
	}
	c.even = even.demand+even.priority > 0
	for _, n := range c.byName {
		n.demand += even.demand * n.present / c.all.present
		n.priority += even.priority * n.present / c.all.present
	}
}

// distribute hands the leaf's parts to nodes, and keeps least to most of what is known.
func (l *leaf) distribute(least, most float64, untold bool) {
	total := 0.0
	for _, w := range l.workers {
		for i := range w.taken {
			total += w.taken[i].recent
		}
	}
	keep := min(most, max(least, slowCount/total))
	l.even = 1
	for _, w := range l.workers {
		for i := range w.taken {
			k := &w.taken[i]
			if of := k.recent / total * k.node.present; of > leastPart && !untold {
				k.node.add(l, of)
				l.even -= of
			}
			k.recent *= keep
		}
	}
	if l.even < leastEven {
		l.even = 0
	}
}

// bound is what a leaf may have by a budget.
type bound struct {
	by  *pool
	of  float64 // part of the leaf's exchanges that counts there
	got float64
}

// allot shares every budget out: that of all nodes together to what is spread evenly,
// and each node's to what goes there. A leaf has what the tightest nodes that get a
// material part of it leave it. What it then leaves at others goes to those that are
// at home there.
func (c *Controller) allot(of func(*leaf) claim, budget func(*pool) (full, less float64)) {
	for _, l := range c.sorted {
		l.whole, l.bound, l.bounds = of(l), bound{}, l.bounds[:0]
	}
	even := 0.0
	if c.even {
		full, less := budget(&c.all)
		tight := c.all.claims() > less
		c.level(c.all.parts, full, less)
		for _, k := range c.all.parts {
			even += k.even * k.claim.got
			if tight && k.even > 0 {
				k.bounds = append(k.bounds, bound{&c.all, k.even, k.claim.got})
			}
		}
	}
	for _, n := range c.byName {
		n.full, n.less = budget(&n.pool)
		n.full -= even * n.present / c.all.present
		n.less -= even * n.present / c.all.present
		if n.tight = n.capacity > 0 && n.claims() > n.less; n.tight {
			c.level(n.parts, n.full, n.less)
			for _, k := range n.parts {
				k.bounds = append(k.bounds, bound{&n.pool, k.of, k.claim.got / k.of})
			}
		}
	}
	for _, l := range c.sorted {
		l.settle()
	}
	for _, n := range c.byName {
		if n.tight && n.rest() {
			c.level(n.parts, n.full, n.less)
			for _, k := range n.parts {
				if k.atHome(&n.pool) {
					k.bound.got = k.claim.got / k.of
				}
			}
		}
	}
}

// settle finds the bound that counts.
func (l *leaf) settle() {
	slices.SortStableFunc(l.bounds, func(a, b bound) int { return cmp.Compare(a.got, b.got) })
	sum := 0.0
	for _, b := range l.bounds {
		if sum += b.of; sum >= material {
			l.bound = b
			return
		}
	}
}

// atHome tells whether the leaf is bound by the pool, and by no other.
func (l *leaf) atHome(p *pool) bool { return l.bound.by == p && l.bound.of > 1-material }

// rest tells whether those bound elsewhere leave anything to those at home, and lets
// them claim no more than they have.
func (p *pool) rest() bool {
	rest, home := p.less, false
	for i := range p.parts {
		k := &p.parts[i]
		if k.atHome(p) {
			home = true
		} else {
			k.claim.max = k.claim.got
			if k.bound.by != nil {
				k.claim.max = min(k.claim.max, k.of*k.bound.got)
			}
			k.claim.min = k.claim.max
		}
		rest -= min(k.claim.got, k.claim.max)
	}
	return home && rest > leastRest*p.less
}

// level shares a budget of exchanges a second out over tenants, their gateways, and the
// policies of these; see fill.
func (c *Controller) level(parts []part, budget, less float64) {
	tenants, gateways, policies := c.claims[0][:0], c.claims[1][:0], c.claims[2][:0]
	for i := 0; i < len(parts); {
		t := parts[i].policy.tenant
		sum := claim{weight: t.weight}
		for ; i < len(parts) && parts[i].policy.tenant == t; i++ {
			sum.add(parts[i].claim)
		}
		tenants = append(tenants, sum)
	}
	fill(tenants, budget, less)
	for i, t := 0, 0; i < len(parts); t++ {
		first := i
		gateways = gateways[:0]
		for i < len(parts) && parts[i].policy.tenant == parts[first].policy.tenant {
			sum := gatewaySum(parts[i:])
			gateways = append(gateways, sum)
			i += sum.of
		}
		fill(gateways, tenants[t].full, tenants[t].got)
		for j, g := first, 0; j < i; g++ {
			one := &gateways[g]
			if one.of == 1 {
				parts[j].claim.got = one.got
				j++
				continue
			}
			policies = policies[:0]
			for _, k := range parts[j : j+one.of] {
				policies = append(policies, k.claim)
			}
			fill(policies, one.full, one.got)
			for _, p := range policies {
				parts[j].claim.got = p.got
				j++
			}
		}
	}
	c.claims = [3][]claim{tenants, gateways, policies}
}

// gatewaySum is the claim of all parts of a tenant at one gateway, from the first on.
func gatewaySum(parts []part) (sum claim) {
	l := parts[0].leaf
	for sum.of < len(parts) && parts[sum.of].place == l.place {
		k := &parts[sum.of]
		sum.add(k.claim)
		sum.weight = max(sum.weight, l.weight*k.of)
		sum.of++
	}
	return sum
}

func (c *claim) add(o claim) {
	c.min += o.min
	c.max += o.max
}
