package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/bench/sink"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
)

const (
	connections = 32 // of each gateway, kept open
	warmUp      = 300 * time.Millisecond
)

// receiver takes what a gateway copies.
type receiver interface {
	Port() int
	Copies() uint64           // complete ones that have arrived
	Expected() (uint64, bool) // how many the sender says there are, if it says so
	Open() int64              // that have begun to arrive
	runner
}

// gateway is a variant, running.
type gateway struct {
	variant
	envoy    *proxy.Envoy
	client   *load.Client
	receiver receiver // nil: nothing is counted
}

// figures are what one variant did under one workload, a value per round.
type figures struct {
	throughput []float64 // requests answered a second
	cpu        []float64 // µs of the gateway per request, saturated
	busy       []float64 // share of the time that the gateway ran or wanted to, saturated
	p50, p99   []float64 // ms, at the fixed rate

	requests, errors int
	copies, expected uint64
	firstError       error
	peakRSS          int64  // bytes
	noted            string // what went wrong with mirroring, where nothing should
}

// bench is what all scenarios need, and what they tell of their surroundings.
type bench struct {
	options
	progress  io.Writer
	dir       string // for temporary files
	machine   result.Machine
	version   string // of Envoy
	date      time.Time
	variants  []variant
	workloads []workload

	// Of the time that gateways were measured, how much of their CPU others had.
	measured, foreign time.Duration
}

// runner is a part of the surroundings of gateways.
type runner interface {
	Run(ctx context.Context) error
}

// within calls f, which starts runners by the function that it is given, and
// ends them when f returns.
func within(ctx context.Context, f func(ctx context.Context, run func(runner)) error) error {
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	err := func() error {
		defer cancel()
		return f(ctx, func(r runner) { group.Go(func() error { return r.Run(ctx) }) })
	}()
	if failed := group.Wait(); failed != nil {
		return failed // the cause; err is then only that everything was stopped
	}
	return err
}

// fleet calls f with a gateway for each variant, with backend and receivers
// around them, and ends them all:
//
//	                 ┌─► Envoy "none" ──────┐
//	                 ├─► Envoy "empty-lua" ─┤
//	load.Client ×n ──┼─► Envoy "periscope" ─┼──► sink.Backend (one for all)
//	                 └─► Envoy …  ──┬───────┘
//	                                └ copies ─► a receiver for each:
//	                                            sink.Events, sink.Processor, …
//
// Envoys on one CPU, all the rest on another.
func (b *bench) fleet(ctx context.Context, w workload, variants []variant, f func(context.Context, []*gateway) error) error {
	return within(ctx, func(ctx context.Context, run func(runner)) error {
		backend, err := sink.ListenBackend(kib, 64*kib, mib)
		if err != nil {
			return err
		}
		run(backend)
		var gateways []*gateway
		for _, v := range variants {
			recv, err := newReceiver(v)
			if err != nil {
				return err
			}
			port := 0
			if recv != nil {
				run(recv)
				port = recv.Port()
			}
			config, err := bootstrapJSON(v, w.limit, backend.Port(), port)
			if err != nil {
				return err
			}
			g, err := b.start(ctx, v, config, load.Config{Conns: connections})
			if err != nil {
				return fmt.Errorf("variant %s: %w", v.name, err)
			}
			defer g.stop()
			g.receiver = recv
			gateways = append(gateways, g)
		}
		defer b.watch(gateways)()
		return f(ctx, gateways)
	})
}

// pick gives the chosen variants that are wanted.
func (b *bench) pick(wanted func(variant) bool) []variant {
	return slices.DeleteFunc(slices.Clone(b.variants), func(v variant) bool { return !wanted(v) })
}

// start brings up a gateway with this bootstrap, and connections to it.
func (b *bench) start(ctx context.Context, v variant, config []byte, conns load.Config) (*gateway, error) {
	dir, err := os.MkdirTemp(b.dir, v.name+"-")
	if err != nil {
		return nil, fmt.Errorf("create folder for envoy: %w", err)
	}
	e, err := b.startEnvoy(ctx, dir, config)
	if err != nil {
		return nil, err
	}
	conns.Addr = e.Addr
	client, err := load.Dial(conns)
	if err != nil {
		e.Stop()
		return nil, err
	}
	return &gateway{variant: v, envoy: e, client: client}, nil
}

