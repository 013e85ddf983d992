// Package istiod reads back what istiods did with the resources that we serve
// them: whether each has them in its store, whether it pushed them to the
// gateways connected to it, and what Envoy replied. An istiod never says so to
// a config source itself. It finds istiods by their pods, or is told of them.
//
// It never takes silence for success: what can't be read, or isn't shown by a
// push made after the resource arrived, is not reported as done. It only reads,
// and asks rarely, since each page is the whole mesh's: after a push at short
// and growing intervals, otherwise every Config.Interval.
//
// cmd/periscope may import it; it imports nothing of ours.
package istiod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
)

const (
	defaultInterval = 10 * time.Second
	firstDelay      = 150 * time.Millisecond // after a Refresh: istiod waits for 100 ms before it pushes
	dialTimeout     = 2 * time.Second        // a host that is gone holds up the others no longer
	maxIstiods      = 256                    // asked; beyond them, none
	parallel        = 8                      // asked at a time
	busy            = 10                     // reading takes at most a part in so many of the time
)

// Config is what New needs.
type Config struct {
	// Endpoints gives the base URLs of istiods' monitoring ports, such as
	// http://10.0.0.4:15014: each of them, since each knows only the gateways
	// connected to it. Never a Service's, which leads to any one. An error says
	// why they may not be all.
	Endpoints func() ([]string, error)
	// Served gives what istiods are served now.
	Served func() Served
	// Token gives the projected service-account token to show; nil for
	// istiods on this host, which ask for none. It is called for each request:
	// such tokens are renewed within the hour.
	Token      func() (string, error)
	HTTPClient *http.Client  // redirects are never followed; nil: one without a proxy
	Interval   time.Duration // default 10 s
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Changed, if set, is called with each verdict that differs from the one
	// before, from Run's goroutine.
	Changed func(State)
}

// State is what is known. It is never changed.
type State struct {
	At      time.Time `json:"time,omitzero"` // of the last reading; zero: there was none
	Serial  uint64    `json:"-"`             // Served's, when istiods were asked
	Istiods []Istiod  `json:"istiods"`
	Problem string    `json:"problem,omitempty"` // why these may not be all istiods
	Verdict
}

// Istiod says how an istiod could be read.
type Istiod struct {
	URL      string `json:"url"`
	Problem  string `json:"problem,omitempty"` // empty: everything was read
	Gateways int    `json:"gateways"`          // connected to it, whoever governs them
}

// Poller asks istiods.
type Poller struct {
	endpoints func() ([]string, error)
	served    func() Served
	token     func() (string, error)
	client    *http.Client
	interval  time.Duration
	maxBody   int64 // of a page; tests have no time for 64 MiB
	log       *slog.Logger
	metrics   *metrics
	changed   func(State)

	state atomic.Pointer[State]
	// refresh asks for a reading soon. It holds one: more would say no more.
	refresh chan struct{}

	// Of Run's goroutine: the readings before, by istiod, and what went wrong.
	last       map[string]Reading
	complaints map[string]string
}

// New makes a Poller; it starts nothing.
func New(c Config) (*Poller, error) {
	if c.Endpoints == nil || c.Served == nil || c.Logger == nil || c.Registerer == nil {
		return nil, errors.New("make istiod poller: endpoints, what is served, a logger and a registerer are needed")
	}
	m, err := newMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("make istiod poller: %w", err)
	}
	client := http.Client{Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute}}
	if c.HTTPClient != nil {
		client = *c.HTTPClient
	}
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	if c.Interval <= 0 {
		c.Interval = defaultInterval
	}
	p := &Poller{
		endpoints: c.Endpoints, served: c.Served, token: c.Token, client: &client, interval: c.Interval, maxBody: maxBodyBytes,
		log: c.Logger.With("component", "istiod"), metrics: m, changed: c.Changed,
		refresh: make(chan struct{}, 1), last: map[string]Reading{}, complaints: map[string]string{},
	}
	p.state.Store(&State{})
	return p, nil
}

// State is what the last reading showed.
func (p *Poller) State() State { return *p.state.Load() }

// Refresh asks for readings soon, and at short intervals until what is served
// has come as far as it gets: to be called when what is served has changed.
func (p *Poller) Refresh() {
	select {
	case p.refresh <- struct{}{}:
	default:
	}
}

// Run asks until the context ends, and then returns nil.
func (p *Poller) Run(ctx context.Context) error {
	defer p.client.CloseIdleConnections()
	next := time.NewTimer(0)
	defer next.Stop()
	delay := firstDelay
	var due, earliest time.Time // of the next reading, and what it must not come before
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.refresh: // brings the next reading forward, however often it comes
			delay = firstDelay
			at := time.Now().Add(delay)
			if at.Before(earliest) {
				at = earliest
			}
			if at.Before(due) {
				due = at
				next.Reset(time.Until(due))
			}
		case <-next.C:
			start := time.Now()
			state, settled := p.poll(ctx)
			if ctx.Err() != nil {
				return nil
			}
			p.publish(state)
			delay *= 2
			if settled {
				delay = p.interval
			}
			delay = min(delay, p.interval)
			earliest = time.Now().Add(busy * time.Since(start))
			due = time.Now().Add(delay)
			if due.Before(earliest) {
				due = earliest
			}
			next.Reset(time.Until(due))
		}
	}
}

func (p *Poller) publish(s State) {
	before := p.state.Swap(&s)
	p.metrics.verdict(s)
	if p.changed != nil && (before.At.IsZero() || !same(s, *before)) {
		p.changed(s)
	}
}

