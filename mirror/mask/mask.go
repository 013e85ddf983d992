// Package mask hides what a policy masks in headers, paths and bodies. It is
// the reference for the masking that the gateway plugin does in Lua, and does
// the same where exchanges reach a node without the plugin.
//
// Where a message can be read in more than one way it errs towards hiding. Time
// and memory grow with the length of what it is given, whatever that is. It
// never parses a message as a whole: cut and malformed ones are masked too.
//
// What reads exchanges that no plugin has masked may import it; it imports only
// package policy.
package mask

import (
	"bytes"
	"strings"

	"github.com/periscope-mesh/periscope/policy"
)

// Hidden stands for what is masked: alone, or as a string in JSON.
const Hidden = "***"

// Masker masks by one policy. It may be used by several goroutines at once.
type Masker struct {
	headers, json        map[string]bool
	cookies, query, form names
	cards                bool
}

// New makes the policy's Masker.
func New(m policy.Mask) *Masker {
	masker := &Masker{headers: set(m.Headers), json: set(m.JSONNames()), cookies: set(m.Cookies), query: set(m.QueryParameters), form: set(m.FormFields)}
	for _, d := range m.Detectors {
		masker.cards = masker.cards || d == policy.DetectorCreditCard
	}
	return masker
}

// isURLHeader tells headers with a URL, or several, for a value.
func isURLHeader(name string) bool {
	switch name {
	case ":path", "referer", "location", "content-location", "refresh", "link",
		"x-envoy-original-path", "x-envoy-original-url", "x-original-url", "x-original-uri", "x-rewrite-url", "x-forwarded-uri":
		return true
	}
	return false
}

// Header masks a header's or trailer's value, and says whether anything was
// hidden. What it returns may be value itself, and is else a copy.
func (m *Masker) Header(name, value []byte) ([]byte, bool) {
	key := lower(name)
	out := value
	switch {
	case m.headers[key]:
		return []byte(Hidden), true
	case key == "cookie" || key == "set-cookie":
		out = m.cookies.inCookies(value)
	case isURLHeader(key):
		out = m.query.inURL(value)
	}
	return m.finish(value, out)
}

// Path masks a request's target, the value of :path.
func (m *Masker) Path(value []byte) ([]byte, bool) { return m.Header([]byte(":path"), value) }

// Body masks a body, or what there is of it, by the message's Content-Type and
// Content-Encoding. A compressed one whose type may hold masked names is hidden
// as a whole: nil, true. The result is at most twice as long as the body, and a
// few bytes.
func (m *Masker) Body(contentType, contentEncoding string, body []byte) ([]byte, bool) {
	json, form, parts := m.kinds(contentType)
	if (json || form || parts) && isEncoded(contentEncoding) {
		return nil, true
	}
	out := body
	if json {
		out = inJSON(out, m.json)
	}
	if form {
		out = m.form.inForm(out)
	}
	if parts {
		out = m.form.inMultipart(out, boundary(contentType))
	}
	return m.finish(body, out)
}

func (m *Masker) finish(before, after []byte) ([]byte, bool) {
	if m.cards {
		after = inCards(after)
	}
	return after, !bytes.Equal(before, after)
}

// kinds tells what a body of a content type may hold that is to be masked. Text
// and bodies without a type may be JSON or a form; so may what says it is a
// form, for curl says so of all that it sends.
func (m *Masker) kinds(contentType string) (json, form, parts bool) {
	t := lower([]byte(contentType))
	json, form, parts = strings.Contains(t, "json"), strings.Contains(t, "urlencoded"), strings.Contains(t, "multipart/")
	if t == "" || strings.Contains(t, "text/plain") {
		form = true
	}
	return (json || form) && len(m.json) > 0, form && len(m.form) > 0, parts && len(m.form) > 0
}

func isEncoded(contentEncoding string) bool {
	return contentEncoding != "" && lower([]byte(contentEncoding)) != "identity"
}

// names are masked names in lower case, of cookies, parameters or fields.
type names map[string]bool

func set(list []string) map[string]bool {
	s := make(map[string]bool, len(list))
	for _, name := range list {
		s[lower([]byte(name))] = true
	}
	return s
}

// has says whether a name as it was sent is masked: decoded, in lower case, as
// a whole or by any of its parts: "user[password]" and "user.password" are
// masked with password.
func (n names) has(sent []byte) bool {
	if len(n) == 0 {
		return false
	}
	var short [64]byte
	name := decode(short[:0], sent)
	if n[string(name)] || bytes.IndexFunc(name, isBreak) >= 0 && n[string(bytes.TrimFunc(name, isSpace))] {
		return true
	}
	for part := range bytes.FieldsFuncSeq(name, isBreak) {
		if n[string(part)] {
			return true
		}
	}
	return false
}

