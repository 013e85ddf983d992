// Package share decides which part of its traffic each gateway mirrors, from what
// analysis nodes report of their load and of the demand at gateways: each node's rate
// budget, shared out fairly. docs/backpressure.md has the rules and what they do.
//
// It is pure: it reads no clock and no network, starts nothing, and leaves nothing
// to chance. Every replica of the control plane runs it on the same reports, without
// a leader: the order of the reports within a tick makes no difference, and what
// reaches one replica later, or not at all, makes a small one that does not grow.
//
// It never compares clocks of two machines: rates are by nodes' own monotonic time.
// It believes no gateway's counters to another's cost. Everything is bounded: 10,000
// policies, 1,000 nodes, 10,000 gateways, 100,000 pairs of gateway and policy,
// 200,000 series of workers'; what is beyond is left out and counted.
//
// The commands may import it; it imports mirror/load.
package share

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

// Everything is the share of all exchanges, in parts per million.
const Everything = 1_000_000

const (
	maxPolicies    = 10_000
	maxNodes       = 1000
	maxGateways    = 10_000
	maxLeaves      = 100_000
	maxWorkers     = 200_000
	maxLeafWorkers = 128 // of one gateway for one policy
	maxTaken       = 400_000
	maxHeld        = 200_000 // reports, and demands in them
	maxName        = 256
	maxListed      = 1_000_000 // gateways in Config
	maxUptime      = 100 * 365 * 24 * time.Hour
)

// Policy is what counts of one.
type Policy struct {
	ID      string // "namespace/name"
	Tenant  string
	Ceiling int // parts per million: spec.sampling.percent
	Floor   int // parts per million: spec.sampling.adaptive.minPercent
}

// Gateway is a pod that mirrors.
type Gateway struct {
	Pod      string // "namespace/pod", as in load.Demand.Gateway
	Workload string // pods of one share a default
	Weight   float64
}

// Config is what there is to share. Of two entries of one name the first counts.
type Config struct {
	Policies []Policy
	Gateways []Gateway          // others are taken as they are heard of, with weight 1
	Tenants  map[string]float64 // weights; without: 1
}

// Controller computes shares. It is not for concurrent use.
type Controller struct {
	policies map[string]*policy
	pods     map[string]Gateway
	tenants  []*tenant // by name

	held        []arrival // since the last tick
	demandsHeld int

	nodes    map[string]*node
	heardOf  int     // nodes, ever
	byName   []*node // sorted
	all      pool    // of all of them
	even     bool    // something is spread evenly over them
	leaves   map[leafKey]*leaf
	gateways map[string]int // leaves of each
	sorted   []*leaf        // by tenant, gateway, policy
	groups   map[groupKey]*group
	workers  int
	taken    int  // entries of all workers' taken
	resort   bool // leaves came or went
	relist   bool // the same, for what is shown

	start   time.Time
	last    time.Duration // of the latest Decide
	decided bool
	warm    bool
	tau     time.Duration
	shown   Decision
	faults  map[Fault]uint64
	claims  [3][]claim
}

// Fault is something wrong with what was reported: a closed set.
type Fault string

const (
	FaultFull    Fault = "full"    // beyond a bound
	FaultName    Fault = "name"    // empty or too long
	FaultPolicy  Fault = "policy"  // not known here
	FaultEpoch   Fault = "epoch"   // a node restarted; often: two nodes of one name
	FaultUptime  Fault = "uptime"  // a node's time went back
	FaultClock   Fault = "clock"   // a node's time and ours ran apart by more than a second
	FaultCounter Fault = "counter" // counters went back, jumped or contradict each other
	FaultDemand  Fault = "demand"  // a gateway sends more than it counts
)

// Faults are all of them.
func Faults() []Fault {
	return []Fault{FaultFull, FaultName, FaultPolicy, FaultEpoch, FaultUptime, FaultClock, FaultCounter, FaultDemand}
}

type policy struct {
	Policy
	tenant *tenant
	mean   mean
	share  output // where nothing more is known
}

