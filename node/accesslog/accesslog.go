// Package accesslog takes gateways' access logs: how exchanges ended that the
// plugin has copied, which it adds to their events, and exchanges that ended
// before the plugin saw them, of which it makes events.
//
// It never holds an event back: what comes later than its event is counted. It
// keeps a bounded number of entries for a bounded time, and calls no one back.
// Wiring (cmd) may import it; it imports mirror/event.
package accesslog

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// Path of the endpoint.
const Path = event.LogPath

const (
	maxCallBytes = 1 << 20 // one call's message; Envoy sends 16 KiB and an entry
	maxCalls     = 16      // being read at once
	// Entries that wait for their event: the plugin sends it 30 s after the
	// exchange's start at the latest. Of more, or older ones, the oldest leave.
	maxWaiting = 16384
	// Events that came without an entry, to tell an entry that is late from one
	// whose event went elsewhere.
	maxRecent = 65536
	remembers = time.Minute
	// Exchanges that the plugin has not seen, a second: a flood of them is worth
	// no more, and leaves room in the ring for others.
	unseenRate  = 500
	unseenBurst = 1000
)

// Ring queues exchanges for analysis.
type Ring interface {
	Push(b *event.Batch, gateway string, received time.Time, size int) (accepted, dropped int)
}

// Authenticator yields the identity of the gateway behind a request; claim is
// what the log says.
type Authenticator interface {
	Authenticate(r *http.Request, claim string) (gateway string, err error)
}

// Config of a Log.
type Config struct {
	Ring          Ring          // required
	Authenticator Authenticator // required
	// Mirrors tells whether any policy wants exchanges. What Envoy refused is of
	// no policy: it counts as wanted if another exchange may be. nil: always.
	Mirrors    func() bool
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	Now        func() time.Time
}

// Log takes access logs by gRPC, as an http.Handler of HTTP/2: each call is one
// request, read whole, under the server's time limits.
type Log struct {
	cfg     Config
	reading chan struct{}
	unseen  *rate.Limiter
	metrics *metrics
	vm      string        // that events made here bear
	number  atomic.Uint64 // of the last of them
	seed    maphash.Seed  // so that nobody can choose keys that collide

	mu      sync.Mutex
	waiting window[end]
	recent  window[trace]
}

// end is how an exchange ended, and when it was.
type end struct {
	flags, details string
	start, us      uint64 // in µs
	trace
}

// New makes a Log.
func New(cfg Config) (*Log, error) {
	if cfg.Ring == nil || cfg.Authenticator == nil {
		return nil, errors.New("accesslog: Config.Ring and Config.Authenticator are required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Logger = cfg.Logger.With("component", "accesslog")
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Mirrors == nil {
		cfg.Mirrors = func() bool { return true }
	}
	l := &Log{
		cfg: cfg, reading: make(chan struct{}, maxCalls), unseen: rate.NewLimiter(unseenRate, unseenBurst), seed: maphash.MakeSeed(),
		waiting: window[end]{max: maxWaiting, age: remembers}, recent: window[trace]{max: maxRecent, age: remembers},
	}
	id := make([]byte, 8)
	_, _ = rand.Read(id) // never fails
	l.vm = "log-" + hex.EncodeToString(id)
	l.metrics = newMetrics(cfg.Registerer, l.countWaiting)
	return l, nil
}

// Join adds to a batch's events what the log has told of them. An entry that
// comes later finds its event gone.
func (l *Log) Join(gateway string, b *event.Batch) {
	now := l.cfg.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(now)
	for i := range b.Events {
		e := &b.Events[i]
		id, t := e.LogID(b.Header.VM), ofEvent(e)
		key := l.key(gateway, id, e)
		end, ok := l.entryOf(key, id, t)
		if !ok {
			l.recent.put(key, t, now, nil)
			continue
		}
		e.ResponseFlags, e.ResponseDetails = end.flags, end.details
		if end.us > 0 {
			e.EndUS = max(end.us, e.HeadersUS, e.RequestEndUS) // it is rounded down, and so are these
		}
		l.metrics.joined.Inc()
	}
}

// expire forgets what is too old.
func (l *Log) expire(now time.Time) {
	l.recent.expire(now, nil)
	l.waiting.expire(now, l.unmatched)
}

func (l *Log) unmatched(e end) {
	l.metrics.unmatched.Inc()
	l.metrics.flagged(e.flags)
}

func (l *Log) countWaiting() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(l.cfg.Now())
	return float64(l.waiting.live)
}

// ServeHTTP implements http.Handler: one call of the OpenTelemetry log service,
// by the rules of gRPC over HTTP/2
// (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md).
func (l *Log) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || r.ProtoMajor != 2 || !strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		l.metrics.calls.WithLabelValues(callRequest).Inc()
		http.Error(w, "the access log comes by gRPC", http.StatusUnsupportedMediaType)
		return
	}
	result, code, problem := l.serve(w, r)
	l.metrics.calls.WithLabelValues(result).Inc()
	h := w.Header()
	h.Set("Content-Type", "application/grpc")
	h.Set(http.TrailerPrefix+"Grpc-Status", strconv.Itoa(int(code)))
	if problem != "" {
		h.Set(http.TrailerPrefix+"Grpc-Message", problem)
	}
	w.WriteHeader(http.StatusOK)
	if code == codes.OK {
		_, _ = w.Write(make([]byte, frameHead)) // an empty message
	}
}

