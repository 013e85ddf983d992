package sink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/periscope-mesh/periscope/mirror/event"
)

const maxBatchBytes = 8 << 20

// Events takes the plugin's batches, over HTTP/2 in plain text as a node does,
// and decodes every event.
type Events struct {
	ln   net.Listener
	open atomic.Int64
	// Batches' buffers are used again: collecting garbage would take the
	// generator's CPU.
	buffers sync.Pool

	mu       sync.Mutex
	events   uint64
	rejected uint64
	fault    error
	counters map[string]uint64 // the highest value seen of each
}

// ListenEvents makes one on a free port.
func ListenEvents() (*Events, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for events: %w", err)
	}
	return &Events{ln: ln, counters: map[string]uint64{}, buffers: sync.Pool{New: func() any { return new(bytes.Buffer) }}}, nil
}

// Port is where it listens.
func (e *Events) Port() int { return e.ln.Addr().(*net.TCPAddr).Port }

// Copies is the number of events that arrived and could be decoded.
func (e *Events) Copies() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.events
}

// Expected is the number of events that the plugin says it has made.
func (e *Events) Expected() (uint64, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.counters[event.CounterMirrored], true
}

// Open is the number of batches that have begun and are not answered.
func (e *Events) Open() int64 { return e.open.Load() }

// Fault says what the plugin did wrong, if anything.
func (e *Events) Fault() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.rejected > 0:
		return fmt.Errorf("%d events or batches could not be decoded: %w", e.rejected, e.fault)
	case e.counters[event.CounterErrors] > 0:
		return fmt.Errorf("the plugin counts %d errors of its own", e.counters[event.CounterErrors])
	}
	return nil
}

// Run serves until ctx ends.
func (e *Events) Run(ctx context.Context) error { return serveHTTP2(ctx, e.ln, e) }

// serveHTTP2 serves HTTP/2 in plain text, as a node does, until ctx ends.
func serveHTTP2(ctx context.Context, ln net.Listener, h http.Handler) error {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: h, Protocols: protocols}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve events: %w", err)
	}
	return nil
}

func (e *Events) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.open.Add(1)
	defer e.open.Add(-1)
	if r.URL.Path == event.LogPath { // Envoy's access log, by gRPC: not what is counted here
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Grpc-Status", "0")
		return
	}
	buf := e.buffers.Get().(*bytes.Buffer)
	defer e.buffers.Put(buf)
	buf.Reset()
	if r.ContentLength > 0 && r.ContentLength <= maxBatchBytes {
		buf.Grow(int(r.ContentLength) + bytes.MinRead)
	}
	if _, err := io.Copy(buf, io.LimitReader(r.Body, maxBatchBytes)); err != nil {
		e.reject(fmt.Errorf("read batch: %w", err))
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	b, err := event.Decode(buf.Bytes(), event.DefaultLimits())
	if err != nil {
		e.reject(err)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	for _, rej := range b.Rejected {
		e.reject(rej.Err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.events += uint64(len(b.Events))
	for k, v := range b.Header.Counters {
		e.counters[k] = max(e.counters[k], v)
	}
}

func (e *Events) reject(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rejected++
	if e.fault == nil {
		e.fault = err
	}
}
