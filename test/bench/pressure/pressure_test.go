package main

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/overload"
)

// short is a scenario that takes less time than those of the tables.
func short(gateways int, tau time.Duration, multiple float64) scenario {
	s := base(multiple, true)
	s.gateways, s.tau, s.seed = gateways, tau, 1
	switch {
	case gateways > 1000:
		s.from, s.to, s.end = 500*time.Millisecond, 2*time.Second, 2*time.Second
	case gateways > 10:
		s.from, s.to, s.end = time.Second, 5*time.Second, 7500*time.Millisecond
	}
	return s
}

// What the budget must hold, with room: the tables in docs/backpressure.md have the
// figures themselves.
func TestBudget(t *testing.T) {
	for _, n := range []int{1, 10, 100, 1000, 10_000} {
		for _, m := range []float64{2, 10} {
			for _, tau := range delays() {
				if n > 10 && tau != 100*time.Millisecond || n > 100 && m == 2 {
					continue // as long as all others together
				}
				s := short(n, tau, m)
				t.Run(s.String(), func(t *testing.T) {
					t.Parallel()
					testBudget(t, s)
				})
			}
		}
	}
}

func testBudget(t *testing.T, s scenario) {
	o := play(s, newControl(overload.Budget, s))
	t.Logf("goodput %.2f, priority %.2f, waste %.2f, p99 %.0f ms, longest %.0f ms, settled %.2f s, unsteady %.2f, recovery %.2f s, %.1f changes/s",
		o.goodput, o.priority, o.waste, o.p99, o.longest, o.settled, o.unsteady, o.recovery, o.pushes)
	// What lands before a decision has an effect, in seconds of capacity, and what it
	// takes to settle after that.
	lands := (s.tau + 100*time.Millisecond).Seconds() * s.multiple
	length := (s.to - s.from).Seconds()
	if least := 0.85 - 0.4*lands/length; o.goodput < least {
		t.Errorf("goodput %.2f, want %.2f", o.goodput, least)
	}
	if least := 0.98 - 0.4*lands/length; o.priority < least {
		t.Errorf("priority classes %.2f, want %.2f", o.priority, least)
	}
	dropped := 1.2 * lands
	if s.gateways > 1000 {
		dropped *= 1.5 // their counters come late, one by one
	}
	if most := 0.03 + dropped/(dropped+length); o.waste > most {
		t.Errorf("waste %.2f, want %.2f", o.waste, most)
	}
	if most := 60 + 250*lands; o.longest > most {
		t.Errorf("longest delay %.0f ms, want %.0f", o.longest, most)
	}
	if s.gateways > 1000 {
		if !(o.settled < 0.8) {
			t.Errorf("settled after %.2f s", o.settled)
		}
		return // too short for what follows
	}
	if !(o.recovery < 2.4) {
		t.Errorf("recovery after %.2f s", o.recovery)
	}
	if s.gateways > 1 && o.unsteady > 0.15 {
		t.Errorf("variation %.2f beyond that of demand", o.unsteady)
	}
}

func TestCapacityDrop(t *testing.T) {
	s := capacityDrop(true)
	s.from, s.to, s.end, s.seed = 2*time.Second, 7*time.Second, 10*time.Second, 1
	o := play(s, newControl(overload.Budget, s))
	if o.goodput < 0.8 || o.p99 > 200 || o.priority < 0.95 || !(o.recovery < 2) {
		t.Errorf("%+v", o)
	}
}

// The quiet gateways keep what they have, whatever the hot one does.
func TestQuiet(t *testing.T) {
	s := hot()
	s.from, s.to, s.end, s.seed = 2*time.Second, 7*time.Second, 10*time.Second, 1
	ours := play(s, newControl(overload.Budget, s))
	if ours.quiet < 0.97 {
		t.Errorf("the quiet gateways have %.2f", ours.quiet)
	}
	if o := play(s, newControl(overload.AIMD, s)); o.quiet > 0.5 {
		t.Errorf("with AIMD, the quiet gateways have %.2f: the scenario shows nothing", o.quiet)
	}
}

func TestMisread(t *testing.T) {
	for by, least := range map[float64]float64{0.7: 0.85, 1.4: 0.65} {
		s := misread(by)
		s.from, s.to, s.end, s.seed = 2*time.Second, 7*time.Second, 10*time.Second, 1
		if o := play(s, newControl(overload.Budget, s)); o.goodput < least || o.p99 > 100 {
			t.Errorf("read %g-fold: %+v", by, o)
		}
	}
}

