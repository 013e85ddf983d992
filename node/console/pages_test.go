package console

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/html"

	"github.com/periscope-mesh/periscope/node/attack"
)

// get requests a page as a browser on the same machine does.
func get(t testing.TB, h http.Handler, target string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.Host = "localhost:8090"
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// dirt is put into every field that traffic can fill. The marker tells where
// it came out.
const marker = "zzx"

func dirtCorpus() []string {
	return []string{
		`<script>alert(1)</script>` + marker,
		`"><img src=x onerror=alert(1)>` + marker,
		`' onmouseover='alert(1)` + marker,
		`javascript:alert(1)//` + marker,
		`</title></textarea></style></script><svg/onload=alert(1)>` + marker,
		`</pre></code><iframe srcdoc="<script>alert(1)</script>">` + marker,
		"`${alert(1)}`{{.}}{{html}}" + marker,
		`<!--<a hx-get="//evil.example" hx-trigger="load">` + marker,
		"\x00\x1b[31m\u202e\u2066\ufeff\xff\xfe<b>" + marker,
		`&lt;script&gt;&#60;script&#62;` + marker,
		`+ADw-script+AD4-` + marker,
		"]]><x:script xmlns:x='http://www.w3.org/1999/xhtml'>" + marker,
	}
}

// dirty is a hit whose every text is s.
func dirty(s string, at time.Time) attack.Hit {
	m := attack.Match{RuleID: 1, Type: attack.Type(s), Severity: attack.Critical, Message: s,
		Tags: []string{"owasp" + s, "capec/" + s, "paranoia-level/" + s}, Value: []byte(s), End: len(s)}
	h := attack.Hit{ID: s, Time: at, Type: attack.Type(s), Severity: attack.Critical, Tenant: s, Application: s, Policy: s, PolicyRev: s,
		Gateway: s, Client: s, Location: attack.Location{Place: attack.Place(s), Name: s}, Weight: 3,
		Exchange: attack.Exchange{Method: s, Scheme: s, Host: s, Path: s, Protocol: s, TLS: s, SNI: s, Route: s, Peer: s, Flags: s, Details: s, Status: 200,
			Request:  attack.Message{Headers: []attack.Field{{Name: s, Value: s}, {Name: "x", Value: s}}, Body: []byte(s), BodyBytes: 1 << 63},
			Response: attack.Message{Headers: []attack.Field{{Name: s, Value: s}}, Body: []byte(s)}}}
	for _, place := range []attack.Place{attack.InPath, attack.InQuery, attack.InHeader, attack.InCookie, attack.InForm, attack.InJSON, attack.InXML,
		attack.InBody, attack.InRequest, attack.InResponse, attack.InRespHeader, attack.InMultipart, attack.InNone} {
		m.Location = attack.Location{Place: place, Name: s}
		h.Matches = append(h.Matches, m)
		m.Excluded = !m.Excluded
	}
	return h
}

// TestStoredXSS: whatever attackers send, the pages have the elements and
// attributes of our templates and nothing else.
func TestStoredXSS(t *testing.T) {
	for i, dirt := range dirtCorpus() {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			store := &fakeStore{}
			id := store.add(9, dirty(dirt, time.Now()))
			store.attacks[0].Path, store.attacks[0].Payload = dirt, dirt
			h := newHandler(t, store, func(c *Config) { c.Version, c.TryCommand = dirt, dirt })
			q := url.QueryEscape(dirt)
			for _, target := range []string{"/attacks", "/attacks/rows", "/attacks/" + id,
				"/attacks?q=" + q + "&gateway=" + q + "&host=" + q + "&tenant=" + q + "&path=" + q,
				"/attacks?type=" + q, "/attacks?cursor=" + q, "/attacks/" + url.PathEscape(dirt), "/static/" + url.PathEscape(dirt), "/" + url.PathEscape(dirt)} {
				w := get(t, h, target)
				if w.Code == http.StatusMovedPermanently || w.Code == http.StatusTemporaryRedirect {
					continue // a path that is not clean
				}
				checkDocument(t, target, w)
			}
		})
	}
}

