package console

import (
	"bytes"
	"math"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/node/attack"
)

// flat writes runs as text: [marked], (silenced), {escape}, «note».
func flat(list []run) string {
	var b strings.Builder
	for _, r := range list {
		around := map[string]string{"hit": "[]", "silenced": "()"}[r.Mark]
		if around != "" {
			b.WriteByte(around[0])
		}
		for _, p := range r.Pieces {
			switch p.Kind {
			case "esc":
				b.WriteString("{" + p.Text + "}")
			case "note":
				b.WriteString("«" + p.Text + "»")
			default:
				b.WriteString(p.Text)
			}
		}
		if around != "" {
			b.WriteByte(around[1])
		}
	}
	return b.String()
}

func TestRuns(t *testing.T) {
	long := strings.Repeat("a", 2000) + "NEEDLE" + strings.Repeat("b", 2000)
	tests := map[string]struct {
		data  string
		marks []span
		limit int
		want  string
	}{
		"plain":           {"abc", nil, 100, "abc"},
		"marked":          {"abc", []span{{1, 2, false}}, 100, "a[b]c"},
		"overlapping":     {"abcdef", []span{{1, 3, false}, {2, 4, false}}, 100, "a[bcd]ef"},
		"silenced":        {"abcdef", []span{{1, 5, true}, {2, 3, false}}, 100, "a(b)[c](de)f"},
		"out of bounds":   {"abc", []span{{-5, 99, false}}, 100, "[abc]"},
		"controls":        {"a\x00\x1b\r\n\tb\x7f", nil, 100, "a{\\x00\\x1b\\r}\n{\\t}b{\\x7f}"},
		"bidi":            {"a\u202eb\u2067", nil, 100, "a{‹U+202E›}b{‹U+2067›}"},
		"invisible":       {"a\u200b\u00a0\ufeff\u2028", nil, 100, "a{‹U+200B›‹U+00A0›‹U+FEFF›‹U+2028›}"},
		"C1":              {"\u0085\u009b", nil, 100, "{‹U+0085›‹U+009B›}"},
		"invalid UTF-8":   {"a\xff\xc3b", nil, 100, "a{\\xff\\xc3}b"},
		"letters":         {"añ日本😀", nil, 100, "añ日本😀"},
		"stacked accents": {"e\u0301\u0301\u0301\u0301", nil, 100, "e\u0301\u0301{‹U+0301›‹U+0301›}"},
		"escape in mark":  {"a\x00b", []span{{1, 2, false}}, 100, "a[{\\x00}]b"},
		"cut":             {strings.Repeat("a", 200), nil, 100, strings.Repeat("a", 100) + "«[100 bytes not shown]»"},
		"cut around mark": {long, []span{{2000, 2006, false}}, 1200,
			strings.Repeat("a", 300) + "«[1\u202f188 bytes not shown]»" + strings.Repeat("a", 512) + "[NEEDLE]" + strings.Repeat("b", 382) + "«[1\u202f618 bytes not shown]»"},
		"empty": {"", nil, 100, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, flat(runs([]byte(tt.data), tt.marks, tt.limit))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzRuns(f *testing.F) {
	f.Add([]byte("abc\x00\u202e"), 1, 2, 10)
	f.Add([]byte("\xff\xfe\xf0\x9f"), -1, 99, 2)
	f.Fuzz(func(t *testing.T, data []byte, start, end, limit int) {
		for _, r := range runs(data, []span{{start, end, false}}, max(limit, 0)) {
			for _, p := range r.Pieces {
				if !utf8.ValidString(p.Text) || strings.ContainsAny(p.Text, "\x00\x1b\r\u202e\u2066") {
					t.Errorf("not safe to show: %q", p.Text)
				}
			}
		}
	})
}

// TestLocate marks a match in an exchange and shows the part it should be in.
func TestLocate(t *testing.T) {
	at := func(place attack.Place, name string) attack.Location {
		return attack.Location{Place: place, Name: name}
	}
	header := func(name, value string) []attack.Field {
		return []attack.Field{{Name: "accept", Value: "*/*"}, {Name: name, Value: value}}
	}
	tests := map[string]struct {
		x     attack.Exchange
		at    attack.Location
		value string
		part  string // the matched part; all if empty
		want  string // path, request headers' values and body, then the response's
	}{
		"path":                   {attack.Exchange{Path: "/a/../../etc/passwd?x=etc/passwd"}, at(attack.InPath, ""), "/a/../../etc/passwd", "etc/passwd", "/a/../../[etc/passwd]?x=etc/passwd"},
		"path, encoded":          {attack.Exchange{Path: "/a/%2e%2e%2Fetc"}, at(attack.InPath, ""), "/a/../etc", "../", "/a/[%2e%2e%2F]etc"},
		"path, twice encoded":    {attack.Exchange{Path: "/a/%252e%252e%252fetc"}, at(attack.InPath, ""), "/a/../etc", "../", "/a/[%252e%252e%252f]etc"},
		"query":                  {attack.Exchange{Path: "/?a=1'&b=1'"}, at(attack.InQuery, "b"), "1'", "", "/?a=1'&b=[1']"},
		"query, encoded":         {attack.Exchange{Path: "/?q=1%27+OR%201%3d1&z"}, at(attack.InQuery, "q"), "1' OR 1=1", "OR 1", "/?q=1%27+[OR%201]%3d1&z"},
		"query, name encoded":    {attack.Exchange{Path: "/?%71=x&q2=x"}, at(attack.InQuery, "q"), "x", "", "/?%71=[x]&q2=x"},
		"query, %u":              {attack.Exchange{Path: "/?q=%u003cscript>"}, at(attack.InQuery, "q"), "<script>", "", "/?q=[%u003cscript>]"},
		"query, lower-cased":     {attack.Exchange{Path: "/?q=UnIoN"}, at(attack.InQuery, "q"), "union", "", "/?q=[UnIoN]"},
		"query, name itself":     {attack.Exchange{Path: "/?<script>=1"}, at(attack.InQuery, "<script>"), "<script>", "", "/?[<script>]=1"},
		"query, value transform": {attack.Exchange{Path: "/?q=aaXYZbb"}, at(attack.InQuery, "q"), "changed XYZ changed", "XYZ", "/?q=aa[XYZ]bb"},
		"header":                 {attack.Exchange{Request: attack.Message{Headers: header("User-Agent", "() { :;}; id")}}, at(attack.InHeader, "user-agent"), "() { :;}; id", "() {", "|*/*|[() {] :;}; id"},
		"host":                   {attack.Exchange{Host: "1.2.3.4"}, at(attack.InHeader, "host"), "1.2.3.4", "", "|[1.2.3.4]"},
		"cookie":                 {attack.Exchange{Request: attack.Message{Headers: header("cookie", "a=x; s=x")}}, at(attack.InCookie, "s"), "x", "", "|*/*|a=x; s=[x]"},
		"form":                   {attack.Exchange{Request: attack.Message{Body: []byte("a=%3Cb%3E&c=%3Cb%3E")}}, at(attack.InForm, "c"), "<b>", "", "|a=%3Cb%3E&c=[%3Cb%3E]"},
		"JSON":                   {attack.Exchange{Request: attack.Message{Body: []byte(`{"a":"x","u":{"n":["y","x"]}}`)}}, at(attack.InJSON, "$.u.n[1]"), "x", "", `|{"a":"x","u":{"n":["y","[x]"]}}`},
		"JSON, CRS's name":       {attack.Exchange{Request: attack.Message{Body: []byte(`{"a":"x","u":{"n":["y","x"]}}`)}}, at(attack.InJSON, "json.u.n.1"), "x", "", `|{"a":"x","u":{"n":["y","[x]"]}}`},
		"JSON, escaped":          {attack.Exchange{Request: attack.Message{Body: []byte(`{"a":"\u003cscript\u003e\"\/"}`)}}, at(attack.InJSON, "$.a"), `<script>"/`, "script", `|{"a":"\u003c[script]\u003e\"\/"}`},
		"JSON, number":           {attack.Exchange{Request: attack.Message{Body: []byte(`{"b": 17, "a": 17}`)}}, at(attack.InJSON, "$.a"), "17", "", `|{"b": 17, "a": [17]}`},
		"JSON, cut":              {attack.Exchange{Request: attack.Message{Body: []byte(`{"a":"x","b":"evil`)}}, at(attack.InJSON, "$.b"), "evil", "", `|{"a":"x","b":"[evil]`},
		"body":                   {attack.Exchange{Request: attack.Message{Body: []byte("\x00evil\xff")}}, at(attack.InBody, ""), "evil", "", "|{\\x00}[evil]{\\xff}"},
		"response":               {attack.Exchange{Request: attack.Message{Body: []byte("leak")}, Response: attack.Message{Body: []byte("a leak")}}, at(attack.InResponse, ""), "leak", "", "|leak|a [leak]"},
		"response header":        {attack.Exchange{Response: attack.Message{Headers: header("x-powered-by", "PHP/5")}}, at(attack.InRespHeader, "X-Powered-By"), "PHP/5", "", "||*/*|[PHP/5]"},
		"not in the copy":        {attack.Exchange{Path: "/?q=abc"}, at(attack.InQuery, "q"), "evil", "", "/?q=abc"},
		"empty value":            {attack.Exchange{Path: "/?q=abc"}, at(attack.InQuery, "q"), "", "", "/?q=abc"},
		"request":                {attack.Exchange{Path: "/x", Request: attack.Message{Headers: header("a", "evil")}}, at(attack.InRequest, ""), "evil", "", "/x|*/*|[evil]"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			part := tt.part
			if part == "" {
				part = tt.value
			}
			m := match(1, attack.XSS, "", tt.at, tt.value, part)
			out, found := locate(&tt.x, []attack.Match{m})
			if found[0] != strings.Contains(tt.want, "[") {
				t.Errorf("found: %v", found[0])
			}
			show := func(msg *markedMessage, body []byte) string {
				s := ""
				for i, f := range msg.fields {
					s += "|" + flat(runs([]byte(f.Value), msg.headers[i], 1000))
				}
				if len(body) > 0 {
					s += "|" + flat(runs(body, msg.body, 1000))
				}
				return s
			}
			got := flat(runs([]byte(tt.x.Path), out.path, 1000)) + show(&out.request, tt.x.Request.Body)
			if r := show(&out.response, tt.x.Response.Body); r != "" {
				got += strings.Repeat("|", strings.Count(tt.want, "||")) + r
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzLocate(f *testing.F) {
	f.Add("/a%2f?q=%u0041", `{"a":["\u0041\ud83d\ude00"]}`, "$.a[0]", "A", 0, 1)
	f.Add("/", `[[[[`, "", "", -1, 5)
	f.Fuzz(func(t *testing.T, path, body, name, value string, start, end int) {
		x := attack.Exchange{Path: path, Host: value, Request: attack.Message{Headers: []attack.Field{{Name: name, Value: body}, {Name: "cookie", Value: body}}, Body: []byte(body)}}
		var matches []attack.Match
		for _, place := range []attack.Place{attack.InPath, attack.InQuery, attack.InHeader, attack.InCookie, attack.InForm, attack.InJSON, attack.InRequest} {
			matches = append(matches, attack.Match{Location: attack.Location{Place: place, Name: name}, Value: []byte(value), Start: start, End: end})
		}
		out, _ := locate(&x, matches)
		for _, s := range out.path {
			if s.start < 0 || s.start > s.end || s.end > len(path) {
				t.Errorf("mark %v of a path of %d bytes", s, len(path))
			}
		}
		for _, s := range out.request.body {
			if s.start < 0 || s.start > s.end || s.end > len(body) {
				t.Errorf("mark %v of a body of %d bytes", s, len(body))
			}
		}
	})
}

func TestCurl(t *testing.T) {
	tests := map[string]struct {
		x    attack.Exchange
		want string
	}{
		"get": {attack.Exchange{Method: "GET", Scheme: "https", Host: "shop.example:8443", Path: "/a?b=../etc"},
			`curl -i --path-as-is --globoff 'https://shop.example:8443/a?b=../etc'`},
		"headers": {attack.Exchange{Method: "GET", Host: "h", Path: "/", Request: attack.Message{Headers: []attack.Field{
			{Name: "X-A", Value: "it's"}, {Name: "empty", Value: ""}, {Name: "authorization", Value: "***"}, {Name: "content-length", Value: "5"},
			{Name: "@/etc/passwd", Value: "x"}, {Name: "bad name", Value: "x"}, {Name: "x-envoy-external-address", Value: "x"}}}},
			`curl -i --path-as-is --globoff -H 'X-A: it'\''s' -H 'empty;' -H 'authorization: <masked>' 'http://h/'`},
		"body": {attack.Exchange{Method: "POST", Host: "h", Path: "/", Request: attack.Message{Body: []byte(`@/etc/passwd {"p":"***"}`),
			Headers: []attack.Field{{Name: "content-type", Value: "a/b"}}}},
			`curl -i --path-as-is --globoff -X 'POST' -H 'content-type: a/b' --data-raw '@/etc/passwd {"p":"<masked>"}' 'http://h/'`},
		"masked values": {attack.Exchange{Method: "POST", Host: "h", Path: "/a?b=***&c=****-****&d=***", Request: attack.Message{Body: []byte("p=***&q=*"),
			Headers: []attack.Field{{Name: "cookie", Value: "a=1; sid=***; b=2"}, {Name: "content-type", Value: "a/b"}}}},
			`curl -i --path-as-is --globoff -X 'POST' -H 'cookie: a=1; sid=<masked>; b=2' -H 'content-type: a/b' --data-raw 'p=<masked>&q=*' 'http://h/a?b=<masked>&c=****-****&d=<masked>'`},
		"bytes": {attack.Exchange{Method: "PUT", Host: "h", Path: "/", Request: attack.Message{Body: []byte("a\n'\\\x1b\xff\u202e")}},
			`curl -i --path-as-is --globoff -X 'PUT' -H 'content-type:' --data-raw $'a\n\'\\\x1b\xff\xe2\x80\xae' 'http://h/'`},
		"NUL": {attack.Exchange{Method: "POST", Host: "h", Path: "/", Request: attack.Message{Body: []byte("a\x00'%b")}},
			`printf -- 'a\000\047\045b' | curl -i --path-as-is --globoff -X 'POST' -H 'content-type:' --data-binary @- 'http://h/'`},
		"hostile target": {attack.Exchange{Method: "-X; rm", Scheme: "file", Host: "-o/tmp/x", Path: "*"},
			`curl -i --path-as-is --globoff --request-target '*' 'http://HOST/'`},
		"fragment": {attack.Exchange{Method: "GET", Host: "h", Path: "/a#b"}, `curl -i --path-as-is --globoff --request-target '/a#b' 'http://h/'`},
		"head":     {attack.Exchange{Method: "HEAD", Host: "h", Path: ""}, `curl -i --path-as-is --globoff --head 'http://h/'`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, _ := curlCommand(&tt.x)
			if diff := cmp.Diff(tt.want, strings.ReplaceAll(got, curlIndent, " ")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestShellQuote lets a real shell read the words back.
func TestShellQuote(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil && os.Getenv("REQUIRE_REAL") != "" {
		t.Fatal("no bash: apt-get install bash")
	}
	if err != nil {
		t.Skip("no bash: apt-get install bash")
	}
	for _, s := range []string{"", "a b", "it's", `\`, "$(id)`id`$HOME", "-n", "a\nb\r\t", "\x01\x7f\xff\xfe", "\u202e😀", `\x41\`, "'\\''", "!!"} {
		out, err := exec.Command(bash, "-c", "printf %s "+shellQuote(s)).Output()
		if err != nil || string(out) != s {
			t.Errorf("%q becomes %q (%v)", s, out, err)
		}
		body := []byte(s + "\x00%s\\")
		out, err = exec.Command(bash, "-c", "printf -- "+printfQuote(body)).Output()
		if err != nil || !bytes.Equal(out, body) {
			t.Errorf("printf: %q becomes %q (%v)", body, out, err)
		}
	}
}

func TestChart(t *testing.T) {
	at := func(minutes int) time.Time { return time.Date(2026, 5, 4, 12, minutes, 0, 0, time.UTC) }
	if newChart(nil) != nil {
		t.Error("a chart of nothing")
	}
	one := newChart([]Minute{{at(0), counted(1, 1)}})
	if len(one.Bars) != 1 || one.Width != minBars*barStride || one.Summary != "1 hit between 2026-05-04 12:00 and 2026-05-04 12:01 UTC; most per minute: 1 at 12:00" {
		t.Errorf("%+v", one)
	}
	week := newChart([]Minute{{at(0), counted(1, 1)}, {at(120), counted(5000, 1)}, {at(7 * 24 * 60), counted(2, 1)}})
	if len(week.Bars) != 3 || week.Width > maxBars*barStride || week.Step != "2 hours" || week.Peak != "5\u202f000" {
		t.Errorf("%+v", week)
	}
	for _, b := range week.Bars {
		if b.Height < 3 || b.Y+b.Height != week.Height || b.X+b.Width > week.Width {
			t.Errorf("bar %+v", b)
		}
	}
	// Of a sample, estimates are drawn: two hits of weight 100 are more than fifty.
	sampled := newChart([]Minute{{at(0), counted(50, 1)}, {at(1), counted(2, 100)}})
	if b := sampled.Bars; b[0].Height != barHeight/4 || b[1].Height != barHeight || !strings.HasSuffix(b[0].Title, "UTC: 50 hits") ||
		!strings.HasSuffix(b[1].Title, "UTC: ≈\u202f200 ±\u202f141 hits") || !strings.HasPrefix(sampled.Summary, "≈\u202f250 ±\u202f141 hits between") {
		t.Errorf("%+v", sampled)
	}
}

func TestAbout(t *testing.T) {
	for want, c := range map[string]attack.Count{
		"120": counted(120, 1), "1\u202f234": counted(1234, 1), "≈\u202f120 ±\u202f22": counted(24, 5), "≈\u202f2\u202f000\u202f000 ±\u202f1\u202f414\u202f213": counted(2, 1e6),
		"≈\u202f1.1 ±\u202f0.3": counted(1, 1.1), "≈\u202f21 ±\u202f19": {Hits: 2, Estimated: 21, Variance: 380},
		"≈\u202f4\u202f611\u202f686\u202f018\u202f427\u202f387\u202f904 ±\u202f4\u202f611\u202f686\u202f018\u202f427\u202f387\u202f904": {Hits: 1, Estimated: 1e300, Variance: math.Inf(1)},
	} {
		if got := about(c); got != want {
			t.Errorf("%+v: %q, want %q", c, got, want)
		}
	}
}

func TestRuleRows(t *testing.T) {
	a := attack.Attack{RuleIDs: []int{3, 9}}
	hits := []attack.Hit{
		{Matches: []attack.Match{
			{RuleID: 3, Message: "three", Severity: attack.Error, Tags: []string{"OWASP_CRS", "paranoia-level/2", "capec/1000/152/248/66", "OWASP_CRS/ATTACK-SQLI"}},
			{RuleID: 3, Message: "three", Severity: attack.Error, Excluded: true},
			{RuleID: 5, Message: "five", Excluded: true}}},
		{Matches: []attack.Match{{RuleID: 5, Message: "five", Excluded: true}}},
	}
	want := []ruleRow{
		{ID: 3, Message: "three", Severity: attack.Error, Samples: 1, Tags: []string{"CAPEC-66", "OWASP CRS/ATTACK-SQLI"}, Paranoia: "2"},
		{ID: 5, Message: "five", Samples: 2, Excluded: true},
		{ID: 9},
	}
	if diff := cmp.Diff(want, ruleRows(a, hits)); diff != "" {
		t.Error(diff)
	}
}

func TestAgo(t *testing.T) {
	for d, want := range map[time.Duration]string{-time.Hour: "0 s ago", 59 * time.Second: "59 s ago", time.Minute: "1 min ago",
		61 * time.Minute: "1 h ago", 47 * time.Hour: "47 h ago", 48 * time.Hour: "2 days ago"} {
		if got := ago(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
