package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
	"github.com/periscope-mesh/periscope/test/bench/overload"
)

const (
	usual       = 50_000.0 // exchanges a second that a node can analyse
	dropCost    = 0.12     // of an exchange's cost is that of reading
	priorityOf  = 0.05     // of demand is of a priority class
	goodWithin  = 0.1      // seconds from arrival to analysis
	queueLength = 2.0      // seconds of nominal capacity; beyond it the newest are dropped
	batchMS     = 100      // the plugin sends a batch then, or when it has batchEvents
	batchEvents = 48
	burstMS     = 20
	sampleMS    = 10
	reportMS    = 50
	leastMS     = 20  // between urgent reports
	reportLag   = 1   // ms from a node to the control plane
	moveMS      = 200 // from a node's end, or return, until its gateways go elsewhere, or come back
)

// scenario is one run's conditions.
type scenario struct {
	gateways      int
	tau           time.Duration // mean time from a decision to its effect at a gateway
	multiple      float64       // of capacity that is demanded during the step
	nominal       float64       // exchanges a second that a node can analyse
	capacity      float64       // part of nominal that there is during the step
	guard         bool
	hot           bool // ten gateways; nine want 5 % of the capacity each, the first the rest
	homes         homes
	misread       float64
	from, to, end time.Duration
	seed          uint64
	trace         bool
}

func (s scenario) String() string {
	return fmt.Sprintf("%d gateways, %v, ×%g, capacity %g, guard %t, hot %t, seed %d", s.gateways, s.tau, s.multiple, s.capacity, s.guard, s.hot, s.seed)
}

// homes is how gateways spread over several nodes. Each gateway sends to one node, in
// turn, as long as that is there; the last ones roam: they send to all alike, and want
// half as much as those of one node. The step of demand is that of the first node's
// gateways alone, unless that node is away meanwhile: then demand is the same all the
// time.
type homes struct {
	nodes   int // 0: one
	roaming int
	away    bool
}

// outcome of a run, between from and to; of several nodes, of the first one, or, if
// that is away, of the second.
type outcome struct {
	goodput  float64 // analysed in time, of what could have been
	priority float64 // exchanges of a priority class analysed in time, of those that were to be mirrored
	waste    float64 // mirrored, then dropped, of what was mirrored
	longest  float64 // ms of delay
	p99      float64 // ms of delay
	settled  float64 // s, see overload.Settled
	unsteady float64 // variation of the share beyond that of demand
	recovery float64 // s from the end of the step until the share is 0.95
	pushes   float64 // changes a second and gateway
	quiet    float64 // share that the quiet gateways had, in scenario hot, or those of other nodes
	roaming  float64 // the same of those that roam
	home     float64 // the same of those of the first node
	others   float64 // goodput of the other nodes
	otherP99 float64 // ms of delay at the other nodes
	points   []overload.Point
}

// gateway is one, with one worker and one policy.
type gateway struct {
	name     string
	part     float64 // of demand
	burst    float64
	rate     float64 // exchanges a ms, in this block
	share    overload.Shares
	home     int // node; −1: all of them
	lag      int // ms until a decision takes effect
	next     []change
	eligible uint64
	priority uint64
	mirrored uint64
	batched  uint64 // mirrored, at the last batch
	batches  int
	kept     [2]float64 // routine exchanges mirrored and wanted, in the step but for its first second
}

type change struct {
	at    int
	share overload.Shares
}

// plant is gateways and nodes, in steps of 1 ms.
type plant struct {
	scenario
	rng      *rand.Rand
	block    int // ms after which gateways' arrivals are drawn anew
	gateways []gateway
	nodes    []*node
	now      int // ms
	reports  []queuedReport

	out                      outcome
	mirroredWin, eligibleWin float64
	shares, demands          []float64
	pushed                   int
}

type queuedReport struct {
	at int
	r  load.Report
}

func newPlant(s scenario) *plant {
	p := &plant{scenario: s, rng: rand.New(rand.NewPCG(s.seed, 1)), gateways: make([]gateway, s.gateways)}
	p.block = 5
	if s.gateways > 1000 {
		p.block = burstMS // they are a crowd
	}
	p.out.recovery = math.NaN()
	for i := range max(1, s.homes.nodes) {
		p.nodes = append(p.nodes, p.start(i, 0))
	}
	sums := make([]float64, len(p.nodes)+1) // of those at home at each node, and of those that roam
	for i := range p.gateways {
		g := &p.gateways[i]
		g.name = gatewayName(i)
		g.home = i % len(p.nodes)
		if i >= s.gateways-s.homes.roaming {
			g.home = -1
		}
		g.part = 1 / math.Sqrt(float64(i/len(p.nodes)+1))
		g.share = overload.Shares{Routine: 1, Priority: 1}
		g.lag = max(1, int(float64(ms(s.tau))*(0.5+p.rng.Float64())))
		sums[g.home+1] += g.part
	}
	for i := range p.gateways {
		g := &p.gateways[i]
		g.part /= sums[g.home+1]
		if g.home < 0 {
			g.part /= 2
		}
	}
	return p
}

