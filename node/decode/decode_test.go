package decode

import (
	"bytes"
	"compress/flate"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/periscope-mesh/periscope/mirror/event"
)

func message(typ, body string) *event.Event {
	e := &event.Event{}
	for _, f := range [][2]string{
		{":method", "POST"}, {":path", "/a/b?x=1&y=%41+b#z"}, {":scheme", "https"}, {":authority", "h.example"},
		{"Content-Type", typ},
	} {
		e.Request.Headers = append(e.Request.Headers, event.Field{Name: []byte(f[0]), Value: []byte(f[1])})
	}
	e.Request.Body = []byte(body)
	return e
}

// flat lists values as "kind name=text", without path and query.
func flat(r *Request) []string {
	var out []string
	kinds := map[Kind]string{Path: "path", Query: "query", Cookie: "cookie", Form: "form", JSON: "json", XML: "xml", Multipart: "part", Body: "body"}
	for _, v := range r.Values {
		if v.Kind != Path && v.Kind != Query {
			out = append(out, fmt.Sprintf("%s %s=%s", kinds[v.Kind], v.Name, v.Text))
		}
	}
	return out
}

func TestRequestLine(t *testing.T) {
	r := ParseRequest(message("", ""))
	if r.Method != "POST" || r.Scheme != "https" || r.Authority != "h.example" || r.Target != "/a/b?x=1&y=%41+b#z" ||
		r.Path != "/a/b" || r.Query != "x=1&y=%41+b" {
		t.Errorf("%+v", r)
	}
	want := []Value{
		{Kind: Path, Raw: []byte("/a/b"), Text: "/a/b"},
		{Kind: Query, Name: "x", Key: "x", Raw: []byte("1"), Text: "1"},
		{Kind: Query, Name: "y", Key: "y", Raw: []byte("%41+b"), Text: "A b"},
	}
	if d := cmp.Diff(want, r.Values); d != "" {
		t.Error(d)
	}
	if len(r.Headers) != 1 || r.Headers[0].Name != "content-type" {
		t.Errorf("headers %v", r.Headers)
	}
}

