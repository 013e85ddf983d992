package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
	"github.com/periscope-mesh/periscope/node/pressure"
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

// hearing is what a node knows of a gateway.
type hearing struct {
	received uint64
	heard    bool // since the last report
	count    [3]uint64
	at       int
}

type change struct {
	at    int
	share overload.Shares
}

// batch is on its way to being read.
type batch struct {
	gateway int
	sent    int
	events  uint64
	count   [3]uint64
}

// arrival is what came to the node in one ms.
type arrival struct{ routine, priority float64 }

func (a *arrival) all() float64 { return a.routine + a.priority }

// scale keeps a part, and gives how much goes.
func (a *arrival) scale(keep float64) (gone float64) {
	gone = (1 - keep) * a.all()
	a.routine *= keep
	a.priority *= keep
	return gone
}

// room1 is the part of n that there is room for.
func room1(room, n float64) float64 {
	if n <= room {
		return 1
	}
	return max(0, room) / n
}

// fifo is a queue of what arrived, by the ms of arrival.
type fifo struct {
	at   []arrival
	head int // the first ms of which something may be left
	size float64
}

func (f *fifo) push(at int, a arrival) {
	f.at[at].routine += a.routine
	f.at[at].priority += a.priority
	f.size += a.all()
}

// pop takes up to n of what arrived until now.
func (f *fifo) pop(n float64, now int, take func(at int, a arrival)) {
	for f.head <= now && n > 1e-9 {
		a := &f.at[f.head]
		one := *a
		if all := a.all(); all > n {
			one.scale(n / all)
		}
		a.routine -= one.routine
		a.priority -= one.priority
		n -= one.all()
		f.size = max(0, f.size-one.all())
		if one.all() > 0 {
			take(f.head, one)
		}
		if a.all() > 1e-9 {
			return
		}
		*a = arrival{}
		f.head++
	}
}

// age of what waits longest, in ms.
func (f *fifo) age(now int) int {
	if f.size < 1e-6 {
		return 0
	}
	return max(0, now-f.head)
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

// node is an analysis node.
type node struct {
	name     string
	epoch    uint64
	since    int     // ms, of its start
	unread   fifo    // in sockets
	analysis fifo    // between reading and analysis
	perMS    arrival // arrivals of this block
	hears    []hearing
	batches  []batch
	read     int // of batches
	meter    pressure.Meter
	guarding pressure.Guard
	sample   pressure.Sample
	level    pressure.Level
	analysed float64
	discards float64
	cpu      float64 // s
	reported int

	demandMS                     float64
	good, possible, came, spoilt float64
	goodPriority, allPriority    float64
	delays                       []float64
	longest                      float64
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

// start makes node i anew.
func (p *plant) start(i, at int) *node {
	n := &node{name: fmt.Sprintf("node-%d", i), epoch: uint64(at + 1), since: at, hears: make([]hearing, len(p.gateways))}
	n.sample.CPUs = 1
	n.unread, n.analysis = fifo{at: make([]arrival, ms(p.end)+1), head: at}, fifo{at: make([]arrival, ms(p.end)+1), head: at}
	return n
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

// lose is what becomes of what goes to a node that is away.
func (p *plant) lose(n *node) {
	n.batches, n.read = nil, 0
	p.count(&n.came, n.perMS.all())
	p.count(&n.spoilt, n.perMS.all())
}

// work lets a node read, discard and analyse for a ms. Reading goes first, as
// analysis has the lower scheduling priority.
func (p *plant) work(n *node, c overload.Control) {
	in := n.perMS
	p.count(&n.allPriority, in.priority)
	room := queueLength*p.nominal - n.unread.size
	if most := float64(c.Limit() * p.scenario.gateways); most > 0 {
		in.scale(room1(most-n.unread.size-n.analysis.size, in.all())) // what breakers drop is never mirrored
	}
	p.count(&n.came, in.all())
	p.count(&n.spoilt, in.scale(room1(room, in.all())))
	n.unread.push(p.now, in)

	capacity := p.nodeCapacity() / 1000
	left := capacity
	n.guarding.Set(max(n.level.Delay, n.level.Wait(int(n.analysis.size))))
	n.unread.pop(left/dropCost, p.now, func(at int, a arrival) {
		left -= a.all() * dropCost
		if p.guard {
			gone := a.routine * n.guarding.Part()
			a.routine -= gone
			n.discards += gone
			p.count(&n.spoilt, gone)
		}
		p.count(&n.spoilt, a.scale(room1(queueLength*p.nominal-n.analysis.size, a.all())))
		n.analysis.push(at, a)
	})
	left = max(0, left)
	n.analysis.pop(left/(1-dropCost), p.now, func(at int, a arrival) {
		left -= a.all() * (1 - dropCost)
		n.analysed += a.all()
		if float64(p.now-at) <= goodWithin*1000 {
			p.count(&n.good, a.all())
			p.count(&n.goodPriority, a.priority)
		}
	})
	n.cpu += min((capacity-max(0, left))/capacity, 1) / 1000
	for n.read < len(n.batches) && n.batches[n.read].sent < n.unread.head {
		b := &n.batches[n.read]
		h := &n.hears[b.gateway]
		h.heard, h.count, h.at = true, b.count, p.now
		h.received += b.events
		n.read++
	}
}

func (p *plant) count(sum *float64, n float64) {
	if p.step() {
		*sum += n
	}
}

// look is a node looking at itself, and telling what it sees.
func (p *plant) look(n *node) {
	at := time.Duration(p.now) * time.Millisecond
	n.sample.At = at
	n.sample.Kernel = time.Duration(n.unread.age(p.now)) * time.Millisecond
	n.sample.Queue = time.Duration(n.analysis.age(p.now)) * time.Millisecond
	n.sample.CPU = time.Duration(n.cpu * float64(time.Second) * p.misread)
	n.sample.Queued = int(n.analysis.size)
	n.sample.Analysed = uint64(n.analysed)
	n.sample.Discarded = uint64(n.discards)
	n.level, _ = n.meter.Add(n.sample)
	since := p.now - n.reported
	if since < reportMS && !(n.level.Delay > 2*load.Target && since >= leastMS) {
		return
	}
	n.reported = p.now
	uptime := func(at int) time.Duration { return time.Duration(at-n.since)*time.Millisecond + 1000*time.Hour }
	r := load.Report{
		Node: n.name, Epoch: n.epoch, Uptime: uptime(p.now), Kernel: n.level.Kernel, Queue: n.level.Queue, Utilization: n.level.Utilization, Busy: n.level.Busy,
		Capacity: n.level.Capacity, Analysed: n.sample.Analysed, Discarded: n.sample.Discarded,
	}
	for i := range p.gateways {
		h := &n.hears[i]
		if !h.heard {
			continue
		}
		h.heard = false
		r.Demands = append(r.Demands, load.Demand{
			Gateway: p.gateways[i].name, VM: "vm", Policy: policyID, Eligible: h.count[0], Priority: h.count[1], Mirrored: h.count[2],
			Heard: uptime(h.at), Received: h.received,
		})
	}
	p.reports = append(p.reports, queuedReport{p.now + reportLag, r})
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

// delay of what waits longest, in ms.
func (n *node) delay(now int) float64 {
	return float64(max(n.unread.age(now), n.analysis.age(now)))
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

// p99 of the delay, in ms.
func (n *node) p99() float64 {
	slices.Sort(n.delays)
	return n.delays[len(n.delays)*99/100]
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
