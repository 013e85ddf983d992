package detect

import (
	"bytes"
	"html"
	"unicode/utf8"

	"github.com/periscope-mesh/periscope/node/attack"
)

// maxLocate bounds the values in which decoded text is searched for; longer
// ones are only searched as they stand.
const maxLocate = 64 << 10

// text is decoded text that knows where each of its bytes came from.
type text struct {
	b     []byte
	start []int32 // offset in the raw value at which what made b[i] starts
	end   []int32 // and ends
}

func (t *text) put(c byte, start, end int32) {
	t.b = append(t.b, c)
	t.start = append(t.start, start)
	t.end = append(t.end, end)
}

// locate finds text that a rule saw, after its transformations, in the raw
// value: decoded from URL encoding up to three times, with or without JSON
// escapes and HTML entities, in any case, and at last with white space,
// quotes and the like taken out of both. It takes time linear in the value.
func locate(raw []byte, want string) (start, end int, ok bool) {
	if want == "" || len(raw) == 0 {
		return 0, 0, false
	}
	if i := bytes.Index(raw, []byte(want)); i >= 0 {
		return i, i + len(want), true
	}
	if len(raw) > maxLocate || len(want) > 4*len(raw) {
		if i := bytes.Index(lower(raw), lower([]byte(want))); i >= 0 && len(raw) <= 2<<20 {
			return i, i + len(want), true
		}
		return 0, 0, false
	}
	forms := decodings(raw)
	needle := lower([]byte(want))
	for _, f := range forms {
		if s, e, ok := f.find(needle); ok {
			return s, e, true
		}
	}
	bare := strip(&text{b: needle}).b
	if len(bare) == 0 {
		return 0, 0, false
	}
	for _, f := range forms {
		if s, e, ok := strip(f).find(bare); ok {
			return s, e, true
		}
	}
	return 0, 0, false
}

// lower folds ASCII only, so that lengths stay.
func lower(b []byte) []byte {
	out := make([]byte, len(b))
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		out[i] = c
	}
	return out
}

func (t *text) find(needle []byte) (int, int, bool) {
	i := bytes.Index(lower(t.b), needle)
	if i < 0 {
		return 0, 0, false
	}
	return int(t.start[i]), int(t.end[i+len(needle)-1]), true
}

// decodings lists the raw value and what decoding it makes, each once.
func decodings(raw []byte) []*text {
	t := &text{b: raw, start: make([]int32, len(raw)), end: make([]int32, len(raw))}
	for i := range raw {
		t.start[i], t.end[i] = int32(i), int32(i+1)
	}
	var out []*text
	for range 4 {
		out = append(out, t)
		if u, changed := unescape(t); changed {
			out = append(out, u)
		}
		next, changed := percent(t)
		if !changed {
			break
		}
		t = next
	}
	return out
}

// percent decodes %XX, %uXXXX and +.
func percent(t *text) (*text, bool) {
	if bytes.IndexByte(t.b, '%') < 0 && bytes.IndexByte(t.b, '+') < 0 {
		return nil, false
	}
	out := &text{}
	changed := false
	for i := 0; i < len(t.b); {
		n, c := 1, t.b[i]
		switch {
		case c == '+':
			c = ' '
		case c == '%' && hexAt(t.b, i+1, 2):
			c, n = byte(hexValue(t.b[i+1:i+3])), 3
		case c == '%' && i+1 < len(t.b) && (t.b[i+1] == 'u' || t.b[i+1] == 'U') && hexAt(t.b, i+2, 4):
			c, n = byte(hexValue(t.b[i+2:i+6])), 6
		}
		changed = changed || n > 1 || c != t.b[i]
		out.put(c, t.start[i], t.end[i+n-1])
		i += n
	}
	return out, changed
}

// unescape decodes what JSON, JavaScript and HTML escape: \n, \", \uXXXX,
// \xXX, &lt;, &#60;, &#x3c;.
func unescape(t *text) (*text, bool) {
	if bytes.IndexByte(t.b, '\\') < 0 && bytes.IndexByte(t.b, '&') < 0 {
		return nil, false
	}
	out := &text{}
	changed := false
	for i := 0; i < len(t.b); {
		r, n := unescapeAt(t.b[i:])
		if n <= 1 {
			out.put(t.b[i], t.start[i], t.end[i])
			i++
			continue
		}
		changed = true
		var buf [utf8.UTFMax]byte
		for _, c := range buf[:utf8.EncodeRune(buf[:], r)] {
			out.put(c, t.start[i], t.end[i+n-1])
		}
		i += n
	}
	return out, changed
}

// unescapeAt reads one escape; a length of 0 means that there is none.
func unescapeAt(b []byte) (rune, int) {
	if len(b) < 2 {
		return 0, 0
	}
	if b[0] == '\\' {
		switch c := b[1]; {
		case c == 'u' && hexAt(b, 2, 4):
			return rune(hexValue(b[2:6])), 6
		case c == 'x' && hexAt(b, 2, 2):
			return rune(hexValue(b[2:4])), 4
		case c == 'n':
			return '\n', 2
		case c == 't':
			return '\t', 2
		case c == 'r':
			return '\r', 2
		case c == '"' || c == '\'' || c == '\\' || c == '/':
			return rune(c), 2
		}
		return 0, 0
	}
	if b[0] != '&' {
		return 0, 0
	}
	end := bytes.IndexByte(b[:min(len(b), 12)], ';')
	if end < 0 {
		return 0, 0
	}
	decoded := html.UnescapeString(string(b[:end+1]))
	r, n := utf8.DecodeRuneInString(decoded)
	if n != len(decoded) || r == utf8.RuneError {
		return 0, 0
	}
	return r, end + 1
}

// strip takes out what transformations remove or rewrite: white space, quotes,
// shell escapes, separators, comments. It also folds case.
func strip(t *text) *text {
	out := &text{}
	closed := true // there may be another end of a comment; searched for once only if not
	for i := 0; i < len(t.b); i++ {
		c := t.b[i]
		if closed && c == '/' && i+1 < len(t.b) && t.b[i+1] == '*' {
			n := bytes.Index(t.b[i+2:], []byte("*/"))
			if n >= 0 {
				i += n + 3
				continue
			}
			closed = false
		}
		switch c {
		case ' ', '\t', '\n', '\r', '\v', '\f', 0, 0xa0, '\'', '"', '`', '\\', '^', ',', ';':
			continue
		}
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		out.b = append(out.b, c)
		if t.start != nil {
			out.start = append(out.start, t.start[i])
			out.end = append(out.end, t.end[i])
		}
	}
	return out
}

func hexAt(b []byte, i, n int) bool {
	if i+n > len(b) {
		return false
	}
	for _, c := range b[i : i+n] {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') {
			return false
		}
	}
	return true
}

func hexValue(b []byte) int {
	v := 0
	for _, c := range b {
		switch {
		case c >= 'a':
			c -= 'a' - 10
		case c >= 'A':
			c -= 'A' - 10
		default:
			c -= '0'
		}
		v = v<<4 | int(c)
	}
	return v
}

// window cuts a value to attack.MaxValueBytes around [start,end), and copies
// it: a match outlives the buffer its exchange was decoded from.
func window(raw []byte, start, end int) ([]byte, int, int) {
	if len(raw) <= attack.MaxValueBytes {
		return bytes.Clone(raw), start, end
	}
	end = min(end, start+attack.MaxValueBytes)
	from := max(0, start-(attack.MaxValueBytes-(end-start))/2)
	from = min(from, len(raw)-attack.MaxValueBytes)
	return bytes.Clone(raw[from : from+attack.MaxValueBytes]), start - from, end - from
}
