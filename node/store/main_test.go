package store

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/node/attack"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("PERISCOPE_TEST_READ"); path != "" {
		os.Exit(readInChild(path))
	}
	goleak.VerifyTestMain(m)
}

// noon is when the tests' traffic begins.
var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// open opens a store in a temporary directory, whose clock stands at noon plus
// a day unless change says otherwise.
func open(t testing.TB, change func(*Config)) *Store {
	t.Helper()
	cfg := Config{
		Path:       filepath.Join(t.TempDir(), "data", "attacks.db"),
		Logger:     slog.New(slog.DiscardHandler),
		Registerer: prometheus.NewRegistry(),
		Now:        func() time.Time { return noon.Add(24 * time.Hour) },
	}
	if change != nil {
		change(&cfg)
	}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// hit is a path traversal by 192.0.2.7 in the query parameter file, n minutes
// after noon.
func hit(id string, minutes float64, change ...func(*attack.Hit)) attack.Hit {
	value := "../../etc/passwd"
	h := attack.Hit{
		ID: id, Time: noon.Add(time.Duration(minutes * float64(time.Minute))),
		Type: attack.PathTraversal, Severity: attack.Critical, Score: 10,
		Tenant: "shop", Application: "storefront", Policy: "edge/public", PolicyRev: "7", Gateway: "edge/gw-1", Client: "192.0.2.7",
		Location: attack.Location{Place: attack.InQuery, Name: "file"}, Weight: 1,
		Matches: []attack.Match{{
			RuleID: 930100, Type: attack.PathTraversal, Severity: attack.Critical, Message: "Path Traversal Attack (/../)",
			Tags: []string{"attack-lfi", "paranoia-level/1"}, Location: attack.Location{Place: attack.InQuery, Name: "file"},
			Value: []byte(value), Start: 0, End: 6,
		}},
		Exchange: attack.Exchange{
			Method: "GET", Scheme: "https", Host: "shop.example", Path: "/download?file=" + value, Protocol: "HTTP/1.1", Status: 404,
			Request:  attack.Message{Headers: []attack.Field{{Name: "user-agent", Value: "curl/8.5.0"}}},
			Response: attack.Message{Headers: []attack.Field{{Name: "content-type", Value: "text/plain"}}, Body: []byte("not found"), BodyBytes: 9},
		},
	}
	for _, c := range change {
		c(&h)
	}
	return h
}

// payload gives a hit another matched value.
func payload(value string) func(*attack.Hit) {
	return func(h *attack.Hit) {
		h.Matches[0].Value, h.Matches[0].Start, h.Matches[0].End = []byte(value), 0, len(value)
	}
}

func client(address string) func(*attack.Hit) {
	return func(h *attack.Hit) { h.Client = address }
}

func appendHits(t testing.TB, s *Store, hits ...attack.Hit) []Registered {
	t.Helper()
	touched, err := s.Append(t.Context(), hits)
	if err != nil {
		t.Fatal(err)
	}
	return touched
}

func attacks(t testing.TB, r *Reader, f Filter) []attack.Attack {
	t.Helper()
	list, _, err := r.Attacks(t.Context(), f, Page{Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func samples(t testing.TB, r *Reader, id string) []attack.Hit {
	t.Helper()
	var all []attack.Hit
	for page := (Page{Limit: 100}); ; {
		list, next, err := r.Hits(t.Context(), id, page)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, list...)
		if next == "" {
			return all
		}
		page.Cursor = next
	}
}

func readInChild(path string) int {
	r, err := OpenReader(context.Background(), path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer r.Close()
	list, _, err := r.Attacks(context.Background(), Filter{}, Page{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, a := range list {
		fmt.Println(a.ID, a.Hits)
	}
	return 0
}
