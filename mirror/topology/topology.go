// Package topology finds, in a Kubernetes API, the gateway workloads that
// policies can be attached to: it resolves the Gateways of Istio and of the
// Gateway API to pods and the labels that pick them, and node services to the
// addresses of their ready endpoints.
//
// It never writes to the API, never guesses (a Gateway that leads to no
// workload is a Problem with its reason), and never tells of a topology before
// it has seen every source whole: what is missing from it, mirroring stops for.
//
// cmd/periscope may import it; it imports mirror and policy.
package topology

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"

	"github.com/periscope-mesh/periscope/mirror"
)

const (
	// quiet is how long nothing may change before a change is taken, and
	// maxHold how long that is waited for: a roll-out touches many pods.
	quiet   = 50 * time.Millisecond
	maxHold = 500 * time.Millisecond

	defaultRediscover  = 10 * time.Second
	defaultSyncTimeout = 30 * time.Second

	maxNodeServices = 256
)

// Config is what New needs.
type Config struct {
	REST    *rest.Config // of the API server
	Clients *Clients     // to use instead of making them of REST
	// NodeServices is what SetNodeServices would set.
	NodeServices []ServiceRef
	// ScopeToNamespace is istiod's PILOT_SCOPE_GATEWAY_TO_NAMESPACE.
	ScopeToNamespace bool
	Logger           *slog.Logger
	Registerer       prometheus.Registerer

	// Rediscover is how often the API is asked whether a kind that it lacks
	// (or had) is there; default 10 s.
	Rediscover time.Duration
	// SyncTimeout bounds Load; default 30 s.
	SyncTimeout time.Duration
}

// Result is a topology and what could not be resolved. It is never changed.
type Result struct {
	Topology mirror.Topology
	Problems []Problem
}

// Watcher follows one Kubernetes API. Load and Run are not for use at the same
// time; SetNodeServices may be called at any.
type Watcher struct {
	clients     Clients
	scoped      bool
	log         *slog.Logger
	metrics     *metrics
	rediscover  time.Duration
	syncTimeout time.Duration

	nodes atomic.Pointer[[]ServiceRef]
	// nudge says that something changed. It holds one: more would say no more.
	nudge chan struct{}

	last *Result // what the caller knows; nil before Load

	mu         sync.Mutex        // guards complaints
	complaints map[string]string // what went wrong lately, by source
}

// New makes a Watcher, which asks nothing yet.
func New(c Config) (*Watcher, error) {
	if c.Logger == nil || c.Registerer == nil {
		return nil, errors.New("make topology watcher: a logger and a registerer are needed")
	}
	if c.Clients == nil {
		if c.REST == nil {
			return nil, errors.New("make topology watcher: no API server is given")
		}
		clients, err := newClients(c.REST)
		if err != nil {
			return nil, fmt.Errorf("make topology watcher: %w", err)
		}
		c.Clients = clients
	}
	m, err := newMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("make topology watcher: %w", err)
	}
	w := &Watcher{
		clients:     *c.Clients,
		scoped:      c.ScopeToNamespace,
		log:         c.Logger.With("component", "topology"),
		metrics:     m,
		rediscover:  defaultRediscover,
		syncTimeout: defaultSyncTimeout,
		nudge:       make(chan struct{}, 1),
		complaints:  map[string]string{},
	}
	if c.Rediscover > 0 {
		w.rediscover = c.Rediscover
	}
	if c.SyncTimeout > 0 {
		w.syncTimeout = c.SyncTimeout
	}
	w.SetNodeServices(c.NodeServices)
	return w, nil
}

