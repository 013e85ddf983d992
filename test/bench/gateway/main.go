// Command gateway measures what the plugin costs a real Envoy, against no
// filter, an empty Lua filter, request_mirror_policies and ext_proc in
// observability mode: CPU and memory, users' latency while nodes fail and
// policies change, and memory in a long run; and what a node that is always busy
// costs users of a gateway on the same CPU. It prints Markdown tables.
//
// It never leaves this machine's loopback, and nothing of it outlives it. Its
// figures are this machine's: ratios travel better than microseconds. Nobody
// imports it; `make bench-gateway` and `make bench-beside` run it.
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

	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

func main() {
	// Children get this thread's CPU and die with it, see bench.startEnvoy.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options of a run.
type options struct {
	envoy     string
	rounds    int
	burst     time.Duration
	rate      float64
	only      string
	soakFor   time.Duration
	variants  string
	workloads string
	write     string
	periscope string
	plugins   []string
	pinning   pinning
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-gateway", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.envoy, "envoy", "", "Envoy `binary`; default $PERISCOPE_ENVOY, then "+proxy.Pinned+", then the one on PATH")
	fs.IntVar(&o.rounds, "rounds", 9, "rounds; each measures every variant once")
	fs.DurationVar(&o.burst, "burst", time.Second, "length of a burst")
	fs.Float64Var(&o.rate, "rate", 1000, "requests a second where latency is measured, and memory over time")
	fs.StringVar(&o.only, "only", "", "comma-separated `names` of scenarios: saturated, latency, changes, and beside, which needs root; default all but that")
	fs.StringVar(&o.periscope, "periscope", "bin/periscope", "periscope `binary` of the node that is beside the gateway")
	fs.DurationVar(&o.soakFor, "soak", 0, "run for so `long` at a steady rate, show memory over time, and measure nothing else")
	fs.StringVar(&o.workloads, "workloads", "", "comma-separated `names` of workloads when saturated: get, post, whole, cut, download; default all")
	fs.StringVar(&o.variants, "variants", "", "comma-separated `names` of variants; default all")
	fs.StringVar(&o.write, "write", "", "`file` whose marked sections are replaced; default: print")
	plugins := fs.String("plugin", "", "comma-separated `files` with other plugin code, measured beside ours; a.lua is the variants a, a-10 and a-0")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if *plugins != "" {
		o.plugins = strings.Split(*plugins, ",")
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
	case o.soakFor != 0 && (o.soakFor < time.Second || o.soakFor > 24*time.Hour):
		return o, fmt.Errorf("-soak %v is not from 1s to 24h", o.soakFor)
	case o.soakFor != 0 && o.only != "":
		return o, errors.New("-soak measures nothing else: leave -only out")
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err == nil {
		err = benchmark(ctx, o, stdout, stderr)
	}
	return result.Code("bench-gateway", err, stderr)
}

// benchmark runs the scenarios one after the other, and publishes each.
func benchmark(ctx context.Context, o options, stdout, stderr io.Writer) error {
	all, err := variants(o.plugins)
	if err != nil {
		return err
	}
	b := &bench{progress: stderr, machine: result.ReadMachine(), date: time.Now()}
	if b.variants, err = choose(all, o.variants); err != nil {
		return err
	}
	if b.workloads, err = named(workloads(), o.workloads, func(w workload) string { return w.name }); err != nil {
		return err
	}
	scenarios, err := b.scenarios(o)
	if err != nil {
		return err
	}
	for _, sc := range scenarios {
		// Better now than after the measurement.
		if o.write != "" {
			if err := result.Check(o.write, sc.section()); err != nil {
				return err
			}
		}
	}
	if o.envoy, err = proxy.Find(o.envoy); err != nil {
		return err
	}
	if o.pinning, err = pin(); err != nil {
		return err
	}
	b.options = o
	// The collector runs between bursts; the limit is for bursts that are too
	// long for that.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(1 << 30)

	if b.version, err = proxy.Version(ctx, o.envoy); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "bench-gateway-"); err != nil {
		return fmt.Errorf("create temporary folder: %w", err)
	}
	defer os.RemoveAll(b.dir)
	for _, sc := range scenarios {
		s, err := sc.run(ctx)
		if err != nil {
			return err
		}
		if err := publish(sc.section(), s, o.write, stdout); err != nil {
			return err
		}
	}
	return nil
}

type scenario struct {
	name string
	run  func(context.Context) (section, error)
}

// section is the name of the marked section that its report goes to.
func (s scenario) section() string { return "bench-gateway-" + s.name }

// scenarios are those that the options ask for.
func (b *bench) scenarios(o options) ([]scenario, error) {
	if o.soakFor != 0 {
		return []scenario{{"soak", b.soak}}, nil
	}
	all := []scenario{{"saturated", b.saturated}, {"latency", b.latency}, {"changes", b.changes}}
	if o.only != "" {
		all = append(all, scenario{"beside", b.beside})
	}
	return named(all, o.only, func(s scenario) string { return s.name })
}
