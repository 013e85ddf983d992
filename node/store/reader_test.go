package store

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/node/attack"
)

func TestFilter(t *testing.T) {
	s := open(t, nil)
	appendHits(t, s,
		hit("a", 0, client("192.0.2.1")),
		hit("b", 10, client("192.0.2.2"), func(h *attack.Hit) {
			h.Type, h.Severity, h.Matches[0].RuleID = attack.SQLInjection, attack.Warning, 942100
			h.Exchange.Host, h.Exchange.Path, h.Gateway = "api.example", "/v1/Users_list", "edge/gw-2"
		}, payload("1' OR 100%=1")),
		hit("c", 20, client("192.0.2.3"), func(h *attack.Hit) { h.Tenant, h.Application, h.Severity = "bank", "teller", attack.Notice }),
	)
	tests := map[string]struct {
		filter Filter
		want   string // clients' last digits, newest first
	}{
		"all":              {Filter{}, "3 2 1"},
		"type":             {Filter{Types: []attack.Type{attack.SQLInjection}}, "2"},
		"types":            {Filter{Types: []attack.Type{attack.SQLInjection, attack.PathTraversal}}, "3 2 1"},
		"unknown type":     {Filter{Types: []attack.Type{"x' OR 1=1 --"}}, ""},
		"severity":         {Filter{MinSeverity: attack.Warning}, "2 1"},
		"tenant":           {Filter{Tenant: "bank"}, "3"},
		"application":      {Filter{Application: "teller"}, "3"},
		"gateway":          {Filter{Gateway: "edge/gw-2"}, "2"},
		"client":           {Filter{Client: "192.0.2.1"}, "1"},
		"host":             {Filter{Host: "api.example"}, "2"},
		"path prefix":      {Filter{PathPrefix: "/v1/"}, "2"},
		"path prefix, %":   {Filter{PathPrefix: "/%"}, ""},
		"search path":      {Filter{Search: "users_"}, "2"},
		"search payload":   {Filter{Search: "100%"}, "2"},
		"search rule":      {Filter{Search: "942100"}, "2"},
		"search, case":     {Filter{Search: "SHOP.example"}, "3 1"},
		"search _ is text": {Filter{Search: "sho_.example"}, ""},
		"since":            {Filter{Since: noon.Add(10 * time.Minute)}, "3 2"},
		"until":            {Filter{Until: noon.Add(10 * time.Minute)}, "1"},
		"both":             {Filter{Client: "192.0.2.1", Host: "api.example"}, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, a := range attacks(t, s.Reader, tt.filter) {
				got = append(got, a.Client[len(a.Client)-1:])
			}
			if g := strings.Join(got, " "); g != tt.want {
				t.Errorf("got %q, want %q", g, tt.want)
			}
		})
	}
}

// TestPages walks a list whose entries have equal times, while it grows.
func TestPages(t *testing.T) {
	s := open(t, nil)
	var hits []attack.Hit
	for i := range 25 {
		hits = append(hits, hit(fmt.Sprint(i), float64(i/10), client(fmt.Sprintf("192.0.2.%d", i))))
	}
	appendHits(t, s, hits...)
	want := attacks(t, s.Reader, Filter{})
	var got []attack.Attack
	for page := (Page{Limit: 4}); ; {
		list, next, err := s.Attacks(t.Context(), Filter{}, page)
		if err != nil || len(list) > 4 {
			t.Fatal(len(list), err)
		}
		got = append(got, list...)
		if next == "" {
			break
		}
		page.Cursor = next
		appendHits(t, s, hit("new"+next, 30, client("203.0.113.1"))) // newer than the page: not seen
	}
	if diff := cmp.Diff(want, got); diff != "" || len(got) != 25 {
		t.Error(diff)
	}
	if !slices.IsSortedFunc(got, func(a, b attack.Attack) int { return b.Last.Compare(a.Last) }) {
		t.Error("not newest first")
	}
}

