// Package debug is the control plane's window: /debug and its pages, /ready,
// /metrics and /version, in the formats that istiod's users know, and the same
// pages for istioctl, which asks by xDS.
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

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/xds"
)

// Config is what the pages show. Functions are called with each request, from
// several goroutines at a time; a nil one leaves its pages out.
type Config struct {
	Logger      *slog.Logger
	Policies    func() any              // policyz
	Configs     func() []Object         // configz
	Connections func() []xds.Connection // syncz, connections, adsz, push_status
	// Deliveries tells what a connection was sent, by type URL: config_dump,
	// ecdsz, edsz, and with the next three the pages named there.
	Deliveries   func(connectionID string) map[string][]xds.Delivery
	Plugin       func(xds.Resource) (Plugin, bool) // whether it is the plugin, and which: pluginz
	Rollout      func() any                        // of the plugin: pluginz, too
	Shares       func() []Share                    // sharez
	NodeRevision func(xds.Resource) string         // the plan's revision in a node's policies: nodez
	NodeWires    func(node string) []int           // versions of the wire contract that a node reads: nodez, too
	Snapshots    func() map[string]*xds.Snapshot   // resourcesz
	Plan         func() any                        // planz
	Mesh         func() any                        // mesh
	Ledger       func() any                        // ledgerz
	Pressure     func() any                        // pressurez
	Load         func() any                        // loadz
	Info         func() any                        // a free section on the index, such as insecure listeners
	Ready        func() error                      // /ready; nil: always ready
	Version      any                               // /version
	Gatherer     prometheus.Gatherer               // /metrics
	Instance     Instance                          // how istioctl shows this control plane
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
	name  string
	help  string
	query string // that it can't do without, for the index
	data  func(*http.Request) (any, error)
}

// pageError is an answer in plain words.
type pageError struct {
	status int
	text   string
}

func (e *pageError) Error() string { return e.text }

// Pages serves the pages by HTTP, and to istioctl as an xds.DebugSource. Its
// methods may be called from several goroutines.
type Pages struct {
	logger     *slog.Logger
	config     Config
	pages      []page // by name
	debug      *http.ServeMux
	root       http.Handler
	identifier string
	style      string // of the content security policy
}

