// Package extproc takes exchanges that gateways stream by Envoy's ext_proc
// filter in observability mode, one gRPC stream each, and makes of each the
// event that the gateway plugin would make: it selects, cuts and masks by the
// gateway's settings.
//
// It never answers a gateway but by ending a stream of which nothing more is
// needed, never keeps a gateway waiting for analysis, and holds no more memory
// than Config says: what is beyond is given up and counted.
//
// The commands and tests of transports may import it; it imports mirror,
// mirror/event, mirror/mask and policy.
package extproc

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/mask"
	"github.com/periscope-mesh/periscope/policy"
)

// Path of the gRPC method.
const Path = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"

// Plugin is what stands for the plugin's build in what is told of gateways.
const Plugin = "ExtProc"

// Metadata of a stream; package xds/gateway has gateways send it.
const (
	gatewayKey  = "periscope-gateway"
	settingsKey = "periscope-settings"
	shareKey    = "periscope-share"
	sharesKey   = "periscope-shares"
	peerKey     = "periscope-peer"
)

const (
	maxMessage   = 4 << 20
	maxNameBytes = 512
	maxCached    = 1024 // settings, parsed
	maxGateways  = 1024 // of which counts are kept

	eventOverhead = 1 << 10 // of an event, besides its bytes
	// smallMessage is allocated before it has come; a larger one as it comes.
	smallMessage = 64 << 10
)

// codes of gRPC that streams end with.
const (
	codeOK                = "0"
	codeInvalidArgument   = "3"
	codeResourceExhausted = "8"
	codeInternal          = "13"
	codeUnauthenticated   = "16"
)

// Config of a Handler. Zero bounds take defaults.
type Config struct {
	// Settings gives those of a gateway by their revision, or the newest that
	// are known: the JSON of mirror.Settings, and their revision.
	Settings func(gateway, revision string) (revisionKnown string, encoded []byte, ok bool)
	// Queue takes a batch of one event on to analysis; size is its memory. It
	// must not wait.
	Queue func(b *event.Batch, gateway string, received time.Time, size int)
	// Authenticate yields the identity of the gateway behind a stream, as
	// ingest.Authenticator does.
	Authenticate func(r *http.Request, claim string) (gateway string, err error)
	Guard        Guard // nil: nothing is discarded
	Logger       *slog.Logger
	Registerer   prometheus.Registerer

	MaxStreams int           // at once; default 4096
	MaxBytes   int64         // of the copies of all exchanges under way; default 64 MiB
	MaxWait    time.Duration // for an exchange's end, then it is taken as it is; default 30 s, as the plugin's
	Now        func() time.Time
}

// Handler serves ext_proc's one method, gRPC over HTTP/2. It does what little of
// gRPC that takes itself: each exchange is a stream, and costs less so; and a
// stream that is cut off still gives all that has come of it.
type Handler struct {
	cfg       Config
	metrics   *metrics
	vm        string // stands for the plugin's worker in events
	number    atomic.Uint64
	discarded atomic.Uint64
	streams   atomic.Int64
	held      atomic.Int64

	mu       sync.Mutex
	parsed   map[parsedKey]*parsed
	gateways map[string]*GatewayCount
	demands  map[demandKey]*demand
}

// Guard discards exchanges while the node is late, see ingest.Guard.
type Guard interface {
	Discard(priority bool) (discard bool, weight float64)
}

type parsedKey struct{ gateway, revision string }

// parsed are the settings of a gateway; without a selector, they could not be
// read.
type parsed struct {
	selector *mirror.Selector
	masks    map[*mirror.Settings]*mask.Masker
	places   map[*mirror.Settings]int // of the policies
}

// GatewayCount is what was heard from a gateway.
type GatewayCount struct {
	Gateway string
	Seen    uint64    // exchanges
	Errors  uint64    // streams that could not be read
	Last    time.Time // of the newest
}

// New makes a Handler; it starts nothing.
func New(c Config) (*Handler, error) {
	if c.Settings == nil || c.Queue == nil || c.Authenticate == nil {
		return nil, errors.New("extproc: Config.Settings, Queue and Authenticate are required")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("component", "extproc")
	c.MaxStreams = cmp.Or(c.MaxStreams, 4096)
	c.MaxBytes = cmp.Or(c.MaxBytes, 64<<20)
	c.MaxWait = cmp.Or(c.MaxWait, 30*time.Second)
	if c.Now == nil {
		c.Now = time.Now
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	h := &Handler{cfg: c, vm: hex.EncodeToString(id[:]), parsed: map[parsedKey]*parsed{}, gateways: map[string]*GatewayCount{}, demands: map[demandKey]*demand{}}
	h.metrics = newMetrics(c.Registerer, func() float64 { return float64(h.held.Load()) })
	return h, nil
}

// Gateways lists what was heard from each, by gateway.
func (h *Handler) Gateways() []GatewayCount {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]GatewayCount, 0, len(h.gateways))
	for _, g := range h.gateways {
		out = append(out, *g)
	}
	slices.SortFunc(out, func(a, b GatewayCount) int { return strings.Compare(a.Gateway, b.Gateway) })
	return out
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor < 2 || r.Method != http.MethodPost || !strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		http.Error(w, "this is ext_proc's gRPC method", http.StatusUnsupportedMediaType)
		return
	}
	code, text := h.stream(w, r)
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Grpc-Status", code) // without a message before it, the head is the trailer too
	if text != "" {
		w.Header().Set("Grpc-Message", text)
	}
}

