package console

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// text is data decoded from other bytes, with where each of its bytes came
// from.
type text struct {
	data []byte
	pos  []int // pos[i] is where byte i began, pos[len(data)] the end; nil if nothing was decoded
}

func asText(b []byte) text { return text{data: b} }

func (t text) from(i int) int {
	if t.pos == nil {
		return i
	}
	return t.pos[i]
}

// to is the end of the bytes that [.., i) came from.
func (t text) to(i int) int { return t.from(i) }

// decodings are the forms in which detection may have seen the bytes, the
// plainest first.
func decodings(b []byte) []text {
	list := []text{asText(b)}
	once := percentDecoded(list[0])
	if !bytes.Equal(once.data, b) {
		list = append(list, once)
		if twice := percentDecoded(once); !bytes.Equal(twice.data, once.data) {
			list = append(list, twice)
		}
	}
	if bytes.IndexByte(b, '\\') >= 0 {
		list = append(list, jsonDecoded(list[0]))
	}
	return list
}

// percentDecoded undoes %41, %u0041 and + for a space.
func percentDecoded(t text) text {
	out := text{data: make([]byte, 0, len(t.data)), pos: make([]int, 0, len(t.data)+1)}
	for i := 0; i < len(t.data); {
		c, n := t.data[i], 1
		switch {
		case c == '+':
			out.add(' ', t.from(i))
		case c == '%' && i+2 < len(t.data) && isHex(t.data[i+1:i+3]):
			v, _ := strconv.ParseUint(string(t.data[i+1:i+3]), 16, 8)
			out.add(byte(v), t.from(i))
			n = 3
		case c == '%' && i+5 < len(t.data) && t.data[i+1]|0x20 == 'u' && isHex(t.data[i+2:i+6]):
			v, _ := strconv.ParseUint(string(t.data[i+2:i+6]), 16, 32)
			out.addRune(rune(v), t.from(i))
			n = 6
		default:
			out.add(c, t.from(i))
		}
		i += n
	}
	out.pos = append(out.pos, t.from(len(t.data)))
	return out
}

// jsonDecoded undoes the escapes of JSON strings, wherever they are.
func jsonDecoded(t text) text {
	out := text{data: make([]byte, 0, len(t.data)), pos: make([]int, 0, len(t.data)+1)}
	const short = "\"\\/bfnrt"
	const plain = "\"\\/\b\f\n\r\t"
	for i := 0; i < len(t.data); {
		at := t.from(i)
		if t.data[i] != '\\' || i+1 == len(t.data) {
			out.add(t.data[i], at)
			i++
			continue
		}
		if k := strings.IndexByte(short, t.data[i+1]); k >= 0 {
			out.add(plain[k], at)
			i += 2
			continue
		}
		r, n := unicodeEscape(t.data[i:])
		if n == 0 {
			out.add('\\', at)
			i++
			continue
		}
		out.addRune(r, at)
		i += n
	}
	out.pos = append(out.pos, t.from(len(t.data)))
	return out
}

// unicodeEscape reads \u0041 or a pair of surrogates; n is 0 if b does not
// begin with one.
func unicodeEscape(b []byte) (r rune, n int) {
	one := func(b []byte) (rune, bool) {
		if len(b) < 6 || b[0] != '\\' || b[1] != 'u' || !isHex(b[2:6]) {
			return 0, false
		}
		v, _ := strconv.ParseUint(string(b[2:6]), 16, 32)
		return rune(v), true
	}
	r, ok := one(b)
	if !ok {
		return 0, 0
	}
	if utf16.IsSurrogate(r) {
		if low, ok := one(b[6:]); ok {
			if both := utf16.DecodeRune(r, low); both != utf8.RuneError {
				return both, 12
			}
		}
	}
	return r, 6
}

func (t *text) add(c byte, from int) {
	t.data = append(t.data, c)
	t.pos = append(t.pos, from)
}

func (t *text) addRune(r rune, from int) {
	n := len(t.data)
	t.data = utf8.AppendRune(t.data, r)
	for range len(t.data) - n {
		t.pos = append(t.pos, from)
	}
}

func isHex(b []byte) bool {
	for _, c := range b {
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'f') {
			return false
		}
	}
	return true
}

// maxJSONDepth bounds the walk below.
const maxJSONDepth = 64

// jsonValues are the ranges of the scalar values at a path such as
// $.items[0].name (items.0.name and json.items.0.name mean the same), strings
// without their quotes. The walk ends where the text stops being JSON: bodies
// may be cut.
func jsonValues(body []byte, path string) (list []span) {
	want := plainPath(path)
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	type level struct {
		array bool
		index int
		key   string
		value bool // in an object: the next token is a value
	}
	var stack []level
	for {
		before := int(d.InputOffset())
		token, err := d.Token()
		if err != nil {
			return list
		}
		if delim, ok := token.(json.Delim); ok && (delim == '}' || delim == ']') {
			if len(stack) > 0 {
				stack = stack[:len(stack)-1]
			}
			continue
		}
		if top := len(stack) - 1; top >= 0 {
			l := &stack[top]
			if !l.array && !l.value {
				l.key, _ = token.(string)
				l.value = true
				continue
			}
			l.value = false
			l.index++
		}
		if delim, ok := token.(json.Delim); ok {
			if len(stack) == maxJSONDepth {
				return list
			}
			stack = append(stack, level{array: delim == '[', index: -1})
			continue
		}
		var names []string
		for _, l := range stack {
			if l.array {
				names = append(names, strconv.Itoa(l.index))
			} else {
				names = append(names, l.key)
			}
		}
		if !strings.EqualFold(strings.Join(names, "."), want) {
			continue
		}
		end := int(d.InputOffset())
		start := before + len(body[before:end]) - len(bytes.TrimLeft(body[before:end], " \t\r\n,:"))
		if _, ok := token.(string); ok && end-start >= 2 {
			start, end = start+1, end-1
		}
		list = append(list, span{start: start, end: end})
	}
}

func plainPath(path string) string {
	path = strings.TrimPrefix(strings.TrimPrefix(path, "$"), ".")
	path = strings.TrimPrefix(path, "json.")
	return strings.TrimPrefix(strings.NewReplacer("[", ".", "]", "", `"`, "", "'", "").Replace(path), ".")
}
