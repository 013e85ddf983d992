package lua_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/mask"
	"github.com/periscope-mesh/periscope/policy"
)

// input is something to mask: a body if name is a content type, "type/subtype".
type input struct{ name, coding, value string }

// maskedByPlugin gives what the plugin makes of the inputs.
func maskedByPlugin(t *testing.T, call func(t *testing.T, name string, args ...string) string, m policy.Mask, inputs []input) []string {
	t.Helper()
	escape := strings.NewReplacer("%", "%25", "\x00", "%00").Replace
	args := []string{escape(mirror.Settings{Mask: m}.Encode())}
	for _, in := range inputs {
		args = append(args, escape(in.name), escape(in.coding), escape(in.value))
	}
	out := strings.Split(call(t, "mask", args...), "\x00")
	if len(out) != len(inputs) {
		t.Fatalf("%d answers to %d inputs", len(out), len(inputs))
	}
	for i := range out {
		out[i] = strings.NewReplacer("%25", "%", "%00", "\x00").Replace(out[i])
	}
	return out
}

// maskedByReference gives the same by package mask.
func maskedByReference(m *mask.Masker, in input) string {
	var out []byte
	var masked bool
	if strings.Contains(in.name, "/") {
		out, masked = m.Body(in.name, in.coding, []byte(in.value))
	} else {
		out, masked = m.Header([]byte(in.name), []byte(in.value))
	}
	return fmt.Sprint(masked) + string(out)
}

