package main

import (
	"context"
	"log/slog"
	"runtime"
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

// analysis takes exchanges off the ring, inspects them and hands hits to the
// store's writer.
type analysis struct {
	ring     *ingest.Ring
	policies *nodepolicy.Client
	engine   *detect.Engine
	writer   *store.Writer
	logger   *slog.Logger
	delay    prometheus.Histogram
	analysed atomic.Uint64 // exchanges
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
			for {
				x, ok := a.ring.Pop(ctx)
				if !ok {
					return nil
				}
				a.inspect(x)
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
	defer a.analysed.Add(1)
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
