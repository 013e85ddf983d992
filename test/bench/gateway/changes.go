package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/bench/sink"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
)

const (
	filterChains = 100
	editEvery    = 500 * time.Millisecond
	// editedBursts is how much longer bursts with edits are than saturated ones:
	// enough for several edits.
	editedBursts = 4

	settingsReloads = "extension_config_discovery.http_filter." + xdsgateway.SettingsFilter + ".config_reload"
)

// changes is what edits of policies do to users' waiting at a gateway with many
// filter chains, each of which has both of our filters.
type changes struct {
	surroundings
	chains    int
	rate      float64
	burst     time.Duration
	variants  []variant // no filter; without edits; with
	figures   []figures
	edits     int
	inForce   int64 // reloads of settings, by Envoy's count
	editEvery time.Duration
}

func (b *bench) changes(ctx context.Context) (section, error) {
	s := &changes{chains: filterChains, rate: b.rate, burst: editedBursts * b.burst, editEvery: editEvery, variants: []variant{
		{name: baseline, title: "no filter"},
		{name: "quiet", title: "**Periscope**, no changes", copies: copiesEvents},
		{name: "edited", title: "**Periscope**, changes", copies: copiesEvents},
	}}
	err := within(ctx, func(ctx context.Context, run func(runner)) error {
		backend, err := sink.ListenBackend(kib)
		if err != nil {
			return err
		}
		run(backend)
		events, err := sink.ListenEvents()
		if err != nil {
			return err
		}
		run(events)
		control, err := listenControl(s.chains, backend.Port(), events.Port())
		if err != nil {
			return err
		}
		run(control)
		conns := load.Config{Conns: s.chains, From: from}
		var gateways []*gateway
		for i, name := range []string{bare, mirroring} {
			config, err := control.bootstrap(name)
			if err != nil {
				return err
			}
			g, err := b.start(ctx, s.variants[i], config, conns)
			if err != nil {
				return err
			}
			defer g.stop()
			gateways = append(gateways, g)
		}
		defer b.watch(gateways)()
		quiet := gateways[1]
		quiet.receiver = events
		edited := *quiet
		edited.variant = s.variants[2]
		return s.measure(ctx, b, append(gateways, &edited), control)
	})
	if err != nil {
		return nil, err
	}
	s.surroundings = b.surroundings()
	return s, nil
}

// measure takes turns; with and without edits, it is at one and the same gateway.
func (s *changes) measure(ctx context.Context, b *bench, gateways []*gateway, c *control) error {
	call := workloads()[0].call()
	before, err := gateways[1].envoy.Sum(ctx, settingsReloads)
	if err != nil {
		return err
	}
	s.figures, err = b.rounds(ctx, "changes", gateways, func(g *gateway, round int, warm bool) (figures, error) {
		burst := s.burst
		if warm {
			burst = warmUp
		}
		end := func() error { return nil }
		if g.name == "edited" && !warm {
			end = c.keepEditing(s.editEvery)
		}
		f, err := g.pace(ctx, call, load.Poisson(uint64(round), s.rate, burst))
		if editing := end(); err == nil {
			err = editing
		}
		return f, err
	})
	if err != nil {
		return err
	}
	s.edits = c.edits
	// The last may still be on its way.
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		now, err := gateways[1].envoy.Sum(ctx, settingsReloads)
		s.inForce = now - before
		if err != nil || s.inForce >= int64(s.edits) || time.Now().After(deadline) {
			return err
		}
	}
}

// keepEditing edits until the function that it gives is called.
func (c *control) keepEditing(every time.Duration) (end func() error) {
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				done <- nil
				return
			case <-tick.C:
				if err := c.edit(); err != nil {
					done <- err
					return
				}
			}
		}
	}()
	return func() error { close(stop); return <-done }
}

func (s *changes) faults() error {
	// While Envoy is slow to acknowledge, edits are sent as one.
	if 10*s.inForce < 9*int64(s.edits) {
		return fmt.Errorf("of %d edits %d came into force", s.edits, s.inForce)
	}
	for _, f := range s.figures[1:] {
		if f.copies == 0 {
			return errors.New("the gateway with many filter chains mirrored nothing")
		}
	}
	return failures(s.variants, "changes", s.figures)
}

func (s *changes) write(b *strings.Builder) {
	s.heading(b)
	fmt.Fprintf(b, "%d filter chains, each with a connection; GET, 1 KiB response; Poisson arrivals, %g a second; %d rounds of bursts of %v; a change every %v, %d in all, %d reloads.\n\n", s.chains, s.rate, s.rounds, s.burst, s.editEvery, s.edits, s.inForce)
	base, quiet, edited := s.figures[0], s.figures[1], s.figures[2]
	writeGoals(b, []goal{{what: "p99 with changes, against without", got: result.Paired(edited.p99, quiet.p99, result.Ratio), limit: 1.1, format: "×%.2f"}})
	b.WriteString("\n| variant | p50 ms | to no changes | p99 ms | to no changes | peak MB (Δ) | requests | errors |\n|---|---|---|---|---|---|---|---|\n")
	for i, v := range s.variants {
		f := s.figures[i]
		cells := []string{v.title, fmt.Sprintf("%.2f", result.Over(f.p50).Mid), "1", fmt.Sprintf("%.2f", result.Over(f.p99).Mid), "1",
			peak(f, base, i), fmt.Sprint(f.requests), fmt.Sprint(f.errors)}
		if i != 1 {
			cells[2] = result.Paired(f.p50, quiet.p50, result.Ratio).Times()
			cells[4] = result.Paired(f.p99, quiet.p99, result.Ratio).Times()
		}
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
	b.WriteString("\nEnvoys with the bootstrap, the listener and the clusters that our control plane serves, one without our filters; bursts take turns, in alternating order, with and without changes at the same Envoy. " +
		"A change is of the share, or of what the policy excludes: a new plan, a new snapshot, and over ADS new settings of all filter chains. The control plane shares its CPU with the generator. " + s.method("“no changes”") + "\n")
	notes(b, s.variants, "changes", s.figures)
}
