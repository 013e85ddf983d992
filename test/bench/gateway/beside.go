package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/bench/sink"
	"github.com/periscope-mesh/periscope/test/cgrouptest"
)

const (
	// besideBursts is how much longer bursts are than those of one gateway alone: the
	// scheduler divides time over some tens of milliseconds.
	besideBursts = 3
	// drainFor is how long a node may take to work off what it was sent.
	drainFor = 30 * time.Second
)

// besideLoads are the rates of users' requests, as parts of what the gateway can
// do alone.
func besideLoads() []float64 { return []float64{0.3, 0.7} }

// placement is where the node beside a gateway is.
type placement struct {
	variant
	weight int // of the node's control group; 0: it is in the gateway's
	absent bool
}

func placements() []placement {
	p := func(name, title string, weight int) placement {
		return placement{variant: variant{name: name, title: title, copies: copiesEvents, share: 100, fault: "saturated"}, weight: weight}
	}
	return []placement{
		{variant: variant{name: "alone", title: "no node on its CPU", copies: copiesEvents, share: 100}, absent: true},
		p("shared", "node in the gateway's control group", 0),
		p("weight-100", "node with CPU weight 100, the usual one", 100),
		p("weight-20", "**node with CPU weight 20**", 20),
		p("weight-10", "**node with CPU weight 10**", 10),
		p("weight-1", "node with CPU weight 1, the least", 1),
	}
}

// beside is what a node that wants all of the gateway's CPU costs users, by the
// CPU weight of the node's control group.
type beside struct {
	surroundings
	version    int // of control groups
	workload   workload
	burst      time.Duration
	placements []placement
	tables     []besideTable
}

type besideTable struct {
	part    float64 // of what the gateway can do alone; 0: all that it takes
	rate    float64 // requests a second; 0: closed loop
	figures []figures
	node    [][]float64 // part of the CPU that the node had, a value per round
}

func (b *bench) beside(ctx context.Context) (section, error) { return b.placed(ctx, placements()) }

