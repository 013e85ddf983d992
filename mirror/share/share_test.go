package share_test

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
)

func TestBudget(t *testing.T) {
	w := newWorld(t, policies(1), 2, 5000)
	a, b := w.gateway("a", 2000), w.gateway("b", 2000)
	if d := w.c.Decide(w.now); d.Ready || len(d.Shares) != 0 {
		t.Errorf("a decision without reports: %+v", d)
	}
	w.run(2 * time.Second)
	if a.ppm != share.Everything || b.ppm != share.Everything || w.last.Shares[0].Reason != share.ReasonCeiling {
		t.Errorf("without overload: %+v", w.last.Shares)
	}
	near(t, "capacity", w.last.Totals.Capacity, 10_000, 0.05)
	near(t, "demand", w.last.Totals.Demand, 4000, 0.05)

	a.demand, b.demand = 40_000, 40_000
	w.run(3 * time.Second)
	near(t, "mirrored", a.share()*a.demand+b.share()*b.demand, 9000, 0.1)
	near(t, "share of a beside that of b", a.share(), b.share(), 0.1)
	if r := w.last.Shares[0].Reason; r != share.ReasonBudget {
		t.Errorf("reason %q", r)
	}
	if d := w.delay(); d > 10*time.Millisecond {
		t.Errorf("delay %v, 3 s after the step", d)
	}
	if changed := w.last.Changed; changed != 0 {
		t.Errorf("%d changes under steady load", changed)
	}

	a.demand, b.demand = 2000, 2000
	w.run(2 * time.Second)
	if a.ppm != share.Everything || b.ppm != share.Everything {
		t.Errorf("2 s after the overload: %+v", w.last.Shares)
	}
}

func TestUrgent(t *testing.T) {
	w := newWorld(t, policies(1), 1, 10_000)
	w.gateway("a", 5000)
	w.run(2 * time.Second)
	if want := w.now.Add(tick); w.last.Urgent || !w.last.NextTick.Equal(want) {
		t.Errorf("urgent %t, next %v, want no, %v", w.last.Urgent, w.last.NextTick, want)
	}
	r := load.Report{Node: "node-0", Epoch: 1, Uptime: w.nodes[0].uptime + 30*time.Millisecond, Analysed: uint64(w.nodes[0].analysed) + 300, Utilization: 1, Queue: 40 * time.Millisecond}
	if w.c.Observe(r, w.now.Add(10*time.Millisecond)) {
		t.Error("urgent, 10 ms after a decision")
	}
	r.Uptime += 10 * time.Millisecond
	r.Demands = []load.Demand{{Gateway: "ingress/a", VM: "a/1", Policy: "ns/p0", Eligible: uint64(w.gateways[0].eligible) + 4000}}
	if !w.c.Observe(r, w.now.Add(40*time.Millisecond)) {
		t.Error("a late node is not urgent")
	}
	if d := w.c.Decide(w.now.Add(40 * time.Millisecond)); !d.Urgent || d.Shares[0].PPM == share.Everything {
		t.Errorf("%+v", d)
	}
	for range 50 {
		w.c.Effect(w.now, w.now.Add(8*time.Millisecond))
	}
	if d := w.c.Decide(w.now.Add(50 * time.Millisecond)); d.NextTick.Sub(w.now) != 70*time.Millisecond {
		t.Errorf("next tick after %v where pushes are quick", d.NextTick.Sub(w.now)-50*time.Millisecond)
	}
}

