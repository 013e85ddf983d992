package ingest

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// Exchange is a decoded exchange on its way to analysis.
type Exchange struct {
	Event    *event.Event
	Header   *event.Header // of the batch it came in
	Gateway  string        // authenticated identity
	Received time.Time
	batch    *batch
}

// Done gives the exchange's share of memory back. Call it once, when neither
// the event nor anything that aliases it is needed any more.
func (x Exchange) Done() {
	if x.batch != nil && x.batch.left.Add(-1) == 0 {
		x.batch.ring.release(x.batch.bytes)
	}
}

// batch accounts for the buffer that its events alias: it is freed with the
// last of them.
type batch struct {
	ring  *Ring
	bytes int64
	left  atomic.Int64
}

// Ring is the queue between ingest and analysis. It holds at most a number of
// exchanges and of bytes (of whole batches, as their events alias one buffer).
// When it is full the newest are dropped: Push says how many, the caller
// counts them. Nothing ever waits to push.
type Ring struct {
	queue    chan Exchange
	maxBytes int64

	priority, overflown atomic.Uint64

	mu    sync.Mutex
	bytes int64
	head  time.Time // the oldest waiting exchange was received then or later
}

// NewRing makes a ring for so many exchanges and bytes.
func NewRing(exchanges int, bytes int64) *Ring {
	return &Ring{queue: make(chan Exchange, exchanges), maxBytes: bytes}
}

// Push takes a decoded batch whose buffer has size bytes. It keeps as many of
// its events as there is room for, from the first on.
func (r *Ring) Push(b *event.Batch, gateway string, received time.Time, size int) (accepted, dropped int) {
	if len(b.Events) == 0 {
		return 0, 0
	}
	for i := range b.Events {
		if b.Events[i].Class != "" {
			r.priority.Add(1)
		}
	}
	defer func() { r.overflown.Add(uint64(dropped)) }()
	if !r.reserve(int64(size)) {
		return 0, len(b.Events)
	}
	// The extra count keeps the batch alive until all are pushed.
	owner := &batch{ring: r, bytes: int64(size)}
	owner.left.Store(int64(len(b.Events)) + 1)
	defer Exchange{batch: owner}.Done()
	if len(r.queue) == 0 {
		r.passed(received)
	}
	for i := range b.Events {
		select {
		case r.queue <- Exchange{Event: &b.Events[i], Header: &b.Header, Gateway: gateway, Received: received, batch: owner}:
			accepted++
		default:
			owner.left.Add(-1)
			dropped++
		}
	}
	return accepted, dropped
}

// Pop waits for the next exchange, or for the context's end.
func (r *Ring) Pop(ctx context.Context) (Exchange, bool) {
	select {
	case x := <-r.queue:
		r.passed(x.Received)
		return x, true
	case <-ctx.Done():
		return Exchange{}, false
	}
}

// passed moves the head on to what was received at t.
func (r *Ring) passed(t time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t.After(r.head) {
		r.head = t
	}
}

// Age is how long the oldest exchange has been waiting, at most: the time since the
// receipt of the one taken last, or of the first after the ring was empty.
func (r *Ring) Age(now time.Time) time.Duration {
	if len(r.queue) == 0 {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(0, now.Sub(r.head))
}

// Len is the number of exchanges waiting.
func (r *Ring) Len() int { return len(r.queue) }

// Priority counts the exchanges of a class that sampling spares that came, also
// those that found no room.
func (r *Ring) Priority() uint64 { return r.priority.Load() }

// Overflown counts the exchanges that found no room.
func (r *Ring) Overflown() uint64 { return r.overflown.Load() }

// Bytes is the memory held by exchanges waiting or being analysed.
func (r *Ring) Bytes() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.bytes
}

func (r *Ring) reserve(n int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bytes+n > r.maxBytes {
		return false
	}
	r.bytes += n
	return true
}

func (r *Ring) release(n int64) {
	r.mu.Lock()
	r.bytes -= n
	r.mu.Unlock()
}