type tenant struct {
	name   string
	weight float64
	flows  [2]flow // by leaf.class
}

type leafKey struct{ gateway, policy string }

type groupKey struct{ workload, policy string }

// New makes a controller. It decides nothing until it has heard of nodes for a
// while.
func New(c Config) *Controller {
	k := &Controller{
		nodes: map[string]*node{}, leaves: map[leafKey]*leaf{}, gateways: map[string]int{}, groups: map[groupKey]*group{},
		tau: firstTau, faults: map[Fault]uint64{},
	}
	k.Configure(c)
	return k
}

// Configure replaces the configuration. What is known of nodes and gateways stays,
// as far as their policies do.
func (c *Controller) Configure(config Config) {
	before := c.policies
	c.policies, c.pods, c.tenants = map[string]*policy{}, map[string]Gateway{}, nil
	tenants := map[string]*tenant{}
	for _, p := range config.Policies {
		if _, twice := c.policies[p.ID]; twice || len(c.policies) >= maxPolicies {
			c.faults[FaultFull]++
			continue
		}
		p.Ceiling = min(max(p.Ceiling, 0), Everything)
		p.Floor = min(max(p.Floor, 0), p.Ceiling)
		t := tenants[p.Tenant]
		if t == nil {
			t = &tenant{name: p.Tenant, weight: weight(config.Tenants[p.Tenant])}
			tenants[p.Tenant] = t
			c.tenants = append(c.tenants, t)
		}
		c.policies[p.ID] = &policy{Policy: p, tenant: t}
	}
	slices.SortFunc(c.tenants, func(a, b *tenant) int { return strings.Compare(a.name, b.name) })
	for _, g := range config.Gateways[:min(len(config.Gateways), maxListed)] {
		if _, twice := c.pods[g.Pod]; !twice {
			g.Weight = weight(g.Weight)
			c.pods[g.Pod] = g
		}
	}
	c.groups = map[groupKey]*group{}
	for key, l := range c.leaves {
		if c.policies[key.policy] == nil {
			c.removeLeaf(l)
			continue
		}
		if was := before[key.policy]; was != nil && was.Ceiling < c.policies[key.policy].Ceiling {
			l.share.set = false // an edit takes effect at once, not gradually
		}
		c.place(l)
	}
	c.resort = true
}

// weight of what is configured; 0 or garbage is 1.
func weight(w float64) float64 {
	if !(w > 0) {
		return 1
	}
	return min(max(w, 1e-6), 1e6)
}

// Observe takes a report, with the time of its arrival here; it is the
// controller's from then on. It tells whether Decide should be called at once
// rather than at the next tick.
func (c *Controller) Observe(r load.Report, received time.Time) (urgent bool) {
	switch {
	case r.Node == "" || len(r.Node) > maxName:
		c.faults[FaultName]++
		return false
	case r.Uptime < 0 || r.Uptime > maxUptime:
		c.faults[FaultUptime]++
		return false
	}
	if !(r.Utilization >= 0) || math.IsInf(r.Utilization, 0) {
		r.Utilization = 0
		c.faults[FaultCounter]++
	}
	if len(c.held) >= maxHeld || c.demandsHeld >= maxHeld { // far more than a tick brings
		c.absorb()
	}
	at := c.since(received)
	c.held = append(c.held, arrival{r, at})
	c.demandsHeld += len(r.Demands)
	return r.Delay() > 2*load.Target && at-c.last >= minTick
}

// arrival is a report with the time of its arrival.
type arrival struct {
	load.Report
	at time.Duration
}

