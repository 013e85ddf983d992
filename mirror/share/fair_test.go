package share

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

func TestFillLevel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		claims := make([]claim, 1+rng.IntN(50))
		least, most := 0.0, 0.0
		for i := range claims {
			c := &claims[i]
			c.weight = math.Exp(3 * rng.NormFloat64())
			c.max = math.Exp(5 * rng.NormFloat64())
			if rng.IntN(3) == 0 {
				c.min = c.max * rng.Float64()
			}
			if rng.IntN(10) == 0 {
				c.min, c.max = 0, 0
			}
			least += c.min
			most += c.max
		}
		budget := rng.Float64() * 1.2 * most
		fillLevel(claims, budget)
		sum, level := 0.0, 0.0
		for _, c := range claims {
			if c.got < c.min-1e-9 || c.got > c.max+1e-9 {
				t.Fatalf("%+v", c)
			}
			sum += c.got
			if c.got > c.min {
				level = max(level, c.got/c.weight)
			}
		}
		if want := min(most, max(least, budget)); math.Abs(sum-want) > 1e-6*want {
			t.Fatalf("%g of %g given, from %g to %g", sum, budget, least, most)
		}
		for _, c := range claims { // whoever has less by weight than another wants no more
			if c.got/c.weight < level*(1-1e-6) && c.got < c.max*(1-1e-6) && sum > least*(1+1e-6) {
				t.Fatalf("%+v, others have %g by weight", c, level)
			}
		}
	}
}

func TestQuantise(t *testing.T) {
	for share, want := range map[float64]int{0: 0, 1: 1_000_000, 0.5: 500_000, 0.12345: 125_000, 0.0999: 100_000, 0.98765: 990_000, 0.00212: 2100, 0.00005: 50} {
		if got := quantise(share); got != want {
			t.Errorf("%v is %d, want %d", share, got, want)
		}
	}
}

func TestFill(t *testing.T) {
	for name, c := range map[string]struct {
		claims       []claim
		budget, less float64
		want         []float64
	}{
		"a floor":                     {[]claim{{min: 50, max: 1000}, {max: 20}, {max: 1000}}, 90, 90, []float64{50, 20, 20}},
		"a floor of all":              {[]claim{{min: 90, max: 1000}, {max: 20}, {max: 1000}}, 90, 90, []float64{90, 20, 0}},
		"late, the modest keep all":   {[]claim{{max: 1000}, {max: 20}, {max: 20}}, 90, 50, []float64{10, 20, 20}},
		"late, all want much":         {[]claim{{max: 40}, {max: 45}, {max: 50}}, 90, 60, []float64{20, 20, 20}},
		"late, and room for all":      {[]claim{{max: 40}, {max: 40}}, 90, 60, []float64{30, 30}},
		"late, and less than no room": {[]claim{{max: 1000}, {max: 20}}, 90, -50, []float64{0, 20}},
	} {
		for i := range c.claims {
			c.claims[i].weight = 1
		}
		fill(c.claims, c.budget, c.less)
		for i, want := range c.want {
			if math.Abs(c.claims[i].got-want) > 1e-6 {
				t.Errorf("%s: %+v, want %v", name, c.claims, c.want)
				break
			}
		}
	}
}

