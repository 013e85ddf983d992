package mask_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror/mask"
	"github.com/periscope-mesh/periscope/policy"
)

func masker() *mask.Masker {
	names := []string{"password", "sid", "user.pin"}
	return mask.New(policy.Mask{
		Headers: []string{"authorization"}, Cookies: names, QueryParameters: names, FormFields: names,
		JSONPaths: []string{"$.user.password", "$.list[*].sid"}, Detectors: []policy.Detector{policy.DetectorCreditCard},
	})
}

func TestHeader(t *testing.T) {
	m := masker()
	for _, tc := range []struct{ name, value, want string }{
		{"authorization", "Bearer x", "***"},
		{"Authorization", "", "***"},
		{"x-other", "sid=1", "sid=1"},
		{"x-other", "4111 1111 1111 1111", "**** **** **** ****"},
		// Cookies.
		{"cookie", "a=1; sid=secret; b=2", "a=1; sid=***; b=2"},
		{"cookie", "sid=secret", "sid=***"},
		{"cookie", "SID = secret;b=2", "SID =***;b=2"},
		{"cookie", "sid=a=b==; b=2", "sid=***; b=2"},
		{"cookie", "sid=1; sid=2", "sid=***; sid=***"},
		{"cookie", "sids=1; xsid=2; sid; a=sid", "sids=1; xsid=2; sid; a=sid"},
		{"cookie", "a=sid=1", "a=sid=1"},
		{"cookie", `sid="a;b\";c"; d=2`, "sid=***; d=2"},
		{"cookie", `sid="a; d=2`, "sid=***; d=2"},
		{"cookie", `a="x; sid=1; y"`, `a="x; sid=***; y"`},
		{"cookie", "$Version=1, sid=1, b=2; c=3", "$Version=1, sid=***; c=3"},
		{"cookie", "s%69d=1; sid[a]=1", "s%69d=***; sid[a]=***"},
		{"cookie", "=; ;=sid; ", "=; ;=sid; "},
		{"set-cookie", "sid=secret; Path=/; HttpOnly; Expires=Wed, 21 Oct 2026 07:28:00 GMT", "sid=***; Path=/; HttpOnly; Expires=Wed, 21 Oct 2026 07:28:00 GMT"},
		{"set-cookie", "a=1; Path=/, sid=b,c; Secure", "a=1; Path=/, sid=***; Secure"},
		{"set-cookie", "sid=secret", "sid=***"},
		// URLs.
		{":path", "/a?password=secret&b=2", "/a?password=***&b=2"},
		{":path", "/a?b=2&password=a;b?c&d", "/a?b=2&password=***&d"},
		{":path", "/a?%70assw%6frd=s&+password+=s&password%00=s&Password=s", "/a?%70assw%6frd=***&+password+=***&password%00=***&Password=***"},
		{":path", "/a?password[]=s&user[password]=s&user.password=s&password[a][b]=s", "/a?password[]=***&user[password]=***&user.password=***&password[a][b]=***"},
		{":path", "/a?user.pin=s&pin=1&user[pin]=1", "/a?user.pin=***&pin=1&user[pin]=1"},
		{":path", "/a?x;password=s?sid=2&b", "/a?x;password=***&b"},
		{":path", "/a??password=s", "/a??password=***"},
		{":path", "/a?password&password=&passwords=1&xpassword=2&%zzpassword=3", "/a?password&password=***&passwords=1&xpassword=2&%zzpassword=3"},
		{":path", "/a?b=password=s", "/a?b=password=s"},
		{":path", "/a;sid=1/b;c=2?d=sid", "/a;sid=***/b;c=2?d=sid"},
		{":path", "/password=1/x", "/password=***/x"},
		{":path", "*", "*"},
		{":path", "", ""},
		{"referer", "https://h/a?sid=1#password=2&b#sid=3&c", "https://h/a?sid=***#password=***&b#sid=***&c"},
		{"location", "https://h/cb#sid=1&state=2", "https://h/cb#sid=***&state=2"},
		{"link", "<https://h/a?sid=1&p=2>; rel=next, <https://h/?p=1&sid=3>", "<https://h/a?sid=***&p=2>; rel=next, <https://h/?p=1&sid=***"},
		{"refresh", "5; url=https://h/?sid=1&a", "5; url=https://h/?sid=***&a"},
		{"x-forwarded-uri", "/?pan=4111111111111111&sid=1", "/?pan=****************&sid=***"},
	} {
		got, masked := m.Header([]byte(tc.name), []byte(tc.value))
		if string(got) != tc.want || masked != (tc.want != tc.value) {
			t.Errorf("%s: %s\n got %s, %v\nwant %s", tc.name, tc.value, got, masked, tc.want)
		}
	}
}

