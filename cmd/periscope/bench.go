package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/periscope-mesh/periscope/node/sockstat"
)

func newBench(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Show on this machine what Periscope does",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newBenchOverload(o))
	return cmd
}

// overloadFlags are the flags of periscope bench overload.
type overloadFlags struct {
	envoy                   string
	capacity, times         float64
	steady, overload, after time.Duration
}

func newBenchOverload(o *options) *cobra.Command {
	var f overloadFlags
	cmd := &cobra.Command{
		Use:   "overload",
		Short: "Overload an analysis node, and plot what load control does",
		Long: `Overload an analysis node, and plot what load control does.

Starts everything on this machine, as periscope up does, but at free ports, with
a store that is thrown away, and with a node that is made slow: it analyses
--capacity exchanges a second. Users then want half of that, --times that, and half
of it again. One of 100 of their requests looks suspicious: the policy has those
analysed whatever the share.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			return runOverload(cmd.Context(), f, o.stdout)
		},
	}
	cmd.Flags().StringVar(&f.envoy, "envoy", "", "Envoy to start; default: the one on PATH, then the one of make tools")
	cmd.Flags().Float64Var(&f.capacity, "capacity", 100, "exchanges a second that the node can analyse, 10 to 1000")
	cmd.Flags().Float64Var(&f.times, "times", 10, "what users want at the height, by the capacity, 1 to 50")
	cmd.Flags().DurationVar(&f.steady, "before", 5*time.Second, "time at half of the capacity, before")
	cmd.Flags().DurationVar(&f.overload, "for", 10*time.Second, "time of the overload")
	cmd.Flags().DurationVar(&f.after, "after", 6*time.Second, "time at half of the capacity, after")
	return cmd
}

func (f *overloadFlags) check() error {
	switch {
	case !(f.capacity >= 10 && f.capacity <= 1000):
		return fmt.Errorf("--capacity: %v is not from 10 to 1000", f.capacity)
	case !(f.times >= 1 && f.times <= 50):
		return fmt.Errorf("--times: %v is not from 1 to 50", f.times)
	}
	for name, d := range map[string]time.Duration{"--before": f.steady, "--for": f.overload, "--after": f.after} {
		if d < 2*time.Second || d > 5*time.Minute {
			return fmt.Errorf("%s: %v is not from 2s to 5m", name, d)
		}
	}
	return nil
}

const overloadPolicy = `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: overload}
spec:
  sampling: {percent: 100, always: [Suspicious], adaptive: {minPercent: 0.5}}
`

// stack are the flags of a periscope up of its own, in a directory.
func (f *overloadFlags) stack(dir string) (upFlags, error) {
	var up upFlags
	defaults := pflag.NewFlagSet("", pflag.ContinueOnError)
	up.controlFlags.add(defaults)
	up.nodeFlags.add(defaults, []string{sockstat.InetDiag, sockstat.InProcess})
	up.envoy, up.concurrency, up.dataDir, up.https = f.envoy, 1, dir, ""
	up.workers, up.pace = 1, time.Duration(float64(time.Second)/f.capacity)
	up.policy = filepath.Join(dir, "policy.yaml")
	if err := os.WriteFile(up.policy, []byte(overloadPolicy), 0o600); err != nil {
		return up, err
	}
	for _, addr := range []*string{&up.http, &up.xds, &up.debug, &up.listen, &up.admin, &up.orca, &up.console} {
		var err error
		if *addr, err = freeLoopback(); err != nil {
			return up, err
		}
	}
	return up, nil
}

// runOverload runs:
//
//	users ─► Envoy ─► sample API
//	           └────► slow node ─► loadHistory ─► a line each second
func runOverload(ctx context.Context, f overloadFlags, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "periscope-bench-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w (logs are in %s)", err, dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	up, err := f.stack(dir)
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "periscope.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	started := make(chan running, 1)
	group.Go(func() error {
		return runUp(ctx, up, slog.New(slog.NewTextHandler(log, nil)), func(r running) { started <- r })
	})
	group.Go(func() error {
		defer cancel()
		select {
		case <-ctx.Done():
			return nil
		case r := <-started:
			return f.drive(ctx, "http://"+up.http, r, out)
		}
	})
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// phase is a part of a run.
type phase struct {
	name string
	rate float64 // of users' requests, a second
	long time.Duration
}

func (f *overloadFlags) phases() []phase {
	return []phase{{"before", f.capacity / 2, f.steady}, {"overload", f.capacity * f.times, f.overload}, {"after", f.capacity / 2, f.after}}
}

// drive sends the users' requests and plots.
func (f *overloadFlags) drive(ctx context.Context, url string, r running, out io.Writer) error {
	fmt.Fprintf(out, "A node that analyses %.0f exchanges a second; users want half of that, %.0f times that, and half of it again.\n\n", f.capacity, f.times)
	fmt.Fprintf(out, "%5s %9s  %-31s %9s %8s  %s\n", "", "wanted/s", "share", "analysed", "late by", "users' p99")
	users := newUsers(url)
	defer users.close()
	var done []phaseResult
	second := 0
	for _, p := range f.phases() {
		fmt.Fprintf(out, "%s\n", p.name)
		result := phaseResult{phase: p}
		users.run(ctx, p.rate, p.long, func(took []time.Duration) {
			second++
			fmt.Fprintln(out, plotLine(second, r.control.history.newest(), quantile(took, 0.99)))
		})
		if ctx.Err() != nil {
			return nil
		}
		result.took, result.failed, result.suspicious = users.cut()
		done = append(done, result)
	}
	fmt.Fprintln(out)
	for _, d := range done {
		fmt.Fprintf(out, "users, %-9s %6d requests, %d failed, p50 %s, p99 %s\n", d.name+":", len(d.took), d.failed, milliseconds(quantile(d.took, 0.5)), milliseconds(quantile(d.took, 0.99)))
	}
	return f.account(ctx, r, done, out)
}

type phaseResult struct {
	phase
	took       []time.Duration
	failed     int
	suspicious int
}

// account tells what became of everything.
func (f *overloadFlags) account(ctx context.Context, r running, done []phaseResult, out io.Writer) error {
	var total, suspicious int
	for _, d := range done {
		total += len(d.took) + d.failed
		suspicious += d.suspicious
	}
	select { // for what is on its way, and the next report
	case <-ctx.Done():
		return nil
	case <-time.After(2500 * time.Millisecond):
	}
	counts := ledgerCounts(r.node.registry)
	of := func(series string) uint64 { return counts[series] }
	lost := r.control.history.lost()
	fmt.Fprintf(out, "exchanges:       %d: %d analysed, %d left out by the share, %d discarded by the guard, %.0f lost on the way\n", total,
		of(`periscope_detect_inspections_total{outcome="clean"}`)+of(`periscope_detect_inspections_total{outcome="hit"}`),
		of(`periscope_gateway_exchanges_total{outcome="sampled_out"}`), of(`periscope_ingest_events_total{outcome="discarded"}`), lost)
	fmt.Fprintf(out, "suspicious:      %d, %d found to be attacks\n", suspicious, of(`periscope_detect_inspections_total{outcome="hit"}`))
	return nil
}

const barWidth = 20

// plotLine is a second.
func plotLine(second int, s loadSample, p99 time.Duration) string {
	share := 100.0
	if len(s.shares) > 0 {
		share = s.shares[0].percent
	}
	filled := int(math.Round(share / 100 * barWidth))
	late := "–"
	if s.kernel >= 0 || s.queue >= 0 || s.lag >= 0 { // else nobody told
		late = milliseconds(time.Duration(max(orZero(s.kernel), orZero(s.queue), orZero(s.lag)) * float64(time.Second)))
	}
	return fmt.Sprintf("%3d s %9s  %s%s %5.1f %% %9s %8s  %s", second, perSecond(s.demand), strings.Repeat("█", filled), strings.Repeat("░", barWidth-filled), share,
		perSecond(s.analysed), late, milliseconds(p99))
}

func perSecond(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	return fmt.Sprintf("%.0f", v)
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%.0f ms", d.Seconds()*1000) }
