package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/periscope-mesh/periscope/mirror/share"
	"github.com/periscope-mesh/periscope/test/bench/overload"
	"github.com/periscope-mesh/periscope/test/bench/result"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
)

// Fixed shares, beside the controls of package overload.
const (
	controlCapacity = "capacity" // more than the node can do, however fast the machine is, unguarded: what it does is what it can
	controlHealthy  = "healthy"  // half of what the node can do: what users feel otherwise
)

// cell is a scenario under a control.
type cell struct {
	scenario scenario
	control  string
	guard    bool
}

func (c cell) String() string {
	return fmt.Sprintf("%v, %s, %s", c.scenario, c.control, map[bool]string{true: "guard", false: "no guard"}[c.guard])
}

// results are everything that the tables and the plot need.
type results struct {
	options  options
	machine  result.Machine
	version  string // of Envoy
	date     time.Time
	capacity map[scenario][]float64 // exchanges a second, by round
	work     map[scenario][]float64 // the same by the machine's speed then: exchanges a second times gauge.cost
	costs    []float64              // of the gauge in all runs, ms
	cells    map[cell][]outcome     // by round
}

// cells are those of a round, in their order.
func (o options) cells(s scenario, round int) []cell {
	out := []cell{{s, controlHealthy, true}}
	if round <= o.others {
		for _, c := range []string{overload.None, overload.Breaker, overload.Small, overload.AIMD} {
			out = append(out, cell{s, c, true})
			if !s.hot {
				out = append(out, cell{s, c, false})
			}
		}
	}
	out = append(out, cell{s, overload.Budget, true})
	kept := out[:0]
	for _, c := range out {
		if o.only.MatchString(c.String()) {
			kept = append(kept, c)
		}
	}
	return kept
}

// lengths of the phases under a control: as long as there is something to see.
func (o options) lengths(control string) lengths {
	rest := min(5*time.Second, o.step)
	switch control {
	case overload.AIMD, overload.Budget:
		return lengths{rest, o.step, rest}
	case controlHealthy, controlCapacity:
		return lengths{time.Second, min(8*time.Second, o.step), 200 * time.Millisecond}
	}
	return lengths{min(2*time.Second, rest), min(8*time.Second, o.step), 200 * time.Millisecond} // nothing changes any more
}

// measure runs everything, a round after the other: what disturbs a while, disturbs
// all controls alike.
func (r *results) measure(ctx context.Context, progress io.Writer) error {
	r.capacity, r.work, r.cells = map[scenario][]float64{}, map[scenario][]float64{}, map[cell][]outcome{}
	gateways := 0
	var wanted []scenario
	for _, s := range scenarios() {
		if len(r.options.cells(s, 1)) > 0 {
			wanted = append(wanted, s)
			gateways = max(gateways, s.gateways)
		}
	}
	if len(wanted) == 0 {
		return errors.New("-only: nothing matches")
	}
	return within(ctx, r.options, gateways, func(ctx context.Context, w *world) error {
		capacity, err := w.roughCapacity(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(progress, "the node can analyse some %.0f exchanges a second\n", capacity)
		records := map[cell][]*record{}
		for round := 1; round <= r.options.rounds; round++ {
			for _, s := range wanted {
				for _, c := range append([]cell{{s, controlCapacity, false}}, r.options.cells(s, round)...) {
					fmt.Fprintf(progress, "round %d of %d: %v\n", round, r.options.rounds, c)
					rec, err := w.playCell(ctx, c, capacity, round)
					if err == nil {
						err = rec.write(r.options.log, c, round)
					}
					if err != nil {
						return fmt.Errorf("%v: %w", c, err)
					}
					cost := rec.cost()
					r.costs = append(r.costs, cost)
					if c.control == controlCapacity {
						can := rec.outcome(s, capacity).analysed
						r.capacity[s], r.work[s] = append(r.capacity[s], can), append(r.work[s], can*cost)
						continue
					}
					records[c] = append(records[c], rec)
				}
			}
		}
		for c, list := range records {
			for _, rec := range list {
				r.cells[c] = append(r.cells[c], rec.outcome(c.scenario, result.Over(r.work[c.scenario]).Mid/rec.cost()))
			}
		}
		return nil
	})
}

// playCell plays a round of a cell; capacity is what demand is measured by.
func (w *world) playCell(ctx context.Context, c cell, capacity float64, round int) (*record, error) {
	return w.play(ctx, c.scenario, w.lengths(c.control), capacity, round, w.newControl(c), c.guard)
}

func (w *world) newControl(c cell) overload.Control {
	part := map[string]float64{controlCapacity: 1.4, controlHealthy: 0.5}[c.control]
	if part > 0 {
		s := part / c.scenario.multiple
		return overload.Fixed(c.scenario.gateways, overload.Shares{Routine: s, Priority: s}, xdsgateway.MirrorMaxRequests)
	}
	config := overload.Config{Policy: w.plan.Gateways[0].Settings.PolicyID, Priority: 0.3 / (priorityOf * c.scenario.multiple), Limit: xdsgateway.MirrorMaxRequests, OnceLate: true}
	for _, g := range w.gateways[:c.scenario.gateways] {
		config.Gateways = append(config.Gateways, share.Gateway{Pod: g.id, Workload: g.id})
	}
	return overload.New(c.control, config)
}

// roughCapacity finds out what to measure demand by.
func (w *world) roughCapacity(ctx context.Context) (float64, error) {
	capacity := 1000 * w.quota
	for range 3 {
		c := cell{scenario{gateways: 1, multiple: 2}, controlCapacity, false}
		rec, err := w.playCell(ctx, c, capacity, 0)
		if err != nil {
			return 0, fmt.Errorf("what the node can do: %w", err)
		}
		// It was sent 1.4 times what was thought.
		if done := rec.outcome(c.scenario, capacity).analysed; done < 1.1*capacity && done > 0.8*capacity {
			return done, nil
		} else {
			capacity = min(done, 1.4*capacity)
		}
	}
	return capacity, nil
}

// write appends what was seen to a file.
func (r *record) write(file string, c cell, round int) (err error) {
	if file == "" {
		return nil
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("-log: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	o := r.outcome(c.scenario, 1)
	return json.NewEncoder(f).Encode(map[string]any{
		"cell": c.String(), "round": round, "reports": r.reports, "decisions": r.pushes, "effects": r.effects, "counters": fmt.Sprintf("%+v", r.counters),
		"delays": r.delays(), "points": o.points, "errors": o.errors, "analysed": o.analysed, "cost": r.cost(),
	})
}
