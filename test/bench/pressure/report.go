package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/overload"
)

// section is the name of the marked section that the report goes to.
const section = "bench-pressure-sim"

// cell is one scenario under one control, over all seeds.
type cell struct {
	scenario
	control string
}

// report is everything that the tables and plots need.
type report struct {
	seeds    int
	gateways []int
	cells    map[cell]outcome
}

func delays() []time.Duration {
	return []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond}
}

// base is a step of demand at ten gateways, with decisions that take 100 ms.
func base(multiple float64, guard bool) scenario {
	return scenario{gateways: 10, tau: 100 * time.Millisecond, multiple: multiple, nominal: usual, capacity: 1, guard: guard, misread: 1, from: 5 * time.Second, to: 20 * time.Second, end: 35 * time.Second}
}

// many is the same at a hundred gateways.
func many(multiple float64, guard bool) scenario {
	s := base(multiple, guard)
	s.gateways = 100
	return s
}

func capacityDrop(guard bool) scenario {
	s := base(0.5, guard)
	s.capacity = 0.2
	return s
}

func hot() scenario {
	s := base(10, true)
	s.hot = true
	return s
}

func misread(by float64) scenario {
	s := base(2, true)
	s.misread = by
	return s
}

func scaled(gateways int, tau time.Duration, multiple float64) scenario {
	s := base(multiple, true)
	s.gateways, s.tau = gateways, tau
	if gateways > 1000 { // long enough
		s.from, s.to, s.end = 2*time.Second, 10*time.Second, 16*time.Second
	}
	return s
}

// capacities are what nodes can analyse, in exchanges a second.
func capacities() []float64 { return []float64{usual, 1000, 500, 200} }

// small is a step as test/bench/step has it: of a node that can do little, whose
// share takes effect soon.
func small(nominal float64, gateways int, multiple float64) scenario {
	s := scaled(gateways, 30*time.Millisecond, multiple)
	s.nominal, s.from, s.to, s.end = nominal, 5*time.Second, 13*time.Second, 18*time.Second
	return s
}

func traced() scenario {
	s := base(10, true)
	s.from, s.to, s.end, s.trace = 2*time.Second, 8*time.Second, 12*time.Second, true
	return s
}

// village is nodes with four gateways at home at each, of which one side's want ten
// times the capacity, and some that roam.
func village(nodes, roaming int) scenario {
	s := base(10, true)
	s.gateways, s.homes = 4*nodes+roaming, homes{nodes: nodes, roaming: roaming}
	return s
}

// leaving is nodes at whose gateways 80 % of their capacity is wanted, of which one
// goes, and comes back.
func leaving(nodes int) scenario {
	s := base(0.8, true)
	s.gateways, s.homes = 4*nodes, homes{nodes: nodes, away: true}
	return s
}

func (o options) cells() []cell {
	var out []cell
	for _, c := range overload.Controls() {
		for _, guard := range []bool{false, true} {
			out = append(out, cell{base(2, guard), c}, cell{base(10, guard), c}, cell{many(10, guard), c}, cell{capacityDrop(guard), c})
		}
		out = append(out, cell{hot(), c}, cell{traced(), c})
	}
	for _, row := range sides() {
		out = append(out, cell{row.scenario, overload.Budget})
	}
	for _, by := range []float64{0.7, 1.4} {
		out = append(out, cell{misread(by), overload.Budget})
	}
	for _, n := range capacities() {
		for _, gateways := range []int{1, 4} {
			for _, m := range []float64{2, 10} {
				out = append(out, cell{small(n, gateways, m), overload.Budget})
			}
		}
	}
	for _, n := range o.gateways {
		for _, tau := range delays() {
			for _, m := range []float64{2, 10} {
				out = append(out, cell{scaled(n, tau, m), overload.Budget})
			}
		}
	}
	return out
}

// measure runs all cells, as many at a time as there are CPUs.
func measure(ctx context.Context, o options, progress io.Writer) (*report, error) {
	r := &report{seeds: o.seeds, gateways: o.gateways, cells: map[cell]outcome{}}
	todo := make(chan cell)
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for c := range todo {
				out := c.outcome(o.seeds)
				mu.Lock()
				r.cells[c] = out
				mu.Unlock()
			}
		})
	}
	cells := o.cells()
	for i, c := range cells {
		fmt.Fprintf(progress, "%d of %d: %s, %v\n", i+1, len(cells), c.control, c.scenario)
		if ctx.Err() != nil {
			break
		}
		todo <- c
	}
	close(todo)
	workers.Wait()
	return r, ctx.Err()
}