// Whatever is wanted at one node's gateways, others keep what they have, and the node
// does as well as one that is alone; so do those that stay when a node goes.
func TestHomes(t *testing.T) {
	shorter := func(s scenario) outcome {
		s.from, s.to, s.end = 2*time.Second, 12*time.Second, 15*time.Second
		return cell{s, overload.Budget}.outcome(4)
	}
	alone := shorter(village(1, 0))
	for _, s := range []scenario{village(2, 0), village(10, 0), village(2, 4)} {
		o := shorter(s)
		t.Logf("%+v: %+v", s.homes, o)
		if o.quiet < 0.999 || o.others < 0.99 || o.otherP99 > 10 || s.homes.roaming > 0 && o.roaming < 0.99 {
			t.Errorf("%+v: others have %.3f of theirs, those that roam %.3f, goodput %.2f, delay %.0f ms", s.homes, o.quiet, o.roaming, o.others, o.otherP99)
		}
		if o.goodput < 0.85 || o.priority < 0.95 || o.waste > alone.waste+0.02 || o.p99 > 1.2*alone.p99 || o.longest > 1.2*alone.longest || !(o.recovery < 2.4) {
			t.Errorf("%+v: %+v, alone %+v", s.homes, o, alone)
		}
	}
	for _, nodes := range []int{2, 3} {
		o := shorter(leaving(nodes))
		t.Logf("one of %d goes: %+v", nodes, o)
		if o.goodput < 0.85 || o.priority < 0.98 || o.waste > 0.06 || o.longest > 60 || !(o.settled < 2.4) || !(o.recovery < 2.4) {
			t.Errorf("one of %d goes: %+v", nodes, o)
		}
		if math.Abs(o.home-o.quiet) > 0.1 {
			t.Errorf("one of %d goes: its gateways have %.2f, others %.2f", nodes, o.home, o.quiet)
		}
	}
}

// Others fail where they are said to.
func TestOthers(t *testing.T) {
	s := short(100, 100*time.Millisecond, 10)
	s.end = s.to
	ours := play(s, newControl(overload.Budget, s))
	for _, c := range []string{overload.None, overload.Breaker, overload.Small, overload.AIMD} {
		if o := play(s, newControl(c, s)); o.goodput > ours.goodput-0.02 {
			t.Errorf("%s: goodput %.2f, ours %.2f", c, o.goodput, ours.goodput)
		}
	}
}

func TestSame(t *testing.T) {
	s := short(10, 100*time.Millisecond, 10)
	s.trace = true
	a, b := play(s, newControl(overload.Budget, s)), play(s, newControl(overload.Budget, s))
	for i := range a.points {
		if a.points[i] != b.points[i] {
			t.Fatalf("two runs of one seed differ at %g s: %+v, %+v", a.points[i].T, a.points[i], b.points[i])
		}
	}
}

func TestReport(t *testing.T) {
	r := &report{seeds: 1, gateways: []int{10}, cells: map[cell]outcome{}}
	for _, c := range (options{gateways: r.gateways}).cells() {
		r.cells[c] = outcome{goodput: 0.5, settled: math.NaN(), points: []overload.Point{{T: 1}, {T: 2, Share: 1, Delay: 9}}}
	}
	out := r.markdown()
	for _, want := range []string{"| demand ×10 | yes | **budget** | 0.50 |", "| 10 | 500 | ×10 | 0.50 |", "| 200 | 4 | ×10 | 0.50 |", "never"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "NaN") || strings.Contains(out, "%!") {
		t.Errorf("report:\n%s", out)
	}
	for name, svg := range r.plots() {
		if !strings.HasPrefix(svg, "<svg") || !strings.HasSuffix(svg, "</svg>\n") || strings.Contains(svg, "NaN") {
			t.Errorf("%s:\n%s", name, svg)
		}
	}
}

func TestParse(t *testing.T) {
	for _, args := range []string{"-seeds 0", "-gateways x", "-gateways 0", "-gateways 10001", "x"} {
		if _, err := parse(strings.Fields(args), t.Output()); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
	file := filepath.Join(t.TempDir(), "x.md")
	if err := os.WriteFile(file, []byte("no marks\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code := run(t.Context(), []string{"-write", file}, t.Output(), t.Output()); code != 1 {
		t.Errorf("a file without marks: code %d", code)
	}
}
