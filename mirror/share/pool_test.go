package share_test

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
)

// village is four gateways at home at each node, of half its capacity together.
func village(t testing.TB, nodes int) (*world, [][]*gateway) {
	w := newWorld(t, policies(1), nodes, 5000)
	at := make([][]*gateway, nodes)
	for i := range 4 * nodes {
		at[i%nodes] = append(at[i%nodes], w.gateway(fmt.Sprint("g", i), 625).home(i%nodes))
	}
	w.run(2 * time.Second)
	return w, at
}

func set(gateways []*gateway, demand float64) {
	for _, g := range gateways {
		g.demand = demand
	}
}

// mirrored is what gateways mirror by their shares, exchanges a second.
func mirrored(gateways []*gateway) (sum float64) {
	for _, g := range gateways {
		sum += g.share() * g.demand
	}
	return sum
}

func (w *world) delayOf(node int) time.Duration {
	n := w.nodes[node]
	return time.Duration(n.backlog / n.capacity * float64(time.Second))
}

func (w *world) nodeState(name string) share.NodeState {
	for _, n := range w.c.State(w.now).Nodes {
		if n.Name == name {
			return n
		}
	}
	w.t.Fatalf("no node %s", name)
	return share.NodeState{}
}

// One side is overloaded tenfold: the other keeps everything.
func TestHomes(t *testing.T) {
	w, at := village(t, 2)
	set(at[0], 6250)
	for range 60 {
		w.run(tick)
		for _, g := range at[1] {
			if g.ppm != share.Everything {
				t.Fatalf("%s, at home at the idle node, has %d ppm", g.pod, g.ppm)
			}
		}
	}
	near(t, "mirrored to the overloaded node", mirrored(at[0]), 4500, 0.08)
	if d := w.delayOf(0); d > 10*time.Millisecond {
		t.Errorf("delay %v, 3 s after the step", d)
	}
	a, b := w.nodeState("node-0"), w.nodeState("node-1")
	near(t, "the overloaded node's demand", a.Demand, 25_000, 0.05)
	near(t, "its budget", a.Budget, 4500, 0.05)
	near(t, "the other node's demand", b.Demand, 2500, 0.05)
	near(t, "its budget", b.Budget, 4500, 0.05)
	if a.Bound != 4 || b.Bound != 0 {
		t.Errorf("%d and %d shares are bound", a.Bound, b.Bound)
	}
	for _, s := range w.c.State(w.now).Shares {
		home := "node-0"
		if s.Demand < 1000 {
			home = "node-1"
		}
		if bound := s.Node == home; bound != (home == "node-0") || s.Nodes[home] < 0.99 {
			t.Errorf("%+v", s)
		}
	}
	set(at[0], 625)
	w.run(2 * time.Second)
	near(t, "mirrored after the overload", mirrored(at[0]), 2500, 0)
}

// Gateways that roam have as much as those at home, by what binds them both.
func TestRoaming(t *testing.T) {
	w, at := village(t, 2)
	var roaming []*gateway
	for i := range 4 {
		roaming = append(roaming, w.gateway(fmt.Sprint("roaming-", i), 300))
	}
	set(at[0], 6250)
	w.run(4 * time.Second)
	near(t, "mirrored by modest ones that roam", mirrored(roaming), 1200, 0)
	near(t, "mirrored by those at home at the overloaded node", mirrored(at[0]), 4500-600, 0.08)
	set(roaming, 6250)
	w.run(4 * time.Second)
	near(t, "mirrored by those at home at the overloaded node", mirrored(at[0]), 3000, 0.1)
	near(t, "mirrored by the others at home", mirrored(at[1]), 2500, 0)
	near(t, "mirrored by greedy ones that roam", mirrored(roaming), 3000, 0.1)
	set(at[1], 6250)
	w.run(4 * time.Second)
	near(t, "mirrored by all", mirrored(w.gateways), 9000, 0.08)
	near(t, "mirrored by greedy ones that roam, all greedy", mirrored(roaming), 3000, 0.1)

	// A small part binds nobody to a node that is used up.
	set(at[1], 625)
	for _, g := range roaming {
		g.demand, g.to = 500, []float64{0.1, 0.9}
	}
	w.run(8 * time.Second)
	near(t, "mirrored by those that hardly roam", mirrored(roaming), 2000, 0.01)
}

// One slow node of several holds nobody back who sends to all alike.
func TestSlowNode(t *testing.T) {
	w := newWorld(t, policies(1), 4, 5000)
	g := w.gateway("a", 15_000)
	w.run(2 * time.Second)
	w.nodes[2].capacity = 1000
	w.run(10 * time.Second)
	near(t, "mirrored", g.share()*g.demand, 14_500, 0.12)
}