// Where there is no room to keep what nodes got of a gateway, its exchanges are taken to
// be spread evenly, and leave the rest of a node to those that are at home there.
func TestUntold(t *testing.T) {
	c := New(Config{Policies: []Policy{{ID: "ns/p", Ceiling: Everything}}})
	c.taken = maxTaken - 2
	now := time.Unix(1e9, 0)
	var home, untold load.Demand
	home = load.Demand{Gateway: "ingress/home", VM: "a", Policy: "ns/p"}
	untold = load.Demand{Gateway: "ingress/untold", VM: "b", Policy: "ns/p"}
	for i := range uint64(40) {
		home.Eligible, untold.Eligible, home.Received, untold.Received = i*500, i*500, i*50, i*50
		for _, node := range []string{"node-0", "node-1"} {
			r := load.Report{Node: node, Epoch: 1, Uptime: time.Duration(i) * tick, Capacity: 1000, Demands: []load.Demand{home, untold}}
			if node == "node-1" {
				r.Demands = r.Demands[1:]
			}
			c.Observe(r, now)
		}
		c.Decide(now)
		now = now.Add(tick)
	}
	for gateway, want := range map[string]float64{home.Gateway: 450, untold.Gateway: 900} {
		l := c.leaves[leafKey{gateway, "ns/p"}]
		if got := l.share.want * l.routine; math.Abs(got-want) > 20 {
			t.Errorf("%s may mirror %.0f, want %.0f", gateway, got, want)
		}
	}
	if c.taken != maxTaken || c.faults[FaultFull] == 0 {
		t.Errorf("%d kept, faults %v", c.taken, c.faults)
	}
}

// Nodes go on telling of a worker that is silent, a minute after it was forgotten here:
// what they got of it long ago is not taken for what they get.
func TestSilentWorker(t *testing.T) {
	c := New(Config{Policies: []Policy{{ID: "ns/p", Ceiling: Everything}}})
	now := time.Unix(1e9, 0)
	const start = 3 * time.Minute // of the node, before
	silent := load.Demand{Gateway: "ingress/g", VM: "a", Policy: "ns/p", Eligible: 1e6, Mirrored: 1e6, Received: 1e6, Heard: start}
	busy := load.Demand{Gateway: "ingress/g", VM: "b", Policy: "ns/p"}
	for i := range uint64(3 * time.Minute / tick) {
		at := start + time.Duration(i)*tick
		busy.Eligible, busy.Mirrored, busy.Received, busy.Heard = i*5, i*5, i*5, at
		c.Observe(load.Report{Node: "n", Epoch: 1, Uptime: at, Capacity: 1000, Demands: []load.Demand{silent, busy}}, now)
		d := c.Decide(now)
		for _, s := range d.Shares {
			if s.PPM != Everything {
				t.Fatalf("after %v: %+v, faults %v", at-start, s, c.faults)
			}
		}
		now = now.Add(tick)
	}
	// It comes back, with what it had counted.
	silent.Eligible, silent.Mirrored, silent.Received = 1e6+5, 1e6+5, 1e6+5
	silent.Heard = start + 3*time.Minute
	for i := range uint64(20) {
		at := silent.Heard + time.Duration(i)*tick
		c.Observe(load.Report{Node: "n", Epoch: 1, Uptime: at, Capacity: 1000, Demands: []load.Demand{silent, busy}}, now)
		if d := c.Decide(now); len(d.Shares) != 1 || d.Shares[0].PPM != Everything {
			t.Fatalf("back for %v: %+v, faults %v", time.Duration(i)*tick, d.Shares, c.faults)
		}
		now = now.Add(tick)
	}
}

// Demand that is a little beyond what it was on average is mostly chance, if it is
// small; what is far beyond it, or large, is not.
func TestSurge(t *testing.T) {
	for name, c := range map[string]struct{ fast, slow, least, most float64 }{
		"a standard deviation":    {400 * 1.1, 400, 1, 1.02},
		"the same of 100 times":   {40_000 * 1.1, 40_000, 1.08, 1.1},
		"a quarter":               {100, 400, 0.25, 0.4},
		"twice as much":           {800, 400, 1.85, 2},
		"nothing":                 {0, 400, 1, 1},
		"nothing before":          {400, 0, 1, 1},
		"garbage, hundredfold":    {1e9, 1e7, 20, 20},
		"garbage, to a hundredth": {1e5, 1e7, 0.05, 0.05},
	} {
		f := flow{fast: c.fast, slow: c.slow}
		if f.surge(); f.gain < c.least || f.gain > c.most {
			t.Errorf("%s: gain %.3f, want %.2f to %.2f", name, f.gain, c.least, c.most)
		}
	}
}
