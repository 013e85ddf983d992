package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	mirrorload "github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/overload"
	"github.com/periscope-mesh/periscope/xds/orca"
)

// settling is left to a node that has got its quota.
const settling = 1500 * time.Millisecond

// record is what was seen of a run. Times are since its start, when the first
// requests were due.
type record struct {
	lengths  lengths
	start    time.Time
	demands  []demand // by gateway
	fates    []fate
	pushes   []pushed
	effects  []time.Duration // from a push to the first batch made under it
	reports  []report
	users    [phases]load.Result
	counters [2]counters // at the step's two ends
	idle     float64     // part of the machine's CPU time that nobody used during the step
	readings []reading   // of the machine's speed
}

// pushed are shares that a control decided, by gateway.
type pushed struct {
	At     time.Duration
	Shares []overload.Shares
	State  *share.State // what the control knew then, if it says so
}

// report is one of the node's, without demand.
type report struct {
	At     time.Duration
	Report mirrorload.Report
}

// counters of all gateways' Envoys.
type counters struct {
	mirrored int64 // events that the plugin made
	overflow int64 // batches dropped by the mirror cluster's breakers
	failed   int64 // batches that the node did not answer in time, or at all
	errors   int64 // of the plugin
}

// play runs a step of demand under a control.
func (w *world) play(ctx context.Context, s scenario, l lengths, capacity float64, round int, c overload.Control, guard bool) (_ *record, err error) {
	r := &record{lengths: l, demands: s.demands(l, capacity, round)}
	gateways := w.gateways[:s.gateways]
	limit := c.Limit()
	for _, g := range w.gateways {
		if err := w.put(g, nil, limit); err != nil {
			return nil, err
		}
	}
	if err := w.settled(ctx); err != nil {
		return nil, err
	}
	n, err := w.startNode(ctx, guard)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, w.group.Quota(0)) // what is queued would take long
		n.stop()
		if err == nil {
			r.fates, err = fates(n.trace())
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	parts, ctx := errgroup.WithContext(ctx)
	err = func() error {
		defer cancel()
		loop, err := w.control(c, gateways, limit)
		if err != nil {
			return err
		}
		parts.Go(func() error { return loop.watcher.Run(ctx) })
		if err := loop.warmUp(ctx, w); err != nil {
			return err
		}
		if err := w.group.Quota(w.quota); err != nil {
			return err
		}
		if err := pause(ctx, settling); err != nil {
			return err
		}
		r.start = time.Now()
		parts.Go(func() error { return loop.run(ctx) })
		parts.Go(func() (err error) {
			r.readings, err = w.gauge.run(ctx, r.start)
			return err
		})
		err = w.drive(ctx, r, gateways)
		loop.mu.Lock()
		defer loop.mu.Unlock()
		r.pushes, r.effects, r.reports = since(loop, r.start)
		return err
	}()
	if failed := parts.Wait(); failed != nil {
		return nil, failed
	}
	return r, err
}

// drive sends the requests, and waits for the end of all phases.
func (w *world) drive(ctx context.Context, r *record, gateways []*gateway) error {
	var mu sync.Mutex
	users, ctx := errgroup.WithContext(ctx)
	for i, g := range gateways {
		for _, of := range []struct {
			client  *load.Client
			request load.Request
			due     [phases][]time.Duration
		}{{g.routine, routineRequest(), r.demands[i].routine}, {g.priority, priorityRequest(), r.demands[i].priority}} {
			users.Go(func() error {
				for phase, due := range of.due {
					shifted := make([]time.Duration, len(due))
					late := time.Since(r.start)
					for j := range due {
						shifted[j] = due[j] - late
					}
					res, err := of.client.Paced(ctx, of.request, shifted)
					if err != nil {
						return err
					}
					mu.Lock()
					add(&r.users[phase], res)
					mu.Unlock()
				}
				return nil
			})
		}
	}
	users.Go(func() error { return w.look(ctx, r, gateways) })
	return users.Wait()
}

// look reads counters at the step's two ends, and stays until the run's.
func (w *world) look(ctx context.Context, r *record, gateways []*gateway) error {
	var cpu [2]cpuTimes
	for i, at := range []time.Duration{r.lengths.from(), r.lengths.to()} {
		err := pause(ctx, at-time.Since(r.start))
		if err == nil {
			cpu[i], err = readCPU()
		}
		if err == nil {
			r.counters[i], err = count(ctx, gateways)
		}
		if err != nil {
			return err
		}
	}
	r.idle = cpu[1].idleSince(cpu[0])
	return pause(ctx, r.lengths.end()-time.Since(r.start))
}

func add(to *load.Result, r load.Result) {
	to.Requests += r.Requests
	to.Errors += r.Errors
	if to.FirstError == nil {
		to.FirstError = r.FirstError
	}
	to.Latencies = append(to.Latencies, r.Latencies...)
}