// startEnvoy starts one on the gateways' CPU. The calling goroutine must be locked
// to its thread.
func (b *bench) startEnvoy(ctx context.Context, dir string, config []byte) (*proxy.Envoy, error) {
	var e *proxy.Envoy
	if err := b.pinning.start(func() (err error) {
		e, err = proxy.Start(b.envoy, dir, config)
		return err
	}); err != nil {
		return nil, err
	}
	return e, e.Ready(ctx)
}

func (g *gateway) stop() {
	g.client.Close()
	g.envoy.Stop()
}

// newReceiver listens for copies; nil for nothing.
func newReceiver(v variant) (receiver, error) {
	switch {
	case v.fault != "":
		return sink.ListenFaulty(v.fault)
	case v.copies == copiesEvents:
		return sink.ListenEvents()
	case v.copies == copiesRequests:
		return sink.ListenBackend(0)
	case v.copies == copiesProcessor:
		return sink.ListenProcessor()
	default:
		return nil, nil
	}
}

// watch sees who has the gateways' CPU, beside other processes that are meant
// to, until the function that it gives is called.
func (b *bench) watch(gateways []*gateway, pids ...int) func() {
	seen := map[int]bool{}
	for _, g := range gateways {
		seen[g.envoy.Pid()] = true
	}
	for _, pid := range pids {
		seen[pid] = true
	}
	used := func() time.Duration {
		var sum time.Duration
		for pid := range seen {
			// One that cannot be read counts nothing.
			if d, err := proxy.CPUOf(pid); err == nil {
				sum += d.Run
			}
		}
		return sum
	}
	begin, own := time.Now(), used()
	all, err := cpuBusy(b.pinning.gateway)
	return func() {
		now, err2 := cpuBusy(b.pinning.gateway)
		if b.pinning.on && err == nil && err2 == nil {
			b.measured += time.Since(begin)
			b.foreign += max(0, now-all-(used()-own))
		}
	}
}

// rounds measures each gateway once a round, after one short round that is
// thrown away. The order alternates, so that a machine that slows down steadily,
// or a variant that leaves work behind, favours nobody. The figures are in the
// order of the gateways.
func (b *bench) rounds(ctx context.Context, title string, gateways []*gateway, measure func(g *gateway, round int, warm bool) (figures, error)) ([]figures, error) {
	out := make([]figures, len(gateways))
	order := make([]int, len(gateways))
	for i := range order {
		order[i] = i
	}
	for n := range b.options.rounds + 1 {
		if n > 0 {
			fmt.Fprintf(b.progress, "%s: round %d of %d\n", title, n, b.options.rounds)
		}
		for _, i := range order {
			f, err := measure(gateways[i], n, n == 0)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return nil, fmt.Errorf("variant %s, %s: round %d: %w", gateways[i].name, title, n, err)
			}
			if n > 0 {
				out[i].add(f)
			}
		}
		slices.Reverse(order)
	}
	for i, g := range gateways {
		if err := g.look(ctx, &out[i]); err != nil {
			return nil, fmt.Errorf("variant %s: %w", g.name, err)
		}
	}
	return out, nil
}

// look reads what is to be read of a gateway at its end.
func (g *gateway) look(ctx context.Context, f *figures) (err error) {
	if f.peakRSS, _, err = g.envoy.RSS(); err != nil {
		return err
	}
	faults, err := faults(ctx, g.envoy, g.fault == "")
	if err != nil {
		return err
	}
	if e, ok := g.receiver.(*sink.Events); ok && e.Fault() != nil {
		faults = append(faults, e.Fault().Error())
	}
	f.noted = strings.Join(faults, ", ")
	return nil
}

// faults gives the counters, not zero, that say that the plugin failed, and
// with a node that doesn't, that mirroring did.
func faults(ctx context.Context, e *proxy.Envoy, mirror bool) ([]string, error) {
	filter := `lua.*errors`
	if mirror {
		filter += `|` + xdsgateway.MirrorCluster + `.*(overflow|_timeout|connect_fail|rq_5xx)$`
	}
	counters, err := e.Stats(ctx, filter)
	var out []string
	for _, c := range counters {
		if c.Value != 0 {
			out = append(out, fmt.Sprintf("%s %d", c.Name, c.Value))
		}
	}
	return out, err
}

