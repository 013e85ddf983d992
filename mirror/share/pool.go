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
	fullness float64 // claims by budget
}

// part of a leaf's exchanges.
type part struct {
	*leaf
	of float64
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
	p.parts = append(p.parts, part{l, of})
}

// claimed is the sum of claims.
func (p *pool) claimed(of func(*leaf) claim) (sum float64) {
	for _, k := range p.parts {
		sum += k.of * of(k.leaf).max
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

// allot shares every node's budget out: first that of all nodes together, to what is
// spread evenly; then node by node, those with the most claims first. A leaf is bound
// by the nodes that are used up, from the one on by which a material part of it goes to
// such; at the others it claims no more than it has got.
func (c *Controller) allot(of func(*leaf) claim, budget func(*pool) (budget, less float64), set func(*leaf, *pool, float64)) {
	for _, l := range c.sorted {
		l.scarce = 0
	}
	even := 0.0
	if c.even {
		most, less := budget(&c.all)
		scarce := c.all.claimed(of) > less
		c.level(c.all.parts, most, less, of, func(l *leaf, got float64) {
			even += l.even * got
			if !scarce {
				return
			}
			if l.scarce = l.even; l.scarce >= material {
				set(l, &c.all, got)
			}
		})
	}
	c.fullest = c.fullest[:0]
	for _, n := range c.byName {
		if n.capacity > 0 {
			_, less := budget(&n.pool)
			n.fullness = (n.claimed(of) + even*n.present/c.all.present) / max(less, 1e-9)
			c.fullest = append(c.fullest, &n.pool)
		}
	}
	slices.SortStableFunc(c.fullest, func(a, b *pool) int { return cmp.Compare(b.fullness, a.fullness) })
	for _, p := range c.fullest {
		most, less := budget(p)
		most, less = most-even*p.present/c.all.present, less-even*p.present/c.all.present
		if p.claimed(of) <= less {
			continue
		}
		binds := false
		for _, k := range p.parts {
			k.scarce += k.of
			binds = binds || k.scarce >= material
		}
		if binds {
			c.level(p.parts, most, less, of, func(l *leaf, got float64) {
				if l.scarce >= material {
					set(l, p, got)
				}
			})
		}
	}
}

// level shares a budget of exchanges a second out, by leaves' claims; see fill.
func (c *Controller) level(parts []part, budget, less float64, of func(*leaf) claim, set func(*leaf, float64)) {
	tenants, gateways, policies := c.claims[0][:0], c.claims[1][:0], c.claims[2][:0]
	for i := 0; i < len(parts); {
		t := parts[i].policy.tenant
		sum := claim{weight: t.weight}
		for ; i < len(parts) && parts[i].policy.tenant == t; i++ {
			sum.add(parts[i].claim(of))
		}
		tenants = append(tenants, sum)
	}
	fill(tenants, budget, less)
	for i, t := 0, 0; i < len(parts); t++ {
		first := i
		gateways = gateways[:0]
		for i < len(parts) && parts[i].policy.tenant == parts[first].policy.tenant {
			sum, n := gatewaySum(parts[i:], of)
			gateways = append(gateways, sum)
			i += n
		}
		fill(gateways, tenants[t].full, tenants[t].got)
		for j, g := first, 0; j < i; g++ {
			_, n := gatewaySum(parts[j:], of)
			if n == 1 {
				set(parts[j].leaf, gateways[g].got/parts[j].of)
				j++
				continue
			}
			policies = policies[:0]
			for _, k := range parts[j : j+n] {
				policies = append(policies, k.claim(of))
			}
			fill(policies, gateways[g].full, gateways[g].got)
			for i, k := range parts[j : j+n] {
				set(k.leaf, policies[i].got/k.of)
			}
			j += n
		}
	}
	c.claims = [3][]claim{tenants, gateways, policies}
}

// claim of the part: to have an even share on the whole, a leaf must have as much at
// a node as it sends there.
func (p part) claim(of func(*leaf) claim) claim {
	k := of(p.leaf)
	return claim{weight: p.of, min: p.of * k.min, max: p.of * k.max}
}

// gatewaySum is the claim of all n parts of a tenant at one gateway, from the first on.
func gatewaySum(parts []part, of func(*leaf) claim) (sum claim, n int) {
	l := parts[0].leaf
	for _, k := range parts {
		if k.key.gateway != l.key.gateway || k.policy.tenant != l.policy.tenant {
			break
		}
		one := k.claim(of)
		sum.add(one)
		sum.weight = max(sum.weight, l.weight*one.weight)
		n++
	}
	return sum, n
}

func (c *claim) add(o claim) {
	c.min += o.min
	c.max += o.max
}