func TestHitPages(t *testing.T) {
	s := open(t, nil)
	var id string
	for i := range 7 {
		id = appendHits(t, s, hit(fmt.Sprint(i), 0, payload(fmt.Sprint("../", i))))[0].Attack.ID
	}
	var got []string
	for page := (Page{Limit: 3}); ; {
		list, next, err := s.Hits(t.Context(), id, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range list {
			got = append(got, h.ID)
		}
		if next == "" {
			break
		}
		page.Cursor = next
	}
	if diff := cmp.Diff([]string{"6", "5", "4", "3", "2", "1", "0"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestQueryErrors(t *testing.T) {
	s := open(t, nil)
	if _, err := s.Attack(t.Context(), "nope"); !errors.Is(err, ErrNotFound) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("unknown id: %v", err)
	}
	for _, cursor := range []string{"x", "!!!", strings.Repeat("A", 500), base64.RawURLEncoding.EncodeToString([]byte("\x02123456789"))} {
		if _, _, err := s.Attacks(t.Context(), Filter{}, Page{Cursor: cursor}); !errors.Is(err, ErrCursor) || !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("cursor %q: %v", cursor, err)
		}
		if _, _, err := s.Hits(t.Context(), "a", Page{Cursor: cursor}); !errors.Is(err, ErrCursor) {
			t.Errorf("cursor %q of hits: %v", cursor, err)
		}
	}
	if list, next, err := s.Hits(t.Context(), "nope", Page{}); len(list) != 0 || next != "" || err != nil {
		t.Errorf("hits of an unknown attack: %v, %q, %v", list, next, err)
	}
}

func TestStats(t *testing.T) {
	s := open(t, nil)
	empty, err := s.Stats(t.Context())
	if err != nil || empty.Attacks != 0 || !empty.Oldest.IsZero() {
		t.Errorf("%+v, %v", empty, err)
	}
	appendHits(t, s, hit("a", 0), hit("b", 1), hit("c", 5, client("192.0.2.9")))
	got, err := s.Stats(t.Context())
	got.Bytes = min(got.Bytes, 1)
	if diff := cmp.Diff(Stats{Attacks: 2, Hits: 3, Samples: 2, Bytes: 1, Oldest: noon.Add(time.Minute)}, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

// TestReaders: a second handle and a second process read while the first one
// writes, and afterwards.
func TestReaders(t *testing.T) {
	s := open(t, nil)
	path := s.cfg.Path
	second, err := OpenReader(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	child := func() string {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "PERISCOPE_TEST_READ="+path)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	for i := range 3 {
		id := appendHits(t, s, hit(fmt.Sprint(i), float64(i)))[0].Attack.ID
		want := fmt.Sprintln(id, i+1)
		if got := attacks(t, second, Filter{}); len(got) != 1 || got[0].Hits != int64(i+1) {
			t.Errorf("second handle after %d hits: %+v", i+1, got)
		}
		if got := child(); got != want {
			t.Errorf("second process reads %q, want %q", got, want)
		}
	}
	if _, err := second.db.Exec("DELETE FROM attacks"); err == nil {
		t.Error("a reader can write")
	}
}

func FuzzParseCursor(f *testing.F) {
	f.Add("")
	f.Add(position{us: 1, id: "a"}.cursor())
	f.Add(position{us: -1, id: strings.Repeat("z", maxIDBytes)}.cursor())
	f.Add("AQ")
	f.Fuzz(func(t *testing.T, s string) {
		p, ok, err := parseCursor(s)
		switch {
		case err != nil && !errors.Is(err, ErrCursor):
			t.Errorf("error %v is not ErrCursor", err)
		case ok && p.cursor() != s:
			t.Errorf("%q does not round-trip: %q", s, p.cursor())
		case !ok && err == nil && s != "":
			t.Errorf("%q is silently no cursor", s)
		}
	})
}
