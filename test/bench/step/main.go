// Command step overloads a real analysis node, in a control group of its own, by
// real Envoys with our plugin, under several controls of the mirrored share: none,
// a fixed circuit breaker, AIMD, and ours. It prints Markdown tables and draws a
// plot.
//
// It never leaves this machine's loopback, and nothing of it outlives it. Its
// figures are this machine's. It needs root, for the control group. Nobody imports
// it; `make bench-pressure` runs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

func main() {
	// Children die with this thread, see proxy.Start.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options of a run.
type options struct {
	envoy, periscope string
	rounds           int
	others           int
	quota            float64
	step             time.Duration
	only             *regexp.Regexp
	log              string
	write            string
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-pressure", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.envoy, "envoy", "", "Envoy `binary`; default $PERISCOPE_ENVOY, then "+proxy.Pinned+", then the one on PATH")
	fs.StringVar(&o.periscope, "periscope", "bin/periscope", "periscope `binary`")
	fs.IntVar(&o.rounds, "rounds", 3, "rounds in which the budget, the node's capacity and a healthy node are measured; figures are medians")
	fs.IntVar(&o.others, "others", 1, "rounds in which the other controls are measured too")
	// With more, users' requests at ×10 fill a machine of two CPUs.
	fs.Float64Var(&o.quota, "quota", 0.5, "`part` of a CPU that the node has")
	fs.DurationVar(&o.step, "step", 15*time.Second, "`length` of the step; before and after it there are 5 s at most")
	only := fs.String("only", "", "`regexp` that the names of what is run match, \"×10, 4 gateways, **budget**, guard\"; default: all")
	fs.StringVar(&o.log, "log", "", "`file` for what controls knew and decided, JSON lines")
	fs.StringVar(&o.write, "write", "", "`file` whose marked section is replaced, with a plot beside it; default: print the tables")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	var err error
	o.only, err = regexp.Compile(*only)
	switch {
	case err != nil:
		return o, fmt.Errorf("-only: %w", err)
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.rounds < 1 || o.rounds > 100:
		return o, fmt.Errorf("-rounds %d is not from 1 to 100", o.rounds)
	case o.others < 0 || o.others > o.rounds:
		return o, fmt.Errorf("-others %d is not from 0 to -rounds", o.others)
	case !(o.quota >= 0.1 && o.quota <= 1):
		return o, fmt.Errorf("-quota %g is not from 0.1 to 1", o.quota)
	case o.step < 2*time.Second || o.step > time.Minute:
		return o, fmt.Errorf("-step %v is not from 2s to 1m", o.step)
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err == nil {
		err = benchmark(ctx, o, stdout, stderr)
	}
	return result.Code("bench-pressure", err, stderr)
}

func benchmark(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	if o.write != "" { // better now than after the measurement
		if err := result.Check(o.write, section); err != nil {
			return err
		}
	}
	if o.envoy, err = proxy.Find(o.envoy); err != nil {
		return err
	}
	if _, err := os.Stat(o.periscope); err != nil {
		return fmt.Errorf("-periscope: %w: run `make build`", err)
	}
	r := &results{machine: result.ReadMachine(), date: time.Now(), options: o}
	if r.version, err = proxy.Version(ctx, o.envoy); err != nil {
		return err
	}
	if err := r.measure(ctx, stderr); err != nil {
		return err
	}
	if o.write == "" {
		_, err := io.WriteString(stdout, r.markdown())
		return err
	}
	if svg := r.plot(); svg != "" {
		if err := os.WriteFile(filepath.Join(filepath.Dir(o.write), plotFile), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return result.WriteInto(o.write, section, r.markdown())
}
