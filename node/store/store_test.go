package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/periscope-mesh/periscope/node/attack"
)

func reopen(t *testing.T, path string) (*Store, error) {
	return Open(t.Context(), Config{Path: path, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b?c%d#e", "attacks.db") // a name that must be quoted
	s, err := reopen(t, path)
	if err != nil {
		t.Fatal(err)
	}
	appendHits(t, s, hit("a", 0))
	want := attacks(t, s.Reader, Filter{})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := OpenReader(t.Context(), path) // with no writer alive
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, attacks(t, r, Filter{})); diff != "" {
		t.Errorf("reader alone: %s", diff)
	}
	r.Close()
	if s, err = reopen(t, path); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if diff := cmp.Diff(want, attacks(t, s.Reader, Filter{})); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]os.FileMode{filepath.Dir(path): 0o700, path: 0o600, path + "-wal": 0o600, path + "-shm": 0o600} {
		info, err := os.Stat(name)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v %v, want %v", name, info.Mode(), err, want)
		}
	}
}

func TestOpenTightensTheMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "attacks.db")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := reopen(t, path)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if info, _ := os.Stat(path); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

// TestUnusableFiles: each is refused with a remedy and stays as it was.
func TestUnusableFiles(t *testing.T) {
	tests := map[string]struct {
		make func(t *testing.T, path string)
		want string
	}{
		"text": {func(t *testing.T, path string) {
			os.WriteFile(path, []byte("these are my notes, not a database"), 0o600)
		}, "is not a SQLite file: choose another path"},
		"short": {func(t *testing.T, path string) { os.WriteFile(path, []byte("SQ"), 0o600) }, "is not a SQLite file"},
		"another program's": {func(t *testing.T, path string) {
			execAll(t, path, "CREATE TABLE bookmarks (url TEXT)")
		}, "is another program's SQLite file: choose another path"},
		"another program's mark": {func(t *testing.T, path string) {
			execAll(t, path, "PRAGMA application_id = 42")
		}, "is another program's SQLite file"},
		"newer": {func(t *testing.T, path string) {
			s, err := reopen(t, path)
			if err != nil {
				t.Fatal(err)
			}
			s.Close()
			execAll(t, path, "INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, 1)")
		}, "made by a newer periscope (schema 9999, this one knows 3): update"},
		"damaged": {func(t *testing.T, path string) {
			os.WriteFile(path, []byte(sqliteHeader+strings.Repeat("\xa5", 8192)), 0o600)
		}, "move the file"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "attacks.db")
			tt.make(t, path)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = reopen(t, path)
			var file *FileError
			if !errors.As(err, &file) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %q does not name the file and say %q", err, tt.want)
			}
			if _, err := OpenReader(t.Context(), path); !errors.As(err, &file) {
				t.Errorf("reader: %v", err)
			}
			if after, _ := os.ReadFile(path); string(after) != string(before) {
				t.Error("the file was changed")
			}
		})
	}
}

