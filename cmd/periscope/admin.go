package main

import (
	"encoding/json"
	"fmt"
	"html/template"
	"maps"
	"net/http"
	"net/http/pprof"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

type adminConfig struct {
	registry *prometheus.Registry
	ready    func() error
	states   map[string]func() any // under /debug
}

var adminIndex = template.Must(template.New("index").Parse(`<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Periscope node</title>
<h1>Periscope node</h1>
<ul>{{range .}}<li><a href="{{.}}">{{.}}</a></li>{{end}}</ul>
`))

// adminPages serves /live, /ready, /metrics and /debug. /live says that the
// process answers; /ready, that it analyses with the operator's policies.
func adminPages(cfg adminConfig) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "live") })
	mux.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := cfg.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.Handle("/metrics", promhttp.HandlerFor(cfg.registry, promhttp.HandlerOpts{}))
	paths := []string{"/live", "/ready", "/metrics", "/version", "/debug/pprof/"}
	mux.HandleFunc("/version", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, currentVersion()) })
	for _, name := range slices.Sorted(maps.Keys(cfg.states)) {
		path := "/debug/" + name
		paths = append(paths, path)
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			e := json.NewEncoder(w)
			if r.URL.Query().Has("pretty") {
				e.SetIndent("", "  ")
			}
			_ = e.Encode(cfg.states[name]())
		})
	}
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'")
		_ = adminIndex.Execute(w, paths)
	})
	return mux
}
