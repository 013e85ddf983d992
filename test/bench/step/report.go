package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/overload"
	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/cgrouptest"
)

// section is the name of the marked section that the report goes to.
const section = "bench-pressure"

const plotFile = "pressure-step-real.svg"

// median over rounds; never (NaN) counts as later than anything.
func median(of []outcome, f func(outcome) float64) float64 {
	var v []float64
	for _, o := range of {
		v = append(v, f(o))
	}
	return middle(v)
}

func middle(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = ordered(v)
	m := (v[(len(v)-1)/2] + v[len(v)/2]) / 2
	if math.IsInf(m, 1) {
		return math.NaN()
	}
	return m
}

// ordered are values, never last.
func ordered(v []float64) []float64 {
	v = slices.Clone(v)
	for i := range v {
		if math.IsNaN(v[i]) {
			v[i] = math.Inf(1)
		}
	}
	slices.Sort(v)
	return v
}

func total(of []outcome, f func(outcome) int) int {
	sum := 0
	for _, o := range of {
		sum += f(o)
	}
	return sum
}

func (r *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; Envoy %s, `--concurrency 1`; %s; load average before the run: %s. `make bench-pressure` writes this section.\n",
		r.machine, r.version, r.date.Format(time.DateOnly), orNone(r.machine.Load))
	fmt.Fprintf(&b, "\nA node with %.0f %% of a CPU (in periods of %v). It analyses", 100*r.options.quota, cgrouptest.Period)
	for i, s := range r.scenarios() {
		if i > 0 {
			b.WriteByte(',')
		}
		c := result.Over(r.capacity[s])
		fmt.Fprintf(&b, " %.0f exchanges a second (%.0f–%.0f) at %v", c.Mid, c.Low, c.High, s)
	}
	fmt.Fprintf(&b, ". The machine's speed varies: one inspection, always of the same request, took %.2f ms of CPU time (%.2f–%.2f). Goodput is by what the node can do at the speed of each run.\n", middle(r.costs), slices.Min(r.costs), slices.Max(r.costs))
	r.goals(&b)
	r.compare(&b)
	r.fair(&b)
	if r.plot() != "" {
		fmt.Fprintf(&b, "\n![share, demand and delay around a tenfold step, measured](%s)\n", plotFile)
	}
	r.explain(&b)
	return b.String()
}

