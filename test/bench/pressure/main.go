// Command pressure simulates an analysis node under more traffic than it can
// analyse, with mirror/share and node/pressure themselves in the loop, beside what
// others do: nothing, a fixed circuit breaker, AIMD. It prints Markdown tables and
// draws plots.
//
// Time is simulated, and chance is seeded: the same seeds give the same figures on
// any machine. It opens no connection. Nobody imports it; `make bench-pressure-sim`
// runs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// options of a run.
type options struct {
	gateways []int
	seeds    int
	write    string
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-pressure-sim", flag.ContinueOnError)
	fs.SetOutput(stderr)
	gateways := fs.String("gateways", "1,10,100,1000,10000", "comma-separated `numbers` of gateways")
	fs.IntVar(&o.seeds, "seeds", 3, "seeds; figures are means over them")
	fs.StringVar(&o.write, "write", "", "`file` whose marked section is replaced, with plots beside it; default: print the tables")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	for f := range strings.SplitSeq(*gateways, ",") {
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 || n > 10_000 {
			return o, fmt.Errorf("-gateways: %q is not a number from 1 to 10000", f)
		}
		o.gateways = append(o.gateways, n)
	}
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.seeds < 1 || o.seeds > 100:
		return o, fmt.Errorf("-seeds %d is not from 1 to 100", o.seeds)
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err == nil {
		err = benchmark(ctx, o, stdout, stderr)
	}
	return result.Code("bench-pressure-sim", err, stderr)
}

func benchmark(ctx context.Context, o options, stdout, stderr io.Writer) error {
	if o.write != "" {
		if err := result.Check(o.write, section); err != nil {
			return err
		}
	}
	r, err := measure(ctx, o, stderr)
	if err != nil {
		return err
	}
	if o.write == "" {
		_, err := io.WriteString(stdout, r.markdown())
		return err
	}
	for name, svg := range r.plots() {
		if err := os.WriteFile(filepath.Join(filepath.Dir(o.write), name), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return result.WriteInto(o.write, section, r.markdown())
}