// placed is beside with these placements, of which the first is the one without a
// node.
func (b *bench) placed(ctx context.Context, all []placement) (section, error) {
	s := &beside{workload: workloads()[0], burst: besideBursts * b.burst, placements: all}
	err := within(ctx, func(ctx context.Context, run func(runner)) error {
		r, err := b.openBeside(ctx, s, run)
		if err != nil {
			return err
		}
		defer r.close()
		defer b.watch(r.gateways, r.node.pid())()
		call := s.workload.call()
		alone, err := r.measure(ctx, besideTable{}, func(g *gateway, _ int, burst time.Duration) (figures, error) {
			return g.saturate(ctx, call, burst)
		})
		if err != nil {
			return err
		}
		s.tables = append(s.tables, alone)
		// Where the generator is the limit, the gateway could do more.
		most := result.Paired(alone.figures[0].throughput, alone.figures[0].busy, result.Ratio).Mid
		for _, part := range besideLoads() {
			t := besideTable{part: part, rate: part * most}
			t, err := r.measure(ctx, t, func(g *gateway, round int, burst time.Duration) (figures, error) {
				return g.pace(ctx, call, load.Poisson(uint64(round), t.rate, burst))
			})
			if err != nil {
				return err
			}
			s.tables = append(s.tables, t)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.surroundings = b.surroundings()
	return s, nil
}

// besideRig is what beside measures:
//
//	                 ┌─► Envoy "alone" ── copies ─► sink.Events
//	load.Client ×n ──┤                                              sink.Backend
//	                 └─► Envoy "beside" ─ copies ─► node ◄─ feed    (of both)
//	                     └── control group ──┘      └─ control group
//
// Envoys and the node on one CPU, all the rest on another. The second Envoy
// stands for all placements of the node.
type besideRig struct {
	b        *bench
	s        *beside
	gateways []*gateway // one for each placement
	groups   [2]*cgrouptest.Group
	node     *busyNode
	closers  []func()
}

func (b *bench) openBeside(ctx context.Context, s *beside, run func(runner)) (_ *besideRig, err error) {
	r := &besideRig{b: b, s: s}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	for i := range r.groups {
		g, err := cgrouptest.New()
		if err != nil {
			return nil, err
		}
		r.groups[i] = g
		r.closers = append(r.closers, func() {
			if err := g.Remove(); err != nil {
				fmt.Fprintf(b.progress, "control group not removed: %v\n", err)
			}
		})
	}
	s.version = r.groups[0].Version()
	backend, err := sink.ListenBackend(s.workload.response)
	if err != nil {
		return nil, err
	}
	run(backend)
	events, err := sink.ListenEvents()
	if err != nil {
		return nil, err
	}
	run(events)
	if r.node, err = b.startNode(ctx); err != nil {
		return nil, err
	}
	r.closers = append(r.closers, r.node.stop)
	all, err := variants(nil)
	if err != nil {
		return nil, err
	}
	plugin := all[slices.Index(names(all), ours)].script
	envoys := map[bool]*gateway{}
	for _, p := range s.placements {
		g := envoys[p.absent]
		if g == nil {
			port := r.node.port
			if p.absent {
				port = events.Port()
			}
			p.script = plugin
			config, err := bootstrapJSON(p.variant, s.workload.limit, backend.Port(), port)
			if err != nil {
				return nil, err
			}
			if g, err = b.start(ctx, p.variant, config, load.Config{Conns: connections}); err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			r.closers = append(r.closers, g.stop)
			if err := r.groups[0].Add(g.envoy.Pid()); err != nil {
				return nil, err
			}
			if p.absent {
				g.receiver = events
			}
			envoys[p.absent] = g
		}
		one := *g
		one.variant = p.variant
		r.gateways = append(r.gateways, &one)
	}
	return r, nil
}

func (r *besideRig) close() {
	for _, c := range slices.Backward(r.closers) {
		c()
	}
}

// measure fills a table in.
func (r *besideRig) measure(ctx context.Context, t besideTable, do func(g *gateway, round int, burst time.Duration) (figures, error)) (besideTable, error) {
	title := "beside, all it takes"
	if t.rate > 0 {
		title = fmt.Sprintf("beside, %.0f %%", 100*t.part)
	}
	t.node = make([][]float64, len(r.gateways))
	var err error
	t.figures, err = r.b.rounds(ctx, title, r.gateways, func(g *gateway, round int, warm bool) (figures, error) {
		i := slices.Index(r.gateways, g)
		burst := r.s.burst
		if warm {
			burst = warmUp
		}
		if r.s.placements[i].absent {
			return do(g, round, burst)
		}
		if err := r.place(r.s.placements[i]); err != nil {
			return figures{}, err
		}
		var f figures
		had, err := r.node.busy(ctx, func() (err error) {
			f, err = do(g, round, burst)
			return err
		})
		if !warm {
			t.node[i] = append(t.node[i], had)
		}
		// With the least weight, and others on the CPU, that would take minutes.
		return f, errors.Join(err, r.groups[1].Weight(100), r.node.drain(ctx))
	})
	return t, err
}

// place puts the node into its control group.
func (r *besideRig) place(p placement) error {
	group := r.groups[1]
	if p.weight == 0 {
		group = r.groups[0]
	} else if err := group.Weight(p.weight); err != nil {
		return err
	}
	return group.Add(r.node.pid())
}

// faults are of the gateway alone: beside a node that has too much, users may
// well wait too long.
func (s *beside) faults() error {
	for _, t := range s.tables {
		for i, p := range s.placements {
			if p.absent {
				if err := failures([]variant{p.variant}, "beside", t.figures[i:i+1]); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (s *beside) write(b *strings.Builder) {
	s.heading(b)
	fmt.Fprintf(b, "%s; %d rounds of bursts of %v, over %d connections. Control groups of version %d.\n", s.workload.title, s.rounds, s.burst, connections, s.version)
	for _, t := range s.tables {
		if t.rate == 0 {
			b.WriteString("\n**As many requests as the gateway takes** (closed loop)\n\n| | requests/s (ratio) | the node had of the CPU |\n|---|---|---|\n")
		} else {
			fmt.Fprintf(b, "\n**%.0f requests a second, %.0f %% of what the gateway could do alone** (Poisson arrivals)\n\n", t.rate, 100*t.part)
			b.WriteString("| | p50 ms (ratio) | p99 ms (ratio) | answered/s (ratio) | the node had of the CPU |\n|---|---|---|---|---|\n")
		}
		for i, p := range s.placements {
			fmt.Fprintf(b, "| %s |\n", strings.Join(t.row(i, p), " | "))
		}
		for i, p := range s.placements {
			if f := t.figures[i]; f.errors > 0 {
				fmt.Fprintf(b, "\n%s: %d of %d requests failed, or had no answer five seconds after their burst. Latency is of the others.\n", strings.ReplaceAll(p.title, "**", ""), f.errors, f.requests+f.errors)
			}
		}
	}
	b.WriteString("\nThe node, a real one, is sent more than it can analyse besides the gateway's copies, so that it would take all of the CPU in each burst; its analysis runs at nice 10. " +
		"The gateway's control group has the usual weight, 100. “No node”: copies go to a receiver on another CPU, and the node is stopped. " +
		"Every placement has its burst in each round, in alternating order, with the same arrivals. Latency counts from when a request was due; what is answered is counted until the last answer. " +
		s.method("“no node on its CPU”") + "\n")
}

func (t *besideTable) row(i int, p placement) []string {
	f, base := t.figures[i], t.figures[0]
	cell := func(format string, values, than []float64) string {
		text := fmt.Sprintf(format, result.Over(values).Mid)
		if i > 0 {
			text += " (" + result.Paired(values, than, result.Ratio).Times() + ")"
		}
		return text
	}
	cells := []string{p.title}
	if t.rate > 0 {
		cells = append(cells, cell("%.2f", f.p50, base.p50), cell("%.2f", f.p99, base.p99))
	}
	cells = append(cells, cell("%.0f", f.throughput, base.throughput))
	if p.absent {
		return append(cells, "–")
	}
	return append(cells, fmt.Sprintf("%.0f %%", 100*result.Over(t.node[i]).Mid))
}
