package main

import (
	"context"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/detect"
	"github.com/periscope-mesh/periscope/node/ingest"
	nodepolicy "github.com/periscope-mesh/periscope/node/policy"
	"github.com/periscope-mesh/periscope/node/store"
)

// analysisNice is the scheduling priority of analysis: users' traffic on the
// same cores goes first (nice(2); 0 is ordinary, 19 the least).
const analysisNice = 10

// A worker leaves CPU time to who reads while bytes in the node's sockets are older
// than yieldAt, before each exchange for as long as the last one took: what waits
// there is of any class, holds calls open at gateways, which may have 64, and is
// lost beyond.
const (
	yieldAt   = 10 * time.Millisecond
	yieldFor  = 50 * time.Millisecond // at most
	yieldStep = 2 * time.Millisecond
)

// analysis takes exchanges off the ring, inspects them and hands hits to the
// store's writer.
type analysis struct {
	ring     *ingest.Ring
	policies *nodepolicy.Client
	engine   *detect.Engine
	writer   *store.Writer
	trace    *trace // nil: none
	logger   *slog.Logger
	delay    prometheus.Histogram
	analysed atomic.Uint64        // exchanges
	pace     time.Duration        // of a worker for an exchange, at least
	kernel   func() time.Duration // age of the oldest bytes in a socket, as last sampled
	work     occupancy
}

// occupancy is how long workers have been at work, summed up.
type occupancy struct {
	mu    sync.Mutex
	total time.Duration
	now   int // workers that are at work
	at    time.Time
}

// change counts workers who begin, or end.
func (o *occupancy) change(workers int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.read()
	o.now += workers
}

func (o *occupancy) worked() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.read()
}

func (o *occupancy) read() time.Duration {
	now := time.Now()
	o.total += time.Duration(o.now) * now.Sub(o.at)
	o.at = now
	return o.total
}

func newAnalysis(a *analysis, reg prometheus.Registerer) *analysis {
	a.delay = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "periscope_analysis_queue_seconds",
		Help:    "Time from the receipt of an exchange to its analysis.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 8),
	})
	reg.MustRegister(a.delay)
	return a
}

// run works with so many threads until the context ends.
func (a *analysis) run(ctx context.Context, workers int) error {
	group, ctx := errgroup.WithContext(ctx)
	for range workers {
		group.Go(func() error {
			a.lowerPriority()
			var took time.Duration
			for {
				x, ok := a.ring.Pop(ctx)
				if !ok {
					return nil
				}
				a.work.change(1)
				for waited := time.Duration(0); waited < min(took, yieldFor) && a.kernel() > yieldAt; waited += yieldStep {
					time.Sleep(yieldStep)
				}
				start := time.Now()
				a.inspect(x)
				time.Sleep(a.pace - time.Since(start))
				took = time.Since(start)
				a.work.change(-1)
			}
		})
	}
	return group.Wait()
}

// lowerPriority ties the worker to its own thread, whose priority it lowers
// (Linux keeps priorities by thread). The thread ends with the worker.
func (a *analysis) lowerPriority() {
	runtime.LockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, analysisNice); err != nil {
		a.logger.Warn("analysis runs at ordinary priority", "error", err)
	}
}

func (a *analysis) inspect(x ingest.Exchange) {
	defer x.Done()
	defer func() {
		a.analysed.Add(1)
		a.trace.analysed(x)
	}()
	a.delay.Observe(time.Since(x.Received).Seconds())
	p := nodepolicy.Policy{Paranoia: 1}
	if x.Event.Flags&event.FlagLogOnly == 0 { // else it is of no policy
		p, _ = a.policies.Lookup(x.Header.PolicyRev, x.Event.Policy)
	}
	exclusions := make([]detect.Exclusion, len(p.Exclusions))
	for i, e := range p.Exclusions {
		exclusions[i] = detect.Exclusion(e)
	}
	result, err := a.engine.Inspect(&detect.Input{
		Event:    x.Event,
		Gateway:  x.Gateway,
		VM:       x.Header.VM,
		Received: x.Received,
		Policy: detect.Policy{ID: x.Event.Policy, Rev: x.Header.PolicyRev, Tenant: p.Tenant, Application: p.Application,
			Paranoia: p.Paranoia, Exclusions: exclusions},
	})
	if err != nil {
		// Counted by the engine; what it is about may be an attacker's doing, so
		// it does not fill the log.
		a.logger.Debug("exchange not inspected", "gateway", x.Gateway, "error", err)
		return
	}
	a.writer.Put(result.Hits...)
}