// part is a body of one part with a header line, and another part.
func part(disposition string) string {
	return "--b\r\nContent-Disposition: form-data; " + disposition + "\r\n\r\nsecret\r\n--b\r\nContent-Disposition: form-data; name=\"q\"\r\n\r\nkept\r\n--b--\r\n"
}

func TestBody(t *testing.T) {
	m := masker()
	const form, parts, object = "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "application/json"
	hidden := func(disposition string) string {
		return strings.Replace(part(disposition), "secret", "***", 1)
	}
	cut := func(disposition string) string { // hidden to the end
		return "--b\r\nContent-Disposition: form-data; " + disposition + "\r\n\r\n***"
	}
	type test struct{ contentType, body, want string }
	tests := []test{
		{form, "a=1&password=secret", "a=1&password=***"},
		{form, "password=a;b=c\r\nd&e=f", "password=***&e=f"},
		{form, "a=1;password=s&b\npassword=s", "a=1;password=***&b\npassword=***"},
		{form, `{"password":"a&b"}`, `{"password":"***"}`},
		{"", "sid=1", "sid=***"},
		{"", `{"sid":1}`, `{"sid":"***"}`},
		{"text/plain;charset=utf-8", "q=1\r\nsid=2\r\nx=3", "q=1\r\nsid=***"},
		{"text/html", "a?sid=1", "a?sid=1"},
		{"image/png", "sid=4111111111111111", "sid=****************"},
		{object, `{"password":"s3\"cret","x":1}`, `{"password":"***","x":1}`},
		{object, `{"a":{"PassWord" : 12.5e3 },"b":[{"sid":null}]}`, `{"a":{"PassWord" : "***" },"b":[{"sid":"***"}]}`},
		{object, `{"sid":{"a":"1}","b":[1,"]"]},"y":2}`, `{"sid":"***","y":2}`},
		{object, `{"p\u0061ssword":"s","\u0070\u0061\u0073\u0073\u0077\u006f\u0072\u0064":"s","\u0053id":1}`, `{"p\u0061ssword":"***","\u0070\u0061\u0073\u0073\u0077\u006f\u0072\u0064":"***","\u0053id":"***"}`},
		{object, `{"password":"cut of`, `{"password":"***"`},
		{object, `{"password":"cut\`, `{"password":"***"`},
		{object, `{"sid":[["cut`, `{"sid":"***"`},
		{object, `{"passwords":"kept","t":"password","x\"password":"s"}`, `{"passwords":"kept","t":"password","x\"password":"***"}`},
		{object, `{"t":"{\"password\":\"kept\"}"}`, `{"t":"{\"password\":\"kept\"}"}`},
		{object, `{"password":{"password":1},"sid":{"password":2}}`, `{"password":"***","sid":"***"}`},
		{object, `{"password"`, `{"password"`},
		{parts, part(`name="q"`), part(`name="q"`)},
		{parts, part(`name="passwords"; filename="password"`), part(`name="passwords"; filename="password"`)},
		{parts, part(`filename="a; name=password"; name=q`), part(`filename="a; name=password"; name=q`)},
		{parts, "--b\r\nContent-Disposition: form-data; name=\"password\"\r\nContent-Type: text/plain\r\n\r\nse\r\n--bcret\r\n--b--x\r\n\n--b\n\r\n--b \t\r\nX", "--b\r\nContent-Disposition: form-data; name=\"password\"\r\n\r\n***\r\n--b \t\r\nX"},
		{parts, "--b\nContent-Disposition: form-data; name=\"password\"\n\nsecret\n--b--", "--b\nContent-Disposition: form-data; name=\"password\"\r\n\r\n***\n--b--"},
		{parts, part(`name="password`), hidden(`name="password`)},
		{parts, part(`name="password"`)[:60], cut(`name="password"`)},
		{parts, "--b\r\nContent-Disposition: form-data; name=\"passw", "--b\r\nContent-Disposition: form-data; name=\"passw"},
	}
	for _, disposition := range []string{
		`name="password"`, `name=password`, `NAME = "Password" ; filename="x"`, `filename="a\";"; name="password"`, `name="user[password]"`, `name="%70assword"`,
		`name="pass\word"`, `name="p\a\ssword"`, `name*=UTF-8''p%61ssword`, `name*=utf-8'en'password; name=x`, `name*0="pass"; name*1="word"`, `name*1=word; name*0*=UTF-8''p%61ss`,
		`name="x"; name="password"`, "x=y;\r\n\tname=password", "name=\u00a0password", "\u2003name=password\u2003", `name=password"x"`, `name=user.pin`,
	} {
		tests = append(tests, test{parts, part(disposition), hidden(disposition)})
	}
	for _, contentType := range []string{"multipart/form-data", "multipart/form-data; boundary=", `multipart/form-data; boundary="b\"`, "multipart/form-data; boundary=b; boundary=c", "multipart/form-data; boundary*=b", "multipart/form-data; boundary=b,c", "multipart/form-data; boundary=c"} {
		tests = append(tests, test{contentType, part(`name="password"`), cut(`name="password"`)})
	}
	for _, contentType := range []string{`multipart/form-data; boundary="b"`, "MULTIPART/Mixed;x=y; Boundary = b ;z=1"} {
		tests = append(tests, test{contentType, part(`name="password"`), hidden(`name="password"`)})
	}
	for _, tc := range tests {
		got, masked := m.Body(tc.contentType, "", []byte(tc.body))
		if string(got) != tc.want || masked != (tc.want != tc.body) {
			t.Errorf("%s: %s\n got %q, %v\nwant %q", tc.contentType, tc.body, got, masked, tc.want)
		}
	}
}

// What is compressed is not shown where it may hold what is masked.
func TestCompressedBody(t *testing.T) {
	m, body := masker(), []byte{0x1f, 0x8b}
	for _, tc := range []struct {
		contentType, coding string
		kept                bool
	}{
		{"application/json", "gzip", false},
		{"multipart/form-data; boundary=b", "br", false},
		{"", "gzip, gzip", false},
		{"application/json", "Identity", true},
		{"image/png", "gzip", true},
	} {
		got, masked := m.Body(tc.contentType, tc.coding, body)
		if kept := bytes.Equal(got, body); kept != tc.kept || masked == tc.kept || !kept && got != nil {
			t.Errorf("%+v: %q, %v", tc, got, masked)
		}
	}
	if got, masked := mask.New(policy.Mask{Headers: []string{"x"}}).Body("application/json", "gzip", body); masked || !bytes.Equal(got, body) {
		t.Errorf("without masks: %q", got)
	}
}

func TestCards(t *testing.T) {
	m := masker()
	for value, want := range map[string]string{
		"pay 4111 1111 1111 1111 now":                              "pay **** **** **** **** now",
		"4111-1111-1111-1111":                                      "****-****-****-****",
		"order 1234567890123456 at 12":                             "order 1234567890123456 at 12",
		"4111111111111111 12 29, 5555555555554444 01":              "**************** 12 29, **************** 01",
		"55555555555544444111 4111111111111111":                    "55555555555544444111 ****************",
		"1 2 4111111111111111 5555-5555 5555-4444 1 1":             "1 2 **************** ****-**** ****-**** 1 1",
		"tel 0123 456 789":                                         "tel 0123 456 789",
		strings.Repeat("4111111111111111 ", 100) + "1":             strings.Repeat("**************** ", 100) + "1",
		strings.Repeat("1 ", 50) + "4111111111111111":              "",
		"4111 1111   1111 - 1111 " + strings.Repeat("-", 100):      "**** ****   **** - **** " + strings.Repeat("-", 100),
		"378282246310005 6011111111111117 30569309025904":          "*************** **************** **************",
		"6304000000000000000 x 4222222222222 63040000000000000000": "******************* x ************* 63040000000000000000",
	} {
		got, _ := m.Header([]byte("x"), []byte(value))
		if want != "" && string(got) != want {
			t.Errorf("%s\n got %s\nwant %s", value, got, want)
		}
	}
}

// Nothing to mask, nothing copied: what is given comes back.
func TestUntouched(t *testing.T) {
	m := masker()
	for _, in := range []string{"a=1&b=2", `{"a":1}`, ""} {
		b := []byte(in)
		for _, contentType := range []string{"application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"} {
			if got, masked := m.Body(contentType, "", b); masked || len(b) > 0 && &got[0] != &b[0] {
				t.Errorf("%s %q: %v", contentType, in, masked)
			}
		}
	}
	b := []byte("a?sid=1&x")
	if got, _ := m.Path(b); string(got) != "a?sid=***&x" || string(b) != "a?sid=1&x" {
		t.Errorf("%q, %q", got, b)
	}
}

const (
	secret = "SECRET7Q"
	other  = "OTHER9XZ"
)

// sees says whether a parser of Go's library sees the word in a value that is
// masked by the name "password".
func sees(contentType string, body []byte, word string) bool {
	media, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		return false
	}
	isMasked := func(name string) bool { return strings.EqualFold(name, "password") && len(name) == len("password") }
	switch media {
	case "application/x-www-form-urlencoded":
		values, _ := url.ParseQuery(string(body)) // gives what it could read
		for name, list := range values {
			if isMasked(name) && strings.Contains(strings.Join(list, "\n"), word) {
				return true
			}
		}
	case "multipart/form-data":
		for r := multipart.NewReader(bytes.NewReader(body), params["boundary"]); ; {
			p, err := r.NextRawPart()
			if err != nil {
				return false
			}
			var content bytes.Buffer
			_, _ = content.ReadFrom(p) // what was read of a part that is cut counts
			if isMasked(p.FormName()) && bytes.Contains(content.Bytes(), []byte(word)) {
				return true
			}
		}
	case "application/json":
		return json.Valid(body) && inObject(body, isMasked, word)
	}
	return false
}

// inObject looks into every member, also those whose name stands twice.
func inObject(value json.RawMessage, isMasked func(string) bool, word string) bool {
	d := json.NewDecoder(bytes.NewReader(value))
	open, err := d.Token()
	if err != nil || open != json.Delim('{') && open != json.Delim('[') {
		return false
	}
	for d.More() {
		name := ""
		if open == json.Delim('{') {
			token, err := d.Token()
			if err != nil {
				return false
			}
			name = token.(string)
		}
		var member json.RawMessage
		if d.Decode(&member) != nil {
			return false
		}
		if isMasked(name) {
			var v any
			if json.Unmarshal(member, &v) == nil && strings.Contains(fmt.Sprint(v), word) {
				return true
			}
		} else if inObject(member, isMasked, word) {
			return true
		}
	}
	return false
}

// FuzzBody: what a parser reads under a masked name is not in the result, and
// the result is no longer than it may be.
func FuzzBody(f *testing.F) {
	const form, parts = "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"
	for _, seed := range [][2]string{
		{form, "a=1&p%61ssword=x" + secret + ";y&b"},
		{"application/json", `{"a":[{"p\u0061ssword":{"x":["` + secret + `"]}}]}`},
		{"application/json", `{"a\\":"\"","password" : "\"` + secret + `","password":1}`},
		{parts, strings.Replace(part(`name="password"`), "secret", "se\n--b\r\n"+secret, 1)},
		{parts, strings.Replace(part(`name*1=word; name*0*=UTF-8''p%61ss`), "secret", secret, 1)},
		{parts, "--b\nContent-Disposition: form-data;\n name=\"pass\\word\"\n\n" + secret + "\n--b--"},
		{`multipart/form-data; x="boundary=c"; boundary*0=b`, strings.Replace(part("name=password"), "secret", "\r\n--c\r\n"+secret, 1)},
	} {
		f.Add(seed[0], []byte(seed[1]))
	}
	m := mask.New(policy.Mask{FormFields: []string{"password"}, JSONPaths: []string{"$.password"}})
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		out, masked := m.Body(contentType, "", body)
		if len(out) > 2*len(body)+3 || masked == bytes.Equal(out, body) {
			t.Fatalf("%d bytes of %d, masked: %v", len(out), len(body), masked)
		}
		if bytes.Count(body, []byte(secret)) != 1 || bytes.Contains(body, []byte(other)) {
			return
		}
		// It must be these very bytes that the parser sees.
		changed := bytes.Replace(body, []byte(secret), []byte(other), 1)
		if sees(contentType, body, secret) && sees(contentType, changed, other) && bytes.Contains(out, []byte(secret)) {
			t.Errorf("%s\n%q\n%q", contentType, body, out)
		}
	})
}

// FuzzHeader is the same for cookies and paths.
func FuzzHeader(f *testing.F) {
	for _, seed := range []string{"a=1; password=" + secret + "; b", "/a?b;c&p%61ssword=" + secret + "#x=y", `password="` + secret + `"`, "/a;b=c?d=/?+password=" + secret} {
		f.Add(seed)
	}
	m := mask.New(policy.Mask{Cookies: []string{"password"}, QueryParameters: []string{"password"}})
	f.Fuzz(func(t *testing.T, value string) {
		cookie, _ := m.Header([]byte("cookie"), []byte(value))
		path, _ := m.Path([]byte(value))
		if len(cookie) > 2*len(value)+3 || len(path) > 2*len(value)+3 {
			t.Fatalf("%q became %q and %q", value, cookie, path)
		}
		if strings.Count(value, secret) != 1 || strings.Contains(value, other) {
			return
		}
		inCookie := func(value, word string) bool {
			for _, c := range (&http.Request{Header: http.Header{"Cookie": {value}}}).Cookies() {
				if strings.ToLower(c.Name) == "password" && strings.Contains(c.Value, word) {
					return true
				}
			}
			return false
		}
		inQuery := func(value, word string) bool {
			u, err := url.ParseRequestURI(value)
			return err == nil && sees("application/x-www-form-urlencoded", []byte(u.RawQuery), word)
		}
		changed := strings.Replace(value, secret, other, 1)
		if inCookie(value, secret) && inCookie(changed, other) && bytes.Contains(cookie, []byte(secret)) {
			t.Errorf("%q became %q", value, cookie)
		}
		if inQuery(value, secret) && inQuery(changed, other) && bytes.Contains(path, []byte(secret)) {
			t.Errorf("%q became %q", value, path)
		}
	})
}

// The same as by FuzzBody, of inputs that are close to what parsers read.
func TestSecretsAreHidden(t *testing.T) {
	words := map[string][]string{
		"application/x-www-form-urlencoded": {"password", "p%61ssword", "PASSWORD", "x", "=", "=", "&", "&", ";", "+", "%20", "%", secret, "a", "\r\n", "\"", "?", "#"},
		"multipart/form-data; boundary=b": {"--b", "\r\n--b\r\n", "\r\n--b\r\n", "\r\n--b--\r\n", "\n--b\n", "\r\n--bx\r\n", "\r\n--b-", "\r\n", "\n", "\r\n\r\n", "\r\n\r\n", secret, "x", "Content-Disposition: form-data; name=password", "\r\nContent-Disposition: form-data; name=\"password\"",
			"Content-Disposition:\r\n form-data; name*=us-ascii'en'p%61ssword", "Content-Disposition: form-data; name*1*=word; name*0=pass", "Content-Disposition: form-data; filename=\"\\\"; name=x\"; name=password", "Content-Type: x", "; name=x", "\t"},
	}
	m := mask.New(policy.Mask{FormFields: []string{"password"}, JSONPaths: []string{"$.password"}})
	rng := rand.New(rand.NewPCG(7, 8))
	hit := map[string]int{}
	pick := func(from []string) string { return from[rng.IntN(len(from))] }
	var object func(depth int) string
	object = func(depth int) string {
		members := make([]string, rng.IntN(4))
		for i := range members {
			name := pick([]string{`"password"`, `"p\u0061ssword"`, `"\u0050assword"`, `"x"`, `"\\"`, `"a\"password"`, `"\u00e9\u0061"`, `""`})
			value := pick([]string{"1", "null", `""`, `"\""`, `"\\"`, `"` + secret + `"`, `"\"` + secret + `\\"`, `"\"password\":"`, `"password"`})
			if depth > 0 && rng.IntN(2) == 0 {
				value = pick([]string{"", " "}) + object(depth-1)
				if rng.IntN(2) == 0 {
					value = "[" + value + ",[]," + value + "]"
				}
			}
			members[i] = name + pick([]string{"", " ", "\n"}) + ":" + value
		}
		return "{" + strings.Join(members, ",") + "}"
	}
	for _, contentType := range []string{"application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"} {
		for range 50_000 {
			b := []byte(object(3))
			if of := words[contentType]; of != nil {
				b = nil
				for range 2 + rng.IntN(12) {
					b = append(b, pick(of)...)
				}
			}
			if bytes.Count(b, []byte(secret)) != 1 || !sees(contentType, b, secret) {
				continue
			}
			hit[contentType]++
			if out, _ := m.Body(contentType, "", b); bytes.Contains(out, []byte(secret)) {
				t.Fatalf("%s\n%q\n%q", contentType, b, out)
			}
		}
		if hit[contentType] < 20 {
			t.Errorf("%s: %d inputs with a secret", contentType, hit[contentType])
		}
	}
}

func BenchmarkBody(b *testing.B) {
	m := masker()
	const form, object, parts = "application/x-www-form-urlencoded", "application/json", "multipart/form-data; boundary=b"
	for name, in := range map[string][2]string{
		"form":                {form, "field=value%20x&"},
		"form, masked":        {form, "password=&"},
		"json":                {object, `"name":"some value","n":12345,`},
		"json, masked":        {object, `"p\u0061ssword":1,`},
		"json, nested":        {object, `"password":{`},
		"multipart, masked":   {parts, "content-disposition:;name=password\r\n\r\n--b\r\n"},
		"multipart, no end":   {parts, "content-disposition:;name=x\r\n--b"},
		"multipart, one line": {parts, "content-disposition:;=;name*1=\"x\";"},
		"digits":              {"image/png", "1 "},
		"cards":               {"image/png", "4111111111111111 "},
	} {
		for _, size := range []int{64 << 10, 1 << 20} { // as fast, whatever the size
			body := []byte(strings.Repeat(in[1], size/len(in[1])))
			b.Run(fmt.Sprintf("%s/%dKi", name, size>>10), func(b *testing.B) {
				b.SetBytes(int64(len(body)))
				for b.Loop() {
					m.Body(in[0], "", body)
				}
			})
		}
	}
}