func TestBodies(t *testing.T) {
	for name, c := range map[string]struct {
		typ, body string
		want      []string
		facts     Facts
	}{
		"none":               {"application/json", "", nil, 0},
		"json":               {"application/json; charset=utf-8", `{"a":{"b":["x",1,true,{"c":"\u0041\n"}]},"d":""}`, []string{"json $.a.b[0]=x", "json $.a.b[3].c=A\n"}, 0},
		"json string":        {"application/json", `"x"`, []string{"json $=x"}, 0},
		"json surrogates":    {"application/json", `["\ud83d\ude00\ud83d"]`, []string{"json $[0]=😀\ufffd"}, 0},
		"json hostile name":  {"application/json", `{"a b":1}`, []string{"json $.a b=a b"}, 0},
		"json repeated":      {"application/json", `["x","x","y"]`, []string{"json $[0]=x", "json $[2]=y"}, 0},
		"json cut in string": {"application/json", `{"a":"b","c":"de`, []string{"json $.a=b", "json $.c=de", `body ={"a":"b","c":"de`}, Malformed},
		"json junk":          {"application/json", `{"a": foo}`, []string{"json $.a=foo", `body ={"a": foo}`}, Malformed},
		"ndjson":             {"application/x-ndjson", "{\"a\":\"x\"}\n{\"a\":\"y\"}", []string{"json $.a=x", "json $.a=y"}, 0},
		"numbers only":       {"application/json", `[1,-2.5e3,null]`, nil, 0},
		"mislabelled form":   {"application/x-www-form-urlencoded", `{"a":"b=c"}`, []string{"json $.a=b=c"}, 0},
		"unlabelled form":    {"", `a=b&c=d`, []string{"body =a=b&c=d", "form a=b", "form c=d"}, 0},
		"form":               {"application/x-www-form-urlencoded", "a=%2Fx&&b&=c&%zz=%", []string{"form a=/x", "form b=", "form =c", "form %zz=%"}, 0},
		"text":               {"text/plain", "hello", []string{"body =hello"}, 0},
		"xml": {"text/xml", `<?xml version="1.0"?><!-- no --><a b='1 &lt; 2'><c>x &#65;</c><d/><e><![CDATA[<y>]]></e>z</a>`,
			[]string{"xml /a/@b=1 < 2", "xml /a/c=x A", "xml /a/e=<y>", "xml /a=z"}, 0},
		"doctype": {"text/xml", `<!DOCTYPE a [<!ENTITY x "y">]><a>z</a>`, []string{`xml !DOCTYPE=<!DOCTYPE a [<!ENTITY x "y">]>`, "xml /a=z"}, 0},
		"multipart": {`multipart/form-data; boundary="x y"`,
			"--x y\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb\r\n--x y\r\nContent-Disposition: form-data; name=\"f\"; filename=\"g;h.txt\"\r\nContent-Type: text/plain\r\n\r\nzz\r\n--x y--\r\n",
			[]string{
				`part content-disposition=Content-Disposition: form-data; name="a"`, "form a=b",
				`part content-disposition=Content-Disposition: form-data; name="f"; filename="g;h.txt"`,
				"part content-type=Content-Type: text/plain", "part filename=g;h.txt",
			}, 0},
		"multipart without boundary": {"multipart/form-data", "x", []string{"body =x"}, Malformed},
		"binary":                     {"application/grpc", "\x00\x01hello there\x02ab\x00", []string{"body (text)=hello there"}, 0},
		"image":                      {"image/png", "/etc/passwd", nil, Opaque},
		"graphql":                    {"application/json", `{"query":"{a(b:\"c d\"){e,f}} # g"}`, []string{"json $.query=c d", "json $.query= g"}, 0},
		"no graphql":                 {"application/json", `{"query":"{a(b:1'){e}"}`, []string{"json $.query={a(b:1'){e}"}, 0},
		"graphql body":               {"application/graphql", `query Q { a(b: "c") { d } }`, []string{"body =c"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := ParseRequest(message(c.typ, c.body))
			if d := cmp.Diff(c.want, flat(r)); d != "" {
				t.Error(d)
			}
			if r.Facts != c.facts {
				t.Errorf("facts %b, want %b", r.Facts, c.facts)
			}
		})
	}
}

func TestCutIsNotMalformed(t *testing.T) {
	for typ, body := range map[string]string{"application/json": `{"a":["b`, "multipart/form-data; boundary=x": "--x\r\nA: b"} {
		e := message(typ, body)
		e.Flags = event.FlagRequestCut
		if r := ParseRequest(e); r.Facts != Cut {
			t.Errorf("%s: facts %b", typ, r.Facts)
		}
	}
}

func TestCookies(t *testing.T) {
	e := message("", "")
	e.Request.Headers = append(e.Request.Headers,
		event.Field{Name: []byte("cookie"), Value: []byte(" a=1;b = 2 ; ;=3;c")}, event.Field{Name: []byte("cookie"), Value: []byte("a=4")})
	want := []string{"cookie a=1", "cookie b=2", "cookie =3", "cookie c=", "cookie a=4"}
	if d := cmp.Diff(want, flat(ParseRequest(e))); d != "" {
		t.Error(d)
	}
}