// One hot gateway costs quiet ones nothing, nor does one tenant the other.
func TestFairness(t *testing.T) {
	w := newWorld(t, policies(2), 1, 10_000)
	hot := w.gateway("hot", 500)
	var quiet []*gateway
	for i := range 9 {
		quiet = append(quiet, w.gateway(fmt.Sprint("quiet-", i), 500))
	}
	w.run(2 * time.Second)
	hot.demand = 95_500
	w.run(500 * time.Millisecond)
	w.run(3 * time.Second)
	for _, g := range quiet {
		if g.ppm != share.Everything {
			t.Errorf("%s has %d ppm", g.pod, g.ppm)
		}
	}
	near(t, "what the hot one mirrors", hot.share()*hot.demand, 4500, 0.12)

	// A second tenant gets half; its gateways, however few, and the first's, however many.
	other := w.gateway("other", 50_000)
	other.policy = "ns/p1"
	w.run(3 * time.Second)
	near(t, "the other tenant", other.share()*other.demand, 4500, 0.12)
	// One gateway for two tenants.
	both := w.gateway("other", 50_000)
	both.vm = "other/2"
	w.run(3 * time.Second)
	near(t, "the other tenant", other.share()*other.demand, 4500, 0.12)
	near(t, "one of eleven gateways of the first", both.share()*both.demand, 409, 0.12)
}

func TestWeights(t *testing.T) {
	c := policies(2)
	c.Tenants = map[string]float64{"tenant-1": 2, "tenant-0": math.NaN()}
	c.Gateways = []share.Gateway{{Pod: "ingress/a", Weight: 3}, {Pod: "ingress/b", Weight: -1}}
	w := newWorld(t, c, 1, 10_000)
	a, b, other := w.gateway("a", 50_000), w.gateway("b", 50_000), w.gateway("other", 50_000)
	other.policy = "ns/p1"
	w.run(4 * time.Second)
	near(t, "tenant of weight 2", other.share()*other.demand, 6000, 0.12)
	near(t, "gateway of weight 3", a.share()*a.demand, 2250, 0.12)
	near(t, "gateway of weight 1", b.share()*b.demand, 750, 0.12)
}

func TestFloorAndCeiling(t *testing.T) {
	c := policies(1)
	c.Policies[0].Floor, c.Policies[0].Ceiling = 50_000, 500_000
	w := newWorld(t, c, 1, 10_000)
	hot, quiet := w.gateway("hot", 1000), w.gateway("quiet", 1000)
	w.run(2 * time.Second)
	if hot.ppm != 500_000 {
		t.Errorf("%d ppm, want the ceiling", hot.ppm)
	}
	hot.demand = 180_000 // the floor brings 9,000
	w.run(4 * time.Second)
	if hot.ppm != 50_000 || w.last.Shares[0].Reason != share.ReasonFloor {
		t.Errorf("%+v, want the floor", w.last.Shares)
	}
	if quiet.ppm != 500_000 {
		t.Errorf("the quiet gateway has %d ppm; there is room for all of it", quiet.ppm)
	}
}

func TestPriority(t *testing.T) {
	w := newWorld(t, policies(1), 1, 10_000)
	a, b := w.gateway("a", 20_000), w.gateway("b", 20_000)
	a.priority, b.priority = 1000, 1000
	w.run(4 * time.Second)
	if a.spared != share.Everything || b.spared != share.Everything {
		t.Errorf("priority classes have %d and %d ppm", a.spared, b.spared)
	}
	near(t, "routine exchanges mirrored", a.share()*19_000+b.share()*19_000, 7000, 0.1)
	// One gateway calls everything suspicious: its own is cut, not the other's.
	a.priority = 20_000
	w.run(4 * time.Second)
	near(t, "a's priority classes", float64(a.spared)/share.Everything*a.priority, 2000, 0.12)
	if b.spared != share.Everything {
		t.Errorf("b's priority classes have %d ppm", b.spared)
	}
	near(t, "b's routine exchanges", b.share()*19_000, 6000, 0.12)
	if d := w.delay(); d > 20*time.Millisecond {
		t.Errorf("delay %v", d)
	}
}

