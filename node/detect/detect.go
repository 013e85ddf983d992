// Package detect judges exchanges: it runs the OWASP Core Rule Set in Coraza
// over what node/decode takes apart, and turns matches into hits.
//
// It never blocks, changes or fetches anything, and never writes a payload to
// a log. Rules come from the binary. Wiring imports it; it imports
// mirror/event, node/decode and node/attack.
//
// # How it uses Coraza
//
// Coraza evaluates rules; it parses nothing. Bodies, queries and cookies are
// decoded by node/decode, which is bounded, knows that a gateway cuts bodies,
// and keeps the raw bytes of each value, so that a match can be shown where it
// stands. Decoded values are then put into the variables that rules read. Two
// kinds of values that CRS does not look at at paranoia level 1 are added as
// ARGS_PATH: headers that are neither well known nor plain tokens, and path
// segments with characters that paths rarely hold. There only rules with few
// false alarms count, see evidence.
//
// # What makes a hit
//
// Each rule counts once per location with CRS's score for its severity
// (critical 5, error 4, warning 3, notice 2). The type with the highest score
// in a location is the location's type; ties go by attack.Types. Locations of
// one type make one hit if their scores reach 5, for leaks in responses 4.
// These are CRS's own thresholds. Protocol enforcement (911, 920) is not
// loaded: a missing Accept, a numeric Host or a rare content type is ordinary
// for APIs. Matches that a policy excludes stay in a hit for audit, but never
// count.
package detect

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/corazawaf/coraza/v3"
	"github.com/corazawaf/coraza/v3/experimental"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/attack"
	"github.com/periscope-mesh/periscope/node/decode"
	"github.com/prometheus/client_golang/prometheus"
)

// Paranoia levels of CRS.
const (
	minParanoia = 1
	maxParanoia = 4
)

// ErrClosed is what Inspect returns after Close.
var ErrClosed = errors.New("detection engine is closed")

var (
	errPanic = errors.New("inspection panicked") // and was stopped
	errInput = errors.New("no event to inspect")
)

// Config is what an Engine needs.
type Config struct {
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Policy is what detection must know of the policy an exchange was mirrored
// under.
type Policy struct {
	ID          string
	Rev         string
	Tenant      string
	Application string
	Paranoia    int // 1 to 4; anything else counts as the nearest
	Exclusions  []Exclusion
}

// Exclusion silences one rule, for one target or for all.
type Exclusion struct {
	RuleID int
	Target string // "ARGS:q", "REQUEST_HEADERS:x-y", "REQUEST_COOKIES"; empty: every target
}

// Input is one exchange and what is known of it.
type Input struct {
	Event    *event.Event // must not change during Inspect; hits share none of it
	Gateway  string       // authenticated identity
	VM       string       // of the gateway worker that counted Event.N
	Policy   Policy
	Received time.Time
}

// Result is what an inspection found.
type Result struct {
	Hits          []attack.Hit
	RequestFacts  decode.Facts
	ResponseFacts decode.Facts
}

// Engine inspects exchanges. It may be used by any number of goroutines and
// starts none.
type Engine struct {
	logger  *slog.Logger
	metrics *metrics

	mu     sync.RWMutex // held for reading during inspections
	closed bool
	levels [maxParanoia]level
}

// level is the rule set of one paranoia level: about 20 MiB, hence built when
// first needed.
type level struct {
	mu  sync.Mutex // held while building; never together with another lock but Engine.mu
	waf coraza.WAF
}

// New builds the rule set of paranoia level 1.
func New(cfg Config) (*Engine, error) {
	if cfg.Logger == nil || cfg.Registerer == nil {
		return nil, errors.New("detect: logger and registerer are required")
	}
	e := &Engine{logger: cfg.Logger.With("component", "detect")}
	waf, err := e.rules(minParanoia)
	if err != nil {
		return nil, fmt.Errorf("load rules: %w", err)
	}
	if err := checkSetters(waf); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	if e.metrics, err = newMetrics(cfg.Registerer); err != nil {
		return nil, errors.Join(fmt.Errorf("register metrics: %w", err), e.Close())
	}
	return e, nil
}

// Close waits for inspections and releases the rule sets.
func (e *Engine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	var errs []error
	for i := range e.levels {
		if c, ok := e.levels[i].waf.(experimental.WAFCloser); ok {
			errs = append(errs, c.Close())
		}
		e.levels[i].waf = nil
	}
	return errors.Join(errs...)
}

// rules is the rule set of a paranoia level.
func (e *Engine) rules(paranoia int) (coraza.WAF, error) {
	l := &e.levels[min(max(paranoia, minParanoia), maxParanoia)-1]
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waf != nil {
		return l.waf, nil
	}
	waf, err := newWAF(min(max(paranoia, minParanoia), maxParanoia))
	if err != nil {
		return nil, err
	}
	l.waf = waf
	return waf, nil
}

// Inspect judges one exchange. An error means that it was not judged in full;
// hits found until then are lost.
func (e *Engine) Inspect(x *Input) (res Result, err error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	started := time.Now()
	defer func() {
		if r := recover(); r != nil {
			// The panic's value may hold a payload; its type and place suffice.
			e.logger.Error("inspection panicked", "type", fmt.Sprintf("%T", r), "stack", string(debug.Stack()))
			res, err = Result{}, errPanic
		}
		e.metrics.observe(res, err, time.Since(started))
	}()
	if e.closed {
		return Result{}, ErrClosed
	}
	if x == nil || x.Event == nil {
		return Result{}, errInput
	}
	waf, err := e.rules(x.Policy.Paranoia)
	if err != nil {
		return Result{}, fmt.Errorf("load rules: %w", err)
	}
	request := decode.ParseRequest(x.Event)
	var response *decode.Response
	if x.Event.Flags&event.FlagNoResponse == 0 && len(x.Event.Response.Headers) > 0 {
		response = decode.ParseResponse(x.Event)
		res.ResponseFacts = response.Facts
	}
	res.RequestFacts = request.Facts
	found := evaluate(waf, x, request, response)
	if len(found) > 0 {
		matches := resolve(found, request, response, x.Policy.Exclusions)
		res.Hits = hits(x, request, response, matches)
	}
	return res, nil
}
