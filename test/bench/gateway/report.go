package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

// section is the name of the marked section that the report goes to.
const section = "bench-gateway"

// report is everything that the table needs.
type report struct {
	machine   result.Machine
	envoy     string // version
	date      time.Time
	rounds    int
	burst     time.Duration
	rate      float64
	pinned    bool
	foreign   float64 // share of the gateways' CPU that others had; negative: unknown
	variants  []variant
	workloads []string
	figures   [][]figures // by workload, then variant
	peakRSS   []int64     // by variant
	notes     []string
}

// atLimit is the share of time from which on a gateway counts as saturated.
const atLimit = 0.9

// write renders Markdown. The first variant is the one to compare with.
func (r *report) write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; Envoy %s, `--concurrency 1`; %s.\n", r.machine, r.envoy, r.date.Format(time.DateOnly))
	fmt.Fprintf(&b, "%d rounds, bursts of %v; saturated: closed loop over %d connections; latency: Poisson arrivals, %g a second.\n", r.rounds, r.burst, connections, r.rate)
	for i, title := range r.workloads {
		fmt.Fprintf(&b, "\n**%s**\n\n", title)
		r.table(&b, r.figures[i])
	}
	b.WriteString("\n")
	r.explain(&b)
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

func (r *report) table(b *strings.Builder, fs []figures) {
	b.WriteString("| variant | requests/s (ratio) | CPU µs/request | Δ µs | ratio | p50 ms (ratio) | p99 ms (ratio) | peak MB | delivered |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|\n")
	base := fs[0]
	for i, v := range r.variants {
		f := fs[i]
		cells := []string{v.title}
		limit := ""
		if result.Over(f.busy).Mid < atLimit {
			limit = "\\*"
		}
		cpu := result.Over(f.cpu)
		if i == 0 {
			cells = append(cells,
				fmt.Sprintf("%.0f%s", result.Over(f.throughput).Mid, limit),
				fmt.Sprintf("%.1f", cpu.Mid), "–", "1",
				fmt.Sprintf("%.2f", result.Over(f.p50).Mid), fmt.Sprintf("%.2f", result.Over(f.p99).Mid))
		} else {
			cells = append(cells,
				fmt.Sprintf("%.0f%s (%s)", result.Over(f.throughput).Mid, limit, result.Paired(f.throughput, base.throughput, result.Ratio).Times()),
				fmt.Sprintf("%.1f", cpu.Mid),
				result.Paired(f.cpu, base.cpu, result.Delta).Signed(),
				result.Paired(f.cpu, base.cpu, result.Ratio).Times(),
				fmt.Sprintf("%.2f (%s)", result.Over(f.p50).Mid, result.Paired(f.p50, base.p50, result.Ratio).Times()),
				fmt.Sprintf("%.2f (%s)", result.Over(f.p99).Mid, result.Paired(f.p99, base.p99, result.Ratio).Times()))
		}
		cells = append(cells, fmt.Sprintf("%.0f", float64(r.peakRSS[i])/1e6), delivered(f, v))
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
}

func (r *report) explain(b *strings.Builder) {
	b.WriteString("Method: every variant's Envoy stays up; bursts take turns, in alternating order. Figures are medians over rounds; ratios and Δ are medians of each round's own comparison with “no filter”, with their lowest and highest. " +
		"CPU is the time of all of Envoy's threads over a saturated burst until its copies have arrived, by request. Latency counts from when a request was due. " +
		"Peak MB is VmHWM over the whole run.")
	if r.pinned {
		b.WriteString(" Gateways have one CPU; generator, backend and receivers share another, so the latencies of variants that copy are upper bounds.")
	} else {
		b.WriteString(" Nothing was pinned, as there is only one CPU: gateways, generator, backend and receivers compete for it.")
	}
	b.WriteString("\n\nNoise: differences as small as those between the two rows without a filter mean nothing")
	if r.foreign >= 0 {
		fmt.Fprintf(b, "; other processes and the kernel had %.1f %% of the gateways' CPU", 100*r.foreign)
	}
	if r.machine.Load != "" {
		fmt.Fprintf(b, "; load average before the run: %s", r.machine.Load)
	}
	fmt.Fprintf(b, ". \\*: Envoy was idle more than %.0f %% of the time, so the throughput is the other side's limit.\n", 100*(1-atLimit))
	for _, n := range r.notes {
		fmt.Fprintf(b, "\nNote: %s\n", n)
	}
}

// delivered is the share of copies that arrived.
func delivered(f figures, v variant) string {
	if v.copies == copiesNothing || f.expected == 0 {
		return "–"
	}
	p := 100 * float64(f.copies) / float64(f.expected)
	if p < 100 {
		// Never round a loss up to nothing.
		p = min(math.Round(p*100)/100, 99.99)
		return fmt.Sprintf("%.2f %%", p)
	}
	return fmt.Sprintf("%.0f %%", p)
}