// checkDocument reads a response as a browser does.
func checkDocument(t *testing.T, target string, w *httptest.ResponseRecorder) {
	t.Helper()
	if got := w.Header().Get("Content-Security-Policy"); got != policyCSP {
		t.Errorf("%s: policy %q", target, got)
	}
	if ct := w.Header().Get("Content-Type"); ct != "text/html; charset=utf-8" {
		t.Errorf("%s: content type %q", target, ct)
	}
	doc, err := html.Parse(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	elements := strings.Fields(`html head meta title link script body a header div svg path circle rect span nav p main footer h1 h2 h3 search form label
		input select option button datalist section table caption thead tbody tr th td code strong mark time dl dt dd pre b details summary`)
	scripts := 0
	for n := range doc.Descendants() {
		if n.Type == html.TextNode {
			checkText(t, target, n.Data)
		}
		if n.Type == html.CommentNode {
			t.Errorf("%s: a comment: %s", target, n.Data)
		}
		if n.Type != html.ElementNode {
			continue
		}
		if !slices.Contains(elements, n.Data) {
			t.Errorf("%s: unexpected element <%s>", target, n.Data)
		}
		if n.Data == "script" {
			scripts++
			if n.FirstChild != nil {
				t.Errorf("%s: an inline script", target)
			}
		}
		checkAttributes(t, target, n)
	}
	if scripts > 2 {
		t.Errorf("%s: %d scripts", target, scripts)
	}
}

// checkText finds characters that would make a text look like another one.
func checkText(t *testing.T, target, text string) {
	t.Helper()
	for _, r := range text {
		if r < ' ' && r != '\n' || r == 0x7f || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0xfeff {
			t.Errorf("%s: the page shows the raw character %U", target, r)
			return
		}
	}
}

func checkAttributes(t *testing.T, target string, n *html.Node) {
	t.Helper()
	free := map[string]bool{"value": true, "title": true, "content": true} // texts, never code or addresses
	for _, a := range n.Attr {
		if a.Key == "title" {
			checkText(t, target, a.Val)
		}
		switch {
		case strings.HasPrefix(a.Key, "on") || a.Key == "style" || a.Key == "srcdoc":
			t.Errorf("%s: <%s %s>", target, n.Data, a.Key)
		case a.Key == "href" || a.Key == "src" || a.Key == "action" || strings.HasPrefix(a.Key, "hx-get"):
			if !strings.HasPrefix(a.Val, "/") && a.Val != "#main" || strings.HasPrefix(a.Val, "//") {
				t.Errorf("%s: <%s %s=%q>", target, n.Data, a.Key, a.Val)
			}
		case strings.Contains(a.Val, marker) && !free[a.Key]:
			t.Errorf("%s: dirt in <%s %s=%q>", target, n.Data, a.Key, a.Val)
		}
	}
}

func TestGuard(t *testing.T) {
	h := newHandler(t, &fakeStore{}, func(c *Config) { c.AllowedHosts = []string{"console.example"} })
	tests := map[string]struct {
		method, host, target string
		want                 int
	}{
		"localhost":             {"GET", "localhost:8090", "/attacks", 200},
		"localhost, any case":   {"GET", "LocalHost.", "/attacks", 200},
		"loopback address":      {"GET", "127.8.9.1:8090", "/attacks", 200},
		"loopback IPv6":         {"GET", "[::1]:8090", "/attacks", 200},
		"loopback IPv6 alone":   {"GET", "[::1]", "/attacks", 200},
		"allowed":               {"GET", "Console.Example:443", "/attacks", 200},
		"rebound name":          {"GET", "evil.example:8090", "/attacks", 421},
		"rebound name, API":     {"GET", "evil.example", "/api/v1/attacks", 421},
		"looks like localhost":  {"GET", "localhost.evil.example", "/attacks", 421},
		"other address":         {"GET", "192.0.2.1:8090", "/attacks", 421},
		"none":                  {"GET", "", "/attacks", 421},
		"HEAD":                  {"HEAD", "localhost", "/attacks", 200},
		"HEAD, API":             {"HEAD", "localhost", "/api/v1/attacks", 200},
		"POST":                  {"POST", "localhost", "/attacks", 405},
		"DELETE":                {"DELETE", "localhost", "/api/v1/attacks/x", 405},
		"OPTIONS":               {"OPTIONS", "localhost", "/api/v1/attacks", 405},
		"long query":            {"GET", "localhost", "/attacks?q=" + strings.Repeat("a", maxQueryBytes), 414},
		"long value":            {"GET", "localhost", "/attacks?q=" + strings.Repeat("a", 300), 400},
		"bad type":              {"GET", "localhost", "/attacks?type=nonsense", 400},
		"bad severity":          {"GET", "localhost", "/attacks?severity=9", 400},
		"bad range":             {"GET", "localhost", "/attacks?range=9y", 400},
		"bad time":              {"GET", "localhost", "/attacks?since=yesterday", 400},
		"bad cursor":            {"GET", "localhost", "/attacks?cursor=nonsense", 400},
		"unknown attack":        {"GET", "localhost", "/attacks/none", 404},
		"unknown page":          {"GET", "localhost", "/nothing", 404},
		"unknown file":          {"GET", "localhost", "/static/layout.html", 404},
		"no listing":            {"GET", "localhost", "/static/", 404},
		"home":                  {"GET", "localhost", "/", 302},
		"tracking is no filter": {"GET", "localhost", "/attacks?utm_source=x", 200},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest(tt.method, tt.target, nil)
			r.Host = tt.host
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != tt.want {
				t.Errorf("status %d, want %d: %s", w.Code, tt.want, w.Body)
			}
			for header, want := range map[string]string{"Content-Security-Policy": policyCSP, "X-Content-Type-Options": "nosniff",
				"Referrer-Policy": "no-referrer", "Cache-Control": "no-store"} {
				if got := w.Header().Get(header); got != want {
					t.Errorf("%s: %q, want %q", header, got, want)
				}
			}
		})
	}
}