func ms(d time.Duration) int { return int(d / time.Millisecond) }

// step tells whether the step is on.
func (p *plant) step() bool { return p.now >= ms(p.from) && p.now < ms(p.to) }

func (p *plant) nodeCapacity() float64 {
	if p.step() {
		return p.nominal * p.capacity
	}
	return p.nominal
}

// away tells whether a node is gone, or gateways behave as though it were: they take
// a moment to see that.
func (p *plant) away(node, moment int) bool {
	return p.homes.away && node == 0 && p.now >= ms(p.from)+moment && p.now < ms(p.to)+moment
}

// want is the demand of a gateway, in exchanges a second.
func (p *plant) want(i int) float64 {
	if p.hot {
		if i > 0 {
			return 0.05 * p.nominal
		}
		if p.step() {
			return (p.multiple - 0.05*float64(len(p.gateways)-1)) * p.nominal
		}
		return 0.05 * p.nominal
	}
	m := 0.5
	if p.homes.away || p.step() && p.gateways[i].home == 0 {
		m = p.multiple
	}
	return m * p.nominal * p.gateways[i].part
}

// targets are the nodes that a gateway sends to.
func (p *plant) targets(g *gateway, to []int) []int {
	to = to[:0]
	if g.home >= 0 && !p.away(g.home, moveMS) {
		return append(to, g.home)
	}
	for i := range p.nodes {
		if !p.away(i, moveMS) {
			to = append(to, i)
		}
	}
	return to
}

// policyID is of the only policy.
const policyID = "shop/api"

// newControl makes the control of a name for a scenario.
func newControl(name string, s scenario) overload.Control {
	c := overload.Config{Policy: policyID, Priority: 0.3 / (priorityOf * s.multiple)}
	for i := range s.gateways {
		c.Gateways = append(c.Gateways, share.Gateway{Pod: gatewayName(i), Workload: "ingress/gateway"})
	}
	return overload.New(name, c)
}

func gatewayName(i int) string { return fmt.Sprintf("ingress/gateway-%05d", i) }

// play runs a scenario.
func play(s scenario, c overload.Control) outcome {
	p := newPlant(s)
	next := 0
	for ; p.now < ms(s.end); p.now++ {
		if s.homes.away && p.now == ms(s.to) { // it comes back, and knows nothing
			n := p.start(0, p.now)
			n.good, n.possible, n.came, n.spoilt = p.nodes[0].good, p.nodes[0].possible, p.nodes[0].came, p.nodes[0].spoilt
			p.nodes[0] = n
		}
		p.arrive()
		for i, n := range p.nodes {
			if p.away(i, 0) {
				p.lose(n)
				continue
			}
			p.work(n, c)
			if p.now%sampleMS == 0 {
				p.look(n)
			}
		}
		urgent := false
		for len(p.reports) > 0 && p.reports[0].at <= p.now {
			urgent = c.Observe(time.Duration(p.now)*time.Millisecond, p.reports[0].r) || urgent
			p.reports = p.reports[1:]
		}
		if urgent || p.now >= next {
			all, at := c.Decide(time.Duration(p.now) * time.Millisecond)
			next = ms(at)
			p.push(all, c)
		}
		p.measure()
	}
	return p.result()
}

// push sends shares on their way.
func (p *plant) push(all []overload.Shares, c overload.Control) {
	for i := range all {
		g := &p.gateways[i]
		last := g.share
		if n := len(g.next); n > 0 {
			last = g.next[n-1].share
		}
		if all[i] == last {
			continue
		}
		g.next = append(g.next, change{p.now + g.lag, all[i]})
		if p.step() {
			p.pushed++
		}
		if i == p.now%len(p.gateways) || len(p.gateways) < 10 {
			now := time.Duration(p.now) * time.Millisecond
			c.Effect(now, now+time.Duration(g.lag)*time.Millisecond+p.nodes[max(0, g.home)].level.Kernel)
		}
	}
}

// arrive draws what gateways mirror in the next block.
func (p *plant) arrive() {
	if p.now%p.block != 0 {
		return
	}
	bursts := p.now%burstMS == 0
	for _, n := range p.nodes {
		n.perMS, n.demandMS = arrival{}, 0
	}
	var to []int
	for i := range p.gateways {
		g := &p.gateways[i]
		for len(g.next) > 0 && g.next[0].at <= p.now {
			g.share = g.next[0].share
			g.next = g.next[1:]
		}
		if bursts {
			g.burst = g.burst*0.9 + 0.3*math.Sqrt(1-0.81)*p.rng.NormFloat64()
			g.rate = math.Exp(g.burst-0.045) / 1000
		}
		rate := p.want(i) * g.rate * float64(p.block)
		priority := poisson(p.rng, priorityOf*rate)
		routine := poisson(p.rng, (1-priorityOf)*rate)
		mirrored := thin(p.rng, routine, g.share.Routine)
		spared := thin(p.rng, priority, g.share.Priority)
		g.eligible += uint64(priority + routine)
		g.priority += uint64(priority)
		g.mirrored += uint64(spared + mirrored)
		to = p.targets(g, to)
		for _, k := range to {
			n, parts := p.nodes[k], float64(p.block*len(to))
			n.perMS.routine += mirrored / parts
			n.perMS.priority += spared / parts
			n.demandMS += (priority + routine) / parts
		}
		if p.step() && p.now > ms(p.from)+1000 {
			g.kept[0] += mirrored
			g.kept[1] += routine
		}
		due := (p.now/p.block+i)%(batchMS/p.block) == 0
		if events := g.mirrored - g.batched; events >= batchEvents || due && events > 0 {
			g.batched = g.mirrored
			n := p.nodes[to[g.batches%len(to)]]
			g.batches++
			n.batches = append(n.batches, batch{i, p.now, events, [3]uint64{g.eligible, g.priority, g.mirrored}})
		}
	}
}