// count sums Envoys' counters up.
func count(ctx context.Context, gateways []*gateway) (counters, error) {
	var c counters
	for _, g := range gateways {
		for filter, to := range map[string]*int64{
			`lua\.periscope\.mirrored$`:                                  &c.mirrored,
			`periscope_mirror\.upstream_(rq|cx)_(pending_)?overflow$`:    &c.overflow,
			`periscope_mirror\.upstream_rq_(timeout|rx_reset|tx_reset)$`: &c.failed,
			`lua.*errors$`: &c.errors,
		} {
			n, err := g.envoy.Sum(ctx, filter)
			if err != nil {
				return c, err
			}
			*to += n
		}
	}
	return c, nil
}

// pause waits, or gives the context's error.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(max(0, d))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// loop is a control at work, as cmd/periscope has its own:
//
//	orca.Watcher ─► Observe ─► Decide ─► xDS server
type loop struct {
	w        *world
	gateways []*gateway
	limit    int
	watcher  *orca.Watcher
	wake     chan struct{}

	mu      sync.Mutex
	c       overload.Control
	start   time.Time
	shares  []overload.Shares // in force
	pushes  []pushed
	sent    [][]revision // of each gateway
	latest  mirrorload.Report
	reports []report
	effects []time.Duration
}

// revision of shares that a gateway was served.
type revision struct {
	number uint32
	at     time.Time
	seen   bool
}

// control watches the node for a control.
func (w *world) control(c overload.Control, gateways []*gateway, limit int) (*loop, error) {
	l := &loop{w: w, gateways: gateways, limit: limit, wake: make(chan struct{}, 1), c: c, start: time.Now(), sent: make([][]revision, len(gateways))}
	l.shares = make([]overload.Shares, len(gateways))
	var err error
	l.watcher, err = orca.New(orca.Config{Deliver: l.take, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		return nil, err
	}
	l.watcher.SetNodes([]string{w.node.orca})
	return l, nil
}

func (l *loop) take(u orca.Update) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latest = *u.Report
	kept := *u.Report
	kept.Demands = nil
	l.reports = append(l.reports, report{u.Received.Sub(l.start), kept})
	l.effect(u)
	if l.c.Observe(u.Received.Sub(l.start), *u.Report) {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// effect looks for shares that a gateway is heard to go by for the first time.
func (l *loop) effect(u orca.Update) {
	for _, d := range u.Report.Demands {
		for i, g := range l.gateways {
			if d.Gateway != g.id || d.Share == 0 || d.ShareSince == 0 {
				continue
			}
			at := u.Received.Add(d.ShareSince - u.Report.Uptime)
			for j := len(l.sent[i]) - 1; j >= 0; j-- {
				if s := &l.sent[i][j]; s.number == d.Share && s.at.Before(at) {
					if !s.seen {
						s.seen = true
						l.effects = append(l.effects, at.Sub(s.at))
						l.c.Effect(s.at.Sub(l.start), at.Sub(l.start))
					}
					break
				}
			}
		}
	}
}

// warmUp sends requests until the node has analysed one of each gateway's.
func (l *loop) warmUp(ctx context.Context, w *world) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		for _, g := range l.gateways {
			for _, of := range []struct {
				client  *load.Client
				request load.Request
			}{{g.routine, routineRequest()}, {g.priority, priorityRequest()}} {
				if res, err := of.client.Paced(ctx, of.request, make([]time.Duration, 1)); err != nil || res.Errors > 0 {
					return errors.Join(err, res.FirstError)
				}
			}
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("not all gateways' traffic comes to the node: %w", err)
		}
		l.mu.Lock()
		heard := map[string]bool{}
		for _, d := range l.latest.Demands {
			heard[d.Gateway] = heard[d.Gateway] || d.Received > 0
		}
		l.mu.Unlock()
		if len(heard) == len(l.gateways) {
			return nil
		}
	}
}

// run decides, tick by tick, until the context ends.
func (l *loop) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-l.wake:
		case <-timer.C:
		}
		next, err := l.decide()
		if err != nil {
			return err
		}
		timer.Reset(time.Until(next))
	}
}

func (l *loop) decide() (next time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Since(l.start)
	all, at := l.c.Decide(now)
	next = l.start.Add(at)
	p := pushed{At: now}
	for i, s := range all {
		if s == l.shares[i] {
			continue
		}
		l.shares[i] = s
		p.Shares = l.shares
		shares := sharesOf(s)
		l.sent[i] = append(l.sent[i], revision{number: mirrorload.ShareNumber(shares.Revision), at: time.Now()})
		if err := l.w.put(l.gateways[i], shares, l.limit); err != nil {
			return next, err
		}
	}
	if p.Shares != nil {
		p.Shares = append([]overload.Shares(nil), p.Shares...)
	}
	if p.State = overload.State(l.c, now); p.State != nil || p.Shares != nil {
		l.pushes = append(l.pushes, p)
	}
	return next, nil
}

// since gives what a loop saw from a time on, and the shares before it.
func since(l *loop, start time.Time) (pushes []pushed, effects []time.Duration, reports []report) {
	shift := start.Sub(l.start)
	for _, p := range l.pushes {
		p.At -= shift
		pushes = append(pushes, p)
	}
	for _, r := range l.reports {
		r.At -= shift
		reports = append(reports, r)
	}
	return pushes, l.effects, reports
}