// TestListState: the filter is in the URL, the form shows it, and the store
// gets it.
func TestListState(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	store := &fakeStore{}
	h := newHandler(t, store, func(c *Config) { c.Now = func() time.Time { return now } })
	w := get(t, h, "/attacks?type=xss&severity=error&gateway=g+1&client=192.0.2.1&q=a%26b&range=24h&host=h&path=/p&tenant=t&application=ap&until=2026-05-04T11:00:00Z")
	want := Filter{Types: []attack.Type{attack.XSS}, MinSeverity: attack.Error, Gateway: "g 1", Client: "192.0.2.1", Search: "a&b", Host: "h",
		PathPrefix: "/p", Tenant: "t", Application: "ap", Since: now.Add(-24 * time.Hour), Until: now.Add(-time.Hour)}
	if diff := cmp.Diff(want, store.filter); diff != "" {
		t.Error(diff)
	}
	page := html.UnescapeString(w.Body.String())
	for _, want := range []string{`<option value="xss" selected>`, `<option value="error" selected>`, `value="g 1"`, `value="192.0.2.1"`, `value="a&amp;b"`,
		`<option value="24h" selected>`, `Remove this filter`, `name="host" value="h"`,
		`hx-get="/attacks/rows?application=ap&client=192.0.2.1&gateway=g+1&host=h`} {
		if !strings.Contains(page, html.UnescapeString(want)) {
			t.Errorf("the page lacks %s", want)
		}
	}
}