// stream takes one exchange, and gives gRPC's code and text.
func (h *Handler) stream(w http.ResponseWriter, r *http.Request) (code, text string) {
	defer h.streams.Add(-1)
	busy := h.streams.Add(1) > int64(h.cfg.MaxStreams)
	h.metrics.open.Inc()
	defer h.metrics.open.Dec()
	gateway, err := h.cfg.Authenticate(r, clip(r.Header.Get(gatewayKey)))
	if err != nil {
		h.count("", outcomeUnauthorized)
		return codeUnauthenticated, "the gateway's identity could not be verified"
	}
	if busy {
		h.count(gateway, outcomeBusy)
		return codeResourceExhausted, "too many exchanges are under way"
	}
	control, deadline := http.NewResponseController(w), time.Now().Add(h.cfg.MaxWait)
	if err := errors.Join(control.SetReadDeadline(deadline), control.SetWriteDeadline(deadline.Add(time.Minute))); err != nil {
		h.cfg.Logger.Error("a stream's time can't be bounded", "error", err)
		return codeInternal, ""
	}
	x, outcome, err := h.follow(r, gateway)
	h.count(gateway, outcome)
	if x != nil {
		h.deliver(x, gateway)
	}
	switch {
	case errors.Is(err, errMalformed):
		return codeInvalidArgument, "not a message of ext_proc in observability mode"
	case errors.Is(err, errNoRoom):
		return codeResourceExhausted, "no room for copies"
	}
	return codeOK, ""
}

// follow takes messages until the exchange's event is made, or it is known that
// none is wanted.
func (h *Handler) follow(r *http.Request, gateway string) (x *exchange, outcome string, err error) {
	in := reader{body: r.Body, handler: h}
	for x == nil || !x.done {
		var m message
		b, err := in.next()
		if err == nil {
			m, err = decode(b)
		}
		now := h.cfg.Now()
		switch {
		case err == nil && x == nil && m.kind == responseHeaders:
			in.drop(b, 0)
			return nil, outcomeNoRequest, nil
		case err == nil && x == nil && m.kind != requestHeaders:
			in.drop(b, 0)
			return nil, outcomeMalformed, errMalformed
		case err != nil && x == nil:
			in.drop(b, 0)
			return nil, outcomeOf(err), err
		case err != nil:
			in.drop(b, 0)
			x.partial(err, now)
			return x, event.CounterMirrored, err
		case x == nil:
			if x, outcome = h.open(r, gateway, &m, now); x == nil {
				in.drop(b, 0)
				return nil, outcome, nil
			}
			x.held = int64(len(b))
		default:
			kept, aliased := x.take(&m, now)
			if aliased {
				kept = len(b)
			} else {
				in.drop(b, kept)
			}
			x.held += int64(kept)
		}
	}
	return x, event.CounterMirrored, nil
}

// open starts an exchange, or says why it isn't wanted.
func (h *Handler) open(r *http.Request, gateway string, m *message, now time.Time) (*exchange, string) {
	p := h.settings(gateway, clip(r.Header.Get(settingsKey)))
	if p == nil {
		return nil, outcomeNoSettings
	}
	s, excluded := p.selector.Select(get(m.fields, ":authority"), get(m.fields, ":path"))
	switch {
	case s == nil || excluded:
		return nil, event.CounterExcluded
	case s.Mode != policy.ModeMonitor:
		return nil, event.CounterOff
	}
	share, wanted := shares(r.Header, p.places[s], s.SharePPM)
	sampled := wanted < share && mathrand.IntN(share) >= wanted
	h.wants(gateway, s.PolicyID, share, !sampled, now)
	if sampled {
		return nil, event.CounterSampled
	}
	weight := 1.0
	if h.cfg.Guard != nil {
		var discard bool
		if discard, weight = h.cfg.Guard.Discard(false); discard {
			h.discarded.Add(1)
			return nil, outcomeDiscarded
		}
	}
	x := h.begin(s, p.masks[s], min(share, wanted), m, now)
	x.event.Weigh(weight)
	if peer := clip(r.Header.Get(peerKey)); peer != x.event.Source && peer != "-" {
		x.event.Peer = peer
	}
	return x, ""
}

