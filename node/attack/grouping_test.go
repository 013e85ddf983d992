package attack

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestPathTemplate(t *testing.T) {
	for in, want := range map[string]string{
		"":                       "/",
		"/":                      "/",
		"/etc/passwd":            "/etc/passwd",
		"/api/v1/users/42":       "/api/v1/users/{id}",
		"/api/v1/users/42?x=1#y": "/api/v1/users/{id}",
		"/users/42/":             "/users/{id}/",
		"/o/7f1a2b3c":            "/o/{id}",
		"/o/deadbeef":            "/o/deadbeef", // a word until a digit says otherwise
		"/cafe/menu":             "/cafe/menu",
		"/o/0190163d-8694-739b-aea5-966c26f8ad91":   "/o/{id}",
		"/o/0190163D-8694-739B-AEA5-966C26F8AD91/x": "/o/{id}/x",
		"/d/dGhpcyBpcyBhIHRlc3Q0Mg==":               "/d/{id}",
		"/t/eyJhbGciOiJIUzI1NiJ9abc12345":           "/t/{id}",
		"/blog/how-to-write-tests-in-2024":          "/blog/how-to-write-tests-in-2024",
		"/products/iphone15":                        "/products/iphone15",
		"/static/app.3f2a9c1b.js":                   "/static/app.3f2a9c1b.js",
		"/a\x00b/\xff\xfe":                          "/a?b/??",
		"/%2e%2e/%2e%2e/etc/passwd":                 "/%2e%2e/%2e%2e/etc/passwd",
		"no/slash/7":                                "no/slash/{id}",
		"/ü/ñ":                                      "/ü/ñ",
	} {
		if got := PathTemplate(in); got != want {
			t.Errorf("PathTemplate(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestPathTemplateIsBounded(t *testing.T) {
	for name, in := range map[string]string{
		"traversal": strings.Repeat("/..", 5000) + "/etc/passwd",
		"long":      "/" + strings.Repeat("x.", 5000),
		"token":     "/" + strings.Repeat("a1B2", 5000),
		"runes":     "/" + strings.Repeat("語", 500),
		"binary":    "/" + strings.Repeat("\x80", 500),
	} {
		got := PathTemplate(in)
		checkTemplate(t, got)
		if name == "traversal" && !strings.HasSuffix(got, "…") {
			t.Errorf("%s: %q does not say that it is cut", name, got)
		}
		if name == "token" && got != "/{id}" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func checkTemplate(t *testing.T, got string) {
	t.Helper()
	if len(got) == 0 || len(got) > 256 || !utf8.ValidString(got) || strings.Count(got, "/") > 17 {
		t.Errorf("template out of bounds: %q", got)
	}
	for _, r := range got {
		if !unicode.IsPrint(r) {
			t.Errorf("template %q holds %U", got, r)
		}
	}
}

func FuzzPathTemplate(f *testing.F) {
	for _, seed := range []string{"/", "/a/1?b", "/../../etc/passwd", "/\xff\x00", "/" + strings.Repeat("9", 5000), "/\u202ex"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		got := PathTemplate(path)
		checkTemplate(t, got)
		if again := PathTemplate(path); again != got {
			t.Errorf("not stable: %q, then %q", got, again)
		}
	})
}

func TestKey(t *testing.T) {
	base := Hit{
		Tenant: "shop", Application: "front", Gateway: "gw-1", Type: PathTraversal, Client: "192.0.2.7",
		Location: Location{Place: InQuery, Name: "file"},
		Exchange: Exchange{Method: "GET", Host: "a.example", Path: "/users/1?file=/etc/passwd"},
	}
	key := Key(base)
	if len(key) != 32 {
		t.Fatalf("key %q", key)
	}
	same := map[string]func(*Hit){
		"other id":       func(h *Hit) { h.Exchange.Path = "/users/2?file=/etc/shadow" },
		"other payload":  func(h *Hit) { h.Matches = []Match{{RuleID: 1}} },
		"host case":      func(h *Hit) { h.Exchange.Host = "A.Example" },
		"mapped address": func(h *Hit) { h.Client = "::ffff:192.0.2.7" },
		"policy":         func(h *Hit) { h.PolicyRev = "7" },
	}
	for name, change := range same {
		h := base
		if change(&h); Key(h) != key {
			t.Errorf("%s: another key", name)
		}
	}
	other := map[string]func(*Hit){
		"tenant":      func(h *Hit) { h.Tenant = "x" },
		"application": func(h *Hit) { h.Application = "x" },
		"gateway":     func(h *Hit) { h.Gateway = "x" },
		"type":        func(h *Hit) { h.Type = XSS },
		"client":      func(h *Hit) { h.Client = "192.0.2.8" },
		"place":       func(h *Hit) { h.Location.Place = InForm },
		"name":        func(h *Hit) { h.Location.Name = "x" },
		"method":      func(h *Hit) { h.Exchange.Method = "POST" },
		"host":        func(h *Hit) { h.Exchange.Host = "b.example" },
		"path":        func(h *Hit) { h.Exchange.Path = "/orders/1" },
		"shifted":     func(h *Hit) { h.Tenant, h.Application = "shopf", "ront" },
	}
	for name, change := range other {
		h := base
		if change(&h); Key(h) == key {
			t.Errorf("%s: the same key", name)
		}
	}
	a, b, c := base, base, base
	a.Client, b.Client, c.Client = "2001:db8:1:2::1", "2001:db8:1:2:ffff::9%eth0", "2001:db8:1:3::1"
	if Key(a) != Key(b) || Key(a) == Key(c) {
		t.Error("IPv6 clients are not grouped by /64")
	}
}

func TestID(t *testing.T) {
	at := time.Unix(1700000000, 5)
	id := ID("k", at)
	if len(id) != 16 || strings.Trim(id, "0123456789abcdefghijklmnopqrstuv") != "" {
		t.Errorf("id %q", id)
	}
	if ID("k", at.UTC()) != id || ID("k", at.Add(1)) == id || ID("l", at) == id {
		t.Error("an id must depend on key and instant alone")
	}
}

func TestTypes(t *testing.T) {
	seen := map[string]bool{}
	for _, typ := range Types() {
		title := typ.Title()
		if seen[title] || title == "" || (title == "Other" && typ != Other) {
			t.Errorf("%s: title %q", typ, title)
		}
		seen[title] = true
	}
	if Type("x").Title() != "Other" {
		t.Error("an unknown type has no title")
	}
}

func TestSeverityJSON(t *testing.T) {
	for s := Notice; s <= Critical; s++ {
		b, err := json.Marshal(Match{Severity: s})
		if err != nil || !strings.Contains(string(b), `"severity":"`+s.String()+`"`) {
			t.Errorf("%v: %s, %v", s, b, err)
		}
		var m Match
		if err := json.Unmarshal(b, &m); err != nil || m.Severity != s {
			t.Errorf("%v came back as %v, %v", s, m.Severity, err)
		}
	}
	var s Severity
	for _, bad := range []string{`"fatal"`, `""`, `"unknown"`, `{}`} {
		if err := json.Unmarshal([]byte(bad), &s); err == nil {
			t.Errorf("%s was read as %v", bad, s)
		}
	}
	if _, err := json.Marshal(Severity(9)); err == nil {
		t.Error("a severity without a word was written")
	}
	if Critical.Score() != 5 || Error.Score() != 4 || Warning.Score() != 3 || Notice.Score() != 2 || Severity(0).Score() != 0 {
		t.Error("scores are not those of CRS")
	}
}