func (p *plant) count(sum *float64, n float64) {
	if p.step() {
		*sum += n
	}
}

// measure keeps what the outcome is made of.
func (p *plant) measure() {
	for i, n := range p.nodes {
		if !p.step() || p.away(i, 0) {
			continue
		}
		delay := n.delay(p.now)
		n.possible += min(p.nodeCapacity()/1000, n.demandMS)
		n.delays = append(n.delays, delay)
		n.longest = max(n.longest, delay)
	}
	if p.now%p.block == 0 {
		for i := range p.gateways {
			if g := &p.gateways[i]; len(p.nodes) == 1 || g.home == 0 { // those of the step
				w := p.want(i) * g.rate
				p.mirroredWin += w * g.share.Routine
				p.eligibleWin += w
			}
		}
	}
	if p.now%50 == 49 {
		share := p.mirroredWin / p.eligibleWin
		if p.step() && p.now > (ms(p.from)+ms(p.to))/2 {
			p.shares = append(p.shares, share)
			p.demands = append(p.demands, p.eligibleWin)
		}
		if p.now >= ms(p.to) && math.IsNaN(p.out.recovery) && share > 0.95 {
			p.out.recovery = float64(p.now-ms(p.to)) / 1000
		}
		if n := p.nodes[0]; p.trace {
			p.out.points = append(p.out.points, overload.Point{
				T: float64(p.now) / 1000, Share: share, Demand: p.eligibleWin * float64(p.block) / 50 * 1000 / p.nominal, Capacity: p.nodeCapacity() / p.nominal,
				Arrived: n.perMS.all() * 1000 / p.nominal, Delay: n.delay(p.now) / 1000,
			})
		}
		p.mirroredWin, p.eligibleWin = 0, 0
	}
}

func (p *plant) result() outcome {
	o := p.out
	n, others := p.nodes[0], p.nodes[1:]
	if p.homes.away {
		n, others = others[0], others[1:]
	}
	o.settled = overload.Settled(n.delays)
	o.goodput, o.p99, o.longest = n.good/n.possible, n.p99(), n.longest
	o.priority = n.goodPriority / n.allPriority
	o.waste = n.spoilt / max(1, n.came)
	var good, possible float64
	for _, n := range others {
		good += n.good
		possible += n.possible
		o.otherP99 = max(o.otherP99, n.p99())
	}
	o.others = good / max(1, possible)
	s, d := overload.Variation(p.shares), overload.Variation(p.demands)
	o.unsteady = math.Sqrt(max(0, s*s-d*d))
	o.pushes = float64(p.pushed) / (p.to - p.from).Seconds() / float64(len(p.gateways))
	quiet := func(i int) bool { return p.gateways[i].home > 0 }
	if len(p.nodes) == 1 {
		quiet = func(i int) bool { return i > 0 }
	}
	o.quiet = p.kept(quiet)
	o.home = p.kept(func(i int) bool { return p.gateways[i].home == 0 })
	o.roaming = p.kept(func(i int) bool { return p.gateways[i].home < 0 })
	return o
}

// kept is the share that some gateways had in the step.
func (p *plant) kept(of func(i int) bool) float64 {
	var mirrored, wanted float64
	for i := range p.gateways {
		if of(i) {
			mirrored += p.gateways[i].kept[0]
			wanted += p.gateways[i].kept[1]
		}
	}
	return mirrored / max(1, wanted)
}

func poisson(r *rand.Rand, mean float64) float64 {
	if mean > 30 {
		return max(0, math.Round(mean+math.Sqrt(mean)*r.NormFloat64()))
	}
	limit, product, n := math.Exp(-mean), r.Float64(), 0.0
	for product > limit {
		product *= r.Float64()
		n++
	}
	return n
}

// thin keeps a share of n.
func thin(r *rand.Rand, n, share float64) float64 {
	if share >= 1 || n == 0 {
		return n
	}
	if n > 30 {
		return min(n, max(0, math.Round(n*share+math.Sqrt(n*share*(1-share))*r.NormFloat64())))
	}
	kept := 0.0
	for range int(n) {
		if r.Float64() < share {
			kept++
		}
	}
	return kept
}
