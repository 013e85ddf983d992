// Package debug is the control plane's window: /debug and its pages, /ready,
// /metrics and /version, in the formats that istiod's users know.
//
// It never changes anything, and never shows secrets: what it is given is
// shown as it is. It asks for no identity, so whoever serves it beyond loopback
// must know who can reach it.
//
// The commands may import it; it imports xds and localweb, and takes everything
// else as functions.
package debug

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/xds"
)

// Config is what the pages show. Functions are called with each request, from
// several goroutines at a time; a nil one leaves its page out.
type Config struct {
	Logger      *slog.Logger
	Policies    func() any              // /debug/policyz
	Configs     func() []Object         // /debug/configz
	Connections func() []xds.Connection // /debug/syncz, /debug/connections
	Plan        func() any              // /debug/planz
	Info        func() any              // a free section on the index, such as insecure listeners
	Ready       func() error            // /ready; nil: always ready
	Version     any                     // /version
	Gatherer    prometheus.Gatherer     // /metrics
}

// Object is a configuration object in Kubernetes' shape, as istiod's configz
// shows it.
type Object struct {
	Kind       string   `json:"kind"`
	APIVersion string   `json:"apiVersion"`
	Metadata   Metadata `json:"metadata"`
	Spec       any      `json:"spec"`
}

// Metadata is the part of an object's metadata that configz shows.
type Metadata struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace,omitempty"`
	ResourceVersion   string            `json:"resourceVersion,omitempty"`
	CreationTimestamp time.Time         `json:"creationTimestamp,omitzero"`
	Labels            map[string]string `json:"labels,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
}

// page is one JSON page below /debug/.
type page struct {
	name string
	help string
	data func() any
}

type handler struct {
	logger *slog.Logger
	pages  []page // by name
	config Config
}

// New makes the handler of all pages.
func New(c Config) (http.Handler, error) {
	if c.Logger == nil || c.Gatherer == nil {
		return nil, errors.New("make debug handler: a logger and a gatherer are needed")
	}
	h := &handler{logger: c.Logger.With("component", "debug"), config: c}
	add := func(name, help string, given bool, data func() any) {
		if given {
			h.pages = append(h.pages, page{name, help, data})
		}
	}
	add("policyz", "policies: the accepted ones, and what is wrong with the others", c.Policies != nil, c.Policies)
	add("configz", "configuration objects, as istiod shows them", c.Configs != nil, func() any { return nonNil(c.Configs()) })
	add("syncz", "what each client was sent and acknowledged, as istiod shows it", c.Connections != nil, func() any { return syncz(c.Connections()) })
	add("connections", "xDS clients", c.Connections != nil, func() any { return connections(c.Connections()) })
	add("planz", "the plan that follows from the policies", c.Plan != nil, c.Plan)
	slices.SortFunc(h.pages, func(a, b page) int { return strings.Compare(a.name, b.name) })
	h.pages = append(h.pages, page{"list", "the names of these pages", func() any { return h.names() }})

	mux := http.NewServeMux()
	mux.HandleFunc("/debug", h.index)
	mux.HandleFunc("/debug/{$}", h.index)
	mux.HandleFunc("/debug/", h.unknown)
	for _, p := range h.pages {
		mux.HandleFunc("/debug/"+p.name, func(w http.ResponseWriter, r *http.Request) { h.json(w, r, p.data()) })
	}
	mux.HandleFunc("/ready", h.ready)
	mux.HandleFunc("/version", func(w http.ResponseWriter, r *http.Request) { h.json(w, r, c.Version) })
	mux.Handle("/metrics", promhttp.HandlerFor(c.Gatherer, promhttp.HandlerOpts{MaxRequestsInFlight: 8}))
	return guard(mux), nil
}

// guard keeps browsers from doing more with a page than showing it.
func guard(next http.Handler) http.Handler {
	guarded := localweb.Guard(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Cache-Control", "no-store")
		header.Set("Content-Security-Policy", "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		guarded.ServeHTTP(w, r)
	})
}

// names lists the pages, without list itself, as istiod does.
func (h *handler) names() []string {
	names := make([]string, 0, len(h.pages))
	for _, p := range h.pages {
		if p.name != "list" {
			names = append(names, p.name)
		}
	}
	return names
}

func (h *handler) unknown(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "404 page not found\n\nKnown pages: "+strings.Join(append(h.names(), "list"), ", "), http.StatusNotFound)
}

func (h *handler) ready(w http.ResponseWriter, _ *http.Request) {
	if h.config.Ready != nil {
		if err := h.config.Ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, "ready")
}

// json answers compactly, or indented when asked for ?pretty.
func (h *handler) json(w http.ResponseWriter, r *http.Request, data any) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	if r.URL.Query().Has("pretty") {
		e.SetIndent("", "  ")
	}
	if err := e.Encode(data); err != nil {
		h.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(out.Bytes()) // the client is gone: nobody to tell
}

func (h *handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	h.logger.Error("debug page not written", "path", r.URL.Path, "error", err)
	http.Error(w, "this page can't be shown; the log tells why", http.StatusInternalServerError)
}

// nonNil makes an empty list [] rather than null.
func nonNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
