package main

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// newSampleAPI is the upstream of periscope up when the user names none: a
// handful of JSON routes that answer honestly and keep nothing.
func newSampleAPI() http.Handler {
	type item struct {
		ID    int     `json:"id"`
		Name  string  `json:"name"`
		Price float64 `json:"price"`
	}
	items := []item{{1, "Sextant", 89.5}, {2, "Compass", 24}, {3, "Brass telescope", 240}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]any{"service": "sample API", "routes": []string{
			"GET /api/items", "GET /api/items/{id}", "POST /api/items", "GET /api/search?q=", "POST /api/login", "GET /healthz"}})
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	})
	mux.HandleFunc("GET /api/items", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, items)
	})
	mux.HandleFunc("GET /api/items/{id}", func(w http.ResponseWriter, r *http.Request) {
		if id, err := strconv.Atoi(r.PathValue("id")); err == nil && id >= 1 && id <= len(items) {
			writeJSON(w, http.StatusOK, items[id-1])
			return
		}
		notFound(w)
	})
	mux.HandleFunc("POST /api/items", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 1<<20))
		writeJSON(w, http.StatusCreated, item{len(items) + 1, "Accepted", 0})
	})
	mux.HandleFunc("GET /api/search", func(w http.ResponseWriter, r *http.Request) {
		q := strings.ToLower(r.FormValue("q"))
		found := []item{}
		for _, i := range items {
			if q != "" && strings.Contains(strings.ToLower(i.Name), q) {
				found = append(found, i)
			}
		}
		writeJSON(w, http.StatusOK, found)
	})
	mux.HandleFunc("POST /api/login", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 1<<20))
		writeJSON(w, http.StatusUnauthorized, map[string]string{"error": "wrong user name or password"})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { notFound(w) })
	return mux
}

func notFound(w http.ResponseWriter) {
	writeJSON(w, http.StatusNotFound, map[string]string{"error": "not found"})
}

// writeJSON answers; a client that is gone is its own affair.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
