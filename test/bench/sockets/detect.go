package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

const (
	// late is the delay that is waited for.
	late = 10 * time.Millisecond
	// calm is how long nothing may have been late before a step.
	calm = 200 * time.Millisecond
	// calmWithin is how long that is waited for.
	calmWithin = 3 * time.Second
	// hold is how long a step lasts.
	hold = 600 * time.Millisecond
	// usual is the demand before a step, of the capacity.
	usual = 0.5
)

// scenario is a kind of overload.
type scenario struct {
	name      string
	way       string
	underWay  int // batches, at most
	exchanges int // a batch
	bodyBytes int // of each, in either direction
	work      work

	demand float64 // exchanges a second, before the step; 0: half of the capacity
	times  float64 // of the capacity, that is demanded from the step on; 0: as before
	step   func(context.Context, *rig) error
	undo   func(context.Context, *rig) error
}

// inline is a node whose CPU time goes to reading.
func inline(name, way string, times float64) scenario {
	return scenario{name: name, way: way, underWay: 128, exchanges: 8, bodyBytes: 256, work: work{Reading: 125 * time.Microsecond}, times: times}
}

// Steps that have goals of their own.
const (
	quotaCut    = "CPU quota cut to 10 %"
	standstill  = "SIGSTOP for 300 ms"
	slowWorkers = "workers ×10 slower"
)

func scenarios() []scenario {
	mixed2, mixed10 := inline("inline CPU ×2, h2c", mixed, 2), inline("inline CPU ×10, h2c", mixed, 10)
	mixed2.underWay, mixed10.underWay = 256, 256
	bodies := inline("bodies of 256 kB, ×10", kept, 10)
	bodies.exchanges, bodies.bodyBytes, bodies.work.Reading = 1, 128<<10, time.Millisecond
	quota := inline(quotaCut, kept, 0)
	quota.step = func(_ context.Context, r *rig) error { return r.group.limit(0.1) }
	quota.undo = func(_ context.Context, r *rig) error { return r.group.limit(0) }
	stopped := inline(standstill, kept, 0)
	stopped.step = func(_ context.Context, r *rig) error {
		if err := r.node.signal(unix.SIGSTOP); err != nil {
			return err
		}
		time.Sleep(300 * time.Millisecond)
		return r.node.signal(unix.SIGCONT)
	}
	analysis := inline("CPU of analysis ×2", kept, 2)
	analysis.work = work{Analysis: 125 * time.Microsecond}
	slow := inline(slowWorkers, kept, 0)
	slow.exchanges, slow.work, slow.demand = 1, work{Waiting: time.Millisecond}, 600 // of 1,900 at most, then of 200
	slow.step = func(ctx context.Context, r *rig) error {
		_, err := r.ask(ctx, nodeRequest{Op: opWork, Work: work{Waiting: 10 * slow.work.Waiting}})
		return err
	}
	slow.undo = func(ctx context.Context, r *rig) error {
		_, err := r.ask(ctx, nodeRequest{Op: opWork, Work: slow.work})
		return err
	}
	return []scenario{
		inline("inline CPU ×2", kept, 2), inline("inline CPU ×10", kept, 10), mixed2, mixed10,
		inline("new connections ×4", once, 4), bodies, quota, stopped, analysis, slow,
	}
}

// detected is how long after a step who saw it, in milliseconds; +Inf: not while it
// lasted.
type detected struct {
	scenario   string
	wanted     int       // steps
	capacities []float64 // exchanges a second; one for each step
	after      map[string][]float64

	disturbed int // steps that do not count, as something was late before
}

// detection is a node under load, with those that watch it.
type detection struct {
	bench   *bench
	rig     *rig
	watcher *process
	order   []string // of series
}

// detect makes every scenario's step so many times, or as often as there is time,
// alike for all.
func (b *bench) detect(ctx context.Context, all []scenario, rounds int, until time.Time) (_ []detected, err error) {
	r, err := b.startNode(ctx, nodeConfig{}, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close(b)) }()
	outside := []string{sockstat.EBPF, sockstat.Pinned, sockstat.InetDiag}
	d := &detection{bench: b, rig: r, order: append(outside, seriesWatch, sockstat.InProcess, seriesLevel, seriesKernel, seriesQueue, seriesLag)}
	d.watcher, err = startProcess(ctx, roleWatcher, watcherConfig{Cgroup: r.group.dir, Pin: b.pin, Backends: outside}, b.cpus.sender(), nil, b.progress)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.watcher.stop()) }()
	if _, err := r.ask(ctx, nodeRequest{Op: opWatch}); err != nil {
		return nil, err
	}
	var out []detected
	for i, s := range all {
		left := time.Until(until) / time.Duration(len(all)-i)
		got, err := d.run(ctx, s, rounds, time.Now().Add(left))
		if err != nil {
			return out, fmt.Errorf("%s: %w", s.name, err)
		}
		out = append(out, got)
	}
	return out, nil
}