// saturate measures g with all the load that it can take.
func (g *gateway) saturate(ctx context.Context, r load.Request, burst time.Duration) (figures, error) {
	var f figures
	before := g.copied()
	runtime.GC() // not during the burst: see main
	cpu0, err := g.envoy.CPU()
	if err != nil {
		return f, err
	}
	res := g.client.Saturate(ctx, r, burst)
	cpu1, err := g.envoy.CPU()
	if err != nil {
		return f, err
	}
	if err := g.settle(ctx); err != nil {
		return f, err
	}
	// What the gateway does after the last answer is part of the requests' price.
	cpu2, err := g.envoy.CPU()
	if err != nil {
		return f, err
	}
	f.count(g, before, res)
	f.throughput = []float64{float64(res.Requests) / res.Elapsed.Seconds()}
	f.cpu = []float64{cpu2.Sub(cpu0).Run.Seconds() * 1e6 / float64(res.Requests)}
	had := cpu1.Sub(cpu0)
	f.busy = []float64{(had.Run + had.Wait).Seconds() / res.Elapsed.Seconds()}
	return f, nil
}

// pace measures g at the schedule's rate.
func (g *gateway) pace(ctx context.Context, r load.Request, schedule []time.Duration) (figures, error) {
	var f figures
	before := g.copied()
	runtime.GC()
	res, err := g.client.Paced(ctx, r, schedule)
	if err != nil {
		return f, err
	}
	if err := g.settle(ctx); err != nil {
		return f, err
	}
	f.count(g, before, res)
	f.throughput = []float64{float64(res.Requests) / res.Elapsed.Seconds()}
	f.p50 = []float64{quantile(res.Latencies, 0.50)}
	f.p99 = []float64{quantile(res.Latencies, 0.99)}
	return f, nil
}

// count takes a burst's outcome over, and what of it was copied.
func (f *figures) count(g *gateway, before copied, res load.Result) {
	after := g.copied()
	f.requests, f.errors, f.firstError = res.Requests, res.Errors, res.FirstError
	f.copies, f.expected = after.arrived-before.arrived, after.made-before.made
	if !after.told || g.share == 100 {
		f.expected = uint64(res.Requests)
	}
}

type copied struct {
	arrived, made uint64
	told          bool // made is what the sender says
}

func (g *gateway) copied() copied {
	if g.receiver == nil {
		return copied{}
	}
	made, told := g.receiver.Expected()
	return copied{g.receiver.Copies(), made, told}
}

// settle waits until the gateway's copies have arrived, so that they are
// counted, and disturb nobody else's burst.
func (g *gateway) settle(ctx context.Context) error {
	if g.receiver == nil {
		return nil
	}
	const still = 5 // ticks
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := g.receiver.Copies()
	for quiet, left := 0, 150; quiet < still && left > 0; left-- {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		now := g.receiver.Copies()
		if now == last && g.receiver.Open() == 0 {
			quiet++
		} else {
			quiet, last = 0, now
		}
	}
	return nil
}

// add appends a round.
func (f *figures) add(r figures) {
	f.throughput = append(f.throughput, r.throughput...)
	f.cpu = append(f.cpu, r.cpu...)
	f.busy = append(f.busy, r.busy...)
	f.p50 = append(f.p50, r.p50...)
	f.p99 = append(f.p99, r.p99...)
	f.requests += r.requests
	f.errors += r.errors
	f.copies += r.copies
	f.expected += r.expected
	if f.firstError == nil {
		f.firstError = r.firstError
	}
}

// failures says which variants' users saw errors: figures with such mean nothing.
func failures(variants []variant, title string, fs []figures) error {
	var faults []error
	for i, f := range fs {
		if f.errors > 0 {
			faults = append(faults, fmt.Errorf("variant %s, %s: %d of %d requests failed, the first: %w",
				variants[i].name, title, f.errors, f.requests+f.errors, f.firstError))
		}
	}
	return errors.Join(faults...)
}

func variantsOf(gateways []*gateway) []variant {
	out := make([]variant, len(gateways))
	for i, g := range gateways {
		out[i] = g.variant
	}
	return out
}
