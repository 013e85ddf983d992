package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/pressure"
	"github.com/periscope-mesh/periscope/test/bench/overload"
)

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

// hearing is what a node knows of a gateway.
type hearing struct {
	received uint64
	heard    bool // since the last report
	count    [3]uint64
	at       int
}

// batch is on its way to being read.
type batch struct {
	gateway int
	sent    int
	events  uint64
	count   [3]uint64
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

// start makes node i anew.
func (p *plant) start(i, at int) *node {
	n := &node{name: fmt.Sprintf("node-%d", i), epoch: uint64(at + 1), since: at, hears: make([]hearing, len(p.gateways))}
	n.sample.CPUs = 1
	n.unread, n.analysis = fifo{at: make([]arrival, ms(p.end)+1), head: at}, fifo{at: make([]arrival, ms(p.end)+1), head: at}
	return n
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
		Node: n.name, Epoch: n.epoch, Uptime: uptime(p.now), Kernel: n.level.Kernel, Queue: n.level.Queue, Utilization: n.level.Utilization,
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

// delay of what waits longest, in ms.
func (n *node) delay(now int) float64 {
	return float64(max(n.unread.age(now), n.analysis.age(now)))
}

// p99 of the delay, in ms.
func (n *node) p99() float64 {
	slices.Sort(n.delays)
	return n.delays[len(n.delays)*99/100]
}
