package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/periscope-mesh/periscope/node/ingest"
)

// trace writes what became of each exchange, a line each, for benchmarks: times in
// µs since the epoch or of duration.
//
//	a TIME AGE WAIT CLASS   analysed: AGE since its batch was sent, by the gateway's clock, WAIT since it was read
//	d TIME CLASS            discarded by the guard
//
// CLASS is an always-class, or -. A nil trace writes nothing.
type trace struct {
	mu   sync.Mutex
	file *os.File
	w    *bufio.Writer
}

func openTrace(file string) (*trace, error) {
	if file == "" {
		return nil, nil
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--node-trace: %w", err)
	}
	return &trace{file: f, w: bufio.NewWriterSize(f, 1<<16)}, nil
}

func (t *trace) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Join(t.w.Flush(), t.file.Close())
}

func (t *trace) analysed(x ingest.Exchange) {
	if t == nil {
		return
	}
	now := time.Now()
	t.write("a %d %d %d %s\n", now.UnixMicro(), now.UnixMicro()-int64(x.Header.SentUS), now.Sub(x.Received).Microseconds(), cmp.Or(x.Event.Class, "-"))
}

func (t *trace) write(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, _ = fmt.Fprintf(t.w, format, args...) // close tells
}

// tracedGuard is a guard whose discards are traced.
type tracedGuard struct {
	ingest.Guard
	trace *trace
}

func (g tracedGuard) Discard(priority bool) (discard bool, weight float64) {
	discard, weight = g.Guard.Discard(priority)
	if discard {
		class := "-"
		if priority {
			class = "priority"
		}
		g.trace.write("d %d %s\n", time.Now().UnixMicro(), class)
	}
	return discard, weight
}