func execAll(t *testing.T, path string, statements ...string) {
	t.Helper()
	db, err := connect(path, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	if _, err := OpenReader(t.Context(), filepath.Join(t.TempDir(), "none.db")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("reader of a missing file: %v", err)
	}
	empty := filepath.Join(t.TempDir(), "empty.db")
	os.WriteFile(empty, nil, 0o600)
	if _, err := OpenReader(t.Context(), empty); err == nil || !strings.Contains(err.Error(), "start the process that writes it") {
		t.Errorf("reader of an empty file: %v", err)
	}
	if _, err := reopen(t, t.TempDir()); err == nil {
		t.Error("a directory opens")
	}
	if _, err := Open(t.Context(), Config{}); err == nil {
		t.Error("an empty config opens")
	}
}

// TestRetain fills a store with attacks a minute apart and enforces one limit.
func TestRetain(t *testing.T) {
	const count = 450
	tests := map[string]struct {
		config  func(*Config)
		atLeast int // attacks left
		atMost  int
		reason  string
	}{
		"age": {func(c *Config) {
			c.Retention = time.Hour
			c.Now = func() time.Time { return noon.Add(count * time.Minute) }
		}, 60, 61, "age"},
		"count":    {func(c *Config) { c.MaxAttacks = 7 }, 7, 7, "count"},
		"size":     {func(c *Config) { c.MaxBytes = 400 << 10 }, 1, count - 200, "size"},
		"no limit": {func(c *Config) {}, count, count, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := open(t, func(c *Config) { c.Retention = 90 * 24 * time.Hour; tt.config(c) })
			var hits []attack.Hit
			for i := range count {
				hits = append(hits, hit(fmt.Sprint(i), float64(i), client(fmt.Sprintf("10.0.%d.%d", i>>8, i&255))))
			}
			appendHits(t, s, hits...)
			if err := s.retain(t.Context()); err != nil {
				t.Fatal(err)
			}
			stats, err := s.Stats(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if n := int(stats.Attacks); n < tt.atLeast || n > tt.atMost || stats.Samples != stats.Attacks {
				t.Errorf("%d attacks and %d samples left, want %d to %d", n, stats.Samples, tt.atLeast, tt.atMost)
			}
			if newest := attacks(t, s.Reader, Filter{})[0]; newest.Client != hits[count-1].Client {
				t.Errorf("the newest attack is %s", newest.Client)
			}
			if tt.reason != "" && testutil.ToFloat64(s.metrics.deleted.WithLabelValues(tt.reason)) != float64(count-stats.Attacks) {
				t.Error("deleted attacks are not counted")
			}
			var orphans int
			s.db.QueryRow(`SELECT count(*) FROM attack_minute WHERE attack_id NOT IN (SELECT id FROM attacks)`).Scan(&orphans)
			if orphans > 0 {
				t.Errorf("%d minutes without an attack", orphans)
			}
		})
	}
}

// TestRetainOngoing: an attack that goes on keeps its row but loses what is
// older than the retention.
func TestRetainOngoing(t *testing.T) {
	s := open(t, func(c *Config) {
		c.Retention = 2 * time.Hour
		c.Now = func() time.Time { return noon.Add(4 * time.Hour) }
	})
	var id string
	for i := range 9 {
		id = appendHits(t, s, hit(fmt.Sprint(i), float64(30*i), payload(fmt.Sprint("../", i))))[0].Attack.ID
	}
	if err := s.retain(t.Context()); err != nil {
		t.Fatal(err)
	}
	line, err := s.Timeline(t.Context(), id)
	if err != nil || len(line) != 5 || len(samples(t, s.Reader, id)) != 5 || attacks(t, s.Reader, Filter{})[0].Hits != 9 {
		t.Errorf("timeline %v, %d samples, %v", line, len(samples(t, s.Reader, id)), err)
	}
}

func TestRunAnswersACrowd(t *testing.T) {
	s := open(t, func(c *Config) { c.MaxAttacks = 10 })
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for i := range 30 {
		appendHits(t, s, hit(fmt.Sprint(i), float64(i), client(fmt.Sprintf("10.0.0.%d", i))))
	}
	deadline := time.After(20 * time.Second)
	for poll := time.NewTicker(10 * time.Millisecond); ; {
		if len(attacks(t, s.Reader, Filter{})) <= 12 {
			break
		}
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatal("the excess is not deleted before the next minute")
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestMigrateEstimates: what was counted before there were errors of estimates gets
// the one that it has if all weights were equal.
func TestMigrateEstimates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "attacks.db")
	s, err := reopen(t, path)
	if err != nil {
		t.Fatal(err)
	}
	weight := func(w float64) func(*attack.Hit) { return func(h *attack.Hit) { h.Weight = w } }
	appendHits(t, s, hit("a", 0), hit("b", 1), hit("c", 0, client("192.0.2.8"), weight(4)), hit("d", 0.5, client("192.0.2.8"), weight(4)), hit("e", 7, client("192.0.2.8"), weight(4)))
	want := attacks(t, s.Reader, Filter{})
	lines := func(r *Reader) (all [][]Minute) {
		for _, a := range want {
			line, err := r.Timeline(t.Context(), a.ID)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, line)
		}
		return all
	}
	wantLines := lines(s.Reader)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := connect(path, 1, "")
	if err != nil {
		t.Fatal(err)
	}
	provider, err := newProvider(db)
	if err == nil {
		_, err = provider.DownTo(t.Context(), 2)
	}
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	if s, err = reopen(t, path); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if diff := cmp.Diff(want, attacks(t, s.Reader, Filter{})); diff != "" || want[0].Error() != 6 || want[1].Sampled() {
		t.Error(diff, want)
	}
	if diff := cmp.Diff(wantLines, lines(s.Reader)); diff != "" {
		t.Error(diff)
	}
}
