package lua_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror"
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
			for range rng.IntN(14) {
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