func isSpace(r rune) bool { return r <= ' ' }

func isBreak(r rune) bool { return isSpace(r) || r == '[' || r == ']' || r == '.' }

// decode appends s in lower case, its URL encoding undone once, as far as it is
// valid.
func decode(out, s []byte) []byte {
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '+':
			c = ' '
		case c == '%' && i+2 < len(s) && isHex(s[i+1]) && isHex(s[i+2]):
			c = fromHex(s[i+1])<<4 | fromHex(s[i+2])
			i += 2
		}
		out = append(out, lowerByte(c))
	}
	return out
}

func isHex(c byte) bool { return c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'f' }

func fromHex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c | 0x20 - 'a' + 10
}

// lower changes ASCII only.
func lower(b []byte) string {
	out := make([]byte, len(b))
	for i, c := range b {
		out[i] = lowerByte(c)
	}
	return string(out)
}

func lowerByte(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c |= 0x20
	}
	return c
}

// inPairs hides values of "name=value" between separators. keys and ends are v
// itself, or v with the separators of which some readers know in place of other
// bytes: a name begins after any in keys, a hidden value ends only at one in ends.
func (n names) inPairs(v, keys, ends []byte, separator byte, quotes bool) []byte {
	var out cutter
	from := 0
	for equals := index(v, '=', 0); equals >= 0; {
		stop := index(keys, separator, from)
		if stop >= 0 && stop < equals {
			from = stop + 1
			continue
		}
		if n.has(v[from:equals]) {
			end := equals + 1
			if quotes {
				end = afterQuotes(v, end)
			}
			stop = index(ends, separator, end)
			if stop < 0 {
				stop = len(v)
			}
			out.hide(v, equals+1, stop, Hidden)
		}
		if stop < 0 || stop == len(v) {
			break
		}
		from = stop + 1
		equals = index(v, '=', from)
	}
	return out.rest(v)
}

// afterQuotes gives the place after a quoted string that begins at i, after
// spaces; i itself where there is none that ends.
func afterQuotes(v []byte, i int) int {
	from := skipSpace(v, i)
	if from == len(v) || v[from] != '"' {
		return i
	}
	if end := stringEnd(v, from); end >= 0 {
		return end
	}
	return i
}

// inCookies masks a Cookie or Set-Cookie header's value. A comma may separate
// cookies (RFC 2965, and proxies that fold header lines), or be part of one.
func (n names) inCookies(v []byte) []byte {
	if len(n) == 0 {
		return v
	}
	return n.inPairs(v, bytes.ReplaceAll(v, []byte{','}, []byte{';'}), v, ';', true)
}

// inURL masks the parameters of a URL's query and fragment, and of its path
// ("/a;name=value/b"). A semicolon or question mark may separate parameters, or
// be part of one.
func (n names) inURL(v []byte) []byte {
	if len(n) == 0 || bytes.IndexByte(v, '=') < 0 {
		return v
	}
	path, query, fragment := v, v[len(v):], v[len(v):]
	if i := bytes.IndexByte(path, '#'); i >= 0 {
		path, fragment = path[:i], v[i:]
	}
	if i := bytes.IndexByte(path, '?'); i >= 0 {
		path, query = path[:i], path[i:]
	}
	keys := bytes.ReplaceAll(path, []byte{';'}, []byte{'/'})
	out := bytes.Clone(n.inPairs(path, keys, keys, '/', false))
	for _, part := range [][]byte{query, fragment} {
		out = append(out, n.inPairs(part, replaceAny(part, ";?#"), part, '&', false)...)
	}
	return out
}

// inForm masks the fields of a form: URL-encoded, or each on a line (HTML's
// text/plain).
func (n names) inForm(v []byte) []byte {
	return n.inPairs(v, replaceAny(v, ";\r\n"), v, '&', false)
}

// replaceAny puts & in place of each of the bytes.
func replaceAny(v []byte, of string) []byte {
	out := bytes.Clone(v)
	for i, c := range out {
		if strings.IndexByte(of, c) >= 0 {
			out[i] = '&'
		}
	}
	return out
}

func index(b []byte, c byte, from int) int {
	if i := bytes.IndexByte(b[from:], c); i >= 0 {
		return from + i
	}
	return -1
}

// cutter copies a text but for what is hidden.
type cutter struct {
	out  []byte
	done int // of the text
}

func (c *cutter) hide(text []byte, from, to int, by string) {
	c.out = append(append(c.out, text[c.done:from]...), by...)
	c.done = to
}

func (c *cutter) rest(text []byte) []byte {
	if c.out == nil {
		return text
	}
	return append(c.out, text[c.done:]...)
}
