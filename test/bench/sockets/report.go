package main

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

// section is the name of the marked section that the report goes to.
const section = "bench-sockets"

// report is everything that the tables need.
type report struct {
	machine   result.Machine
	date      time.Time
	window    time.Duration
	overheads []overhead
	costs     []cost
	steps     []detected
}

func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %s", r.machine, r.date.Format(time.DateOnly))
	if r.machine.Load != "" {
		fmt.Fprintf(&b, "; load average before the run: %s", r.machine.Load)
	}
	b.WriteString(". `make bench-sockets` writes this section.\n")
	r.writeGoals(&b)
	r.writeOverheads(&b)
	r.writeCosts(&b)
	r.writeSteps(&b)
	return b.String()
}

// goal is what a figure should be, beside what it is.
type goal struct {
	what  string
	got   float64
	limit float64
	unit  string
}

func (g goal) verdict() string {
	if g.got <= g.limit { // NaN and +Inf meet nothing
		return "met"
	}
	return "**not met**"
}

func (r *report) goals() []goal {
	var out []goal
	for _, o := range r.overheads {
		if o.way == kept {
			out = append(out, goal{"overhead at full load, upper end of the interval", (o.ratio(counted, usage.node).High - 1) * 100, 3, "%"})
		}
	}
	for _, c := range r.costs {
		if c.conns == 1000 {
			out = append(out, goal{"one sample of 1,000 connections by `ebpf`", result.Over(c.micros[sockstat.EBPF]).Mid, 250, "µs"})
		}
	}
	for _, s := range []struct{ series, who string }{{sockstat.EBPF, "`ebpf`, from outside"}, {seriesWatch, "`periscope node watch`"}, {seriesLevel, "the node's level"}} {
		var all []float64
		for _, d := range r.steps {
			if len(d.capacities) > 0 {
				all = append(all, d.median(s.series))
			}
		}
		if len(all) > 0 && s.series != seriesWatch { // it is for the next one
			out = append(out, goal{"from a step to 10 ms, median of the steps: " + s.who, result.Over(all).Mid, 50, "ms"})
		}
		for _, d := range r.steps {
			if d.scenario == quotaCut {
				out = append(out, goal{d.scenario + ": " + s.who, d.median(s.series), 75, "ms"})
			}
			if d.scenario == slowWorkers && s.series == seriesLevel {
				out = append(out, goal{d.scenario + ": " + s.who, d.median(s.series), 100, "ms"})
			}
		}
	}
	return out
}

func (r *report) writeGoals(b *strings.Builder) {
	goals := r.goals()
	if len(goals) == 0 {
		return
	}
	b.WriteString("\n| goal | measured | at most | |\n|---|---|---|---|\n")
	for _, g := range goals {
		fmt.Fprintf(b, "| %s | %s | %g %s | %s |\n", g.what, amount(g.got, g.unit), g.limit, g.unit, g.verdict())
	}
}

func amount(v float64, unit string) string {
	switch {
	case math.IsNaN(v):
		return "?"
	case math.IsInf(v, 1):
		return "never"
	case unit == "%":
		return fmt.Sprintf("%.1f %%", v)
	}
	return fmt.Sprintf("%.0f %s", v, unit)
}

func (r *report) writeOverheads(b *strings.Builder) {
	if len(r.overheads) == 0 {
		return
	}
	b.WriteString("\n**What counting costs a node at full load: CPU time of an exchange**\n\n" +
		"| connections | exchanges/s | node, µs | without again (A/A) | `ebpf`, every 10 ms | node and sender, µs | without again (A/A) | `ebpf`, every 10 ms |\n" +
		"|---|---|---|---|---|---|---|---|\n")
	for _, o := range r.overheads {
		fmt.Fprintf(b, "| %s | %.0f |", connections(o.way), o.rate())
		for _, of := range []func(usage) float64{usage.node, usage.total} {
			fmt.Fprintf(b, " %.2f | %s | %s |", o.micros(of), percent(o.ratio(again, of)), percent(o.ratio(counted, of)))
		}
		b.WriteString("\n")
	}
	o := r.overheads[0]
	fmt.Fprintf(b, "\nA real ingest server takes batches of %d exchanges, with %d bytes of body in either direction, as fast as it can, by %d connections; what stands in for analysis only gives them back. "+
		"%d blocks; each has two windows of %v without counters and one with, in random order: programs attached, and %.0f samples a second, in the node's own process. "+
		"Medians, with their intervals of 95 %% confidence; with counters against the mean of the block's two windows without. "+
		"The CPU time is that of the processes, in user and kernel mode; what the kernel does to receive is the sender's part on loopback.\n",
		overheadEvents, overheadBody, overheadConns, len(o.blocks), r.window, o.samples())
}

