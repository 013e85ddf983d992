// Package ingest is the node's endpoint for mirrored traffic: it
// authenticates the gateway, bounds what it reads, decodes it, and puts it
// into a ring, or drops and counts.
//
// It never looks into an exchange, never waits for analysis, and holds no more
// memory than Config says. Wiring (cmd) may import it.
package ingest

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/load"
)

// Path of the endpoint.
const Path = "/v1/events"

// Authenticator yields the identity of the gateway behind a request.
type Authenticator interface {
	// Authenticate gives the gateway's identity, or an error that is answered
	// with 401. claim is the header's gateway, which nobody has verified.
	Authenticate(r *http.Request, claim string) (gateway string, err error)
	// String describes the method for /debug.
	String() string
}

// Trusting takes the gateway's word: for listeners that only loopback reaches,
// or that the operator has declared insecure.
type Trusting struct{}

// Authenticate implements Authenticator.
func (Trusting) Authenticate(_ *http.Request, claim string) (string, error) {
	if claim == "" {
		return "unknown", nil
	}
	return claim, nil
}

func (Trusting) String() string { return "none: the gateway's own word is taken" }

// Joiner adds to events what else is known of them.
type Joiner interface {
	Join(gateway string, b *event.Batch)
}

// Guard discards exchanges while the node is late.
type Guard interface {
	// Discard decides about the next exchange. What it lets pass stands for weight
	// exchanges. Those of a priority class always pass.
	Discard(priority bool) (discard bool, weight float64)
}

// Config of a Handler. Zero bounds take defaults.
type Config struct {
	Ring   *Ring  // required
	Joiner Joiner // nil: nothing is added
	Guard  Guard  // nil: nothing is discarded
	// Heard takes when a gateway's worker sent a batch, by its clock in µs; nil:
	// nobody wants to know.
	Heard         func(gateway, vm string, sentUS uint64, received time.Time)
	Authenticator Authenticator
	Logger        *slog.Logger
	Registerer    prometheus.Registerer
	Limits        event.Limits
	MaxBatchBytes int64 // one request's body; default 4 MiB
	MaxBodyBytes  int64 // bodies being read at once, all requests; default 64 MiB
	Now           func() time.Time
}

// Handler serves POST /v1/events.
//
// Answers: 202 with {"accepted","dropped","discarded"} when the batch was read
// (events dropped for a full ring, or discarded unread by the guard, are the node's
// doing, not the sender's fault); 400
// when the header or an event is malformed, with the events that were
// accepted all the same; 401; 404; 405; 411 (no length); 413; 415; 503 with
// Retry-After when too many bodies are being read.
type Handler struct {
	cfg     Config
	budget  chan struct{} // one token per bodyUnit of MaxBodyBytes
	metrics *metrics
	ledger  *ledger

	discarded atomic.Uint64
}

// bodyUnit is the grain of the budget for bodies being read.
const bodyUnit = 64 << 10