// A node that stops leaves the sum, and rejoins as what it was.
func TestNodeStops(t *testing.T) {
	w := newWorld(t, policies(1), 3, 5000)
	g := w.gateway("a", 40_000)
	w.run(3 * time.Second)
	near(t, "mirrored with three nodes", g.share()*g.demand, 13_500, 0.1)
	w.nodes[1].stopped = true
	w.run(time.Second)
	w.run(4 * time.Second)
	near(t, "capacity of two nodes", w.last.Totals.Capacity, 10_000, 0.1)
	near(t, "mirrored with two nodes", g.share()*g.demand, 9000, 0.1)
	if w.last.Totals.Fresh != 2 || w.last.Totals.Frozen {
		t.Errorf("%+v", w.last.Totals)
	}
	w.nodes[1].stopped = false // SIGCONT
	w.run(2 * time.Second)
	near(t, "mirrored with three nodes again", g.share()*g.demand, 13_500, 0.1)
	// A restart counts anew, but can do what it could.
	w.nodes[1].epoch, w.nodes[1].uptime, w.nodes[1].analysed, w.nodes[1].discarded = 99, 0, 0, 0
	w.run(time.Second)
	near(t, "mirrored after a restart", g.share()*g.demand, 13_500, 0.1)
}

// Without any report, shares fall slowly towards the floor, and rise when reports
// come again.
func TestAllStale(t *testing.T) {
	c := policies(1)
	c.Policies[0].Floor = 50_000
	w := newWorld(t, c, 2, 5000)
	g := w.gateway("a", 5000)
	w.run(2 * time.Second)
	for _, n := range w.nodes {
		n.mute = true
	}
	w.run(time.Second)
	w.run(5 * time.Second)
	if g.ppm != share.Everything {
		t.Errorf("%d ppm after 6 s without reports", g.ppm)
	}
	last := g.ppm
	for range 20 {
		w.run(time.Second)
		if g.ppm > last || float64(g.ppm) < 0.7*float64(last) {
			t.Errorf("from %d to %d ppm within a second without reports", last, g.ppm)
		}
		last = g.ppm
	}
	w.run(time.Hour)
	if g.ppm > 60_000 || g.ppm < 50_000 || !w.last.Totals.Frozen || w.last.Shares[0].Reason != share.ReasonStale {
		t.Errorf("an hour without reports: %+v, %+v", w.last.Shares, w.last.Totals)
	}
	for _, d := range w.last.Defaults {
		if d.PPM > 60_000 {
			t.Errorf("an hour without reports: default %+v", d)
		}
	}
	for _, n := range w.nodes {
		n.mute = false
	}
	w.run(2 * time.Second)
	if g.ppm != share.Everything {
		t.Errorf("%d ppm, 2 s after reports came again", g.ppm)
	}
}

// Idle nodes report every 5 s, if all is well.
func TestIdle(t *testing.T) {
	w := newWorld(t, policies(1), 2, 5000)
	g := w.gateway("a", 2000)
	w.run(2 * time.Second)
	g.demand = 0
	w.run(time.Second)
	w.lose = func(int) bool { return w.ticks%100 != 0 }
	for range 60 {
		w.run(time.Second)
		if g.ppm != share.Everything || w.last.Totals.Fresh != 2 {
			t.Fatalf("%d ppm, %+v", g.ppm, w.last.Totals)
		}
		for _, d := range w.last.Defaults {
			if d.PPM != share.Everything {
				t.Fatalf("default %+v", d)
			}
		}
	}
	g.demand, w.lose = 40_000, nil
	w.run(3 * time.Second)
	near(t, "mirrored after a step from nothing", g.share()*g.demand, 9000, 0.12)
}