func (d *detection) run(ctx context.Context, s scenario, rounds int, until time.Time) (_ detected, err error) {
	out := detected{scenario: s.name, wanted: rounds, after: map[string][]float64{}}
	sender := newSender(s.way, exchanges(s.exchanges, s.bodyBytes), s.underWay)
	defer sender.close()
	sending, stop := context.WithCancel(ctx)
	sent := make(chan error, 1)
	go func() { sent <- sender.run(sending) }()
	defer func() {
		stop()
		err = errors.Join(err, <-sent)
	}()
	for len(out.capacities) < rounds && (len(out.capacities) == 0 || time.Now().Before(until)) {
		demand, capacity := s.demand, 0.0
		if demand == 0 {
			capacity, err = d.capacity(ctx, s.work, sender) // each time: the machine's speed changes
			if err != nil {
				return out, err
			}
			demand = usual * capacity
		}
		if _, err := d.rig.ask(ctx, nodeRequest{Op: opWork, Work: s.work}); err != nil {
			return out, err
		}
		before, after := rate(demand, s.exchanges), rate(demand, s.exchanges)
		if s.times > 0 {
			after = rate(s.times*capacity, s.exchanges)
		}
		sender.rate.Store(before)
		var seen map[string]float64
		if err = d.settle(ctx); err == nil {
			seen, err = d.step(ctx, s, sender, before, after)
		}
		if errors.Is(err, errBusy) {
			if out.disturbed++; out.disturbed > 4*rounds {
				break // what there is must do
			}
			continue
		}
		if err != nil {
			return out, err
		}
		out.capacities = append(out.capacities, capacity)
		for _, name := range d.order {
			out.after[name] = append(out.after[name], seen[name])
		}
		fmt.Fprintf(d.bench.progress, "%s, %.0f/s: %s\n", s.name, capacity, inOrder(d.order, seen))
	}
	return out, nil
}

// rate is in batches a second.
func rate(demand float64, exchanges int) int64 { return int64(demand / float64(exchanges)) }

func inOrder(order []string, seen map[string]float64) string {
	out := ""
	for _, name := range order {
		out += fmt.Sprintf("%s %.0f ", name, seen[name])
	}
	return out
}

// capacity is what the node takes in a second, at most, with all its work done while
// reading: else it would read more than it can analyse. Analysis, which is nothing
// then, must not be what is counted: where all want to read, it gets a turn each 400 ms.
// So would whoever asks: that is done before and after.
func (d *detection) capacity(ctx context.Context, w work, s *sender) (float64, error) {
	s.rate.Store(0)
	if _, err := d.rig.ask(ctx, nodeRequest{Op: opWork, Work: work{Reading: w.Reading + w.Analysis}}); err != nil {
		return 0, err
	}
	if err := s.saturate(200 * time.Millisecond); err != nil { // connections are opened
		return 0, err
	}
	before, err := d.rig.ask(ctx, nodeRequest{Op: opCount})
	from := now()
	saturated := s.saturate(400 * time.Millisecond)
	elapsed := time.Duration(now() - from)
	after, err2 := d.rig.ask(ctx, nodeRequest{Op: opCount})
	if err := errors.Join(err, err2, saturated); err != nil {
		return 0, err
	}
	return float64(after.Received-before.Received) / elapsed.Seconds(), nil
}

// settle waits until nothing has been late for a while.
func (d *detection) settle(ctx context.Context) error {
	since, asked := now(), now()
	for until := asked + int64(calmWithin); asked-since < int64(calm); {
		if asked > until {
			return errBusy
		}
		time.Sleep(20 * time.Millisecond)
		asked = now() // a node that is late answers late
		got, err := d.take(ctx)
		if err != nil {
			return err
		}
		for _, series := range got {
			for _, r := range series {
				if r.Delay >= late {
					since = max(since, r.At)
				}
			}
		}
	}
	return ctx.Err()
}

// take gives all readings since the last time.
func (d *detection) take(ctx context.Context) (readings, error) {
	own, err := d.rig.ask(ctx, nodeRequest{Op: opTake})
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	var outside nodeAnswer
	if err := d.watcher.ask(ctx, nodeRequest{Op: opTake}, &outside); err != nil {
		return nil, fmt.Errorf("watcher: %w", err)
	}
	all := readings{}
	for name, series := range outside.Readings {
		all[name] = series
	}
	for name, series := range own.Readings {
		all[name] = series
	}
	return all, nil
}

// step makes a step, at any time of the samplers' periods, takes it back after a
// while, and tells who saw it when.
func (d *detection) step(ctx context.Context, s scenario, sender *sender, before, after int64) (map[string]float64, error) {
	time.Sleep(rand.N(2 * sampleEvery))
	at := now()
	sender.rate.Store(after)
	var err error
	if s.step != nil {
		err = s.step(ctx, d.rig)
	}
	time.Sleep(hold - time.Duration(now()-at))
	end := now()
	sender.rate.Store(before)
	if s.undo != nil {
		err = errors.Join(err, s.undo(ctx, d.rig))
	}
	if err != nil {
		return nil, err
	}
	got, err := d.take(ctx)
	if err != nil {
		return nil, err
	}
	seen := map[string]float64{}
	for _, name := range d.order {
		ms, disturbed := first(got[name], at, end)
		// Only an age is of the past: a queue's delay is also what is to come.
		if disturbed && (ms < 0 || name == seriesKernel || slices.Contains(sockstat.Backends(), name)) {
			return nil, errBusy
		}
		seen[name] = ms
	}
	return seen, nil
}

// errBusy says that something is late without a step.
var errBusy = errors.New("something is late before the step")

// slack is how long bytes may have waited at the time of the step.
const slack = 5 * time.Millisecond

// first is how long after at, in milliseconds, a reading was late; +Inf: none was,
// by end. It may have been disturbed: what it tells of began before at.
func first(series []reading, at, end int64) (ms float64, disturbed bool) {
	for _, r := range series {
		if r.Delay < late || r.At > end {
			continue
		}
		since := time.Duration(r.At - at)
		return since.Seconds() * 1e3, r.Delay > since+slack
	}
	return math.Inf(1), false
}

// capacity is the median of those measured.
func (d detected) capacity() float64 { return result.Over(d.capacities).Mid }

// median is over the rounds of who saw it.
func (d detected) median(series string) float64 { return result.Over(d.after[series]).Mid }

// times is in how many rounds who saw it.
func (d detected) times(series string) (n int) {
	for _, ms := range d.after[series] {
		if !math.IsInf(ms, 1) {
			n++
		}
	}
	return n
}