// absorb takes the reports held, in an order that does not depend on that of their
// arrival. Of a node's, those of the epoch that it is known by come first.
func (c *Controller) absorb() {
	older := func(a arrival) int {
		if n := c.nodes[a.Node]; n != nil && n.report.Epoch == a.Epoch {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(c.held, func(a, b arrival) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), cmp.Compare(older(a), older(b)), cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Uptime, b.Uptime))
	})
	for i := range c.held {
		a := &c.held[i]
		n := c.node(a.Node)
		if n == nil {
			c.faults[FaultFull]++
			continue
		}
		if !n.advance(&a.Report, a.at, c.faults) {
			continue
		}
		for j := range a.Demands {
			c.hear(n, &a.Report, &a.Demands[j])
		}
	}
	clear(c.held)
	c.held, c.demandsHeld = c.held[:0], 0
}

// node finds one, or makes it; nil: there are too many.
func (c *Controller) node(name string) *node {
	n := c.nodes[name]
	if n == nil && len(c.nodes) < maxNodes {
		n = &node{id: c.heardOf, pool: pool{name: strings.Clone(name)}}
		c.heardOf++
		c.nodes[n.name] = n
		i, _ := slices.BinarySearchFunc(c.byName, n.name, func(n *node, name string) int { return strings.Compare(n.name, name) })
		c.byName = slices.Insert(c.byName, i, n)
	}
	return n
}

// Effect tells that a share pushed at one time was in an event seen at another, by
// one clock: how long it takes for decisions to have an effect.
func (c *Controller) Effect(pushed, seen time.Time) {
	d := seen.Sub(pushed)
	if d <= 0 || d > maxEffect {
		return
	}
	gain := 0.1
	if d > c.tau {
		gain = 0.5 // to believe it shorter than it is would be the worse mistake
	}
	c.tau += time.Duration(gain * float64(d-c.tau))
	c.tau = min(max(c.tau, minTau), maxTau)
}

// since is the controller's own time line.
func (c *Controller) since(t time.Time) time.Duration {
	if c.start.IsZero() {
		c.start = t
	}
	return t.Sub(c.start)
}

// place finds the policy, tenant and group of a leaf in the present configuration.
func (c *Controller) place(l *leaf) {
	l.policy = c.policies[l.key.policy]
	g := c.pods[l.key.gateway]
	l.weight = weight(g.Weight)
	key := groupKey{g.Workload, l.key.policy}
	l.group = c.groups[key]
	if l.group == nil {
		l.group = &group{key: key}
		c.groups[key] = l.group
	}
	c.resort = true
}

func (c *Controller) removeLeaf(l *leaf) {
	for _, w := range l.workers {
		c.forget(w)
	}
	delete(c.leaves, l.key)
	if c.gateways[l.key.gateway]--; c.gateways[l.key.gateway] == 0 {
		delete(c.gateways, l.key.gateway)
	}
	c.resort = true
}

func (c *Controller) forget(w *worker) {
	c.workers--
	c.taken -= len(w.taken)
}

// sort puts leaves into the order in which they are computed and shown.
func (c *Controller) sort() {
	if !c.resort {
		return
	}
	c.resort, c.relist = false, true
	c.sorted = c.sorted[:0]
	used := map[groupKey]*group{}
	for _, l := range c.leaves {
		c.sorted = append(c.sorted, l)
		used[l.group.key] = l.group
	}
	c.groups = used
	slices.SortFunc(c.sorted, func(a, b *leaf) int {
		return cmp.Or(strings.Compare(a.policy.Tenant, b.policy.Tenant), strings.Compare(a.key.gateway, b.key.gateway), strings.Compare(a.key.policy, b.key.policy))
	})
	for i, l := range c.sorted {
		l.place = i
		if i > 0 && c.sorted[i-1].key.gateway == l.key.gateway && c.sorted[i-1].policy.tenant == l.policy.tenant {
			l.place = c.sorted[i-1].place
		}
	}
}

// mean of shares, weighted by demand.
type mean struct{ sum, weight, plain, n float64 }

func (m *mean) add(share, demand float64) {
	m.sum += share * demand
	m.weight += demand
	m.plain += share
	m.n++
}

func (m *mean) value(without float64) float64 {
	switch {
	case m.weight > 0:
		return m.sum / m.weight
	case m.n > 0:
		return m.plain / m.n
	}
	return without
}
