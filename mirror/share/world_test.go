package share_test

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
)

const tick = 50 * time.Millisecond

// world is gateways and nodes in virtual time, in which shares take effect at the
// next tick. Every second tick a node hears of a gateway that sends to it.
type world struct {
	t        testing.TB
	c        *share.Controller
	now      time.Time
	ticks    int
	nodes    []*node
	gateways []*gateway
	last     share.Decision
	lose     func(node int) bool // whether a node's report is lost
}

type node struct {
	name      string
	epoch     uint64
	known     float64 // its capacity, to itself
	uptime    time.Duration
	capacity  float64
	stopped   bool
	mute      bool // does its work, but its reports don't arrive
	backlog   float64
	analysed  float64
	discarded float64
}

type gateway struct {
	pod, vm, policy string
	demand          float64 // exchanges a second
	priority        float64 // of them
	eligible        float64
	prioritised     float64
	mirrored        float64
	to              []float64          // part that each node gets as long as it works; nil, or none does: all the same
	received        []float64          // by node
	forced          float64            // share that it takes, whatever it is told; 0: as told
	lie             func(*load.Demand) // what it makes of its counters
	ppm, spared     int
}

func start() time.Time { return time.Unix(1_700_000_000, 0) }

func newWorld(t testing.TB, config share.Config, nodes int, capacity float64) *world {
	w := &world{t: t, c: share.New(config), now: start()}
	for i := range nodes {
		w.nodes = append(w.nodes, &node{name: fmt.Sprintf("node-%d", i), epoch: uint64(i + 1), uptime: time.Duration(i*i) * 777 * time.Second, capacity: capacity})
	}
	return w
}

func policies(n int) share.Config {
	var c share.Config
	for i := range n {
		c.Policies = append(c.Policies, share.Policy{ID: fmt.Sprintf("ns/p%d", i), Tenant: fmt.Sprintf("tenant-%d", i), Ceiling: share.Everything})
	}
	return c
}

func (w *world) gateway(pod string, demand float64) *gateway {
	g := &gateway{pod: "ingress/" + pod, vm: pod + "/1", policy: "ns/p0", demand: demand, received: make([]float64, len(w.nodes)), ppm: share.Everything, spared: share.Everything}
	w.gateways = append(w.gateways, g)
	return g
}

// step lets a tick pass, and gives the reports of it.
func (w *world) step() []load.Report {
	w.now = w.now.Add(tick)
	w.ticks++
	dt := tick.Seconds()
	arrived := make([]float64, len(w.nodes))
	for _, g := range w.gateways {
		routine, priority := (g.demand-g.priority)*dt, g.priority*dt
		s := float64(g.ppm) / share.Everything
		if g.forced > 0 {
			s = g.forced
		}
		sent := routine*s + priority*float64(g.spared)/share.Everything
		g.eligible += routine + priority
		g.prioritised += priority
		g.mirrored += sent
		for i, part := range w.parts(g) {
			g.received[i] += part * sent
			arrived[i] += part * sent
		}
	}
	var reports []load.Report
	for i, n := range w.nodes {
		n.uptime += tick
		if n.stopped {
			continue
		}
		n.backlog += arrived[i]
		done := min(n.backlog, n.capacity*dt)
		n.backlog -= done
		if over := n.backlog - 0.04*n.capacity; over > 0 { // its guard, roughly
			n.backlog -= over
			n.discarded += over
		}
		n.analysed += done
		if done > 0.2*n.capacity*dt {
			n.known = n.capacity // it knows when it has something to do
		}
		r := load.Report{
			Node: n.name, Capacity: n.known, Epoch: n.epoch, Uptime: n.uptime, Analysed: uint64(n.analysed), Discarded: uint64(n.discarded), Utilization: done / (n.capacity * dt),
			Queue: time.Duration(n.backlog / n.capacity * float64(time.Second)),
		}
		for j, g := range w.gateways {
			if (i+j+w.ticks)%2 == 0 && g.received[i] > 0 {
				d := load.Demand{Gateway: g.pod, VM: g.vm, Policy: g.policy, Eligible: uint64(g.eligible), Priority: uint64(g.prioritised), Mirrored: uint64(g.mirrored), Received: uint64(g.received[i])}
				if g.lie != nil {
					g.lie(&d)
				}
				r.Demands = append(r.Demands, d)
			}
		}
		if !n.mute && (w.lose == nil || !w.lose(i)) {
			reports = append(reports, r)
		}
	}
	return reports
}

// parts of what a gateway sends, by node.
func (w *world) parts(g *gateway) []float64 {
	parts := make([]float64, len(w.nodes))
	sum, live := 0.0, 0.0
	for i, n := range w.nodes {
		if n.stopped {
			continue
		}
		live++
		if g.to != nil {
			parts[i] = g.to[i]
			sum += g.to[i]
		}
	}
	for i, n := range w.nodes {
		switch {
		case n.stopped:
		case sum > 0:
			parts[i] /= sum
		default:
			parts[i] = 1 / live
		}
	}
	return parts
}

// home lets a gateway send to one node as long as that works.
func (g *gateway) home(node int) *gateway {
	g.to = make([]float64, len(g.received))
	g.to[node] = 1
	return g
}

func (w *world) run(d time.Duration) {
	w.t.Helper()
	for ; d > 0; d -= tick {
		for _, r := range w.step() {
			w.c.Observe(r, w.now)
		}
		w.last = w.c.Decide(w.now)
		w.apply(w.last)
	}
}

// apply tells gateways their shares, and checks what must hold of any decision.
func (w *world) apply(d share.Decision) {
	w.t.Helper()
	for _, x := range []float64{d.Totals.Capacity, d.Totals.Demand, d.Totals.Priority, d.Totals.Drain} {
		if math.IsNaN(x) || math.IsInf(x, 0) || x < 0 {
			w.t.Fatalf("totals %+v", d.Totals)
		}
	}
	if !d.NextTick.After(w.now.Add(-time.Nanosecond)) {
		w.t.Fatalf("next tick %v at %v", d.NextTick, w.now)
	}
	told := map[string]share.Share{}
	for _, s := range d.Shares {
		if s.PPM < 0 || s.PPM > share.Everything || s.PriorityPPM <= 0 || s.PriorityPPM > share.Everything {
			w.t.Fatalf("share %+v", s)
		}
		told[s.Gateway+" "+s.Policy] = s
	}
	if !d.Ready {
		return
	}
	for _, g := range w.gateways {
		if s, ok := told[g.pod+" "+g.policy]; ok {
			g.ppm, g.spared = s.PPM, s.PriorityPPM
			continue
		}
		for _, f := range d.Defaults {
			if f.Workload == "" && f.Policy == g.policy {
				g.ppm = f.PPM
			}
		}
	}
}

func (w *world) delay() time.Duration {
	var d time.Duration
	for _, n := range w.nodes {
		d = max(d, time.Duration(n.backlog/n.capacity*float64(time.Second)))
	}
	return d
}

// near fails unless got is want, within a fraction of it.
func near(t testing.TB, what string, got, want, within float64) {
	t.Helper()
	if math.IsNaN(got) || math.Abs(got-want) > within*want {
		t.Errorf("%s is %.4g, want %.4g ± %.0f %%", what, got, want, 100*within)
	}
}

func (g *gateway) share() float64 { return float64(g.ppm) / share.Everything }