// The plugin masks as the reference does, whatever there is to mask.
func TestMaskAsReference(t *testing.T) {
	call := caller(t)
	names := []string{"password", "sid", "access_token", "user[pin]", "a.b", "schlüssel"}
	masks := []policy.Mask{
		{Headers: []string{"authorization", "referer"}, Cookies: names, QueryParameters: names, FormFields: names, JSONPaths: []string{"$.password", "$.a.sid", "$.access_token"}},
		{Cookies: names[:1], FormFields: names[:1], Detectors: []policy.Detector{policy.DetectorCreditCard}},
		{JSONPaths: []string{"$.password"}, QueryParameters: names[1:2]},
		{},
	}
	// Words of which inputs are made, by kind.
	words := []string{"password", "sid", "PassWord", "x", "%70assword", "p%61ssword", "pass+word", "+sid", "sid%00", "user[password]", "user.sid", "user[pin]", "a.b", "schl%C3%BCssel", "schlüssel",
		"=", "=", "=", "&", "&", ";", ",", " ", "\t", "secret", "1", "", "%", "%zz", "%2", "?", "#", "/", "[", "]", "\"", "\\", "'", "<", ">", "\x00", "\xff", "\r\n", "\n", "4111 1111-1111 1111", "5555555555554444", "12 34 567", "12345678901234567890123"}
	json := []string{`{`, `}`, `[`, `]`, `,`, `:`, ` : `, `"`, `\`, `"password"`, `"Sid"`, `"p\u0061ssword"`, `"\u0070\u0061ssword"`, `"\u00e9p\u0061ssword"`, `"\u003cp\u0061ss"`, `\u0061`, `\u00`, `"x"`, `"s\"ecret"`, `12.5e3`, `null`, `"password":`, `"sid":{`, `"access_token":[`, "\n", " ", `"4111111111111111"`, `"password`, `password"`}
	multipart := []string{"--b\r\n", "\r\n--b\r\n", "\r\n--b--\r\n", "\n--b\n", "\r\n--b-x", "\r\n--b  \r\n", "--b", "Content-Disposition: form-data; name=\"password\"", "content-disposition: form-data; name=sid; filename=\"x;y\"", "Content-Disposition: form-data; filename=\"a\\\"; name=sid\"; name=q",
		"Content-Disposition:\r\n form-data;\r\n\tname*=UTF-8''p%61ssword", "Content-Disposition: form-data; name*1=\"word\"; name*0*=utf-8'e'pass", "Content-Disposition : form-data; name = \"pass\\word\"", "CONTENT-DISPOSITION: x; NAME=\u00a0sid", "Content-Disposition: form-data; name=\"q", "; name=\"sid\"", "; name=password", "name*", "=", ";", "\"", "\\",
		"\r\n\r\n", "\n\n", "\r\n", "\n", "\r", "secret", "content-type: text/plain", " ", "4111111111111111"}
	types := []struct {
		of    []string
		words []string
	}{
		{[]string{"cookie", "set-cookie", ":path", "referer", "location", "link", "refresh", "x-original-url", "authorization", "x-other"}, words},
		{[]string{"application/x-www-form-urlencoded", "text/plain; charset=utf-8", "x/urlencoded", "text/html"}, words},
		{[]string{"application/json", "Application/problem+JSON", "text/plain", "application/x-www-form-urlencoded", "text/xml"}, json},
		{[]string{"multipart/form-data; boundary=b", `multipart/form-data; boundary="b"`, "multipart/mixed;BOUNDARY= b ; x=y", "multipart/form-data", "multipart/form-data; boundary=b; boundary=c", "multipart/form-data; boundary*=b", "multipart/x; boundary=b,c", `multipart/x; boundary="b\"`}, multipart},
		{[]string{"x-other", "image/png"}, []string{"0", "1", "4", "41", "111", "1111", "5555", "12345678", "4111111111111111", "000000000000000000000", " ", " ", "-", "  ", "x"}},
	}
	codings := []string{"", "", "", "", "identity", "gzip"}
	rng := rand.New(rand.NewPCG(5, 6))
	pick := func(from []string) string { return from[rng.IntN(len(from))] }
	rounds := 40
	if os.Getenv("CI") != "" {
		rounds = 200
	}
	for range rounds {
		policyMask := masks[rng.IntN(len(masks))]
		reference := mask.New(policyMask)
		var inputs []input
		for range 250 {
			kind := types[rng.IntN(len(types))]
			in := input{name: pick(kind.of), coding: pick(codings)}
			for range rng.IntN(20) {
				in.value += pick(kind.words)
			}
			in.value = in.value[:len(in.value)-rng.IntN(len(in.value)/4+1)] // cut anywhere
			inputs = append(inputs, in)
		}
		for i, got := range maskedByPlugin(t, call, policyMask, inputs) {
			if want := maskedByReference(reference, inputs[i]); got != want {
				t.Fatalf("%q with %+v:\n got %q\nwant %q", inputs[i], policyMask, got, want)
			}
		}
	}
}

// hostileInputs are long and made to cost time.
func hostileInputs(size int) []input {
	const form, object, parts, header = "application/x-www-form-urlencoded", "application/json", "multipart/form-data; boundary=b", "content-disposition:"
	fill := func(unit string) string { return strings.Repeat(unit, size/len(unit)) }
	var names strings.Builder
	for i := 0; names.Len() < size; i++ {
		fmt.Fprintf(&names, "k%d[x]=v&", i)
	}
	inputs := []input{{form, "", names.String()}, {form, "", fill("&") + "="}, {form, "", "a=" + fill(";")}, {form, "", fill(" ") + "=1"}, {form, "", fill("[") + "=1"}}
	for _, unit := range []string{"a=&", "password=&", "="} {
		inputs = append(inputs, input{form, "", fill(unit)})
	}
	for _, unit := range []string{`"password":1,`, `"password" `, `"password":{`, `"p\u0061ssword":1,`, `\u0061`, `"\u0061`, `"`, `\"`, "[", " "} {
		inputs = append(inputs, input{object, "", fill(unit)}, input{object, "", `{"password":"` + fill(unit)}, input{object, "", `"password"` + fill(unit)})
	}
	for _, unit := range []string{header, header + ";name=q\r\na", header + ";name=password\r\n\r\n--b\r\n", header + " "} {
		inputs = append(inputs, input{parts, "", fill(unit)})
	}
	for _, unit := range []string{"\r\n--b", "\r\n--b  ", "\r\n "} {
		inputs = append(inputs, input{parts, "", header + ";name=password\r\na" + fill(unit)}, input{parts, "", header + ";name=q" + fill(unit)})
	}
	for _, unit := range []string{`;name*1="x"`, ";", ";=", `="`, "'", `\"`, "a1 "} {
		inputs = append(inputs, input{parts, "", header + fill(unit) + "=\r\na"}, input{parts, "", header + ";name*=" + fill(unit) + "\r\na"}, input{parts, "", header + ";name=\"" + fill(unit) + "\r\na"})
	}
	for _, unit := range []string{"1 ", "4111111111111111 ", "0", "12 - - x", "1" + strings.Repeat(" ", 100)} {
		inputs = append(inputs, input{"image/png", "", fill(unit)})
	}
	for _, unit := range []string{`password="`, `password="\;`, "password=  ", ";", ","} {
		inputs = append(inputs, input{"cookie", "", fill(unit)})
	}
	for _, unit := range []string{";a=/", "?a=#", "?", "a=&password=1&"} {
		inputs = append(inputs, input{":path", "", "/" + fill(unit)})
	}
	return inputs
}

// Long inputs are masked as the reference masks them.
func TestMaskHostileInput(t *testing.T) {
	call := caller(t)
	m := policy.Mask{Cookies: []string{"password"}, QueryParameters: []string{"password"}, FormFields: []string{"password"}, JSONPaths: []string{"$.password"}, Detectors: []policy.Detector{policy.DetectorCreditCard}}
	reference := mask.New(m)
	for _, in := range hostileInputs(256 << 10) {
		got, want := maskedByPlugin(t, call, m, []input{in})[0], maskedByReference(reference, in)
		if got != want {
			t.Errorf("%s %.60q… of %d bytes: got %d bytes, %.60q…, want %d, %.60q…", in.name, in.value, len(in.value), len(got), got, len(want), want)
		}
	}
}

// What leaves the gateway is masked; what the user sends and gets is not.
func TestMaskedExchange(t *testing.T) {
	n := startNode(t)
	addr, e := gateway(t, settings(func(s *mirror.Settings) {
		s.Mask = policy.Mask{Cookies: []string{"sid"}, QueryParameters: []string{"key"}, FormFields: []string{"pin"}, JSONPaths: []string{"$.pin"}}
		s.Response.ContentTypes = []string{"*/*"}
	}), n.addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.Header().Set("Content-Encoding", r.Header.Get("Content-Encoding"))
		w.Header().Set("Location", r.URL.String())
		w.Header().Add("Set-Cookie", "sid=secret; Path=/")
		w.Header().Add("Set-Cookie", r.Header.Get("Cookie"))
		_, _ = w.Write(body)
	}))
	const parts = "--b\r\nContent-Disposition: form-data; name=\"pin\"\r\n\r\nsecret\r\n--b--\r\n"
	long := strings.Repeat("pin=&", 4096/5)
	for _, tc := range []struct {
		contentType, coding, body string
		request, response         string
		flags                     event.Flags
	}{
		{contentType: "application/json", body: `{"a":1,"p\u0069n":"secret"}`, request: `{"a":1,"p\u0069n":"***"}`, response: `{"a":1,"p\u0069n":"***"}`},
		{contentType: "application/x-www-form-urlencoded", body: "a=1&user%5Bpin%5D=secret", request: "a=1&user%5Bpin%5D=***", response: "a=1&user%5Bpin%5D=***"},
		{contentType: "multipart/form-data; boundary=b", body: parts, request: strings.Replace(parts, "secret", "***", 1), response: strings.Replace(parts, "secret", "***", 1)},
		{contentType: "", body: "pin=secret", request: "pin=***", response: "pin=***"},
		{contentType: "application/json", coding: "gzip", body: "\x1f\x8bsecret", flags: event.FlagRequestCut | event.FlagResponseCut},
		{contentType: "image/png", coding: "gzip", body: "\x1f\x8bkept", request: "\x1f\x8bkept", response: "\x1f\x8bkept"},
		// A masked copy is no longer than a copy may be.
		{contentType: "application/x-www-form-urlencoded", body: long, request: strings.Repeat("pin=***&", 4096/8), response: strings.Repeat("pin=***&", 2048/8), flags: event.FlagRequestCut | event.FlagResponseCut},
	} {
		req, _ := http.NewRequest("POST", "http://"+addr+"/a?b=1&%6bey=secret#", strings.NewReader(tc.body))
		req.Header = http.Header{"Cookie": {"a=1; sid=secret"}, "Referer": {"https://h/?key=secret"}, "Content-Type": {tc.contentType}, "Content-Encoding": {tc.coding}, "Accept-Encoding": {"identity"}}
		for _, name := range []string{"Content-Type", "Content-Encoding"} {
			if req.Header.Get(name) == "" {
				req.Header.Del(name)
			}
		}
		res, body := do(t, req)
		if string(body) != tc.body || res.Header.Get("Location") != "/a?b=1&%6bey=secret" || res.Header.Values("Set-Cookie")[0] != "sid=secret; Path=/" {
			t.Errorf("%s: the user got %q with %v", tc.contentType, body, res.Header)
		}
		ev := n.take(1)[0]
		for _, h := range []struct {
			of         []event.Field
			name, want string
		}{
			{ev.Request.Headers, ":path", "[/a?b=1&%6bey=***]"}, {ev.Request.Headers, "cookie", "[a=1; sid=***]"}, {ev.Request.Headers, "referer", "[https://h/?key=***]"},
			{ev.Response.Headers, "location", "[/a?b=1&%6bey=***]"}, {ev.Response.Headers, "set-cookie", "[sid=***; Path=/ a=1; sid=***]"},
		} {
			if got := fmt.Sprint(header(h.of, h.name)); got != h.want {
				t.Errorf("%s: %s: %s, want %s", tc.contentType, h.name, got, h.want)
			}
		}
		if string(ev.Request.Body) != tc.request || string(ev.Response.Body) != tc.response {
			t.Errorf("%s: request %q, response %q", tc.contentType, ev.Request.Body, ev.Response.Body)
		}
		if ev.Request.BodyBytes != uint64(len(tc.body)) || ev.Response.BodyBytes != uint64(len(tc.body)) || ev.Flags != tc.flags|event.FlagMasked {
			t.Errorf("%s: %d and %d bytes of %d, flags %b", tc.contentType, ev.Request.BodyBytes, ev.Response.BodyBytes, len(tc.body), ev.Flags)
		}
	}
	if n := e.Stat("http.ingress.lua.periscope.errors"); n != 0 {
		t.Errorf("%d Lua errors", n)
	}
}