// What a gateway says untruly costs nobody but itself.
func TestLies(t *testing.T) {
	for name, lie := range map[string]func(*load.Demand){
		"a thousand times the demand": func(d *load.Demand) { d.Eligible *= 1000 },
		"no demand":                   func(d *load.Demand) { d.Eligible, d.Mirrored = 1, 1 },
		"a tenth of the demand":       func(d *load.Demand) { d.Eligible /= 10; d.Mirrored = min(d.Mirrored, d.Eligible) },
		"counters of the largest": func(d *load.Demand) {
			d.Eligible, d.Priority, d.Mirrored = math.MaxUint64, math.MaxUint64, math.MaxUint64
		},
		"all of it of a priority": func(d *load.Demand) { d.Priority = d.Eligible },
		"chance":                  func(d *load.Demand) { d.Eligible, d.Priority = rand.Uint64(), rand.Uint64() },
		"chance, small":           func(d *load.Demand) { d.Eligible, d.Priority = rand.Uint64N(1e6), rand.Uint64N(1e6) },
		"going back":              func(d *load.Demand) { d.Eligible = math.MaxUint64/2 - d.Eligible },
		"a new worker each time":  func(d *load.Demand) { d.VM = fmt.Sprint(rand.Uint64()) },
		"other policies":          func(d *load.Demand) { d.Policy = fmt.Sprint("ns/p", rand.Uint64()) },
		"a time to come":          func(d *load.Demand) { d.Heard = math.MaxInt64 },
		"a time before all":       func(d *load.Demand) { d.Heard = math.MinInt64 },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, policies(1), 2, 5000)
			liar := w.gateway("liar", 20_000)
			liar.priority = 500
			var honest []*gateway
			for i := range 9 {
				honest = append(honest, w.gateway(fmt.Sprint("honest-", i), 700))
			}
			w.run(62 * time.Second)
			liar.lie = lie
			w.run(10 * time.Second)
			for _, g := range honest {
				if g.share() < 0.9 {
					t.Errorf("%s has %.2f", g.pod, g.share())
				}
			}
			if d := w.delay(); d > 150*time.Millisecond {
				t.Errorf("delay %v", d)
			}
			liar.lie = nil
			w.run(20 * time.Second)
			for _, g := range honest {
				if g.ppm != share.Everything {
					t.Errorf("afterwards: %s has %d ppm", g.pod, g.ppm)
				}
			}
		})
	}
}

// Workers that restart count anew; gateways that go are forgotten.
func TestWorkersRestart(t *testing.T) {
	w := newWorld(t, policies(1), 1, 10_000)
	a, b := w.gateway("a", 20_000), w.gateway("b", 2000)
	w.run(3 * time.Second)
	for i := range 10 {
		a.vm = fmt.Sprint("a/", i+2)
		a.eligible, a.prioritised, a.mirrored = 0, 0, 0
		clear(a.received)
		w.run(time.Second)
	}
	w.run(time.Second)
	near(t, "demand", w.last.Totals.Demand, 22_000, 0.1)
	near(t, "mirrored", a.share()*a.demand+b.share()*b.demand, 9000, 0.12)
	w.gateways = w.gateways[1:]
	w.run(5 * time.Second)
	near(t, "demand after a went", w.last.Totals.Demand, 2000, 0.1)
	w.run(2 * time.Minute)
	if len(w.last.Shares) != 1 || w.c.State(w.now).Workers != 1 {
		t.Errorf("%d shares, %d series of counters, 2 minutes after a went", len(w.last.Shares), w.c.State(w.now).Workers)
	}
}

// A pod that nobody knows yet has what its workload has on average.
func TestDefaults(t *testing.T) {
	c := policies(1)
	c.Gateways = []share.Gateway{{Pod: "ingress/a", Workload: "ingress/x"}, {Pod: "ingress/b", Workload: "ingress/x"}, {Pod: "ingress/c", Workload: "ingress/y"}, {Pod: "ingress/new", Workload: "ingress/x"}}
	w := newWorld(t, c, 1, 10_000)
	w.gateway("a", 40_000)
	w.gateway("b", 500)
	w.gateway("c", 400)
	w.run(4 * time.Second)
	got := map[string]float64{}
	for _, d := range w.last.Defaults {
		got[d.Workload] = float64(d.PPM) / share.Everything
	}
	near(t, "default of x", got["ingress/x"], 8600.0/40_500, 0.12)
	near(t, "default of y", got["ingress/y"], 1, 0)
	near(t, "default of what is unknown", got[""], 9000.0/40_900, 0.12)
	g := w.gateway("new", 30_000)
	g.ppm = int(got["ingress/x"] * share.Everything)
	w.run(2 * time.Second)
	near(t, "share of the new pod", g.share()*g.demand, 4050, 0.12)
}

