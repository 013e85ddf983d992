package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

// latency is how long users wait at a steady rate, whatever becomes of copies.
type latency struct {
	surroundings
	workload workload
	rate     float64
	burst    time.Duration
	variants []variant
	figures  []figures
}

// pacedBursts is how much longer bursts are at a steady rate than saturated
// ones: their tail has fewer requests.
const pacedBursts = 2

func (b *bench) latency(ctx context.Context) (section, error) {
	s := &latency{workload: workloads()[0], rate: b.rate, burst: pacedBursts * b.burst, variants: b.pick(variant.whole)}
	err := b.fleet(ctx, s.workload, s.variants, func(ctx context.Context, gateways []*gateway) error {
		call := s.workload.call()
		var err error
		s.figures, err = b.rounds(ctx, "latency", gateways, func(g *gateway, round int, warm bool) (figures, error) {
			burst := s.burst
			if warm {
				burst = warmUp
			}
			return g.pace(ctx, call, load.Poisson(uint64(round), b.rate, burst))
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	s.surroundings = b.surroundings()
	return s, nil
}

func (s *latency) faults() error { return failures(s.variants, "latency", s.figures) }

func (s *latency) write(b *strings.Builder) {
	s.heading(b)
	fmt.Fprintf(b, "%s; Poisson arrivals, %g a second; %d rounds of bursts of %v.\n\n", s.workload.title, s.rate, s.rounds, s.burst)
	writeGoals(b, s.goals())
	b.WriteString("\n| variant | p50 ms | Δ ms | p99 ms | Δ ms | peak MB (Δ) | requests | errors | delivered |\n|---|---|---|---|---|---|---|---|---|\n")
	base := s.figures[0]
	for i, v := range s.variants {
		f := s.figures[i]
		cells := []string{v.title, fmt.Sprintf("%.2f", result.Over(f.p50).Mid), "–", fmt.Sprintf("%.2f", result.Over(f.p99).Mid), "–",
			peak(f, base, i), fmt.Sprint(f.requests), fmt.Sprint(f.errors), delivered(f, v)}
		if i > 0 {
			cells[2] = fine(result.Paired(f.p50, base.p50, result.Delta))
			cells[4] = fine(result.Paired(f.p99, base.p99, result.Delta))
		}
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
	b.WriteString("\nEvery variant's Envoy stays up; bursts take turns, in alternating order, all of a round with the same arrivals. Latency counts from when a request was due. " +
		s.method("“no filter”") + " So the latencies of variants that copy are upper bounds. Errors are users'.\n")
	notes(b, s.variants, "latency", s.figures)
}

// goals are of us, with every kind of node.
func (s *latency) goals() []goal {
	var out []goal
	for i, v := range s.variants {
		if v.ours() {
			added := result.Paired(s.figures[i].p99, s.figures[0].p99, result.Delta)
			out = append(out, goal{what: v.node() + ": added p99", got: added, limit: 0.5, format: "%.2f ms"}, memoryGoal(v.node(), s.figures[i], s.figures[0]))
		}
	}
	return out
}

// fine writes a difference of milliseconds.
func fine(s result.Spread) string { return fmt.Sprintf("%+.2f, %.2f to %.2f", s.Mid, s.Low, s.High) }