func orNone(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

// scenarios are those that were run.
func (r *results) scenarios() []scenario {
	var out []scenario
	for _, s := range scenarios() {
		if len(r.capacity[s]) > 0 {
			out = append(out, s)
		}
	}
	return out
}

// goal is what the budget should reach.
type goal struct {
	name  string
	of    func(outcome) float64
	limit func(scenario) float64
	least bool // else the most
	show  func(float64) string
	skip  func(scenario) bool
}

func (r *results) allGoals() []goal {
	most := func(v float64) func(scenario) float64 { return func(scenario) float64 { return v } }
	ms := func(v float64) string { return fmt.Sprintf("%.0f ms", v) }
	two := func(v float64) string { return fmt.Sprintf("%.2f", v) }
	number := func(v float64) string { return fmt.Sprintf("%.0f", v) }
	s := func(v float64) string {
		if math.IsNaN(v) || math.IsInf(v, 1) {
			return "never"
		}
		return fmt.Sprintf("%.2f s", v)
	}
	users := func(o outcome) float64 { return o.users }
	return []goal{
		{name: "delay, p99 < 250 ms", of: func(o outcome) float64 { return o.p99 }, limit: most(250), show: ms},
		{name: "delay below 20 ms within 0.5 s", of: func(o outcome) float64 { return o.settled }, limit: most(0.5), show: s},
		{name: "goodput ≥ 0.85, at one gateway 0.80", of: func(o outcome) float64 { return o.goodput }, least: true, show: two, limit: func(s scenario) float64 {
			if s.gateways == 1 {
				return 0.80
			}
			return 0.85
		}},
		{name: "waste < 15 %", of: func(o outcome) float64 { return o.waste }, limit: most(0.15), show: overload.Percent},
		{name: "recovery < 2 s", of: func(o outcome) float64 { return o.recovery }, limit: most(2), show: s},
		{name: "variation of the share ≤ 0.05", of: func(o outcome) float64 { return o.varies }, limit: most(0.05), show: two},
		{name: "quiet gateways' share ≥ 99 %", of: func(o outcome) float64 { return o.quiet }, limit: most(0.99), least: true, show: overload.Percent, skip: func(s scenario) bool { return !s.hot }},
		{name: "priority classes discarded by the guard: 0", of: func(o outcome) float64 { return float64(o.spoilt) }, limit: most(0), show: number},
		{name: "users' p99 ≤ that beside a healthy node", of: users, show: func(v float64) string { return fmt.Sprintf("%.1f ms", v) }, limit: func(s scenario) float64 {
			return median(r.cells[cell{s, controlHealthy, true}], users)
		}},
		{name: "users' errors: 0", of: func(o outcome) float64 { return float64(o.errors) }, limit: most(0), show: number},
	}
}

// verdict is by the median; the lowest and the highest round stand beside it.
func (g goal) verdict(s scenario, rounds []outcome) string {
	var v []float64
	for _, o := range rounds {
		v = append(v, g.of(o))
	}
	mid := middle(v)
	met := mid <= g.limit(s)
	if g.least {
		met = mid >= g.limit(s)
	}
	text := g.show(mid)
	if v = ordered(v); len(v) > 1 && g.show(v[0]) != g.show(v[len(v)-1]) {
		text += fmt.Sprintf(" (%s–%s)", g.show(v[0]), g.show(v[len(v)-1]))
	}
	if !met { // NaN meets nothing
		return "**not met**: " + text
	}
	return "met: " + text
}

func (r *results) goals(b *strings.Builder) {
	var columns []scenario
	for _, s := range r.scenarios() {
		if len(r.cells[cell{s, overload.Budget, true}]) > 0 {
			columns = append(columns, s)
		}
	}
	if len(columns) == 0 {
		return
	}
	b.WriteString("\n**Goals of the budget with the guard** (median; lowest to highest round)\n\n| goal |")
	for _, s := range columns {
		fmt.Fprintf(b, " %v |", s)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, g := range r.allGoals() {
		fmt.Fprintf(b, "| %s |", g.name)
		for _, s := range columns {
			if g.skip != nil && g.skip(s) {
				b.WriteString(" – |")
				continue
			}
			fmt.Fprintf(b, " %s |", g.verdict(s, r.cells[cell{s, overload.Budget, true}]))
		}
		b.WriteByte('\n')
	}
}

func (r *results) compare(b *strings.Builder) {
	b.WriteString("\n**Steps of demand**\n\n" +
		"| step | guard | control | goodput | priority classes | waste | delay p99 ms | longest | below 20 ms after s | recovery s | variation | changes/s | users' p99 ms | errors |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, s := range r.scenarios() {
		if s.hot {
			continue
		}
		if rounds := r.cells[cell{s, controlHealthy, true}]; len(rounds) > 0 {
			fmt.Fprintf(b, "| %v | yes | (healthy: half of what the node can do) | | | | %.0f | %.0f | | | | | %.1f | %d |\n", s,
				median(rounds, func(o outcome) float64 { return o.p99 }), median(rounds, func(o outcome) float64 { return o.longest }),
				median(rounds, func(o outcome) float64 { return o.users }), total(rounds, func(o outcome) int { return o.errors }))
		}
		for _, guard := range []bool{false, true} {
			for _, c := range overload.Controls() {
				if rounds := r.cells[cell{s, c, guard}]; len(rounds) > 0 {
					row(b, s, guard, c, rounds)
				}
			}
		}
	}
}

func row(b *strings.Builder, s scenario, guard bool, control string, rounds []outcome) {
	of := func(f func(outcome) float64) float64 { return median(rounds, f) }
	recovery, variation, changes := "–", "–", "–"
	if control == overload.Budget || control == overload.AIMD {
		recovery = overload.Seconds(of(func(o outcome) float64 { return o.recovery }))
		variation = fmt.Sprintf("%.2f", of(func(o outcome) float64 { return o.varies }))
		changes = fmt.Sprintf("%.1f", of(func(o outcome) float64 { return o.changes }))
	}
	fmt.Fprintf(b, "| %v | %s | %s | %.2f | %.2f | %s | %.0f | %.0f | %s | %s | %s | %s | %.1f | %d |\n", s, overload.Yes(guard), control,
		of(func(o outcome) float64 { return o.goodput }), of(func(o outcome) float64 { return o.priority }), overload.Percent(of(func(o outcome) float64 { return o.waste })),
		of(func(o outcome) float64 { return o.p99 }), of(func(o outcome) float64 { return o.longest }), overload.Seconds(of(func(o outcome) float64 { return o.settled })),
		recovery, variation, changes, of(func(o outcome) float64 { return o.users }), total(rounds, func(o outcome) int { return o.errors }))
}

func (r *results) fair(b *strings.Builder) {
	for _, s := range r.scenarios() {
		if !s.hot {
			continue
		}
		fmt.Fprintf(b, "\n**One gateway goes from 5 to %.0f %% of the capacity, nine stay at 5 %% each**\n\n"+
			"| control, with the guard | share that the quiet nine have | priority classes | goodput | waste | delay p99 ms | users' p99 ms | errors |\n|---|---|---|---|---|---|---|---|\n", 100*s.rates(0)[phaseStep])
		for _, c := range append([]string{controlHealthy}, overload.Controls()...) {
			rounds := r.cells[cell{s, c, true}]
			of := func(f func(outcome) float64) float64 { return median(rounds, f) }
			users, errors := of(func(o outcome) float64 { return o.users }), total(rounds, func(o outcome) int { return o.errors })
			switch {
			case len(rounds) == 0:
			case c == controlHealthy:
				fmt.Fprintf(b, "| (healthy) | | | | | %.0f | %.1f | %d |\n", of(func(o outcome) float64 { return o.p99 }), users, errors)
			default:
				fmt.Fprintf(b, "| %s | %s | %.2f | %.2f | %s | %.0f | %.1f | %d |\n", c, overload.Percent(of(func(o outcome) float64 { return o.quiet })),
					of(func(o outcome) float64 { return o.priority }), of(func(o outcome) float64 { return o.goodput }), overload.Percent(of(func(o outcome) float64 { return o.waste })),
					of(func(o outcome) float64 { return o.p99 }), users, errors)
			}
		}
	}
}

// plot is an SVG file of the tenfold step, or empty.
func (r *results) plot() string {
	var columns []overload.Column
	for _, c := range []string{overload.None, overload.AIMD, overload.Budget} {
		if rounds := r.cells[cell{scenario{gateways: 4, multiple: 10}, c, true}]; len(rounds) > 0 {
			columns = append(columns, overload.Column{Title: c, Points: rounds[0].points})
		}
	}
	if len(columns) == 0 {
		return ""
	}
	return overload.Draw(columns)
}

func (r *results) explain(b *strings.Builder) {
	var effects, idle []float64
	for c, rounds := range r.cells {
		for _, o := range rounds {
			idle = append(idle, o.idle)
			if c.control == overload.Budget && !math.IsNaN(o.effect) {
				effects = append(effects, o.effect)
			}
		}
	}
	fmt.Fprintf(b, "\nMethod: what runs is the product, but that the control plane is in the benchmark's process, so that other controls can take the place of the budget. "+
		"Real Envoys with the plugin, shares by ADS; users are an open loop (Poisson), 5 %% of their requests of a priority class, `GET`, answered with %d bytes of JSON. "+
		"The node is `periscope node`, a process of its own for each run, in a control group of CPU weight %d, as in deploy/; load reports by ORCA. "+
		"Capacity is what it analyses unguarded of 1.4 times as much, at the same demand of users'. "+
		"Demand is half of that, %v long the multiple, and half again. Delays are by the node's trace: how long the oldest exchange that it will analyse has been on its way since its batch was sent, each ms. "+
		"Goodput: analysed within 100 ms of being sent, of what the node can do. “Below 20 ms”: from the step until the delay is, and is on average for half a second from then on. Waste: made an event by the plugin, and not analysed, by whatever of Envoy's breakers, time-outs, the guard or the node's queue. "+
		"Priority classes: analysed within 100 ms, of those that were to be mirrored. Variation: of the share, beyond that of demand as counted over %d ms. "+
		"A request of a breaker's is a batch of up to 48 exchanges; AIMD and the budget have the product's breaker of 64. All but the budget have priority classes capped at 30 %% of the capacity beforehand. "+
		"The budget, the capacity and the healthy node are medians of %d rounds, the others of %d. "+
		"From a decision to the first batch made under it: %.0f ms (median). During steps at least %.0f %% of the machine's CPU time were idle.\n",
		answerBytes, cpuWeight, r.options.step, followedMS, r.options.rounds, r.options.others, middle(effects), 100*slices.Min(append(idle, 1)))
}