// When a node stops, its gateways' budget is that of the nodes where they go; when it
// comes back, its own.
func TestHomeStops(t *testing.T) {
	for _, nodes := range []int{2, 4} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			w, at := village(t, nodes)
			for _, g := range at {
				set(g, 6250)
			}
			w.run(3 * time.Second)
			near(t, "mirrored", mirrored(w.gateways), 4500*float64(nodes), 0.08)
			w.nodes[0].stopped = true
			worst := time.Duration(0)
			for range 60 {
				w.run(tick)
				worst = max(worst, w.delayOf(1))
			}
			near(t, "mirrored, 3 s after a node stopped", mirrored(w.gateways), 4500*float64(nodes-1), 0.1)
			for _, g := range w.gateways { // those that moved, and those that were there
				near(t, "share of "+g.pod, g.share(), 4500*float64(nodes-1)/(25_000*float64(nodes)), 0.15)
			}
			if worst > 100*time.Millisecond {
				t.Errorf("delay up to %v at the other nodes", worst)
			}
			w.run(10 * time.Second)
			n := w.nodes[0] // it was restarted, and counts anew
			n.stopped, n.epoch, n.uptime, n.analysed, n.discarded, n.backlog = false, 99, 0, 0, 0, 0
			for _, g := range w.gateways {
				g.received[0] = 0
			}
			w.run(2 * time.Second)
			near(t, "mirrored, 2 s after it came back", mirrored(w.gateways), 4500*float64(nodes), 0.12)
			w.run(3 * time.Second)
			near(t, "mirrored by its gateways", mirrored(at[0]), 4500, 0.08)
			for _, s := range w.c.State(w.now).Shares {
				if s.Gateway == at[0][0].pod && s.Nodes["node-0"] < 0.9 {
					t.Errorf("%+v, 5 s after it came back", s)
				}
			}
			if d := w.delay(); d > 10*time.Millisecond {
				t.Errorf("delay %v, 5 s after it came back", d)
			}
		})
	}
}

// So it is with small gateways, of which nodes get little; and where another node takes
// the place of one that is gone.
func TestHomeOfSmallOnes(t *testing.T) {
	w := newWorld(t, policies(1), 3, 200)
	for i := range 120 {
		w.gateway(fmt.Sprint("g", i), 50).home(i % 2)
	}
	w.nodes[2].stopped = true
	w.run(10 * time.Second)
	near(t, "mirrored", mirrored(w.gateways), 360, 0.1)
	w.nodes[0].stopped = true
	w.run(5 * time.Second)
	near(t, "mirrored with one node", mirrored(w.gateways), 180, 0.1)
	w.nodes[2].stopped = false
	for _, g := range w.gateways {
		if g.to[0] == 1 {
			g.home(2)
		}
	}
	w.run(12 * time.Second)
	near(t, "mirrored with another in its place", mirrored(w.gateways), 360, 0.1)
	for _, s := range w.c.State(w.now).Shares {
		if max(s.Nodes["node-1"], s.Nodes["node-2"]) < 0.9 {
			t.Errorf("%+v", s)
		}
	}
}

// Each node's tenants and priority classes have their parts of it, whatever there is
// at others.
func TestHomesOfTenants(t *testing.T) {
	w := newWorld(t, policies(2), 2, 5000)
	one, two := w.gateway("one", 20_000).home(0), w.gateway("two", 20_000).home(0)
	two.policy = "ns/p1"
	for i := range 3 { // the second tenant has more of them elsewhere
		w.gateway(fmt.Sprint("elsewhere-", i), 20_000).home(1).policy = "ns/p1"
	}
	w.run(4 * time.Second)
	near(t, "the first tenant at the first node", one.share()*one.demand, 2250, 0.1)
	near(t, "the second tenant there", two.share()*two.demand, 2250, 0.1)
	other := w.gateways[3]
	other.priority, one.priority = 20_000, 500
	w.run(4 * time.Second)
	near(t, "priority classes at the second node", float64(other.spared)/share.Everything*other.priority, 1500, 0.12)
	if one.spared != share.Everything {
		t.Errorf("priority classes at the first node have %d ppm", one.spared)
	}
}

// Where a gateway's exchanges go is what nodes say, not what it says.
func TestLiesOfHomes(t *testing.T) {
	w, at := village(t, 2)
	set(at[0], 6250)
	w.run(62 * time.Second)
	for _, g := range at[0] {
		g.lie = func(d *load.Demand) {
			d.Eligible *= 3
			d.Mirrored = math.MaxUint64
		}
	}
	w.run(10 * time.Second)
	near(t, "mirrored by those at the idle node", mirrored(at[1]), 2500, 0)
	if m := mirrored(at[0]); m > 5500 {
		t.Errorf("liars mirror %.0f", m)
	}
}
