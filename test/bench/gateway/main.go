// Command gateway measures what the plugin costs a real Envoy, against no
// filter, an empty Lua filter, request_mirror_policies and ext_proc in
// observability mode, and prints a Markdown table.
//
// It never leaves this machine's loopback, and nothing of it outlives it. Its
// figures are this machine's: ratios travel better than microseconds. Nobody
// imports it; `make bench-gateway` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/bench/sink"
	"golang.org/x/sync/errgroup"
)

func main() {
	// Children get this thread's CPU and die with it, see startEnvoy.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options of a run.
type options struct {
	envoy    string
	rounds   int
	burst    time.Duration
	rate     float64
	variants string
	write    string
	plugin   string
	full     bool
	pinning  pinning
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-gateway", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.envoy, "envoy", "", "Envoy `binary`; default $PERISCOPE_ENVOY, then "+pinnedEnvoy+", then the one on PATH")
	fs.IntVar(&o.rounds, "rounds", 7, "rounds; each measures every variant once")
	fs.DurationVar(&o.burst, "burst", time.Second, "length of a burst")
	fs.Float64Var(&o.rate, "rate", 1000, "requests a second for latencies")
	fs.StringVar(&o.variants, "variants", "", "comma-separated `names` of variants; default all")
	fs.StringVar(&o.write, "write", "", "`file` whose marked section is replaced; default: print")
	fs.StringVar(&o.plugin, "plugin", "", "`file` with other plugin code, measured beside ours as the variants candidate and candidate-10")
	fs.BoolVar(&o.full, "full", false, "measure POST of 64 KiB as well")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.rounds < 1 || o.rounds > 1000:
		return o, fmt.Errorf("-rounds %d is not from 1 to 1000", o.rounds)
	case o.burst < 100*time.Millisecond || o.burst > time.Minute:
		return o, fmt.Errorf("-burst %v is not from 100ms to 1m", o.burst)
	case !(o.rate >= 1 && o.rate <= 1e5):
		return o, fmt.Errorf("-rate %g is not from 1 to 100000", o.rate)
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err == nil {
		err = benchmark(ctx, o, stdout, stderr)
	}
	if err != nil {
		fmt.Fprintf(stderr, "bench-gateway: %v\n", err)
		return 1
	}
	return 0
}

// benchmark builds:
//
//	                 ┌─► Envoy "none" ──────┐
//	                 ├─► Envoy "empty-lua" ─┤
//	load.Client ×n ──┼─► Envoy "periscope" ─┼──► sink.Backend (one for all)
//	                 └─► Envoy …  ──┬───────┘
//	                                └ copies ─► a receiver for each:
//	                                            sink.Events, sink.Processor, …
//
// Envoys on one CPU, all the rest on another.
func benchmark(ctx context.Context, o options, stdout, stderr io.Writer) error {
	all, err := variants(o.plugin)
	if err != nil {
		return err
	}
	chosen, err := choose(all, o.variants)
	if err != nil {
		return err
	}
	if o.envoy, err = findEnvoy(o.envoy); err != nil {
		return err
	}
	if o.pinning, err = pin(); err != nil {
		return err
	}
	// The collector runs between bursts; the limit is for bursts that are too
	// long for that.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(1 << 30)

	ctx, cancel := context.WithTimeout(ctx, timeLimit(o, len(chosen)))
	defer cancel()
	r := &report{machine: result.ReadMachine(), date: time.Now(), rounds: o.rounds, burst: o.burst, rate: o.rate, pinned: o.pinning.on, foreign: -1, variants: chosen}
	if r.envoy, err = envoyVersion(ctx, o.envoy); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-gateway-")
	if err != nil {
		return fmt.Errorf("create temporary folder: %w", err)
	}
	defer os.RemoveAll(dir)
	b := &bench{options: o, progress: stderr, workloads: workloads(o.full)}
	if err := b.serve(ctx, chosen, dir, r); err != nil {
		return err
	}
	return publish(r, o.write, stdout)
}

// timeLimit is far above what a run needs.
func timeLimit(o options, variants int) time.Duration {
	bursts := time.Duration((o.rounds + 1) * variants * 2 * len(workloads(o.full)))
	return time.Minute + bursts*(o.burst+4*time.Second)
}

// serve runs backend, receivers and gateways around the measurement, and fills
// the report.
func (b *bench) serve(ctx context.Context, chosen []variant, dir string, r *report) error {
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	err := func() error {
		defer cancel() // before waiting: sinks run until then
		backend, err := sink.ListenBackend(responseBytes)
		if err != nil {
			return err
		}
		group.Go(func() error { return backend.Run(ctx) })
		for _, v := range chosen {
			recv, err := newReceiver(v.copies)
			if err != nil {
				return err
			}
			if recv != nil {
				group.Go(func() error { return recv.Run(ctx) })
			}
			fmt.Fprintf(b.progress, "starting %s\n", v.name)
			g, err := start(ctx, v, b.options, dir, backend.Port(), recv)
			if err != nil {
				return err
			}
			defer g.stop()
			b.gateways = append(b.gateways, g)
		}
		return b.fill(ctx, r)
	}()
	if failed := group.Wait(); failed != nil {
		return failed // the cause; err is then only that everything was stopped
	}
	return err
}

// fill measures and reads what is to be read while the gateways live.
func (b *bench) fill(ctx context.Context, r *report) error {
	cpu := b.pinning.gateway
	begin, all0, own0 := time.Now(), b.busy(cpu), b.used()
	if err := b.measure(ctx); err != nil {
		return err
	}
	if all1, own1 := b.busy(cpu), b.used(); b.pinning.on && all0 > 0 && all1 > 0 {
		r.foreign = max(0, (all1-all0-(own1-own0)).Seconds()/time.Since(begin).Seconds())
	}
	for _, w := range b.workloads {
		r.workloads = append(r.workloads, w.title)
	}
	r.figures = b.figures
	for _, g := range b.gateways {
		peak, err := g.envoy.peakRSS()
		if err != nil {
			return err
		}
		r.peakRSS = append(r.peakRSS, peak)
		faults, err := g.envoy.faults(ctx)
		if err != nil {
			return err
		}
		if e, ok := g.receiver.(*sink.Events); ok && e.Fault() != nil {
			faults = append(faults, e.Fault().Error())
		}
		if len(faults) > 0 {
			r.notes = append(r.notes, g.name+": "+strings.Join(faults, ", "))
		}
	}
	return nil
}

// busy is cpuBusy, 0 when unknown.
func (b *bench) busy(cpu int) time.Duration {
	d, err := cpuBusy(cpu)
	if err != nil {
		return 0
	}
	return d
}

// used is the CPU time of all gateways; one that cannot be read counts nothing.
func (b *bench) used() time.Duration {
	var sum time.Duration
	for _, g := range b.gateways {
		if d, err := g.envoy.cpu(); err == nil {
			sum += d.run
		}
	}
	return sum
}

// publish prints the report or writes it into the file, unless users of a
// gateway saw errors: such figures mean nothing.
func publish(r *report, file string, stdout io.Writer) error {
	var faults []error
	for w, fs := range r.figures {
		for i, f := range fs {
			if f.errors > 0 {
				faults = append(faults, fmt.Errorf("variant %s, %s: %d of %d requests failed, the first: %w",
					r.variants[i].name, r.workloads[w], f.errors, f.requests+f.errors, f.firstError))
			}
		}
	}
	var out strings.Builder
	if err := r.write(&out); err != nil {
		return err
	}
	if file == "" || len(faults) > 0 {
		if _, err := io.WriteString(stdout, out.String()); err != nil {
			return fmt.Errorf("print report: %w", err)
		}
		return errors.Join(faults...)
	}
	return result.WriteInto(file, section, out.String())
}
