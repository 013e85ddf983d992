package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/periscope-mesh/periscope/node/attack"
)

// fakeStore notes when which batches came; SQLite's threads cannot live in a
// synctest bubble.
type fakeStore struct {
	start time.Time
	err   error
	block chan struct{}

	mu      sync.Mutex // guards err and batches
	batches []string   // "milliseconds: hits"
}

func (f *fakeStore) Append(ctx context.Context, hits []attack.Hit) ([]Registered, error) {
	if f.block != nil {
		select {
		case <-f.block:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.batches = append(f.batches, fmt.Sprintf("%d: %d", time.Since(f.start).Milliseconds(), len(hits)))
	return nil, f.err
}

// run runs a writer for as long as do takes.
func run(t *testing.T, f *fakeStore, maxHits int, log *bytes.Buffer, do func(*Writer)) *Writer {
	t.Helper()
	f.start = time.Now()
	w, err := NewWriter(WriterConfig{Store: f, Logger: slog.New(slog.NewJSONHandler(log, nil)), Registerer: prometheus.NewRegistry(), MaxHits: maxHits})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	do(w)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return w
}

func put(w *Writer, n int) {
	hits := make([]attack.Hit, n)
	for i := range hits {
		hits[i] = hit(fmt.Sprint(i), 0)
	}
	w.Put(hits...)
}

func dropped(w *Writer, reason string) float64 {
	return testutil.ToFloat64(w.metrics.dropped.WithLabelValues(reason))
}

func TestWriterBatches(t *testing.T) {
	tests := map[string]struct {
		do   func(*Writer)
		want []string
	}{
		"nothing":       {func(*Writer) { time.Sleep(time.Second) }, nil},
		"one hit":       {func(w *Writer) { put(w, 1); time.Sleep(time.Second) }, []string{"100: 1"}},
		"full at once":  {func(w *Writer) { put(w, 500); time.Sleep(time.Second) }, []string{"0: 500"}},
		"more than one": {func(w *Writer) { put(w, 1100); time.Sleep(time.Second) }, []string{"0: 500", "0: 500", "0: 100"}},
		"two bursts": {func(w *Writer) {
			put(w, 3)
			time.Sleep(50 * time.Millisecond)
			put(w, 4)
			time.Sleep(100 * time.Millisecond)
			put(w, 5)
			time.Sleep(time.Second)
		}, []string{"100: 7", "250: 5"}},
		"shutdown flushes": {func(w *Writer) { put(w, 7) }, []string{"0: 7"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeStore{}
				w := run(t, f, 0, &bytes.Buffer{}, func(w *Writer) { tt.do(w); synctest.Wait() })
				if diff := cmp.Diff(tt.want, f.batches); diff != "" {
					t.Error(diff)
				}
				if n := testutil.ToFloat64(w.metrics.queued); n != 0 || w.bytes != 0 {
					t.Errorf("%v hits, %d bytes still queued", n, w.bytes)
				}
			})
		})
	}
}

func TestWriterDrops(t *testing.T) {
	t.Run("queue full", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := &fakeStore{block: make(chan struct{})}
			w := run(t, f, 10, &bytes.Buffer{}, func(w *Writer) {
				put(w, 4)
				time.Sleep(time.Second) // these four are in Append, which blocks
				put(w, 13)
				close(f.block)
			})
			if n := dropped(w, dropFull); n != 3 {
				t.Errorf("%v dropped, want 3", n)
			}
		})
	})
	t.Run("too many bytes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := &fakeStore{}
			w := run(t, f, 0, &bytes.Buffer{}, func(w *Writer) {
				for range 5 {
					w.Put(hit("", 0, func(h *attack.Hit) { h.Exchange.Request.Body = make([]byte, 15<<20) }))
				}
			})
			if n := dropped(w, dropFull); n != 1 {
				t.Errorf("%v dropped, want 1", n)
			}
		})
	})
	t.Run("error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f, log := &fakeStore{err: errors.New("disk on fire")}, &bytes.Buffer{}
			w := run(t, f, 0, log, func(w *Writer) {
				for range 3 {
					put(w, 2)
					time.Sleep(time.Second)
				}
				f.mu.Lock()
				f.err = nil
				f.mu.Unlock()
				put(w, 1)
				time.Sleep(time.Second)
			})
			if n := dropped(w, dropError); n != 6 {
				t.Errorf("%v dropped, want 6", n)
			}
			if strings.Count(log.String(), "disk on fire") != 1 || strings.Count(log.String(), "hits are stored again") != 1 {
				t.Errorf("log: %s", log)
			}
		})
	})
	t.Run("shutdown", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := &fakeStore{block: make(chan struct{})} // blocks for good
			start := time.Now()
			w := run(t, f, 0, &bytes.Buffer{}, func(w *Writer) { put(w, 3) })
			w.Put(hit("late", 0))
			if n := dropped(w, dropShutdown); n != 4 || time.Since(start) > drainFor {
				t.Errorf("%v dropped after %v, want 4", n, time.Since(start))
			}
		})
	})
}

// TestWriterEndToEnd: a real store, and the line for a new attack.
func TestWriterEndToEnd(t *testing.T) {
	s, log := open(t, nil), &bytes.Buffer{}
	w, err := NewWriter(WriterConfig{Store: s, Logger: slog.New(slog.NewTextHandler(log, nil)), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	start := time.Now()
	secret := "../../secret-payload"
	for i := range 3 {
		w.Put(hit(fmt.Sprint(i), 0, payload(secret), func(h *attack.Hit) {
			h.Exchange.Path = "/a\x1b[31m\u202e/" + strings.Repeat("long", 100) + "?file=" + secret
			h.Exchange.Request.Body = []byte(secret)
		}))
	}
	for poll := time.NewTicker(5 * time.Millisecond); len(attacks(t, s.Reader, Filter{})) == 0; <-poll.C {
		if time.Since(start) > 20*time.Second {
			t.Fatal("no attack")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	a := attacks(t, s.Reader, Filter{})[0]
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 1 {
		t.Fatalf("log: %s", log)
	}
	for _, want := range []string{`msg="attack registered"`, "attack=" + a.ID, "type=path-traversal", "severity=critical", "gateway=edge/gw-1",
		"method=GET", "client=192.0.2.7", "rules=[930100]", "path=/a?[31m?/long"} {
		if !strings.Contains(lines[0], want) {
			t.Errorf("%s\ndoes not contain %s", lines[0], want)
		}
	}
	for _, bad := range []string{"secret", "\x1b", "\u202e"} {
		if strings.Contains(lines[0], bad) {
			t.Errorf("%s\ncontains %q", lines[0], bad)
		}
	}
}

func TestWriterFlood(t *testing.T) {
	var log bytes.Buffer
	w := &Writer{log: slog.New(slog.NewTextHandler(&log, nil))}
	touched := make([]Registered, 150)
	for i := range touched {
		touched[i].New = true
	}
	w.report(touched)
	if n := strings.Count(log.String(), "attack registered"); n != maxLogLines || !strings.Contains(log.String(), "attacks=50") {
		t.Errorf("%d lines, then: %s", n, log.String()[log.Len()-200:])
	}
}