// The order in which reports of a tick arrive makes no difference.
func TestOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	w := newWorld(t, policies(1), 8, 1000)
	for i := range 30 {
		if g := w.gateway(fmt.Sprint("g", i), 100+rng.Float64()*1000); i%2 == 0 {
			g.home(i / 2 % 8)
		}
	}
	others := []*share.Controller{share.New(policies(1)), share.New(policies(1))}
	var held []load.Report
	for i := range 400 {
		for _, g := range w.gateways {
			g.demand *= math.Exp(0.1 * rng.NormFloat64())
		}
		w.nodes[3].stopped = i/50%2 == 1
		if i%97 == 0 {
			w.nodes[5].epoch++
			w.nodes[5].known = 0
			w.nodes[5].uptime, w.nodes[5].analysed, w.nodes[5].discarded = 0, 0, 0
		}
		reports := w.step()
		if i%3 != 0 { // several reports of a node in one tick
			held = append(held, reports...)
			continue
		}
		reports = append(held, reports...)
		held = nil
		for _, r := range reports {
			w.c.Observe(r, w.now)
		}
		want := w.c.Decide(w.now)
		for _, o := range others {
			rng.Shuffle(len(reports), func(i, j int) { reports[i], reports[j] = reports[j], reports[i] })
			for _, r := range reports {
				o.Observe(r, w.now)
			}
			if got := o.Decide(w.now); !reflect.DeepEqual(got, want) {
				t.Fatalf("tick %d: decisions differ:\n%+v\n%+v", i, got, want)
			}
		}
		w.apply(want)
	}
}

// Two replicas of which one hears everything later, at other times, and not all of
// it, differ by little, and no more in the end than in the beginning.
func TestReplicas(t *testing.T) {
	t.Run("spread", func(t *testing.T) { testReplicas(t, 1, false, 1.35) })
	t.Run("half at home", func(t *testing.T) { testReplicas(t, 1, true, 1.5) })
	t.Run("half at home, tenants", func(t *testing.T) { testReplicas(t, 3, true, 1.35) })
}

func testReplicas(t *testing.T, tenants int, home bool, most float64) {
	rng := rand.New(rand.NewPCG(3, 4))
	w := newWorld(t, policies(tenants), 4, 2500)
	for i := range 20 {
		g := w.gateway(fmt.Sprint("g", i), 300+rng.Float64()*1500)
		g.policy = fmt.Sprint("ns/p", i%tenants)
		if home && i%2 == 0 {
			g.home(i / 2 % 4)
		}
	}
	other := share.New(policies(tenants))
	offset := 5 * time.Hour // its clock is another
	type late struct {
		at time.Time
		r  load.Report
	}
	var queue []late
	var worst [2]float64
	restarted := false
	for i := range 4800 {
		if i%200 == 0 {
			for _, g := range w.gateways {
				g.demand = min(20_000, max(50, g.demand*math.Exp(0.7*rng.NormFloat64())))
			}
		}
		for _, r := range w.step() {
			w.c.Observe(r, w.now)
			if rng.Float64() < 0.95 {
				queue = append(queue, late{w.now.Add(time.Duration(rng.IntN(40)) * time.Millisecond), r})
			}
		}
		w.last = w.c.Decide(w.now)
		w.apply(w.last)
		if i == 2400 { // the other one is started anew under load
			other, restarted = share.New(policies(tenants)), true
		}
		now := w.now.Add(23 * time.Millisecond)
		slices.SortStableFunc(queue, func(a, b late) int { return a.at.Compare(b.at) })
		for len(queue) > 0 && !queue[0].at.After(now) {
			other.Observe(queue[0].r, queue[0].at.Add(offset))
			queue = queue[1:]
		}
		d := other.Decide(now.Add(offset))
		if i%200 < 120 || len(d.Shares) != len(w.last.Shares) || !d.Ready { // while demand changes, one is ahead of the other
			continue
		}
		var a, b float64
		for j := range d.Shares {
			a += float64(w.last.Shares[j].PPM)
			b += float64(d.Shares[j].PPM)
			ratio := float64(w.last.Shares[j].PPM) / float64(d.Shares[j].PPM)
			half := i / 2401
			worst[half] = max(worst[half], ratio, 1/ratio)
		}
		near(t, "sum of shares", b, a, 0.15)
	}
	if !restarted || max(worst[0], worst[1]) > most {
		t.Errorf("shares differ by factors up to %.2f, then %.2f", worst[0], worst[1])
	}
	t.Logf("shares differ by factors up to %.2f, then, after a restart, %.2f", worst[0], worst[1])
}