func connections(way string) string {
	if way == once {
		return "a new one for each batch"
	}
	return fmt.Sprint(overheadConns, ", kept")
}

// percent writes ratios as differences.
func percent(s result.Spread) string {
	return fmt.Sprintf("%+.1f %%, %+.1f to %+.1f", (s.Mid-1)*100, (s.Low-1)*100, (s.High-1)*100)
}

func (r *report) writeCosts(b *strings.Builder) {
	if len(r.costs) == 0 {
		return
	}
	b.WriteString("\n**One sample: CPU time in µs**\n\n| connections |")
	for _, name := range sockstat.Backends() {
		fmt.Fprintf(b, " `%s` |", name)
	}
	b.WriteString("\n|" + strings.Repeat("---|", 1+len(sockstat.Backends())) + "\n")
	for _, c := range r.costs {
		fmt.Fprintf(b, "| %s |", thousands(c.conns))
		for _, name := range sockstat.Backends() {
			s := result.Over(c.micros[name])
			fmt.Fprintf(b, " %s, %s–%s |", thousands(int(s.Mid)), thousands(int(s.Low)), thousands(int(s.High)))
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(b, "\nOf the whole process, the kernel's part included; half of the connections have bytes to read; they come from %d addresses. "+
		"Samples are taken one after the other for %v, back ends in turn, in random order; medians of %d rounds with their intervals of 95 %% confidence.\n",
		addresses, costFor, costRounds)
}

func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}

func (r *report) writeSteps(b *strings.Builder) {
	if len(r.steps) == 0 {
		return
	}
	b.WriteString("\n**From a step to 10 ms of delay: ms until it is known**\n\n" +
		"| step | capacity, exchanges/s | `ebpf` | `ebpf-pinned` | `inet_diag` | `siocinq`, in the node | `periscope node watch` | the node's level | told by |\n" +
		"|---|---|---|---|---|---|---|---|---|\n")
	disturbed := 0
	for _, d := range r.steps {
		capacity := "–"
		if d.capacity() > 0 {
			capacity = fmt.Sprintf("%.0f", d.capacity())
		}
		fmt.Fprintf(b, "| %s | %s |", d.scenario, capacity)
		for _, name := range append(sockstat.Backends(), seriesWatch, seriesLevel) {
			if name == seriesWatch && d.scenario != quotaCut && d.scenario != standstill {
				b.WriteString(" |") // it goes by what the node tells as well, which is nothing here
				continue
			}
			fmt.Fprintf(b, " %s |", d.cell(name))
		}
		fmt.Fprintf(b, " %s |\n", d.told())
		disturbed += d.disturbed
	}
	fmt.Fprintf(b, "\nMedians of %d steps; in brackets, in how many of them it was seen at all, if not in all; –: never. Samples are taken every %v. "+
		"The node has one CPU; the first three sample from a process outside its control group, the next and the level are in the node. "+
		"`periscope node watch` is what that one believes of the age by `ebpf` while the node, which stands still then, tells nothing. "+
		"The level is the worst of the kernel's age (by `ebpf`), the queue's delay and batches' lag; “told by” is which of them was late first. "+
		"Demand is half of the capacity, measured before each step, at random times; from the step on, as many times the capacity as the row says. "+
		"“Inline”: 1 ms of CPU time while a batch is read; “of analysis”: after the queue. Workers that get slower wait, for 1 ms, then for 10 ms, and use no CPU time. "+
		"At most 128 batches are under way (256 by h2c, on %d connections); more are dropped, as by a circuit breaker. "+
		"A step begins when nothing has been late for %v, and lasts for %v; %d did not count, as something was late before.\n",
		r.steps[0].wanted, sampleEvery, mixedConns, calm, hold, disturbed)
	for _, d := range r.steps {
		if n := len(d.capacities); n < d.wanted {
			fmt.Fprintf(b, "\nNote: %s: the machine was too busy, or time too short, for more than %d of the steps.\n", d.scenario, n)
		}
	}
}

func (d detected) cell(series string) string {
	n, of := d.times(series), len(d.after[series])
	switch {
	case of == 0:
		return "?"
	case n == 0:
		return "–"
	case n == of:
		return fmt.Sprintf("%.0f", d.median(series))
	case math.IsInf(d.median(series), 1):
		return fmt.Sprintf("– (%d/%d)", n, of)
	}
	return fmt.Sprintf("%.0f (%d/%d)", d.median(series), n, of)
}

// told is which part of the level was the first, mostly.
func (d detected) told() string {
	best, most := "–", 0
	for _, name := range []string{seriesKernel, seriesQueue, seriesLag} {
		n := 0
		for i, ms := range d.after[name] {
			if ms == d.after[seriesLevel][i] && !math.IsInf(ms, 1) {
				n++
			}
		}
		if n > most {
			best, most = name, n
		}
	}
	return best
}