// SetNodeServices says which services' endpoints are wanted: those that
// policies name, of which the first 256 count.
func (w *Watcher) SetNodeServices(refs []ServiceRef) {
	refs = slices.DeleteFunc(sortedRefs(refs), func(r ServiceRef) bool {
		return len(validation.IsDNS1123Label(r.Name)) > 0 // no Service has such a name
	})
	if len(refs) > maxNodeServices {
		w.complain("node_services", fmt.Errorf("%d node services are named; those beyond the first %d are left out", len(refs), maxNodeServices))
		refs = refs[:maxNodeServices]
	}
	w.nodes.Store(&refs)
	w.wake()
}

func (w *Watcher) wake() {
	select {
	case w.nudge <- struct{}{}:
	default:
	}
}

// Load gives the topology as it is now. It waits until every source is known
// whole, and fails when that takes longer than Config.SyncTimeout.
func (w *Watcher) Load(ctx context.Context) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, w.syncTimeout)
	defer cancel()
	s := w.newSources()
	defer s.stop()
	tick := time.NewTicker(quiet)
	defer tick.Stop()
	for {
		s.adjust(ctx, *w.nodes.Load())
		if s.complete() {
			r := w.resolve(s)
			if s.adjustMachines(ctx, r.Topology.Gateways) {
				w.last = &r
				return r, nil
			}
		}
		select {
		case <-ctx.Done():
			return Result{}, fmt.Errorf("load topology: %w: waiting for %s", context.Cause(ctx), cmp.Or(s.missing(), s.named(sourceMachines)))
		case <-tick.C:
		}
	}
}

// Run follows the API until the context ends, and then returns nil. It calls
// changed, from one goroutine, with each result that differs from the one
// before, the one of Load included. While changed runs, changes gather.
//
// When the API can't be reached, what was seen last stands.
func (w *Watcher) Run(ctx context.Context, changed func(Result)) error {
	s := w.newSources()
	defer s.stop()
	ctx, cancel := context.WithCancel(ctx) // before stop: informers end by it
	defer cancel()
	tick := time.NewTicker(w.rediscover)
	defer tick.Stop()
	settle := time.NewTimer(0)
	defer settle.Stop()
	var since time.Time // when the change that is waited for began
	pause, located := quiet, false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.nudge:
			now := time.Now()
			if since.IsZero() {
				since = now
			}
			settle.Reset(max(0, min(pause, max(maxHold, pause)-now.Sub(since))))
		case <-tick.C:
			s.probe()
			settle.Reset(0)
		case <-settle.C:
			since = time.Time{}
			s.adjust(ctx, *w.nodes.Load())
			if !s.complete() || s.next != nil {
				settle.Reset(quiet)
			}
			if !s.complete() {
				continue
			}
			start := time.Now()
			r := w.resolve(s)
			// The machines of gateways that come later are not waited for.
			if known := s.adjustMachines(ctx, r.Topology.Gateways); !known {
				settle.Reset(quiet)
				if !located {
					continue
				}
			}
			located = true
			// In a huge cluster something always changes: take a tenth of a core at most.
			pause = max(quiet, 10*time.Since(start))
			if w.last == nil || !reflect.DeepEqual(r, *w.last) {
				w.last = &r
				w.metrics.changes.Inc()
				changed(r)
			}
		}
	}
}

func (w *Watcher) resolve(s *sources) Result {
	in := s.inputs()
	in.NodeServices, in.ScopeToNamespace = *w.nodes.Load(), w.scoped
	start := time.Now()
	t, problems := Resolve(in)
	w.metrics.resolved(len(t.Gateways), len(problems), time.Since(start))
	return Result{Topology: t, Problems: problems}
}

// complain logs what goes wrong with a source unless it did so last time.
func (w *Watcher) complain(source string, err error) {
	text := ""
	if err != nil {
		text = clip(err.Error(), maxReason)
	}
	w.mu.Lock()
	known := w.complaints[source] == text
	w.complaints[source] = text
	w.mu.Unlock()
	if text != "" && !known {
		w.log.Warn("topology source impaired", "source", source, "error", text)
	}
}

func (w *Watcher) complaint(source string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.complaints[source]
}
