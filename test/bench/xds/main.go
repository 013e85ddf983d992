// Command xds measures what it takes to tell many gateways and istiods of an
// edited policy: package xds beside go-control-plane's own cache of snapshots,
// in the same rounds, and prints Markdown tables.
//
// It never leaves this machine's loopback, and nothing of it outlives it. Its
// clients are simulated: they decode and acknowledge, but apply nothing. Its
// figures are this machine's: ratios travel better than microseconds. Nobody
// imports it; `make bench-xds` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

func main() {
	if config := os.Getenv(serverEnv); config != "" {
		os.Exit(serveMain(config))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// serveMain is the main of a server process. An interrupt is meant for the one
// that measures: this one ends with its input.
func serveMain(config string) int {
	signal.Ignore(os.Interrupt)
	if err := serve(config, os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "bench-xds: server: %v\n", err)
		return 1
	}
	return 0
}

// options of a run.
type options struct {
	gateways []int
	istiods  []int
	rounds   int
	limit    time.Duration
	write    string
	profile  string
}

const maxClients = 100 * maxConnections

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-xds", flag.ContinueOnError)
	fs.SetOutput(stderr)
	gateways := fs.String("gateways", "1,100,1000,10000", "comma-separated `numbers` of gateways; empty: none")
	istiods := fs.String("istiods", "1,10,100", "comma-separated `numbers` of istiods; empty: none")
	fs.IntVar(&o.rounds, "rounds", 5, "rounds; each makes every kind of edit at every server. Fewer if time runs out")
	fs.DurationVar(&o.limit, "limit", 5*time.Minute, "time that the whole run may take")
	fs.StringVar(&o.write, "write", "", "`file` whose marked section is replaced; default: print")
	fs.StringVar(&o.profile, "profile", "", "`file` for a CPU profile of our server with the last number of clients")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	var err1, err2 error
	o.gateways, err1 = numbers(*gateways)
	o.istiods, err2 = numbers(*istiods)
	switch {
	case err1 != nil:
		return o, fmt.Errorf("-gateways: %w", err1)
	case err2 != nil:
		return o, fmt.Errorf("-istiods: %w", err2)
	case len(o.gateways)+len(o.istiods) == 0:
		return o, errors.New("neither gateways nor istiods")
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.rounds < 1 || o.rounds > 1000:
		return o, fmt.Errorf("-rounds %d is not from 1 to 1000", o.rounds)
	case o.limit < time.Second || o.limit > 24*time.Hour:
		return o, fmt.Errorf("-limit %v is not from 1s to 24h", o.limit)
	}
	return o, nil
}

func numbers(list string) ([]int, error) {
	var out []int
	for f := range strings.SplitSeq(list, ",") {
		if f == "" && list == "" {
			return nil, nil
		}
		n, err := strconv.Atoi(f)
		if err != nil || n < 1 || n > maxClients {
			return nil, fmt.Errorf("%q is not a number from 1 to %d", f, maxClients)
		}
		out = append(out, n)
	}
	return out, nil
}

// stages of a run, the quick ones first: what time they leave is the others'.
func (o options) stages() []stage {
	var out []stage
	for _, n := range o.istiods {
		out = append(out, stage{n, true})
	}
	for _, n := range o.gateways {
		out = append(out, stage{n, false})
	}
	return out
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err == nil {
		err = benchmark(ctx, o, stdout, stderr)
	}
	return result.Code("bench-xds", err, stderr)
}

// benchmark runs, for each number of clients:
//
//	this process                        server processes
//	fleet: simulated clients ◄── gRPC ─► xds.Server
//	fleet: as many           ◄── gRPC ─► go-control-plane's SnapshotCache
//	side.edit ────────── JSON lines ───► edit, wait for the last ACK, read own CPU
func benchmark(ctx context.Context, o options, stdout, stderr io.Writer) error {
	debug.SetMemoryLimit(3 << 30) // of the clients: their garbage, not what they need
	start := time.Now()
	ctx, cancel := context.WithDeadline(ctx, start.Add(o.limit))
	defer cancel()
	r := &report{machine: result.ReadMachine(), date: start, peer: peerVersion(), wanted: o.rounds}
	// The last rounds and the tidying up need some time too.
	b := &bench{rounds: o.rounds, deadline: start.Add(o.limit * 7 / 10), profile: o.profile, progress: stderr}
	var err error
	if r.stages, err = b.all(ctx, o.stages()); err != nil {
		return err
	}
	out := r.markdown()
	if o.write != "" {
		return result.WriteInto(o.write, section, out)
	}
	if _, err := io.WriteString(stdout, out); err != nil {
		return fmt.Errorf("print report: %w", err)
	}
	return nil
}

// peerVersion is that of the go-control-plane this program was built with.
func peerVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "github.com/envoyproxy/go-control-plane" {
				return d.Version
			}
		}
	}
	return "of unknown version"
}