// Clocks that jump, of nodes and here, and streams that stall change little.
func TestClocks(t *testing.T) {
	w := newWorld(t, policies(1), 2, 5000)
	g := w.gateway("a", 40_000)
	w.run(3 * time.Second)
	check := func(what string) {
		t.Helper()
		w.run(tick)
		near(t, "mirrored, "+what, g.share()*g.demand, 9000, 0.25)
		w.run(2 * time.Second)
		near(t, "mirrored 2 s after, "+what, g.share()*g.demand, 9000, 0.12)
	}
	w.nodes[0].uptime += time.Hour
	check("a node's clock an hour ahead")
	w.now = w.now.Add(-time.Minute)
	w.last = w.c.Decide(w.now)
	w.now = w.now.Add(time.Minute)
	check("a decision in the past")
	// A stream stalls for 800 ms, then all comes at once.
	var held []load.Report
	for range 16 {
		for _, r := range w.step() {
			if r.Node == "node-0" {
				held = append(held, r)
				continue
			}
			w.c.Observe(r, w.now)
		}
		w.apply(w.c.Decide(w.now))
	}
	for _, r := range held {
		w.c.Observe(r, w.now)
	}
	check("a stream that stalled")
	w.nodes[0].uptime = 0
	w.run(2 * time.Second)
	if w.last.Totals.Fresh != 1 {
		t.Errorf("a node whose time went back within an epoch counts: %+v", w.last.Totals)
	}
}

func TestGarbage(t *testing.T) {
	w := newWorld(t, policies(1), 2, 5000)
	g := w.gateway("a", 40_000)
	w.run(3 * time.Second)
	nan, inf := math.NaN(), math.Inf(1)
	for i := range 200 {
		r := load.Report{Node: "node-0", Epoch: 1, Uptime: w.nodes[0].uptime + tick}
		switch i % 10 {
		case 0:
			r.Utilization, r.Capacity = nan, nan
		case 1:
			r.Utilization, r.Capacity = inf, inf
		case 2:
			r.Utilization, r.Capacity = -1, -1
		case 3:
			r.Analysed, r.Discarded = math.MaxUint64, math.MaxUint64
		case 4:
			r.Kernel, r.Queue, r.Lag = math.MinInt64, math.MinInt64, math.MinInt64
		case 5:
			r.Uptime = math.MaxInt64
		case 6:
			r.Uptime = math.MinInt64
		case 7:
			r.Node = string(make([]byte, 1000))
		case 8:
			r.Analysed = 1 << 50 // more than any node can do in so short a time
		case 9:
			r.Demands = []load.Demand{{}, {Gateway: "x"}, {Gateway: string(make([]byte, 1000)), VM: "v", Policy: "ns/p0"}}
		}
		w.c.Observe(r, w.now)
		w.run(tick)
	}
	w.run(5 * time.Second)
	near(t, "mirrored afterwards", g.share()*g.demand, 9000, 0.12)
	s := w.c.State(w.now)
	if _, err := json.Marshal(s); err != nil {
		t.Error(err)
	}
	for _, f := range []share.Fault{share.FaultCounter, share.FaultName, share.FaultUptime} {
		if s.Faults[f] == 0 {
			t.Errorf("no fault %q in %v", f, s.Faults)
		}
	}
	w.c.Effect(w.now, w.now.Add(-time.Hour))
	w.c.Effect(w.now, w.now.Add(time.Hour))
	if e := w.c.Decide(w.now).Totals.Effect; e != 100*time.Millisecond {
		t.Errorf("effect after %v", e)
	}
}