// New makes a Handler.
func New(cfg Config) (*Handler, error) {
	if cfg.Ring == nil {
		return nil, errors.New("ingest: Config.Ring is required")
	}
	if cfg.Authenticator == nil {
		return nil, errors.New("ingest: Config.Authenticator is required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Logger = cfg.Logger.With("component", "ingest")
	if cfg.Limits == (event.Limits{}) {
		cfg.Limits = event.DefaultLimits()
	}
	if cfg.MaxBatchBytes == 0 {
		cfg.MaxBatchBytes = 4 << 20
	}
	if cfg.MaxBodyBytes == 0 {
		cfg.MaxBodyBytes = 64 << 20
	}
	if cfg.MaxBodyBytes < cfg.MaxBatchBytes {
		return nil, errors.New("ingest: Config.MaxBodyBytes is below MaxBatchBytes")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	h := &Handler{cfg: cfg, budget: make(chan struct{}, cfg.MaxBodyBytes/bodyUnit)}
	h.metrics = newMetrics(cfg.Registerer, cfg.Ring)
	h.ledger = newLedger(cfg.Registerer)
	return h, nil
}

// Demands lists the demand at gateways as far as batches told it, sorted: that
// of workers heard from within five minutes, with the time since start.
func (h *Handler) Demands(start time.Time) []load.Demand { return h.ledger.demands(h.cfg.Now(), start) }

// Gateways lists what gateways' batches told of the builds of the plugin that
// made them, by gateway and build.
func (h *Handler) Gateways() []GatewayCount { return h.ledger.gateways() }

type rejection struct {
	Index  int          `json:"index"`
	Reason event.Reason `json:"reason"`
	Where  string       `json:"where"`
	Detail string       `json:"detail"`
	Rest   bool         `json:"rest,omitempty"`
}

type answer struct {
	Accepted int `json:"accepted"`
	Dropped  int `json:"dropped"`
	// Discarded by the guard.
	Discarded int         `json:"discarded,omitempty"`
	Rejected  []rejection `json:"rejected,omitempty"`
	Error     string      `json:"error,omitempty"`
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status, a := h.serve(w, r)
	h.metrics.batches.WithLabelValues(statusLabel(status)).Inc()
	w.Header().Set("Content-Type", "application/json")
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(a) // the gateway does not wait for it
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) (int, answer) {
	if status, problem := checkRequest(w, r); status != 0 {
		return h.refuse(status, reasonRequest, problem)
	}
	if r.ContentLength > h.cfg.MaxBatchBytes {
		return h.refuse(http.StatusRequestEntityTooLarge, string(event.ReasonTooLarge), "batch is larger than this node takes")
	}
	// A body of unknown length is charged the most it may have.
	size := r.ContentLength
	if size < 0 {
		size = h.cfg.MaxBatchBytes
	}
	units := h.charge(size)
	if units == 0 {
		return h.refuse(http.StatusServiceUnavailable, reasonBusy, "too many batches are being read")
	}
	defer h.refund(units)
	body, err := readBody(http.MaxBytesReader(w, r.Body, h.cfg.MaxBatchBytes), r.ContentLength)
	if err != nil {
		if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
			return h.refuse(http.StatusRequestEntityTooLarge, string(event.ReasonTooLarge), "batch is larger than this node takes")
		}
		return h.refuse(http.StatusBadRequest, reasonRead, "the body ended early")
	}
	return h.take(r, body)
}

// take decodes a batch and queues its events.
func (h *Handler) take(r *http.Request, body []byte) (int, answer) {
	received := h.cfg.Now()
	b, err := event.DecodeSome(body, h.cfg.Limits, h.discard)
	if err != nil {
		fault := new(event.Error)
		errors.As(err, &fault)
		return h.refuse(http.StatusBadRequest, string(fault.Reason), err.Error())
	}
	gateway, err := h.cfg.Authenticator.Authenticate(r, b.Header.Gateway)
	if err != nil {
		return h.refuse(http.StatusUnauthorized, reasonAuthentication, "the gateway's identity could not be verified")
	}
	if h.cfg.Heard != nil {
		h.cfg.Heard(gateway, b.Header.VM, b.Header.SentUS, received)
	}
	h.ledger.observe(gateway, b, received)
	if h.cfg.Joiner != nil {
		h.cfg.Joiner.Join(gateway, b)
	}
	a := answer{Discarded: b.Discarded}
	a.Accepted, a.Dropped = h.push(b, gateway, received, len(body))
	h.metrics.bytes.Add(float64(len(body)))
	for _, rej := range b.Rejected {
		h.metrics.rejected.WithLabelValues(string(rej.Err.Reason)).Inc()
		if len(a.Rejected) < 16 {
			a.Rejected = append(a.Rejected, rejection{rej.Index, rej.Err.Reason, rej.Err.Where, rej.Err.Detail, rej.Rest})
		}
	}
	if len(b.Rejected) > 0 {
		h.cfg.Logger.Debug("events rejected", "gateway", gateway, "count", len(b.Rejected), "first", b.Rejected[0].Err)
		return http.StatusBadRequest, a
	}
	return http.StatusAccepted, a
}

// Queue puts events that came by other ways into the ring, or discards or drops
// them, and counts. size is the batch's memory.
func (h *Handler) Queue(b *event.Batch, gateway string, received time.Time, size int) (accepted, dropped int) {
	kept := b.Events[:0]
	for _, e := range b.Events {
		gone, weight := h.discard(e.Class != "")
		if gone {
			b.Discarded++
			continue
		}
		e.Weigh(weight)
		kept = append(kept, e)
	}
	b.Events = kept
	return h.push(b, gateway, received, size)
}

// Discarded counts the exchanges that the guard has discarded.
func (h *Handler) Discarded() uint64 { return h.discarded.Load() }

func (h *Handler) discard(priority bool) (discard bool, weight float64) {
	if h.cfg.Guard == nil {
		return false, 1
	}
	return h.cfg.Guard.Discard(priority)
}

func (h *Handler) push(b *event.Batch, gateway string, received time.Time, size int) (accepted, dropped int) {
	h.discarded.Add(uint64(b.Discarded))
	h.metrics.events.WithLabelValues("discarded").Add(float64(b.Discarded))
	accepted, dropped = h.cfg.Ring.Push(b, gateway, received, size)
	h.metrics.events.WithLabelValues("accepted").Add(float64(accepted))
	h.metrics.events.WithLabelValues("dropped_ring_full").Add(float64(dropped))
	return accepted, dropped
}

func (h *Handler) refuse(status int, reason, problem string) (int, answer) {
	h.metrics.refused.WithLabelValues(reason).Inc()
	return status, answer{Error: problem}
}

// checkRequest gives the status of a request that is not a batch at all.
func checkRequest(w http.ResponseWriter, r *http.Request) (int, string) {
	if r.URL.Path != Path {
		return http.StatusNotFound, "mirrored traffic goes to POST " + Path
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return http.StatusMethodNotAllowed, "use POST"
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != event.ContentType {
		return http.StatusUnsupportedMediaType, "send " + event.ContentType
	}
	return 0, ""
}

// charge takes tokens for size bytes, all or none, without waiting.
func (h *Handler) charge(size int64) int {
	units := int((size + bodyUnit - 1) / bodyUnit)
	units = max(units, 1)
	for i := range units {
		select {
		case h.budget <- struct{}{}:
		default:
			h.refund(i)
			return 0
		}
	}
	return units
}

func (h *Handler) refund(units int) {
	for range units {
		<-h.budget
	}
}

// readBody reads all of a body, into one allocation when the length is known.
func readBody(r io.Reader, length int64) ([]byte, error) {
	if length < 0 {
		return io.ReadAll(r)
	}
	b := make([]byte, length)
	_, err := io.ReadFull(r, b)
	return b, err
}
