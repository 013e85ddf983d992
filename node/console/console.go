// Package console is what people and programs see of attacks: the JSON API
// under /api/v1 and the pages, on one http.Handler that only reads.
//
// Nearly everything it shows was chosen by attackers. It never hands such
// bytes to a browser other than as escaped text, never loads anything from
// another host, and never answers for a host name that is not its own.
//
// Only cmd/periscope imports it.
package console

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"html/template"
	"io/fs"
	"log/slog"
	"net/http"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/node/attack"
)

//go:embed assets templates
var files embed.FS

// Store is where attacks come from. Attack gives an error that wraps
// fs.ErrNotExist for an unknown id, and a cursor that no earlier page gave is
// an error that wraps fs.ErrInvalid.
type Store interface {
	Attacks(context.Context, Filter, Page) (list []attack.Attack, next string, err error)
	Attack(ctx context.Context, id string) (attack.Attack, error)
	Hits(ctx context.Context, attackID string, p Page) (list []attack.Hit, next string, err error)
	Timeline(ctx context.Context, attackID string) ([]Minute, error)
	Gateways(context.Context) ([]Gateway, error) // by gateway, the build heard from last first
}

// Filter, Page and Minute are aliases of unnamed types, so that a store that
// declares the same ones is a Store without either importing the other.

// Filter chooses attacks: those that satisfy all fields that are set.
type Filter = struct {
	Types       []attack.Type // any of these
	MinSeverity attack.Severity
	Tenant      string // exact, as are the next four
	Application string
	Gateway     string
	Client      string
	Host        string
	PathPrefix  string // of the path template
	Search      string // part of host, path, payload, client, gateway, location or rule id; any case
	Since       time.Time
	Until       time.Time // active in [Since, Until): a hit not before Since, and one before Until
}

// Page is a piece of a list.
type Page = struct {
	Limit  int    // at most 100; 0 means 50
	Cursor string // of the page before; empty for the first
}

// Minute is the count of hits in one minute.
type Minute = struct {
	Start time.Time
	attack.Count
}

// Config is what New needs.
type Config struct {
	Store        Store                 // required
	Logger       *slog.Logger          // required
	Registerer   prometheus.Registerer // required
	Version      string                // shown in the footer and the API's description
	AllowedHosts []string              // names, besides the loopback ones, that a browser may reach the console by; without port
	Load         LoadSource            // what the Load page shows; nil: it says that there is none
	TryCommand   string                // shown while there is no attack; default curl http://localhost:8080/etc/passwd
	Now          func() time.Time      // default time.Now
}

const (
	maxQueryBytes = 8 << 10
	queryTimeout  = 5 * time.Second // for the store's answers to one request
	listLimit     = 50              // attacks on a page
	hitLimit      = 10              // samples on a page
)

// console is the pages' part of the handler.
type console struct {
	cfg    Config
	log    *slog.Logger
	pages  map[string]*template.Template
	assets map[string]asset
	load   *loadView
}

type asset struct {
	body        []byte
	contentType string
	version     string // of the URL, from the content
}

// New builds the handler.
func New(cfg Config) (http.Handler, error) {
	if cfg.Store == nil || cfg.Logger == nil || cfg.Registerer == nil {
		return nil, errors.New("console: store, logger and registerer are required")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.TryCommand == "" {
		cfg.TryCommand = "curl http://localhost:8080/etc/passwd"
	}
	c := &console{cfg: cfg, log: cfg.Logger.With("component", "console")}
	c.load = &loadView{source: cfg.Load, now: cfg.Now}
	if err := c.loadAssets(); err != nil {
		return nil, err
	}
	if err := c.loadPages(); err != nil {
		return nil, err
	}
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	if err := c.routeAPI(mux); err != nil {
		return nil, err
	}
	mux.Handle("GET /{$}", http.RedirectHandler("/attacks", http.StatusFound))
	mux.HandleFunc("GET /attacks", c.list)
	mux.HandleFunc("GET /attacks/rows", c.rows)
	mux.HandleFunc("GET /attacks/{id}", c.detail)
	mux.HandleFunc("GET /gateways", c.gateways)
	mux.HandleFunc("GET /load", c.loads)
	mux.HandleFunc("GET /load/now", c.loadNow)
	mux.HandleFunc("GET /static/{name}", c.static)
	mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/static/favicon.svg", http.StatusFound)
	})
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		c.fail(w, http.StatusNotFound, "There is no such page", "The attacks are listed on the Attacks page.")
	})
	return m.count(mux, guard(cfg.AllowedHosts, mux)), nil
}

func (c *console) loadAssets() error {
	entries, err := fs.ReadDir(files, "assets")
	if err != nil {
		return err
	}
	types := map[string]string{".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
	c.assets = make(map[string]asset)
	for _, e := range entries {
		contentType, ok := types[path.Ext(e.Name())]
		if !ok {
			continue // licences and notes
		}
		body, err := files.ReadFile("assets/" + e.Name())
		if err != nil {
			return err
		}
		sum := sha256.Sum256(body)
		c.assets[e.Name()] = asset{body, contentType, hex.EncodeToString(sum[:6])}
	}
	return nil
}

// static serves our own files. Their URLs change with their content, so they
// can be kept for good.
func (c *console) static(w http.ResponseWriter, r *http.Request) {
	a, ok := c.assets[r.PathValue("name")]
	if !ok {
		c.fail(w, http.StatusNotFound, "There is no such file", "")
		return
	}
	w.Header().Set("Content-Type", a.contentType)
	if r.URL.Query().Get("v") == a.version {
		w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	} else {
		w.Header().Set("Cache-Control", "no-cache")
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(a.body))
}
