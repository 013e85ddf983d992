package store

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/node/attack"
)

const (
	flushHits     = 500
	flushAfter    = 100 * time.Millisecond
	defaultQueue  = 4096
	maxQueueBytes = 64 << 20
	drainFor      = 5 * time.Second // at shutdown
	maxLogLines   = 100             // attacks logged per append
	maxLogPath    = 200
)

// Reasons of dropped hits.
const (
	dropFull     = "queue_full"
	dropError    = "error"
	dropShutdown = "shutdown"
)

// Appender is what a Writer writes to: a Store.
type Appender interface {
	Append(context.Context, []attack.Hit) ([]Registered, error)
}

// WriterConfig is what NewWriter needs.
type WriterConfig struct {
	Store      Appender
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	MaxHits    int // of the queue; default 4096
}

// Writer takes hits from detection, which must not wait for a disk, and
// appends them in batches: 500 hits, or whatever came within 100 ms.
//
// Its queue holds at most MaxHits hits and 64 MiB of their text and bodies.
// When it is full, the newest hits are dropped and counted.
type Writer struct {
	store   Appender
	log     *slog.Logger
	metrics *writerMetrics
	maxHits int
	wake    chan struct{} // the queue is no longer empty
	full    chan struct{} // a whole batch waits

	mu     sync.Mutex
	queue  []attack.Hit
	bytes  int
	closed bool
}

// NewWriter makes a Writer; Run sets it going.
func NewWriter(cfg WriterConfig) (*Writer, error) {
	if cfg.Store == nil || cfg.Logger == nil || cfg.Registerer == nil || cfg.MaxHits < 0 {
		return nil, errors.New("store writer: store, logger and registerer are required, and MaxHits is not negative")
	}
	if cfg.MaxHits == 0 {
		cfg.MaxHits = defaultQueue
	}
	m, err := newWriterMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	return &Writer{
		store: cfg.Store, log: cfg.Logger.With("component", "store"), metrics: m, maxHits: cfg.MaxHits,
		wake: make(chan struct{}, 1), full: make(chan struct{}, 1),
	}, nil
}

// Put queues hits, never waiting. Those that do not fit are dropped and
// counted. The hits' bytes must not be changed afterwards.
func (w *Writer) Put(hits ...attack.Hit) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		w.metrics.dropped.WithLabelValues(dropShutdown).Add(float64(len(hits)))
		return
	}
	wasEmpty := len(w.queue) == 0
	for i := range hits {
		size := sizeOf(&hits[i])
		if len(w.queue) >= w.maxHits || w.bytes+size > maxQueueBytes {
			w.metrics.dropped.WithLabelValues(dropFull).Inc()
			continue
		}
		w.queue = append(w.queue, hits[i])
		w.bytes += size
	}
	w.metrics.queued.Set(float64(len(w.queue)))
	if wasEmpty && len(w.queue) > 0 {
		signal(w.wake)
	}
	if len(w.queue) >= flushHits {
		signal(w.full)
	}
}

// Run appends until ctx ends, then appends what is still queued, for at most
// five seconds.
func (w *Writer) Run(ctx context.Context) error {
	failing := false
	whole := context.WithoutCancel(ctx) // the end of ctx must not tear a batch
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-w.wake:
			w.gather(ctx)
			for ctx.Err() == nil && w.flush(whole, w.take(), &failing) >= flushHits {
			}
		}
	}
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	drain, cancel := context.WithTimeout(whole, drainFor)
	defer cancel()
	for w.flush(drain, w.take(), &failing) > 0 {
	}
	return nil
}

// gather waits until a batch is worth its commit.
func (w *Writer) gather(ctx context.Context) {
	timer := time.NewTimer(flushAfter)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-w.full:
	}
}

// take removes a batch from the queue.
func (w *Writer) take() []attack.Hit {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := min(len(w.queue), flushHits)
	hits := w.queue[:n:n]
	w.queue = append([]attack.Hit(nil), w.queue[n:]...) // the batch's memory can go once it is written
	for i := range hits {
		w.bytes -= sizeOf(&hits[i])
	}
	w.metrics.queued.Set(float64(len(w.queue)))
	// Signals always say what the queue is like now.
	unsignal(w.wake)
	if len(w.queue) > 0 {
		signal(w.wake)
	}
	if len(w.queue) < flushHits {
		unsignal(w.full)
	}
	return hits
}

// flush appends a batch and returns its size. A batch that cannot be appended
// is dropped: kept, it would block all that follow. The log has one line when
// this begins and one when it ends.
func (w *Writer) flush(ctx context.Context, hits []attack.Hit, failing *bool) int {
	if len(hits) == 0 {
		return 0
	}
	touched, err := w.store.Append(ctx, hits)
	if err != nil {
		reason := dropError
		if ctx.Err() != nil {
			reason = dropShutdown
		}
		w.metrics.dropped.WithLabelValues(reason).Add(float64(len(hits)))
		if !*failing {
			w.log.Error("hits lost", "error", err, "hits", len(hits))
		}
		*failing = true
		return len(hits)
	}
	if *failing {
		w.log.Info("hits are stored again")
	}
	*failing = false
	w.report(touched)
	return len(hits)
}

// report logs each new attack, and beyond a flood's hundred only how many.
func (w *Writer) report(touched []Registered) {
	lines, more := 0, 0
	for i := range touched {
		if !touched[i].New {
			continue
		}
		if lines == maxLogLines {
			more++
			continue
		}
		lines++
		a := &touched[i].Attack
		w.log.Info("attack registered", "attack", a.ID, "type", string(a.Type), "severity", a.Severity.String(), "gateway", clean(a.Gateway),
			"method", clean(a.Method), "path", clean(a.Path), "client", clean(a.Client), "rules", a.RuleIDs)
	}
	if more > 0 {
		w.log.Info("more attacks registered", "attacks", more)
	}
}

// clean makes a text from traffic safe for any terminal or log viewer.
func clean(s string) string {
	out := strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, cut(s, maxLogPath))
	if len(s) > maxLogPath {
		out += "…"
	}
	return out
}

// sizeOf is roughly the memory that a queued hit holds.
func sizeOf(h *attack.Hit) int {
	n := 512 + len(h.Exchange.Path)
	for _, m := range []*attack.Message{&h.Exchange.Request, &h.Exchange.Response} {
		n += len(m.Body)
		for _, f := range m.Headers {
			n += 32 + len(f.Name) + len(f.Value)
		}
	}
	for i := range h.Matches {
		n += 160 + len(h.Matches[i].Value) + len(h.Matches[i].Message) + 16*len(h.Matches[i].Tags)
	}
	return n
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // already signalled
	}
}

func unsignal(c chan struct{}) {
	select {
	case <-c:
	default:
	}
}