// settings gives those of a gateway, parsed; nil: none are known that this node
// understands.
func (h *Handler) settings(gateway, revision string) *parsed {
	revision, encoded, ok := h.cfg.Settings(gateway, revision)
	if !ok {
		return nil
	}
	key := parsedKey{gateway, revision}
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.parsed[key]
	if p == nil {
		var err error
		if p, err = h.parse(encoded); err != nil {
			h.cfg.Logger.Error("a gateway's settings are not understood: its exchanges are not taken; update this node", "gateway", gateway, "error", err)
		}
		if len(h.parsed) >= maxCached {
			clear(h.parsed)
		}
		h.parsed[key] = p
	}
	if p.selector == nil {
		return nil
	}
	return p
}

// parse refuses what it doesn't know: it may be a mask.
func (h *Handler) parse(encoded []byte) (*parsed, error) {
	p := &parsed{masks: map[*mirror.Settings]*mask.Masker{}, places: map[*mirror.Settings]int{}}
	var s mirror.Settings
	d := json.NewDecoder(bytes.NewReader(encoded))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return p, err
	}
	p.selector = mirror.NewSelector(s)
	for i, s := range p.selector.Policies() {
		p.places[s] = i
		p.masks[s] = mask.New(s.Mask)
	}
	return p, nil
}

// deliver hands a finished exchange on.
func (h *Handler) deliver(x *exchange, gateway string) {
	e := &x.event
	if n := e.Request.BodyBytes - uint64(len(e.Request.Body)) + e.Response.BodyBytes - uint64(len(e.Response.Body)); e.Flags&event.FlagResponseSkip == 0 && n < math.MaxInt64 {
		h.metrics.cut.Add(float64(n))
	}
	h.refund(x.held)
	h.cfg.Queue(&event.Batch{
		Header: event.Header{Version: event.Version, Gateway: gateway, VM: h.vm, Plugin: Plugin, PolicyRev: x.settings.PolicyRev},
		Events: []event.Event{*e},
	}, gateway, h.cfg.Now(), int(x.held)+x.grown+eventOverhead)
}

// count counts an exchange and what became of it.
func (h *Handler) count(gateway, outcome string) {
	h.metrics.exchanges.WithLabelValues(event.CounterSeen).Inc()
	h.metrics.exchanges.WithLabelValues(outcome).Inc()
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.gateways[gateway]
	if g == nil {
		if gateway == "" || len(h.gateways) >= maxGateways {
			return
		}
		g = &GatewayCount{Gateway: gateway}
		h.gateways[gateway] = g
	}
	g.Seen++
	g.Last = h.cfg.Now()
	if outcome == outcomeMalformed {
		g.Errors++
	}
}

// charge takes so many bytes of the budget, or none.
func (h *Handler) charge(n int) bool {
	if h.held.Add(int64(n)) <= h.cfg.MaxBytes {
		return true
	}
	h.refund(int64(n))
	return false
}

func (h *Handler) refund(n int64) { h.held.Add(-n) }

var (
	errMalformed = errors.New("not a message of ext_proc")
	errNoRoom    = errors.New("no room for copies")
)

func outcomeOf(err error) string {
	switch {
	case errors.Is(err, errMalformed):
		return outcomeMalformed
	case errors.Is(err, errNoRoom):
		return event.CounterEvicted
	}
	return outcomeAborted
}

// reader cuts a stream into messages, each charged to the handler's budget.
type reader struct {
	body    io.Reader
	handler *Handler
	head    [5]byte
	spare   []byte // to read the next message into
}

// next reads a message.
func (in *reader) next() ([]byte, error) {
	if _, err := io.ReadFull(in.body, in.head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(in.head[1:])
	if in.head[0] != 0 || size > maxMessage { // compressed, which no gateway is told to
		return nil, errMalformed
	}
	n := int(size)
	if !in.handler.charge(n) {
		return nil, errNoRoom
	}
	b, err := in.read(n)
	if err != nil {
		in.handler.refund(int64(n))
		return nil, err
	}
	return b, nil
}

func (in *reader) read(n int) ([]byte, error) {
	if b := in.spare; cap(b) >= n || n <= smallMessage {
		in.spare = nil
		if cap(b) < n {
			b = make([]byte, n)
		}
		_, err := io.ReadFull(in.body, b[:n])
		return b[:n], err
	}
	var b bytes.Buffer
	_, err := io.CopyN(&b, in.body, int64(n))
	return b.Bytes(), err
}

// drop gives a message's buffer back, of which so many bytes were copied.
func (in *reader) drop(b []byte, kept int) {
	in.handler.refund(int64(len(b) - kept))
	in.spare = b
}

func clip(s string) string {
	if len(s) > maxNameBytes {
		s = s[:maxNameBytes]
	}
	return strings.ToValidUTF8(s, "")
}
