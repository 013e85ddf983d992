package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

// saturated is what an exchange costs a gateway that has all the load it can
// take.
type saturated struct {
	surroundings
	burst  time.Duration
	tables []saturatedTable
}

type saturatedTable struct {
	workload workload
	variants []variant // the first is what the others are compared with
	figures  []figures
}

// atLimit is the share of time from which on a gateway counts as saturated.
const atLimit = 0.9

func (b *bench) saturated(ctx context.Context) (section, error) {
	s := &saturated{burst: b.burst}
	for _, w := range b.workloads {
		err := b.fleet(ctx, w, b.pick(w.measures), func(ctx context.Context, gateways []*gateway) error {
			call := w.call()
			fs, err := b.rounds(ctx, w.name, gateways, func(g *gateway, _ int, warm bool) (figures, error) {
				if warm {
					return g.saturate(ctx, call, warmUp)
				}
				return g.saturate(ctx, call, b.burst)
			})
			s.tables = append(s.tables, saturatedTable{w, variantsOf(gateways), fs})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	s.surroundings = b.surroundings()
	return s, nil
}

func (s *saturated) faults() error {
	for _, t := range s.tables {
		if err := failures(t.variants, t.workload.name, t.figures); err != nil {
			return err
		}
	}
	return nil
}

func (s *saturated) write(b *strings.Builder) {
	s.heading(b)
	fmt.Fprintf(b, "%d rounds of bursts of %v; closed loop over %d connections.\n\n", s.rounds, s.burst, connections)
	var goals []goal
	for _, t := range s.tables {
		goals = append(goals, t.goals()...)
	}
	writeGoals(b, goals)
	for _, t := range s.tables {
		fmt.Fprintf(b, "\n**%s**\n\n", t.workload.title)
		t.write(b)
	}
	b.WriteString("\nEvery variant's Envoy stays up while a workload is measured; bursts take turns, in alternating order. " + s.method("“no filter”") +
		" CPU is the time of all of Envoy's threads over a burst until its copies have arrived, by request. Peak MB is VmHWM. " +
		fmt.Sprintf("\\*: Envoy was idle more than %.0f %% of the time, so the throughput is the other side's limit.\n", 100*(1-atLimit)))
	for _, t := range s.tables {
		notes(b, t.variants, t.workload.name, t.figures)
	}
}

// goals are those that t has the figures for.
func (t *saturatedTable) goals() []goal {
	figuresOf := func(name string) *figures {
		if i := slices.Index(names(t.variants), name); i >= 0 {
			return &t.figures[i]
		}
		return nil
	}
	var out []goal
	for _, g := range t.workload.goals {
		if f, than := figuresOf(g.variant), figuresOf(g.than); f != nil && than != nil {
			out = append(out, atMost(t.workload.name+": "+g.what, result.Paired(f.cpu, than.cpu, result.Delta), g.limit, "µs"))
		}
	}
	if f, base := figuresOf(ours), t.figures[0]; f != nil {
		if t.workload.shares {
			out = append(out, atLeast(t.workload.name+": throughput", result.Paired(f.throughput, base.throughput, result.Ratio), 0.6))
		}
		out = append(out, memoryGoal(t.workload.name, *f, base))
	}
	return out
}

func (t *saturatedTable) write(b *strings.Builder) {
	compare := slices.ContainsFunc(t.variants, func(v variant) bool { return v.against != "" })
	b.WriteString("| variant | requests/s (ratio) | CPU µs/request | Δ µs | ratio |")
	if compare {
		b.WriteString(" Δ µs to Periscope |")
	}
	b.WriteString(" peak MB (Δ) | delivered |\n|---|---|---|---|---|")
	if compare {
		b.WriteString("---|")
	}
	b.WriteString("---|---|\n")
	for i, v := range t.variants {
		fmt.Fprintf(b, "| %s |\n", strings.Join(t.row(i, v, compare), " | "))
	}
}

func (t *saturatedTable) row(i int, v variant, compare bool) []string {
	f, base := t.figures[i], t.figures[0]
	cells := []string{v.title}
	limit := ""
	if result.Over(f.busy).Mid < atLimit {
		limit = "\\*"
	}
	throughput, cpu := fmt.Sprintf("%.0f%s", result.Over(f.throughput).Mid, limit), fmt.Sprintf("%.1f", result.Over(f.cpu).Mid)
	if i == 0 {
		cells = append(cells, throughput, cpu, "–", "1")
	} else {
		cells = append(cells,
			throughput+" ("+result.Paired(f.throughput, base.throughput, result.Ratio).Times()+")", cpu,
			result.Paired(f.cpu, base.cpu, result.Delta).Signed(),
			result.Paired(f.cpu, base.cpu, result.Ratio).Times())
	}
	if compare {
		cell := "–"
		if j := slices.Index(names(t.variants), v.against); j >= 0 {
			cell = result.Paired(f.cpu, t.figures[j].cpu, result.Delta).Signed()
		}
		cells = append(cells, cell)
	}
	return append(cells, peak(f, base, i), delivered(f, v))
}

// peak is a gateway's memory and, but for the first, how much more it is than the first's.
func peak(f, base figures, i int) string {
	mb := float64(f.peakRSS) / 1e6
	if i == 0 {
		return fmt.Sprintf("%.1f", mb)
	}
	return fmt.Sprintf("%.1f (%+.1f)", mb, mb-float64(base.peakRSS)/1e6)
}

// delivered is the share of copies that arrived.
func delivered(f figures, v variant) string {
	if v.copies == copiesNothing || v.fault != "" || f.expected == 0 {
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
