package detect

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

func TestLocate(t *testing.T) {
	for _, c := range []struct{ raw, want, found string }{
		{"x=/etc/passwd", "etc/passwd", "etc/passwd"},
		{"/ETC/Passwd", "etc/passwd", "ETC/Passwd"},
		{"%2fetc%2Fpasswd%00", "etc/passwd", "etc%2Fpasswd"},
		{"%252e%252e%252fetc", "../", "%252e%252e%252f"},
		{"%25252e%25252e%25252f", "../", "%25252e%25252e%25252f"},
		{"1+union+select", "union select", "union+select"},
		{`a\u002fetc\/passwd`, "/etc/passwd", `\u002fetc\/passwd`},
		{"a&lt;script&#62;b", "<script>", "&lt;script&#62;"},
		{"a%26lt%3Bscript", "<script", "%26lt%3Bscript"},
		{`c"a"t /e't'c/pas\swd`, "cat /etc/passwd", `c"a"t /e't'c/pas\swd`},
		{"union/**/all/**/select", "union all select", "union/**/all/**/select"},
		{"un/*x*/ion", "union", "un/*x*/ion"},
		{"%u003cscript", "<script", "%u003cscript"},
		{"é%20<B", " <b", "%20<B"},
		{"nothing", "else", ""},
		{"", "x", ""},
		{"x", "", ""},
		{"' '", " ", " "},
		{"a''b", "\"", ""},
		{"/* /* /*", "zz", ""},
	} {
		start, end, ok := locate([]byte(c.raw), c.want)
		if got := c.raw[start:end]; got != c.found || ok != (c.found != "") {
			t.Errorf("locate(%q, %q) = %q, %v; want %q", c.raw, c.want, got, ok, c.found)
		}
	}
}

func TestWindow(t *testing.T) {
	raw := bytes.Repeat([]byte("0123456789"), 1000)
	for _, c := range [][2]int{{0, 5}, {5000, 5010}, {9990, 10_000}, {10, 9000}, {0, 10_000}, {7, 7}} {
		v, start, end := window(raw, c[0], c[1])
		if len(v) != attack.MaxValueBytes || start < 0 || start > end || end > len(v) {
			t.Fatalf("window of %v: [%d,%d) of %d", c, start, end, len(v))
		}
		if want := raw[c[0]:min(c[1], c[0]+attack.MaxValueBytes)]; !bytes.HasPrefix(want, v[start:end]) {
			t.Errorf("window of %v shows other text", c)
		}
	}
	v, start, end := window([]byte("abc"), 1, 2)
	if string(v) != "abc" || start != 1 || end != 2 {
		t.Errorf("%q [%d,%d)", v, start, end)
	}
}

// Hostile values must not make the search slow.
func TestLocateIsLinear(t *testing.T) {
	for name, unit := range map[string]string{"comments": "/*", "percent": "%25", "escapes": `\u0041`, "entities": "&lt;", "ampersands": "&"} {
		raw := []byte(strings.Repeat(unit, maxLocate/len(unit)))
		started := time.Now()
		locate(raw, strings.Repeat("a", 500)+"zz")
		if d := time.Since(started); d > 2*time.Second {
			t.Errorf("%s: %v", name, d)
		}
	}
}

func FuzzLocate(f *testing.F) {
	for _, s := range [][2]string{
		{"%252e%252e%252fetc", "../"}, {`\u002f&lt;%3c+`, "/<< "}, {"/*x*/'a", "a"}, {"\xff%zz&#99999999;", "\xff"},
	} {
		f.Add([]byte(s[0]), s[1])
	}
	f.Fuzz(func(t *testing.T, raw []byte, want string) {
		start, end, ok := locate(raw, want)
		if start < 0 || start > end || end > len(raw) || ok && start == end {
			t.Fatalf("[%d,%d) of %d bytes, %v", start, end, len(raw), ok)
		}
		v, s, e := window(raw, start, end)
		if s < 0 || s > e || e > len(v) || len(v) > attack.MaxValueBytes {
			t.Fatalf("window [%d,%d) of %d bytes", s, e, len(v))
		}
	})
}