func TestConfigure(t *testing.T) {
	w := newWorld(t, policies(2), 1, 10_000)
	a, b := w.gateway("a", 20_000), w.gateway("b", 20_000)
	b.policy = "ns/p1"
	w.run(3 * time.Second)
	near(t, "share", a.share(), 0.225, 0.1)
	b.demand = 0
	w.c.Configure(policies(1))
	w.run(3 * time.Second)
	if len(w.last.Shares) != 1 || len(w.last.Defaults) != 1 {
		t.Errorf("%+v, %+v", w.last.Shares, w.last.Defaults)
	}
	near(t, "share", a.share(), 0.45, 0.1)
	c := policies(1)
	c.Policies[0].Ceiling = 100_000
	w.c.Configure(c)
	w.run(tick)
	if a.ppm != 100_000 {
		t.Errorf("%d ppm, above a new ceiling", a.ppm)
	}
	c = policies(10_100)
	c.Policies = append(c.Policies, c.Policies[0])
	w.c.Configure(c)
	w.run(tick)
	if n := len(w.last.Defaults); n != 10_000 {
		t.Errorf("%d policies", n)
	}
}

// Whatever is reported, no more than so much is remembered.
func TestBounded(t *testing.T) {
	if testing.Short() {
		t.Skip("a million demands")
	}
	c := share.New(policies(100))
	now := start()
	for round := range 4 {
		for i := range 1200 {
			r := load.Report{Node: fmt.Sprint("node-", i), Epoch: 1, Uptime: time.Duration(round+1) * tick}
			for j := range 200 {
				r.Demands = append(r.Demands, load.Demand{Gateway: fmt.Sprint("g/", i*200+j), VM: fmt.Sprint(round, j), Policy: fmt.Sprint("ns/p", j%100), Eligible: uint64(round), Received: 1})
			}
			c.Observe(r, now)
		}
		now = now.Add(tick)
		c.Decide(now)
	}
	s := c.State(now)
	gateways := map[string]bool{}
	for _, x := range s.Shares {
		gateways[x.Gateway] = true
	}
	if len(s.Nodes) > 1000 || len(gateways) > 10_000 || len(s.Shares) > 100_000 || s.Workers > 200_000 || s.Faults[share.FaultFull] == 0 {
		t.Errorf("%d nodes, %d gateways, %d shares, %d workers, faults %v", len(s.Nodes), len(gateways), len(s.Shares), s.Workers, s.Faults)
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 200<<20 {
		t.Errorf("%d MB", m.HeapAlloc>>20)
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, c := range []struct{ gateways, nodes, home int }{{100, 10, 0}, {10_000, 10, 0}, {10_000, 100, 9000}, {10_000, 100, 10_000}} {
		b.Run(fmt.Sprintf("gateways=%d,nodes=%d,home=%d", c.gateways, c.nodes, c.home), func(b *testing.B) {
			w := newWorld(b, policies(1), c.nodes, 100_000/float64(c.nodes))
			for i := range c.gateways {
				g := w.gateway(fmt.Sprint("gateway-", i), 200_000/float64(c.gateways))
				if i < c.home {
					g.home(i % c.nodes)
				}
			}
			w.run(2 * time.Second)
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				reports := w.step()
				b.StartTimer()
				for _, r := range reports {
					w.c.Observe(r, w.now)
				}
				w.last = w.c.Decide(w.now)
			}
		})
	}
}