func TestBounds(t *testing.T) {
	e := message("", strings.Repeat("y", MaxBodyBytes+5))
	for i := range 2 * MaxFields {
		e.Request.Headers = append(e.Request.Headers, event.Field{Name: fmt.Appendf(nil, "h%d", i)})
	}
	e.Request.Headers[1].Value = []byte("/?" + strings.Repeat("a=b&", 3*MaxValues) + "last=1")
	r := ParseRequest(e)
	if len(r.Headers) != MaxFields || len(r.Body) != MaxBodyBytes || r.Facts&(FieldsDropped|Folded|Cut) != FieldsDropped|Folded|Cut {
		t.Errorf("%d headers, %d bytes, facts %b", len(r.Headers), len(r.Body), r.Facts)
	}
	more := r.Values[MaxValues+1]
	if more.Name != "(more)" || !strings.HasSuffix(more.Text, "last\n1\n") {
		t.Errorf("what was folded: %q", more.Name)
	}
	deep := ParseRequest(message("application/json", strings.Repeat(`{"a":`, 5000)+`"x"`+strings.Repeat("}", 5000)))
	// Beyond the depth, names are values as well, each once.
	if got := flat(deep); len(got) != 2 || len(got[1]) > maxNameBytes+20 || !strings.HasSuffix(got[1], "=x") || deep.Facts != 0 {
		t.Errorf("deep: %d values, facts %b", len(got), deep.Facts)
	}
}

func TestInflate(t *testing.T) {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, 9)
	_, _ = w.Write(bytes.Repeat([]byte("a"), 8<<20))
	_ = w.Close()
	if out, facts := inflate(b.Bytes(), "Deflate"); facts != InflateLimit || len(out) > MaxBodyBytes || len(out) < 64<<10 {
		t.Errorf("%d bytes, facts %b", len(out), facts)
	}
	for encoding, want := range map[string]Facts{"br": UnknownEncoding, "gzip, br": UnknownEncoding, "gzip": Malformed, "identity": 0} {
		if _, facts := inflate([]byte("xyz"), encoding); facts != want {
			t.Errorf("%s: facts %b", encoding, facts)
		}
	}
}

func TestResponse(t *testing.T) {
	e := &event.Event{}
	e.Response.Headers = []event.Field{{Name: []byte(":status"), Value: []byte("200")}, {Name: []byte("Content-Type"), Value: []byte("text/html")}}
	e.Response.Body = []byte("<p>")
	if r := ParseResponse(e); r.Status != "200" || string(r.Body) != "<p>" || len(r.Headers) != 1 {
		t.Errorf("%+v", r)
	}
	e.Response.Headers[1].Value = []byte("image/png")
	if r := ParseResponse(e); r.Body != nil || r.Facts != Opaque {
		t.Errorf("%+v", r)
	}
}

func FuzzParseRequest(f *testing.F) {
	for _, s := range [][3]string{
		{"application/json", `{"a":["\u00e9\ud83d",{"b":null}],"query":"{a(b:\"c\"){d}}"}`, ""},
		{"application/json", `]}{"a`, ""},
		{"text/xml", `<!DOCTYPE a [<!ENTITY x "y">]><a b='c' d=e><![CDATA[x]]></a>`, ""},
		{"multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data; name=\"a\"; filename*=b\r\n\r\nc\r\n--x--", ""},
		{"application/x-www-form-urlencoded", "a=%4&b=+%zz", ""},
		{"application/grpc", "\x00abcdefgh\xff", ""},
		{"", "\x1f\x8b\x08\x00", "gzip"},
	} {
		f.Add(s[0], []byte(s[1]), s[2])
	}
	f.Fuzz(func(t *testing.T, typ string, body []byte, encoding string) {
		e := message(typ, string(body))
		e.Request.Headers = append(e.Request.Headers,
			event.Field{Name: []byte("content-encoding"), Value: []byte(encoding)}, event.Field{Name: []byte("cookie"), Value: body})
		r := ParseRequest(e)
		total := 0
		for _, v := range r.Values {
			if len(v.Name) > maxNameBytes {
				t.Fatalf("name of %d bytes", len(v.Name))
			}
			total += len(v.Text)
		}
		// Cookies and body each yield at most what they hold, but escapes of
		// three bytes may become replacement characters of as many, and a text
		// may be read as form as well.
		if limit := 4*(len(body)+len(r.Body)) + 1024; total > limit {
			t.Fatalf("%d bytes of text from %d", total, len(body))
		}
		if len(r.Values) > 3*(MaxValues+1)+1 {
			t.Fatalf("%d values", len(r.Values))
		}
		ParseResponse(&event.Event{Response: e.Request})
	})
}
