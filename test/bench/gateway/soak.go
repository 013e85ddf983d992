package main

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/bench/sink"
)

const (
	soakSamples = 60
	soakStep    = 300 * time.Millisecond // at least
	// flat is how many MB a gateway may grow in a run and be called flat.
	flat = 0.5
)

// soak is what a gateway's memory does in a long run.
type soak struct {
	surroundings
	length   time.Duration
	rate     float64
	variants []variant
	at       []float64   // seconds from the start, of the samples
	rss      [][]float64 // MB, by variant
	figures  []figures
}

// soak loads the gateways all at once.
func (b *bench) soak(ctx context.Context) (section, error) {
	debug.SetGCPercent(100) // there is no moment between bursts
	s := &soak{length: b.soakFor, rate: b.rate, variants: b.pick(func(v variant) bool {
		return v.name == baseline || v.copies == copiesEvents && v.whole() && (v.fault == "" || v.fault == sink.Slow)
	})}
	s.rss, s.figures = make([][]float64, len(s.variants)), make([]figures, len(s.variants))
	mix := soakMix()
	err := b.fleet(ctx, mix[0], s.variants, func(ctx context.Context, gateways []*gateway) error {
		steps := max(3, min(soakSamples, int(s.length/soakStep)))
		begin := time.Now()
		for n := range steps {
			fmt.Fprintf(b.progress, "soak: step %d of %d\n", n+1, steps)
			for i, w := range mix {
				schedule := load.Poisson(uint64(n*len(mix)+i), s.rate*w.soakShare(), s.length/time.Duration(steps*len(mix)))
				if err := s.together(ctx, gateways, w.call(), schedule); err != nil {
					return err
				}
			}
			s.at = append(s.at, time.Since(begin).Seconds())
			for i, g := range gateways {
				_, now, err := g.envoy.RSS()
				if err != nil {
					return err
				}
				s.rss[i] = append(s.rss[i], float64(now)/1e6)
			}
		}
		for i, g := range gateways {
			if err := g.look(ctx, &s.figures[i]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.surroundings = b.surroundings()
	return s, nil
}

// soakMix are the workloads of a soak, one after the other. The first says the
// policy's limits.
func soakMix() []workload {
	w := workloads()
	return []workload{w[2], w[0], w[1]}
}

// soakShare is the part of the rate that w has: less with large bodies, as a few
// gateways and all around them share the machine.
func (w workload) soakShare() float64 {
	if w.request >= 64*kib {
		return 0.1
	}
	return 1
}

// together loads all gateways at the same time.
func (s *soak) together(ctx context.Context, gateways []*gateway, call load.Request, schedule []time.Duration) error {
	var group errgroup.Group
	for i, g := range gateways {
		group.Go(func() error {
			res, err := g.client.Paced(ctx, call, schedule)
			s.figures[i].add(figures{requests: res.Requests, errors: res.Errors, firstError: res.FirstError})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

func (s *soak) faults() error { return failures(s.variants, "soak", s.figures) }

// growth is that in the run but for its first fifth, in MB.
func (s *soak) growth(i int) result.Spread {
	at, rss := s.at[len(s.at)/5:], s.rss[i][len(s.at)/5:]
	slope, length := result.Slope(at, rss), at[len(at)-1]-at[0]
	return result.Spread{Mid: slope.Mid * length, Low: slope.Low * length, High: slope.High * length}
}

func (s *soak) write(b *strings.Builder) {
	s.heading(b)
	fmt.Fprintf(b, "%v at %g requests a second to each gateway: POST 64 KiB, with 64 KiB response, at a tenth of the rate; GET; POST 1 KiB; by turns.\n\n", s.length, s.rate)
	var goals []goal
	for i, v := range s.variants {
		if v.ours() {
			goals = append(goals, atMost(v.node()+": growth", s.growth(i), flat, "MB"), memoryGoal(v.node(), s.figures[i], s.figures[0]))
		}
	}
	writeGoals(b, goals)
	// At most ten moments are enough to see a slope.
	step := (len(s.at) + 9) / 10
	b.WriteString("\n| MB after |")
	rule, columns := "\n|---|", ""
	for n := step - 1; n < len(s.at); n += step {
		columns += fmt.Sprintf(" %v |", time.Duration(s.at[n]*float64(time.Second)).Round(100*time.Millisecond))
		rule += "---|"
	}
	b.WriteString(columns + " peak (Δ) | growth | requests | errors |" + rule + "---|---|---|---|\n")
	for i, v := range s.variants {
		fmt.Fprintf(b, "| %s |", v.title)
		for n := step - 1; n < len(s.at); n += step {
			fmt.Fprintf(b, " %.1f |", s.rss[i][n])
		}
		f := s.figures[i]
		fmt.Fprintf(b, " %s | %s | %d | %d |\n", peak(f, s.figures[0], i), s.growth(i).Signed(), f.requests, f.errors)
	}
	b.WriteString("\nAll gateways at once. Memory is the resident set; growth is what it did after the first fifth of the run, by the median slope between all pairs of samples (Theil and Sen), with its interval of 95 % confidence.\n")
	notes(b, s.variants, "soak", s.figures)
}