// TestRefresh: 204 while nothing changed, the table when something did.
func TestRefresh(t *testing.T) {
	store := &fakeStore{}
	h := newHandler(t, store)
	for range 60 { // two pages
		seed(store, time.Now().Add(-time.Duration(len(store.attacks))*time.Minute))
	}
	poll := func(w *httptest.ResponseRecorder) string {
		_, rest, ok := strings.Cut(w.Body.String(), `hx-get="/attacks/rows`)
		if !ok {
			return ""
		}
		target, _, _ := strings.Cut(rest, `"`)
		return "/attacks/rows" + html.UnescapeString(target)
	}
	first := poll(get(t, h, "/attacks"))
	if w := get(t, h, first); w.Code != http.StatusNoContent || w.Body.Len() > 0 {
		t.Errorf("unchanged: %d", w.Code)
	}
	store.mu.Lock()
	store.attacks[0].Hits++
	store.mu.Unlock()
	w := get(t, h, first)
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Body.String(), `<section id="results"`) || poll(w) == first {
		t.Errorf("changed: %d %.80s", w.Code, w.Body)
	}
	if got := poll(get(t, h, "/attacks?cursor=50")); got != "" {
		t.Errorf("a later page refreshes itself: %s", got)
	}
}

func TestStoreErrorIsNotShown(t *testing.T) {
	store := &fakeStore{}
	id := seed(store, time.Now())
	store.err = errors.New("secret path of the file")
	h := newHandler(t, store)
	for _, target := range []string{"/attacks", "/attacks/rows", "/attacks/" + id, "/api/v1/attacks", "/api/v1/attacks/" + id} {
		w := get(t, h, target)
		if w.Code != http.StatusInternalServerError || strings.Contains(w.Body.String(), "secret") {
			t.Errorf("%s: %d %s", target, w.Code, w.Body)
		}
	}
}

func TestNewErrors(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("an empty config is accepted")
	}
	cfg := Config{Store: &fakeStore{}, Registerer: prometheus.NewRegistry()}
	if _, err := New(cfg); err == nil {
		t.Error("no logger is accepted")
	}
}

// TestVendored compares what we took from others with its checksum, and keeps
// the script budget.
func TestVendored(t *testing.T) {
	readme, err := files.ReadFile("assets/README.md")
	if err != nil {
		t.Fatal(err)
	}
	script, err := files.ReadFile("assets/htmx.min.js")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(script)
	if !strings.Contains(string(readme), hex.EncodeToString(sum[:])) {
		t.Errorf("htmx.min.js has the SHA-256 %x, which assets/README.md does not name", sum)
	}
	own, err := files.ReadFile("assets/console.js")
	if err != nil {
		t.Fatal(err)
	}
	if total := len(script) + len(own); total > 103<<10 {
		t.Errorf("%d bytes of script, at most 103 KiB", total)
	}
}

func TestStaticCaching(t *testing.T) {
	h := newHandler(t, &fakeStore{})
	page := get(t, h, "/attacks").Body.String()
	_, rest, _ := strings.Cut(page, `href="/static/console.css`)
	query, _, _ := strings.Cut(rest, `"`)
	w := get(t, h, "/static/console.css"+query)
	if w.Code != 200 || !strings.Contains(w.Header().Get("Cache-Control"), "immutable") || w.Header().Get("Content-Type") != "text/css; charset=utf-8" {
		t.Errorf("%d %v", w.Code, w.Header())
	}
	if w := get(t, h, "/static/console.css?v=old"); w.Header().Get("Cache-Control") != "no-cache" {
		t.Errorf("an old version is kept: %v", w.Header())
	}
}

func TestMetricsAreClosed(t *testing.T) {
	registry := prometheus.NewRegistry()
	h := newHandler(t, &fakeStore{}, func(c *Config) { c.Registerer = registry })
	for _, target := range []string{"/attacks", "/attacks/a", "/attacks/b", "/x", "/y", "/static/q", "/api/v1/nothing", "/api/v1/attacks/a/hits"} {
		get(t, h, target)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var routes []string
	for _, f := range families {
		if f.GetName() != "periscope_console_requests_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "route" {
					routes = append(routes, l.GetValue())
				}
			}
		}
	}
	want := []string{"/", "/api/", "/api/v1/attacks/{id}/hits", "/attacks", "/attacks/{id}", "/static/{name}"}
	if diff := cmp.Diff(want, routes); diff != "" {
		t.Error(diff)
	}
}
