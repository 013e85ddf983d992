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
	usual       = 50_000.0 // exchanges a second that the node can analyse
	dropCost    = 0.12     // of an exchange's cost is that of reading
	priorityOf  = 0.05     // of demand is of a priority class
	goodWithin  = 0.1      // seconds from arrival to analysis
	queueLength = 2.0      // seconds of nominal capacity; beyond it the newest are dropped
	batchMS     = 100      // the plugin sends a batch then, or when it has batchEvents
	batchEvents = 48
	burstMS     = 20
	sampleMS    = 10
	reportMS    = 50
	leastMS     = 20 // between urgent reports
	reportLag   = 1  // ms from a node to the control plane
)

// scenario is one run's conditions.
type scenario struct {
	gateways      int
	tau           time.Duration // mean time from a decision to its effect at a gateway
	multiple      float64       // of capacity that is demanded during the step
	nominal       float64       // exchanges a second that the node can analyse
	capacity      float64       // part of nominal that there is during the step
	guard         bool
	hot           bool // ten gateways; nine want 5 % of the capacity each, the first the rest
	misread       float64
	from, to, end time.Duration
	seed          uint64
	trace         bool
}

func (s scenario) String() string {
	return fmt.Sprintf("%d gateways, %v, ×%g, capacity %g, guard %t, hot %t, seed %d", s.gateways, s.tau, s.multiple, s.capacity, s.guard, s.hot, s.seed)
}

// outcome of a run, between from and to.
type outcome struct {
	goodput  float64 // analysed in time, of what could have been
	priority float64 // exchanges of a priority class analysed in time, of those that were to be mirrored
	waste    float64 // mirrored, then dropped, of what was mirrored
	longest  float64 // ms of delay
	p99      float64 // ms of delay
	settled  float64 // s until the delay has stayed below 20 ms for half a second
	unsteady float64 // variation of the share beyond that of demand
	recovery float64 // s from the end of the step until the share is 0.95
	pushes   float64 // changes a second and gateway
	quiet    float64 // share that the quiet gateways had, in scenario hot
	points   []overload.Point
}

// gateway is one, with one worker and one policy.
type gateway struct {
	name       string
	part       float64 // of demand
	burst      float64
	rate       float64 // exchanges a ms, in this block
	share      overload.Shares
	lag        int // ms until a decision takes effect
	next       []change
	eligible   uint64
	priority   uint64
	mirrored   uint64
	received   uint64
	batched    uint64 // mirrored, at the last batch
	heard      bool   // since the last report
	heardCount [3]uint64
	heardAt    int
}

type change struct {
	at    int
	share overload.Shares
}

// batch is on its way to being read.
type batch struct {
	gateway int
	sent    int
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

// plant is gateways and a node, in steps of 1 ms.
type plant struct {
	scenario
	rng      *rand.Rand
	block    int // ms after which gateways' arrivals are drawn anew
	gateways []gateway
	now      int // ms

	unread   fifo    // in sockets
	analysis fifo    // between reading and analysis
	perMS    arrival // arrivals of this block
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
	reports  []queuedReport

	out                          outcome
	demandMS                     float64
	good, possible, came, spoilt float64
	goodPriority, allPriority    float64
	delays                       []float64
	calm                         int
	mirroredWin, eligibleWin     float64
	shares, demands              []float64
	quietMirrored, quietEligible float64
	pushed                       int
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
	p.sample.CPUs = 1
	p.out.settled, p.out.recovery = math.NaN(), math.NaN()
	p.unread.at, p.analysis.at = make([]arrival, ms(s.end)+1), make([]arrival, ms(s.end)+1)
	sum := 0.0
	for i := range p.gateways {
		g := &p.gateways[i]
		g.name = gatewayName(i)
		g.part = 1 / math.Sqrt(float64(i+1))
		g.share = overload.Shares{Routine: 1, Priority: 1}
		g.lag = max(1, int(float64(ms(s.tau))*(0.5+p.rng.Float64())))
		sum += g.part
	}
	for i := range p.gateways {
		p.gateways[i].part /= sum
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
	if p.step() {
		m = p.multiple
	}
	return m * p.nominal * p.gateways[i].part
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
		p.arrive(c)
		p.work(c)
		if p.now%sampleMS == 0 {
			p.look()
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
			c.Effect(now, now+time.Duration(g.lag)*time.Millisecond+p.level.Kernel)
		}
	}
}

// arrive draws what gateways mirror in the next block.
func (p *plant) arrive(c overload.Control) {
	if p.now%p.block != 0 {
		return
	}
	bursts := p.now%burstMS == 0
	p.perMS, p.demandMS = arrival{}, 0
	quietMirrored, quietEligible := 0.0, 0.0
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
		p.perMS.routine += mirrored / float64(p.block)
		p.perMS.priority += spared / float64(p.block)
		p.demandMS += (priority + routine) / float64(p.block)
		if i > 0 {
			quietMirrored += mirrored
			quietEligible += routine
		}
		due := (p.now/p.block+i)%(batchMS/p.block) == 0
		if n := g.mirrored - g.batched; n >= batchEvents || due && n > 0 {
			g.batched = g.mirrored
			p.batches = append(p.batches, batch{i, p.now, [3]uint64{g.eligible, g.priority, g.mirrored}})
		}
	}
	if p.step() && p.now > ms(p.from)+1000 {
		p.quietMirrored += quietMirrored
		p.quietEligible += quietEligible
	}
}

