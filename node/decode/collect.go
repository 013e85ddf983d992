package decode

import (
	"bytes"
	"strings"
	"unicode/utf8"
)

// collector gathers values, a group at a time, and folds what exceeds
// MaxValues into one value: an attacker cannot hide a value behind others.
type collector struct {
	values []Value
	start  int // of the current group
	folded []byte
	facts  Facts
}

func (c *collector) add(v Value) {
	if len(v.Name) > maxNameBytes {
		v.Name = v.Name[:maxNameBytes]
	}
	if len(c.values)-c.start >= MaxValues {
		c.facts |= Folded
		if len(c.folded)+len(v.Key)+len(v.Text)+2 <= MaxBodyBytes {
			c.folded = append(append(append(append(c.folded, v.Key...), '\n'), v.Text...), '\n')
		}
		return
	}
	c.values = append(c.values, v)
}

// group ends the current group of values.
func (c *collector) group() {
	if len(c.folded) > 0 {
		// What is over the bound loses its place, not its inspection.
		c.values = append(c.values, Value{Kind: Body, Name: "(more)", Key: "more", Raw: c.folded, Text: string(c.folded)})
		c.folded = nil
	}
	c.start = len(c.values)
}

// urlencoded reads a query or a form.
func (c *collector) urlencoded(kind Kind, b []byte) {
	for len(b) > 0 {
		var pair []byte
		pair, b, _ = bytes.Cut(b, []byte{'&'})
		if len(pair) == 0 {
			continue
		}
		name, value, _ := bytes.Cut(pair, []byte{'='})
		key := unescapeURL(string(name), true)
		c.add(Value{Kind: kind, Name: key, Key: key, Raw: value, Text: unescapeURL(string(value), true)})
	}
}

// cookies reads a Cookie header. Values are not decoded (RFC 6265, 5.4).
func (c *collector) cookies(b []byte) {
	for len(b) > 0 {
		var pair []byte
		pair, b, _ = bytes.Cut(b, []byte{';'})
		pair = trimControl(pair)
		name, value, ok := bytes.Cut(pair, []byte{'='})
		if !ok && len(pair) == 0 {
			continue
		}
		key, value := string(trimControl(name)), trimControl(value)
		c.add(Value{Kind: Cookie, Name: key, Key: key, Raw: value, Text: string(value)})
	}
}

func trimControl(b []byte) []byte {
	return bytes.TrimFunc(b, func(r rune) bool { return r <= ' ' || r == 0x7f })
}

// runs adds the printable text in a binary body: strings of protobuf or
// MessagePack, for instance.
func (c *collector) runs(b []byte) {
	const minRun = 6
	for i := 0; i < len(b); {
		start := i
		for i < len(b) {
			r, n := utf8.DecodeRune(b[i:])
			if r == utf8.RuneError && n <= 1 || r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r == 0x7f {
				break
			}
			i += n
		}
		if i-start >= minRun {
			c.add(Value{Kind: Body, Name: "(text)", Key: "text", Raw: b[start:i], Text: string(b[start:i])})
		}
		if i == start {
			i++
		}
	}
}

// unescapeURL decodes %XX (and + if plus); what is no escape stays as it is.
func unescapeURL(s string, plus bool) string {
	if strings.IndexByte(s, '%') < 0 && (!plus || strings.IndexByte(s, '+') < 0) {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '+' && plus:
			out = append(out, ' ')
		case c == '%' && i+2 < len(s) && isHex(s[i+1]) && isHex(s[i+2]):
			out = append(out, unhex(s[i+1])<<4|unhex(s[i+2]))
			i += 2
		default:
			out = append(out, c)
		}
	}
	return string(out)
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c >= 'a':
		return c - 'a' + 10
	case c >= 'A':
		return c - 'A' + 10
	}
	return c - '0'
}