func same(a, b State) bool {
	return a.Problem == b.Problem && slices.Equal(a.Istiods, b.Istiods) && slices.Equal(a.Resources, b.Resources) &&
		slices.Equal(a.Pods, b.Pods) && slices.Equal(a.Gateways, b.Gateways)
}

// poll reads every istiod and judges. It is settled when another reading could
// show nothing new but by a change elsewhere.
func (p *Poller) poll(ctx context.Context) (State, bool) {
	served := p.served()
	urls, problem := p.whom()
	if ctx.Err() == nil {
		p.complain("", problem)
	}
	readings, pods := make([]Reading, len(urls)), concerned(served)
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, url := range urls {
		group.Go(func() error {
			readings[i] = p.read(ctx, url, served, pods)
			return nil
		})
	}
	_ = group.Wait() // none fails: a reading tells its problem
	state := State{At: time.Now().UTC(), Serial: served.Serial, Problem: problem, Verdict: Judge(served, readings, problem)}
	last := make(map[string]Reading, len(readings))
	for _, r := range readings {
		last[r.Istiod] = r
		problem := r.ConfigProblem
		if problem == "" {
			problem = r.SyncProblem
		}
		if ctx.Err() == nil {
			p.complain(r.Istiod, problem)
		}
		state.Istiods = append(state.Istiods, Istiod{URL: r.Istiod, Problem: problem, Gateways: len(r.Proxies)})
	}
	p.last = last
	for url := range p.complaints {
		if _, ok := last[url]; !ok && url != "" {
			delete(p.complaints, url)
		}
	}
	settled := !slices.ContainsFunc(slices.Concat(state.Resources, state.Pods), func(s Status) bool {
		return s.Stage == Pending || s.Stage == Pushed || s.Stage == Accepted && s.Pod != ""
	})
	return state, settled
}

// whom gives the istiods to ask, and says why they may not be all.
func (p *Poller) whom() (urls []string, problem string) {
	urls, err := p.endpoints()
	if err != nil {
		problem = clip(err.Error())
	}
	urls = slices.Compact(slices.Sorted(slices.Values(urls)))
	if len(urls) > maxIstiods {
		problem = fmt.Sprintf("%d istiods are known; those beyond the first %d are not asked", len(urls), maxIstiods)
		urls = urls[:maxIstiods]
	}
	return urls, problem
}

// read asks one istiod. The gateways come first: what they have been sent when
// the store is found without a version can't hold it.
func (p *Poller) read(ctx context.Context, url string, served Served, pods map[string][]string) Reading {
	r := Reading{Istiod: url, At: time.Now()}
	before := p.last[url]
	_, err := p.fetch(ctx, url, "debug/syncz", func(body io.Reader) (err error) {
		r.Proxies, err = decodeSync(body)
		return err
	})
	p.metrics.read(err)
	if err != nil {
		r.SyncProblem, r.Proxies = clip(err.Error()), nil
	}
	if f := (*fault)(nil); errors.As(err, &f) && f.result == readDenied {
		r.ConfigProblem = r.SyncProblem // istiod logs each request that it denies: no second one
		r.Held = before.Held
		return r
	}
	var versions map[string]string
	r.Ahead, err = p.fetch(ctx, url, "debug/configz", func(body io.Reader) (err error) {
		versions, err = decodeConfig(body, served.Resources)
		return err
	})
	p.metrics.read(err)
	if err != nil {
		r.ConfigProblem = clip(err.Error())
	}
	r.Held = hold(&before, &r, versions, pods)
	return r
}

// hold follows versions from one reading of an istiod to the next. A reading
// that failed leaves what was known. pods names, by resource, the proxies that
// it is for.
func hold(before, now *Reading, versions map[string]string, pods map[string][]string) map[string]Held {
	if now.ConfigProblem != "" {
		return before.Held
	}
	watched := before.Held != nil && before.SyncProblem == "" // it was seen whole
	held := make(map[string]Held, len(versions))
	for key, version := range versions {
		h, ok := before.Held[key]
		switch {
		case ok && h.Version == version && (h.Before != nil || now.SyncProblem != ""):
		case ok && h.Version == version: // the first time that its proxies are known
			h.Arrived, h.Before = false, pick(now.Proxies, pods[key])
		case watched:
			h = Held{Version: version, Since: now.At, Arrived: true, Before: pick(before.Proxies, pods[key])}
		default:
			h = Held{Version: version, Since: now.At}
			if now.SyncProblem == "" {
				h.Before = pick(now.Proxies, pods[key])
			}
		}
		held[key] = h
	}
	return held
}

func pick(all map[string]Proxy, ids []string) map[string]Proxy {
	out := make(map[string]Proxy, len(ids))
	for _, id := range ids {
		if p, ok := all[id]; ok {
			out[id] = p
		}
	}
	return out
}

// concerned lists the proxies that each resource is for.
func concerned(s Served) map[string][]string {
	out := make(map[string][]string, len(s.Resources))
	for _, g := range s.Gateways {
		for _, key := range g.Resources {
			for _, pod := range g.Pods {
				out[key] = append(out[key], pod+"."+g.Namespace)
			}
		}
	}
	return out
}

// complain logs what goes wrong with an istiod, or, without a URL, with finding
// them, unless it did so last time.
func (p *Poller) complain(url, problem string) {
	switch {
	case problem == "" || p.complaints[url] == problem:
	case url == "":
		p.log.Warn("not every istiod is known", "problem", problem)
	default:
		p.log.Warn("istiod not read", "istiod", url, "problem", problem)
	}
	p.complaints[url] = problem
}
