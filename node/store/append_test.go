package store

import (
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/node/attack"
)

// TestGrouping appends each batch in turn and compares the attacks, oldest
// first, as "minutes of the first hit–minutes of the last hit: hits".
func TestGrouping(t *testing.T) {
	tests := map[string]struct {
		batches [][]attack.Hit
		want    []string
	}{
		"one hit":                   {[][]attack.Hit{{hit("a", 0)}}, []string{"0–0: 1"}},
		"same batch":                {[][]attack.Hit{{hit("a", 0), hit("b", 1)}}, []string{"0–1: 2"}},
		"two batches":               {[][]attack.Hit{{hit("a", 0)}, {hit("b", 1)}}, []string{"0–1: 2"}},
		"exactly the gap":           {[][]attack.Hit{{hit("a", 0)}, {hit("b", 60)}}, []string{"0–60: 2"}},
		"more than the gap":         {[][]attack.Hit{{hit("a", 0)}, {hit("b", 60.01)}}, []string{"0–0: 1", "60–60: 1"}},
		"gap within a batch":        {[][]attack.Hit{{hit("a", 0), hit("b", 70)}}, []string{"0–0: 1", "70–70: 1"}},
		"gap is from the last hit":  {[][]attack.Hit{{hit("a", 0)}, {hit("b", 50)}, {hit("c", 100)}}, []string{"0–100: 3"}},
		"late":                      {[][]attack.Hit{{hit("a", 30)}, {hit("b", 10)}}, []string{"10–30: 2"}},
		"late, out of reach":        {[][]attack.Hit{{hit("a", 90)}, {hit("b", 10)}}, []string{"10–10: 1", "90–90: 1"}},
		"late, between two":         {[][]attack.Hit{{hit("a", 0)}, {hit("b", 80)}, {hit("c", 40)}}, []string{"0–0: 1", "40–80: 2"}},
		"out of order in a batch":   {[][]attack.Hit{{hit("a", 50), hit("b", 0), hit("c", 100)}}, []string{"0–100: 3"}},
		"other client":              {[][]attack.Hit{{hit("a", 0), hit("b", 1, client("192.0.2.8"))}}, []string{"0–0: 1", "1–1: 1"}},
		"duplicate in the batch":    {[][]attack.Hit{{hit("a", 0), hit("a", 0)}}, []string{"0–0: 1"}},
		"duplicate in a later one":  {[][]attack.Hit{{hit("a", 0)}, {hit("a", 0), hit("b", 1)}}, []string{"0–1: 2"}},
		"no ids":                    {[][]attack.Hit{{hit("", 0), hit("", 1)}}, []string{"0–1: 2"}},
		"ids that are not text":     {[][]attack.Hit{{hit("\xff\x00", 0), hit("\xfe\x00", 1)}, {hit("\xff\x00", 0)}}, []string{"0–1: 2"}},
		"ids that are far too long": {[][]attack.Hit{{hit(strings.Repeat("a", 9999), 0), hit(strings.Repeat("a", 9998), 1)}}, []string{"0–1: 2"}},
		"clock far behind":          {[][]attack.Hit{{hit("a", 0, func(h *attack.Hit) { h.Time = time.Time{} })}}, []string{"1440–1440: 1"}},
		"clock far ahead":           {[][]attack.Hit{{hit("a", 60*24*365*9000)}}, []string{"1440–1440: 1"}},
		"nothing":                   {[][]attack.Hit{{}}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := open(t, nil)
			for _, hits := range tt.batches {
				appendHits(t, s, hits...)
			}
			var got []string
			for _, a := range attacks(t, s.Reader, Filter{}) {
				got = append([]string{fmt.Sprintf("%d–%d: %d", int(a.First.Sub(noon).Minutes()), int(a.Last.Sub(noon).Minutes()), a.Hits)}, got...)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAppendTellsNewAttacks(t *testing.T) {
	s := open(t, nil)
	first := appendHits(t, s, hit("a", 0), hit("b", 0, client("192.0.2.8")))
	again := appendHits(t, s, hit("c", 1))
	if len(first) != 2 || !first[0].New || !first[1].New {
		t.Errorf("first: %+v", first)
	}
	if len(again) != 1 || again[0].New || again[0].Attack.ID != first[0].Attack.ID || again[0].Attack.Hits != 2 {
		t.Errorf("again: %+v", again)
	}
}

func TestAttackFacts(t *testing.T) {
	s := open(t, nil)
	appendHits(t, s, hit("a", 10, payload("../new"), func(h *attack.Hit) {
		h.Severity, h.Exchange.Status, h.Weight = attack.Warning, 200, 20
		h.Matches = append(h.Matches, attack.Match{RuleID: 1, Excluded: true})
	}))
	appendHits(t, s, hit("b", 5, payload("../late"), func(h *attack.Hit) { // late: count, rules and severity only
		h.Exchange.Status, h.Weight = 500, math.NaN()
		h.Matches[0].RuleID = 930110
	}))
	got := attacks(t, s.Reader, Filter{})
	want := []attack.Attack{{
		Type: attack.PathTraversal, Severity: attack.Critical, Tenant: "shop", Application: "storefront", Policy: "edge/public",
		Gateway: "edge/gw-1", Client: "192.0.2.7", Method: "GET", Host: "shop.example", Path: "/download",
		Location: attack.Location{Place: attack.InQuery, Name: "file"}, RuleIDs: []int{930100, 930110},
		Payload: "../new", Status: 200, First: noon.Add(5 * time.Minute), Last: noon.Add(10 * time.Minute), Count: attack.Count{Hits: 2, Estimated: 21, Variance: 380},
	}}
	ignore := cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".ID" || p.Last().String() == ".Key" }, cmp.Ignore())
	if diff := cmp.Diff(want, got, ignore); diff != "" {
		t.Error(diff)
	}
	one, err := s.Attack(t.Context(), got[0].ID)
	if diff := cmp.Diff(got[0], one); diff != "" || err != nil {
		t.Error(diff, err)
	}
	line, err := s.Timeline(t.Context(), one.ID)
	if diff := cmp.Diff([]Minute{{noon.Add(5 * time.Minute), attack.Count{Hits: 1, Estimated: 1}}, {noon.Add(10 * time.Minute), attack.Count{Hits: 1, Estimated: 20, Variance: 380}}}, line); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

// TestSampleIsExact: an exchange comes back byte for byte, whatever its bytes.
func TestSampleIsExact(t *testing.T) {
	s := open(t, nil)
	dirty := "\x00\xff\xfe '\"<script>\r\n\u202e" + strings.Repeat("é", 200)
	want := hit("a", 0, payload(dirty), func(h *attack.Hit) {
		h.Exchange.Path, h.Exchange.Host = "/"+dirty, dirty[:20]
		h.Exchange.Request.Headers = []attack.Field{{Name: dirty, Value: dirty}, {Name: dirty, Value: ""}}
		h.Exchange.Request.Body, h.Exchange.Request.BodyBytes = []byte(dirty), 1<<40
		h.Exchange.Duration = time.Second
	})
	appendHits(t, s, want)
	list := attacks(t, s.Reader, Filter{})
	got := samples(t, s.Reader, list[0].ID)
	if diff := cmp.Diff([]attack.Hit{want}, got); diff != "" {
		t.Error(diff)
	}
	if p := list[0].Payload; !strings.HasPrefix(dirty, p) || len(p) > maxPayload {
		t.Errorf("payload %q", p)
	}
}

func TestSampleIsBounded(t *testing.T) {
	s := open(t, nil)
	big := strings.Repeat("x", 1<<20)
	appendHits(t, s, hit("a", 0, payload(big), func(h *attack.Hit) {
		x := &h.Exchange
		x.Path, x.Host, x.SNI = "/"+big, big, big
		x.Request.Body, x.Response.Body = []byte(big), []byte(big)
		x.Request.Headers = make([]attack.Field, 10_000)
		x.Response.Headers = []attack.Field{{Name: "a", Value: "b"}, {Name: big, Value: big}}
		h.Matches[0].Message, h.Matches[0].Tags, h.Matches[0].Start, h.Matches[0].End = big, make([]string, 1000), -5, 1<<40
		for range 1000 {
			h.Matches = append(h.Matches, h.Matches[0])
		}
	}))
	a := attacks(t, s.Reader, Filter{})[0]
	got := samples(t, s.Reader, a.ID)[0]
	x, m := got.Exchange, got.Matches[0]
	if len(x.Path) != maxPathBytes || len(x.Host) != maxText || len(x.Request.Body) != maxSampleBody || x.Request.BodyBytes != 1<<20 ||
		len(x.Request.Headers) != maxSampleFields || len(x.Response.Headers) != 1 || !x.Truncated ||
		len(got.Matches) != maxSampleMatches || len(m.Value) != attack.MaxValueBytes || m.Start != 0 || m.End != len(m.Value) || len(m.Tags) != maxSampleTags {
		t.Errorf("not within the limits: path %d, host %d, body %d of %d, headers %d and %d, matches %d",
			len(x.Path), len(x.Host), len(x.Request.Body), x.Request.BodyBytes, len(x.Request.Headers), len(x.Response.Headers), len(got.Matches))
	}
	if len(a.Host) != maxText || len(a.Payload) != maxPayload {
		t.Errorf("host %d, payload %d", len(a.Host), len(a.Payload))
	}
}

func TestSamplesPerHour(t *testing.T) {
	s := open(t, func(c *Config) { c.SamplesPerAttack = 3 })
	var id string
	for i := range 12 { // each payload twice
		touched := appendHits(t, s, hit(fmt.Sprint("a", i), float64(i), payload(fmt.Sprint("../", i/2))))
		id = touched[0].Attack.ID
	}
	// A batch of the next hour, with a payload known from the one before.
	appendHits(t, s, hit("b0", 60, payload("../0")), hit("b1", 60, payload("../0")), hit("b2", 61, payload("../7")))
	var got []string
	for _, h := range samples(t, s.Reader, id) {
		got = append(got, h.ID)
	}
	if diff := cmp.Diff([]string{"b2", "b0", "a4", "a2", "a0"}, got); diff != "" {
		t.Error(diff)
	}
	if a := attacks(t, s.Reader, Filter{})[0]; a.Hits != 15 {
		t.Errorf("%d hits counted, want 15", a.Hits)
	}
}

func TestSamplesOfALongAttack(t *testing.T) {
	s := open(t, func(c *Config) { c.SamplesPerAttack = 2 })
	var id string
	for i := range 30 { // 15 hours
		id = appendHits(t, s, hit(fmt.Sprint(i), float64(30*i), payload(fmt.Sprint("../", i))))[0].Attack.ID
	}
	got := samples(t, s.Reader, id)
	if len(got) != 20 || got[0].ID != "29" || got[19].ID != "10" {
		t.Errorf("%d samples, from %s to %s; want the newest 20", len(got), got[len(got)-1].ID, got[0].ID)
	}
}

func TestDuplicateAfterReopen(t *testing.T) {
	s := open(t, nil)
	appendHits(t, s, hit("a", 0))
	s.recent = newRecentSet(recentIDs) // as after a restart
	if touched := appendHits(t, s, hit("a", 0)); len(touched) != 0 {
		t.Errorf("touched %v", touched)
	}
}

// TestAppendIsAtomic: whatever the error, nothing of the batch is there.
func TestAppendIsAtomic(t *testing.T) {
	tests := map[string]func(*testing.T, *Store) context.Context{
		"cancelled": func(t *testing.T, s *Store) context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx
		},
		"disk full": func(t *testing.T, s *Store) context.Context {
			if _, err := s.write.Exec("PRAGMA max_page_count = 20"); err != nil {
				t.Fatal(err)
			}
			return t.Context()
		},
		"locked": func(t *testing.T, s *Store) context.Context {
			other, err := connect(s.cfg.Path, 1, "")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { other.Close() })
			if _, err := other.Exec("BEGIN IMMEDIATE"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { other.Exec("ROLLBACK") })
			if _, err := s.write.Exec("PRAGMA busy_timeout = 20"); err != nil {
				t.Fatal(err)
			}
			return t.Context()
		},
	}
	remedies := map[string]string{"cancelled": "canceled", "disk full": "free space", "locked": "another process"}
	for name, breakIt := range tests {
		t.Run(name, func(t *testing.T) {
			s := open(t, nil)
			appendHits(t, s, hit("first", 0))
			ctx := breakIt(t, s)
			var hits []attack.Hit
			for i := range 400 {
				hits = append(hits, hit(fmt.Sprint(i), 1, client(fmt.Sprintf("198.51.100.%d", i))))
			}
			_, err := s.Append(ctx, hits)
			if err == nil || !strings.Contains(err.Error(), remedies[name]) {
				t.Fatalf("error %v does not say %q", err, remedies[name])
			}
			if got := attacks(t, s.Reader, Filter{}); len(got) != 1 {
				t.Errorf("%d attacks, want the first one alone", len(got))
			}
			if s.recent.has("3") {
				t.Error("a hit that was not stored counts as seen")
			}
		})
	}
}

func TestRecentSetForgets(t *testing.T) {
	r := newRecentSet(2)
	for _, id := range []string{"a", "b", "b", "c"} {
		r.add(id)
	}
	if r.has("a") || !r.has("b") || !r.has("c") || len(r.seen) != 2 {
		t.Errorf("seen: %v", r.seen)
	}
}

func FuzzDecodeSample(f *testing.F) {
	s := open(f, nil)
	h := hit("a", 0)
	record, err := s.encodeSample(&h)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(record)
	f.Add([]byte{recordVersion})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) { decodeSample(b) }) // must not panic
}

func BenchmarkAppend(b *testing.B) {
	for _, bench := range []struct {
		name   string
		client func(i int) string
	}{
		{"one attack", func(int) string { return "192.0.2.1" }},
		{"50 attacks", func(i int) string { return fmt.Sprintf("192.0.2.%d", i%50) }},
		{"all new", func(i int) string { return fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255) }},
	} {
		b.Run(bench.name, func(b *testing.B) {
			s := open(b, func(c *Config) { c.MaxAttacks = 10_000_000 })
			body := []byte(strings.Repeat(`{"user":"jane","note":"hello"},`, 32)) // 1 KB
			n := 0
			b.ReportAllocs()
			for b.Loop() {
				hits := make([]attack.Hit, 500)
				for i := range hits {
					hits[i] = hit(fmt.Sprint(n), float64(n)/100_000, client(bench.client(n)), payload(fmt.Sprint("../", n)))
					hits[i].Exchange.Request.Body = body
					n++
				}
				if _, err := s.Append(b.Context(), hits); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "hits/s")
		})
	}
}