// frameHead is before each message: a byte that tells whether it is compressed,
// and its length.
const frameHead = 5

func (l *Log) serve(w http.ResponseWriter, r *http.Request) (result string, code codes.Code, problem string) {
	select {
	case l.reading <- struct{}{}:
		defer func() { <-l.reading }()
	default:
		return callBusy, codes.ResourceExhausted, "too many calls are being read"
	}
	body, err := readMessage(http.MaxBytesReader(w, r.Body, maxCallBytes+frameHead))
	if err != nil {
		return callRead, codes.InvalidArgument, err.Error()
	}
	received := l.cfg.Now()
	log, err := event.DecodeLog(body, event.DefaultLimits())
	if err != nil {
		return callMalformed, codes.InvalidArgument, err.Error()
	}
	gateway, err := l.cfg.Authenticator.Authenticate(r, log.Gateway)
	if err != nil {
		return callAuthentication, codes.Unauthenticated, "the gateway's identity could not be verified"
	}
	l.take(log, gateway, received, len(body))
	if len(log.Rejected) > 0 {
		l.cfg.Logger.Debug("log entries rejected", "gateway", gateway, "count", len(log.Rejected), "first", log.Rejected[0])
	}
	return callOK, codes.OK, ""
}

// readMessage reads the only message of a call.
func readMessage(r io.Reader) ([]byte, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, errors.New("the message's head ended early")
	}
	size := binary.BigEndian.Uint32(head[1:])
	switch {
	case head[0] != 0:
		return nil, errors.New("the message is compressed, which was not agreed on")
	case size > maxCallBytes:
		return nil, fmt.Errorf("the message has %d bytes, the limit is %d", size, maxCallBytes)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, errors.New("the message ended early")
	}
	return b, nil
}

// take puts entries to wait for their events, and makes events of the others.
func (l *Log) take(log *event.Log, gateway string, received time.Time, size int) {
	l.metrics.malformed.Add(float64(len(log.Rejected)))
	b := &event.Batch{Header: event.Header{Version: event.Version, Gateway: gateway, VM: l.vm}}
	for i := range log.Entries {
		e := &log.Entries[i]
		if e.Copied {
			l.wait(gateway, e, received)
			continue
		}
		l.metrics.flagged(e.ResponseFlags)
		if !l.cfg.Mirrors() {
			l.metrics.off.Inc()
			continue
		}
		if !l.unseen.AllowN(received, 1) {
			l.metrics.limited.Inc()
			continue
		}
		e.N = l.number.Add(1)
		b.Events = append(b.Events, e.Event)
	}
	if len(b.Events) == 0 {
		return
	}
	accepted, dropped := l.cfg.Ring.Push(b, gateway, received, size)
	l.metrics.made.Add(float64(accepted))
	l.metrics.dropped.Add(float64(dropped))
}

// wait keeps an entry for its event, unless that has gone by.
func (l *Log) wait(gateway string, e *event.LogEntry, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.expire(now)
	// The call's buffer is not kept.
	kept := end{strings.Clone(e.ResponseFlags), strings.Clone(e.ResponseDetails), e.StartUS, e.EndUS, ofEntry(e)}
	if e.ID == 0 && !e.ByConnection() { // the plugin has not named it: it left it out
		l.unmatched(kept)
		return
	}
	key := l.key(gateway, e.ID, &e.Event)
	if l.eventOf(key, e.ID, kept) {
		l.metrics.late.Inc()
		return
	}
	l.waiting.put(key, kept, now, l.unmatched)
}