// outcome is the mean over seeds, of the longest delay the longest.
func (c cell) outcome(seeds int) outcome {
	if c.gateways > 1000 { // chance has evened out
		seeds = 1
	}
	var sum outcome
	for seed := range seeds {
		s := c.scenario
		s.seed = uint64(seed + 1)
		o := play(s, newControl(c.control, s))
		for _, f := range []struct{ to, from *float64 }{
			{&sum.goodput, &o.goodput}, {&sum.priority, &o.priority}, {&sum.waste, &o.waste}, {&sum.p99, &o.p99}, {&sum.settled, &o.settled},
			{&sum.unsteady, &o.unsteady}, {&sum.recovery, &o.recovery}, {&sum.pushes, &o.pushes}, {&sum.quiet, &o.quiet},
			{&sum.roaming, &o.roaming}, {&sum.home, &o.home}, {&sum.others, &o.others}, {&sum.otherP99, &o.otherP99},
		} {
			*f.to += *f.from / float64(seeds)
		}
		sum.longest = max(sum.longest, o.longest)
		if sum.points == nil {
			sum.points = o.points
		}
	}
	return sum
}

func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Simulated; mean over %d seeds (longest delay: the longest; 10,000 gateways: one seed). `make bench-pressure-sim` writes this section.\n", r.seeds)
	r.compare(&b)
	r.fair(&b)
	r.sides(&b)
	r.scale(&b)
	r.chance(&b)
	r.wrong(&b)
	b.WriteString("\n![share, demand and delay around a tenfold step](pressure-step.svg)\n")
	r.explain(&b)
	return b.String()
}

// plots are SVG files, by name.
func (r *report) plots() map[string]string {
	var columns []overload.Column
	for _, c := range []string{overload.None, overload.AIMD, overload.Budget} {
		columns = append(columns, overload.Column{Title: c, Points: r.cells[cell{traced(), c}].points})
	}
	return map[string]string{"pressure-step.svg": overload.Draw(columns)}
}

func (r *report) compare(b *strings.Builder) {
	b.WriteString("\n**Steps at ten gateways (and a hundred), decisions take 100 ms to have an effect**\n\n" +
		"| step | guard | control | goodput | priority classes | waste | delay p99 ms | longest | below 20 ms after s | recovery s | variation | changes/s |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, step := range []struct {
		name string
		of   func(guard bool) scenario
	}{
		{"demand ×2", func(g bool) scenario { return base(2, g) }},
		{"demand ×10", func(g bool) scenario { return base(10, g) }},
		{"demand ×10, 100 gateways", func(g bool) scenario { return many(10, g) }},
		{"capacity to 20 %", capacityDrop},
	} {
		for _, guard := range []bool{false, true} {
			for _, c := range overload.Controls() {
				o := r.cells[cell{step.of(guard), c}]
				recovery, variation, changes := overload.Seconds(o.recovery), fmt.Sprintf("%.2f", o.unsteady), fmt.Sprintf("%.1f", o.pushes)
				if c != overload.Budget && c != overload.AIMD {
					recovery, variation, changes = "–", "–", "–"
				}
				fmt.Fprintf(b, "| %s | %s | %s | %.2f | %.2f | %s | %.0f | %.0f | %s | %s | %s | %s |\n", step.name, overload.Yes(guard), c,
					o.goodput, o.priority, overload.Percent(o.waste), o.p99, o.longest, overload.Seconds(o.settled), recovery, variation, changes)
			}
		}
	}
}

func (r *report) fair(b *strings.Builder) {
	b.WriteString("\n**One gateway goes from 5 to 955 % of the capacity, nine stay at 5 % each**\n\n" +
		"| control, with the guard | share that the quiet nine have | priority classes | goodput |\n|---|---|---|---|\n")
	for _, c := range overload.Controls() {
		o := r.cells[cell{hot(), c}]
		fmt.Fprintf(b, "| %s | %s | %.2f | %.2f |\n", c, overload.Percent(o.quiet), o.priority, o.goodput)
	}
}

// side is a scenario of several nodes.
type side struct {
	name string
	scenario
}

func sides() []side {
	return []side{
		{"×10 at the only node", village(1, 0)}, {"×10 at one of 2 nodes", village(2, 0)}, {"×10 at one of 10 nodes", village(10, 0)},
		{"×10 at one of 2 nodes, 4 more gateways roam", village(2, 4)},
		{"one of 2 nodes goes, 80 % are wanted at each", leaving(2)}, {"one of 3 nodes goes, the same", leaving(3)},
	}
}

