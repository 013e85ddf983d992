package decode

import (
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// frame is an open object or array.
type frame struct {
	object  bool
	index   int
	nameLen int // of the path before the current member was appended
	keyLen  int
	haveKey bool
}

// jsonScanner walks JSON text, cut or not, without recursion. Numbers and
// literals are no values: they cannot carry a payload, only their names can.
type jsonScanner struct {
	c     *collector
	b     []byte
	i     int
	name  []byte // $.a.b[0]
	key   []byte // json.a.b.0
	stack []frame
	deep  int // open containers beyond maxDepth
	seen  map[string]struct{}
	bad   bool
}

// json reads JSON text, one document or several.
func (c *collector) json(b []byte, cut bool) {
	s := jsonScanner{c: c, b: b, name: []byte("$"), key: []byte("json"), seen: make(map[string]struct{})}
	s.run()
	if (s.bad || len(s.stack) > 0 || s.deep > 0) && !cut {
		c.facts |= Malformed
	}
}

func (s *jsonScanner) run() {
	for s.i < len(s.b) {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\r', '\n', 0x1e, 0xef, 0xbb, 0xbf:
			s.i++
		case '{', '[':
			s.i++
			s.push(c == '{')
		case '}', ']':
			s.i++
			s.pop(c == '}')
		case ',':
			s.i++
			s.next()
		case ':':
			s.i++
		case '"':
			s.str()
		default:
			s.bare()
		}
	}
}

func (s *jsonScanner) push(object bool) {
	if len(s.stack) >= maxDepth {
		s.deep++
		return
	}
	s.stack = append(s.stack, frame{object: object, nameLen: len(s.name), keyLen: len(s.key)})
	if !object {
		s.member("", 0)
	}
}

func (s *jsonScanner) pop(object bool) {
	if s.deep > 0 {
		s.deep--
		return
	}
	if len(s.stack) == 0 {
		s.bad = true
		return
	}
	f := s.stack[len(s.stack)-1]
	s.bad = s.bad || f.object != object
	s.name, s.key = s.name[:f.nameLen], s.key[:f.keyLen]
	s.stack = s.stack[:len(s.stack)-1]
}

func (s *jsonScanner) next() {
	if len(s.stack) == 0 || s.deep > 0 {
		s.bad = s.bad || s.deep == 0
		return
	}
	f := &s.stack[len(s.stack)-1]
	f.haveKey = false
	f.index++
	s.name, s.key = s.name[:f.nameLen], s.key[:f.keyLen]
	if !f.object {
		s.member("", f.index)
	}
}

// member appends the current member's name to the paths.
func (s *jsonScanner) member(name string, index int) {
	if len(s.key) > 2*maxNameBytes {
		return
	}
	s.key = append(s.key, '.')
	if s.stack[len(s.stack)-1].object {
		s.name = append(append(s.name, '.'), name...)
		s.key = append(s.key, name...)
		return
	}
	s.name = append(strconv.AppendInt(append(s.name, '['), int64(index), 10), ']')
	s.key = strconv.AppendInt(s.key, int64(index), 10)
}

// str reads a string: a member's name or a value.
func (s *jsonScanner) str() {
	start := s.i + 1
	end := start
	for end < len(s.b) && s.b[end] != '"' {
		if s.b[end] == '\\' {
			end++
		}
		end++
	}
	end = min(end, len(s.b))
	s.i = min(end+1, len(s.b))
	raw := s.b[start:end]
	if n := len(s.stack); n > 0 && s.deep == 0 && s.stack[n-1].object && !s.stack[n-1].haveKey {
		s.stack[n-1].haveKey = true
		name := unescapeJSON(raw)
		s.member(name, 0)
		if !isPlain(name) { // the name itself may be the payload, whatever its value
			s.c.add(Value{Kind: JSON, Name: string(s.name), Key: string(s.key), Raw: raw, Text: name})
		}
		return
	}
	s.leaf(raw, unescapeJSON(raw))
}

// bare reads what is neither string nor punctuation: a number, a literal, or
// text that has no place in JSON.
func (s *jsonScanner) bare() {
	start := s.i
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\t', '\r', '\n', '{', '}', '[', ']', ',', ':', '"':
		default:
			s.i++
			continue
		}
		break
	}
	raw := s.b[start:s.i]
	if isScalar(raw) {
		return
	}
	s.bad = true
	s.leaf(raw, string(raw))
}

// leaf adds a value. A plain value that was seen is not added again: lists of
// like objects would otherwise cost as much as they are long.
func (s *jsonScanner) leaf(raw []byte, text string) {
	if text == "" {
		return
	}
	if _, again := s.seen[text]; again {
		return
	}
	if len(s.seen) < 4*MaxValues {
		s.seen[text] = struct{}{}
	}
	name := string(s.name)
	v := Value{Kind: JSON, Name: name, Key: string(s.key), Raw: raw, Text: text}
	if name == "$.query" || strings.HasPrefix(name, "$[") && strings.HasSuffix(name, "].query") {
		if literals, ok := graphqlStrings(text); ok {
			for _, l := range literals {
				v.Text = l
				s.c.add(v)
			}
			return
		}
	}
	s.c.add(v)
}

// isScalar accepts numbers and literals, and prefixes of literals.
func isScalar(b []byte) bool {
	switch string(b) {
	case "true", "false", "null", "t", "tr", "tru", "f", "fa", "fal", "fals", "n", "nu", "nul":
		return true
	}
	for _, c := range b {
		if (c < '0' || c > '9') && c != '-' && c != '+' && c != '.' && c != 'e' && c != 'E' {
			return false
		}
	}
	return true
}

// isPlain accepts names that no payload consists of.
func isPlain(s string) bool {
	if len(s) > 64 {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			return false
		}
	}
	return true
}

// unescapeJSON decodes a string's escapes; what is no escape stays.
func unescapeJSON(raw []byte) string {
	i := 0
	for i < len(raw) && raw[i] != '\\' {
		i++
	}
	if i == len(raw) {
		return string(raw)
	}
	out := append(make([]byte, 0, len(raw)), raw[:i]...)
	for i < len(raw) {
		if raw[i] != '\\' || i+1 == len(raw) {
			out = append(out, raw[i])
			i++
			continue
		}
		i += 2
		switch c := raw[i-1]; c {
		case 'n':
			out = append(out, '\n')
		case 't':
			out = append(out, '\t')
		case 'r':
			out = append(out, '\r')
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'u':
			r, n := unicodeEscape(raw[i:])
			if n == 0 {
				out = append(out, '\\', 'u')
				break
			}
			i += n
			if utf16.IsSurrogate(r) && i+1 < len(raw) && raw[i] == '\\' && raw[i+1] == 'u' {
				if low, m := unicodeEscape(raw[i+2:]); m > 0 {
					if pair := utf16.DecodeRune(r, low); pair != utf8.RuneError {
						r = pair
						i += 2 + m
					}
				}
			}
			out = utf8.AppendRune(out, r)
		default: // \" \\ \/ and whatever lenient parsers take for the character itself
			out = append(out, c)
		}
	}
	return string(out)
}

// unicodeEscape reads the four digits after \u.
func unicodeEscape(b []byte) (rune, int) {
	if len(b) < 4 {
		return 0, 0
	}
	var r rune
	for _, c := range b[:4] {
		if !isHex(c) {
			return 0, 0
		}
		r = r<<4 | rune(unhex(c))
	}
	return r, 4
}