// work lets the node read, discard and analyse for a ms. Reading goes first, as
// analysis has the lower scheduling priority.
func (p *plant) work(c overload.Control) {
	in := p.perMS
	p.count(&p.allPriority, in.priority)
	room := queueLength*p.nominal - p.unread.size
	if most := float64(c.Limit() * p.scenario.gateways); most > 0 {
		in.scale(room1(most-p.unread.size-p.analysis.size, in.all())) // what breakers drop is never mirrored
	}
	p.count(&p.came, in.all())
	p.spoil(in.scale(room1(room, in.all())))
	p.unread.push(p.now, in)

	capacity := p.nodeCapacity() / 1000
	left := capacity
	p.guarding.Set(max(p.level.Delay, p.level.Wait(int(p.analysis.size))))
	p.unread.pop(left/dropCost, p.now, func(at int, a arrival) {
		left -= a.all() * dropCost
		if p.guard {
			gone := a.routine * p.guarding.Part()
			a.routine -= gone
			p.discards += gone
			p.spoil(gone)
		}
		p.spoil(a.scale(room1(queueLength*p.nominal-p.analysis.size, a.all())))
		p.analysis.push(at, a)
	})
	left = max(0, left)
	p.analysis.pop(left/(1-dropCost), p.now, func(at int, a arrival) {
		left -= a.all() * (1 - dropCost)
		p.analysed += a.all()
		if float64(p.now-at) <= goodWithin*1000 {
			p.count(&p.good, a.all())
			p.count(&p.goodPriority, a.priority)
		}
	})
	p.cpu += min((capacity-max(0, left))/capacity, 1) / 1000
	for p.read < len(p.batches) && p.batches[p.read].sent < p.unread.head {
		b := &p.batches[p.read]
		g := &p.gateways[b.gateway]
		g.heard, g.heardCount, g.heardAt = true, b.count, p.now
		g.received = b.count[2]
		p.read++
	}
}

func (p *plant) spoil(n float64) { p.count(&p.spoilt, n) }

func (p *plant) count(sum *float64, n float64) {
	if p.step() {
		*sum += n
	}
}

// look is the node looking at itself, and telling what it sees.
func (p *plant) look() {
	at := time.Duration(p.now) * time.Millisecond
	p.sample.At = at
	p.sample.Kernel = time.Duration(p.unread.age(p.now)) * time.Millisecond
	p.sample.Queue = time.Duration(p.analysis.age(p.now)) * time.Millisecond
	p.sample.CPU = time.Duration(p.cpu * float64(time.Second) * p.misread)
	p.sample.Queued = int(p.analysis.size)
	p.sample.Analysed = uint64(p.analysed)
	p.sample.Discarded = uint64(p.discards)
	p.level, _ = p.meter.Add(p.sample)
	since := p.now - p.reported
	if since < reportMS && !(p.level.Delay > 2*load.Target && since >= leastMS) {
		return
	}
	p.reported = p.now
	r := load.Report{
		Node: "node", Epoch: 1, Uptime: at + 1000*time.Hour, Kernel: p.level.Kernel, Queue: p.level.Queue, Utilization: p.level.Utilization, Busy: p.level.Busy,
		Capacity: p.level.Capacity, Analysed: p.sample.Analysed, Discarded: p.sample.Discarded,
	}
	for i := range p.gateways {
		g := &p.gateways[i]
		if !g.heard {
			continue
		}
		g.heard = false
		r.Demands = append(r.Demands, load.Demand{
			Gateway: g.name, VM: "vm", Policy: policyID, Eligible: g.heardCount[0], Priority: g.heardCount[1], Mirrored: g.heardCount[2],
			Heard: time.Duration(g.heardAt)*time.Millisecond + 1000*time.Hour, Received: g.received,
		})
	}
	p.reports = append(p.reports, queuedReport{p.now + reportLag, r})
}

// measure keeps what the outcome is made of.
func (p *plant) measure() {
	delay := float64(max(p.unread.age(p.now), p.analysis.age(p.now))) / 1000
	var mirrored, all float64
	if p.now%p.block == 0 {
		for i := range p.gateways {
			g := &p.gateways[i]
			w := p.want(i) * g.rate
			mirrored += w * g.share.Routine
			all += w
		}
		p.mirroredWin += mirrored
		p.eligibleWin += all
	}
	if p.step() {
		p.possible += min(p.nodeCapacity()/1000, p.demandMS)
		p.delays = append(p.delays, delay)
		p.out.longest = max(p.out.longest, 1000*delay)
		if delay < 0.02 {
			p.calm++
		} else {
			p.calm = 0
		}
		if p.calm == 500 && math.IsNaN(p.out.settled) {
			p.out.settled = float64(p.now-ms(p.from)-499) / 1000
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
		if p.trace {
			p.out.points = append(p.out.points, overload.Point{
				T: float64(p.now) / 1000, Share: share, Demand: p.eligibleWin * float64(p.block) / 50 * 1000 / p.nominal, Capacity: p.nodeCapacity() / p.nominal,
				Arrived: (p.perMS.routine + p.perMS.priority) * 1000 / p.nominal, Delay: delay,
			})
		}
		p.mirroredWin, p.eligibleWin = 0, 0
	}
}

func (p *plant) result() outcome {
	o := p.out
	o.goodput = p.good / p.possible
	o.priority = p.goodPriority / p.allPriority
	o.waste = p.spoilt / max(1, p.came)
	slices.Sort(p.delays)
	o.p99 = 1000 * p.delays[len(p.delays)*99/100]
	s, d := overload.Variation(p.shares), overload.Variation(p.demands)
	o.unsteady = math.Sqrt(max(0, s*s-d*d))
	o.pushes = float64(p.pushed) / (p.to - p.from).Seconds() / float64(len(p.gateways))
	o.quiet = p.quietMirrored / max(1, p.quietEligible)
	return o
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