func (r *report) sides(b *strings.Builder) {
	b.WriteString("\n**The budget with the guard, four gateways at home at each node**\n\n" +
		"| | goodput | priority classes | waste | delay p99 ms | longest | below 20 ms after s | recovery s | share of its gateways | of the others at home | of those that roam | others' goodput | others' delay p99 ms |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, s := range sides() {
		o := r.cells[cell{s.scenario, overload.Budget}]
		others, roaming, goodput, p99 := overload.Percent(o.quiet), overload.Percent(o.roaming), fmt.Sprintf("%.2f", o.others), fmt.Sprintf("%.0f", o.otherP99)
		if s.homes.nodes == 1 {
			others = "–"
		}
		if s.homes.roaming == 0 {
			roaming = "–"
		}
		if s.homes.nodes == 1 || s.homes.away && s.homes.nodes == 2 {
			goodput, p99 = "–", "–"
		}
		fmt.Fprintf(b, "| %s | %.2f | %.2f | %s | %.0f | %.0f | %s | %s | %s | %s | %s | %s | %s |\n", s.name,
			o.goodput, o.priority, overload.Percent(o.waste), o.p99, o.longest, overload.Seconds(o.settled), overload.Seconds(o.recovery), overload.Percent(o.home), others, roaming, goodput, p99)
	}
}

func (r *report) scale(b *strings.Builder) {
	b.WriteString("\n**The budget with the guard, by number of gateways and by how long decisions take**\n\n" +
		"| gateways | τ ms | demand | goodput | priority classes | waste | delay p99 ms | longest | below 20 ms after s | recovery s | variation | changes/s and gateway |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, n := range r.gateways {
		for _, m := range []float64{2, 10} {
			for _, tau := range delays() {
				o := r.cells[cell{scaled(n, tau, m), overload.Budget}]
				fmt.Fprintf(b, "| %d | %d | ×%g | %.2f | %.2f | %s | %.0f | %.0f | %s | %s | %.2f | %.1f |\n", n, tau.Milliseconds(), m,
					o.goodput, o.priority, overload.Percent(o.waste), o.p99, o.longest, overload.Seconds(o.settled), overload.Seconds(o.recovery), o.unsteady, o.pushes)
			}
		}
	}
}

func (r *report) chance(b *strings.Builder) {
	b.WriteString("\n**The budget with the guard, by what the node can analyse: the less, the more is chance** (τ = 30 ms, a step of 8 s)\n\n" +
		"| exchanges a second | gateways | demand | goodput | priority classes | waste | delay p99 ms | longest | below 20 ms after s | recovery s | variation |\n|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, n := range capacities() {
		for _, gateways := range []int{1, 4} {
			for _, m := range []float64{2, 10} {
				o := r.cells[cell{small(n, gateways, m), overload.Budget}]
				fmt.Fprintf(b, "| %.0f | %d | ×%g | %.2f | %.2f | %s | %.0f | %.0f | %s | %s | %.2f |\n", n, gateways, m,
					o.goodput, o.priority, overload.Percent(o.waste), o.p99, o.longest, overload.Seconds(o.settled), overload.Seconds(o.recovery), o.unsteady)
			}
		}
	}
}

func (r *report) wrong(b *strings.Builder) {
	b.WriteString("\n**The node's CPU time is read wrongly (ten gateways, ×2, with the guard)**\n\n| read | goodput | delay p99 ms |\n|---|---|---|\n")
	for _, row := range []struct {
		name string
		s    scenario
	}{{"rightly", base(2, true)}, {"30 % low", misread(0.7)}, {"40 % high", misread(1.4)}} {
		o := r.cells[cell{row.s, overload.Budget}]
		fmt.Fprintf(b, "| %s | %.2f | %.0f |\n", row.name, o.goodput, o.p99)
	}
}

func (r *report) explain(b *strings.Builder) {
	b.WriteString("\nMethod: 1 ms steps; a node that can analyse 50,000 exchanges a second, if nothing else is said, of which 5 % are of a priority class; demand is half of that, but for a step of 15 s (8 s at 10,000 gateways), " +
		"Poisson, with bursts of each gateway's own (σ 0.3, 200 ms). Gateways are of unlike size. Reading is 12 % of an exchange's cost and goes first; what is discarded costs that much. " +
		"Counters come with batches of 48 exchanges, at least every 100 ms while something is mirrored, and wait in the node's sockets like all else. " +
		"A share takes 0.5 to 1.5 τ to reach a gateway. Goodput: analysed within 100 ms, of what could have been. Waste: mirrored, then dropped. " +
		"Below 20 ms: from the step until the delay is, and is on average for half a second from then on. Recovery: from the end of the step to a share of 95 %. Variation: of the share, beyond that of demand. " +
		"What breakers drop is dropped at the gateway, at no cost, whatever its class; a priority class counts as analysed if it was so in time. " +
		"AIMD: +0.2 a second, −30 % at each tick of 50 ms with more than 5 ms of delay. " +
		"Of several nodes, figures are of the one at which the step is, or of one that stays, and shares without the step's first second; " +
		"gateways go elsewhere, or back, 200 ms after a node's end or return. All but the budget have priority classes capped at 30 % of the capacity beforehand.\n")
}