// New makes all pages.
func New(c Config) (*Pages, error) {
	if c.Logger == nil || c.Gatherer == nil {
		return nil, errors.New("make debug handler: a logger and a gatherer are needed")
	}
	p := &Pages{logger: c.Logger.With("component", "debug"), config: c, style: styleHash()}
	var err error
	if p.identifier, err = c.Instance.identifier(); err != nil {
		return nil, fmt.Errorf("make debug handler: %w", err)
	}
	p.pages = p.list()
	p.debug = http.NewServeMux()
	p.debug.HandleFunc("/debug/", p.unknown)
	for _, page := range p.pages {
		p.debug.HandleFunc("/debug/"+page.name, func(w http.ResponseWriter, r *http.Request) { p.serve(w, r, page) })
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug", p.index)
	mux.HandleFunc("/debug/{$}", p.index)
	mux.Handle("/debug/", p.debug)
	mux.HandleFunc("/ready", p.ready)
	mux.HandleFunc("/version", func(w http.ResponseWriter, r *http.Request) { p.json(w, r, c.Version) })
	mux.Handle("/metrics", promhttp.HandlerFor(c.Gatherer, promhttp.HandlerOpts{MaxRequestsInFlight: 8}))
	p.root = p.guard(mux)
	return p, nil
}

// list makes the pages whose functions are given, by name.
func (p *Pages) list() []page {
	c, pages := p.config, []page(nil)
	add := func(given bool, name, help, query string, data func(*http.Request) (any, error)) {
		if given {
			pages = append(pages, page{name, help, query, data})
		}
	}
	plain := func(data func() any) func(*http.Request) (any, error) {
		return func(*http.Request) (any, error) { return data(), nil }
	}
	clients := c.Connections != nil
	sent := clients && c.Deliveries != nil
	proxy := "proxyID="
	add(c.Policies != nil, "policyz", "policies: the accepted ones, and what is wrong with the others", "", plain(c.Policies))
	add(c.Configs != nil, "configz", "configuration objects, as istiod shows them", "", plain(func() any { return nonNil(c.Configs()) }))
	add(c.Snapshots != nil, "resourcesz", "types of resources that are served, with counts", "", plain(func() any { return resourcesz(c.Snapshots()) }))
	add(clients, "syncz", "what each client was sent and acknowledged, as istiod shows it", "", plain(func() any { return syncz(c.Connections()) }))
	add(clients, "connections", "xDS clients, with the state of each type", "", plain(func() any { return connections(c.Connections()) }))
	add(clients, "adsz", "xDS clients and what they watch, as istiod shows them", "", p.adsz)
	add(clients, "push_status", "what clients refused, and clients that get no answer", "", plain(func() any { return pushStatus(c.Connections()) }))
	add(sent, "config_dump", "what a proxy was sent, as Envoy's admin page has it; types=cds,lds,rds,eds,ecds; include_eds", proxy, p.configDump)
	add(sent, "ecdsz", "extension configurations that a proxy was sent", proxy, p.typed(resource.ExtensionConfigType))
	add(sent, "edsz", "endpoints that a proxy was sent", proxy, p.typed(resource.EndpointType))
	add(sent && c.Plugin != nil, "pluginz", "which build of the plugin gateways are to run, were sent, and run", "", plain(p.pluginz))
	add(sent && c.Shares != nil, "sharez", "the mirrored share of each gateway, in force by which carrier", "", plain(p.sharez))
	add(sent && c.NodeRevision != nil, "nodez", "analysis nodes and the plan's revision that they acknowledged", "", plain(p.nodez))
	add(c.Plan != nil, "planz", "the plan that follows from the policies", "", plain(c.Plan))
	add(c.Mesh != nil, "mesh", "gateways and nodes there are, and the settings of this control plane", "", plain(c.Mesh))
	add(c.Ledger != nil, "ledgerz", "what became of the exchanges, from gateways to the store, as nodes report", "", plain(c.Ledger))
	add(c.Pressure != nil, "pressurez", "the load of each node, as it reports it, and of which nodes nothing is heard", "", plain(c.Pressure))
	add(c.Load != nil, "loadz", "load, shares and what was not analysed over the last five minutes, as the console shows it", "", plain(c.Load))
	slices.SortFunc(pages, func(a, b page) int { return strings.Compare(a.name, b.name) })
	return append(pages, page{"list", "the names of these pages", "", plain(func() any { return p.names() })})
}

// ServeHTTP serves all pages.
func (p *Pages) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.root.ServeHTTP(w, r) }

// guard keeps browsers from doing more with a page than showing it.
func (p *Pages) guard(next http.Handler) http.Handler {
	guarded := localweb.Guard(next)
	policy := "default-src 'none'; style-src '" + p.style + "'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Cache-Control", "no-store")
		header.Set("Content-Security-Policy", policy)
		guarded.ServeHTTP(w, r)
	})
}

// names lists the pages, without list itself, as istiod does.
func (p *Pages) names() []string {
	names := make([]string, 0, len(p.pages))
	for _, page := range p.pages {
		if page.name != "list" {
			names = append(names, page.name)
		}
	}
	return names
}

// unknown begins with the words by which istioctl knows that it should show
// the list.
func (p *Pages) unknown(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "404 page not found\n\nKnown pages: "+strings.Join(append(p.names(), "list"), ", "), http.StatusNotFound)
}

func (p *Pages) ready(w http.ResponseWriter, _ *http.Request) {
	if p.config.Ready != nil {
		if err := p.config.Ready(); err != nil {
			http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, "ready")
}

func (p *Pages) serve(w http.ResponseWriter, r *http.Request, page page) {
	data, err := page.data(r)
	var answer *pageError
	switch {
	case errors.As(err, &answer):
		http.Error(w, answer.text, answer.status)
	case err != nil:
		p.fail(w, r, err)
	default:
		p.json(w, r, data)
	}
}

// json answers compactly, or indented when asked for ?pretty.
func (p *Pages) json(w http.ResponseWriter, r *http.Request, data any) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	if r.URL.Query().Has("pretty") {
		e.SetIndent("", "  ")
	}
	if err := e.Encode(data); err != nil {
		p.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(out.Bytes()) // the client is gone: nobody to tell
}

func (p *Pages) fail(w http.ResponseWriter, r *http.Request, err error) {
	p.logger.Error("debug page not written", "path", r.URL.Path, "error", err)
	http.Error(w, "this page can't be shown; the log tells why", http.StatusInternalServerError)
}

// nonNil makes an empty list [] rather than null.
func nonNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
