package decode

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"html"
	"io"
	"strconv"
	"strings"
)

// DoctypeKey is the key of XML's document type declarations.
const DoctypeKey = "xml.!doctype"

// maxRatio bounds decompression together with MaxBodyBytes: beyond 64 KiB, no
// body grows to more than maxRatio times its length. JSON shrinks to a tenth
// or so; what shrinks to less would buy an attacker our time too cheaply.
const maxRatio = 16

// inflate undoes a content coding within bounds. A cut body yields what its
// beginning holds.
func inflate(b []byte, encoding string) ([]byte, Facts) {
	if len(b) == 0 {
		return nil, 0
	}
	var r io.Reader
	switch strings.ToLower(strings.TrimSpace(encoding)) {
	case "", "identity", "aws-chunked":
		if len(b) > MaxBodyBytes {
			return b[:MaxBodyBytes], Cut
		}
		return b, 0
	case "gzip", "x-gzip":
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, Malformed
		}
		r = z
	case "deflate":
		if z, err := zlib.NewReader(bytes.NewReader(b)); err == nil {
			r = z
		} else { // some send it without zlib's head
			r = flate.NewReader(bytes.NewReader(b))
		}
	default:
		return nil, UnknownEncoding
	}
	limit := min(MaxBodyBytes, max(64<<10, maxRatio*len(b)))
	// An error after some bytes is a cut or damaged stream: what came counts.
	out, _ := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if len(out) > limit {
		return out[:limit], InflateLimit
	}
	return out, 0
}

// boundary is the boundary parameter of a Content-Type.
func boundary(media string) string {
	for _, p := range strings.Split(media, ";") {
		name, value, _ := strings.Cut(p, "=")
		if strings.EqualFold(strings.TrimSpace(name), "boundary") {
			return strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	return ""
}

// multipart reads the parts of a form: fields as values, of files only name
// and head.
func (c *collector) multipart(b []byte, boundary string, cut bool) {
	if boundary == "" || len(boundary) > 70 {
		c.facts |= Malformed
		return
	}
	delimiter := []byte("--" + boundary)
	_, rest, ok := bytes.Cut(b, delimiter)
	if !ok {
		c.facts |= Malformed
		return
	}
	for {
		if bytes.HasPrefix(rest, []byte("--")) {
			return
		}
		part, next, more := bytes.Cut(rest, delimiter)
		c.part(bytes.TrimLeft(part, "\r\n"), more)
		if !more {
			if !cut {
				c.facts |= Malformed
			}
			return
		}
		rest = next
	}
}

func (c *collector) part(b []byte, complete bool) {
	head, content, ok := bytes.Cut(b, []byte("\r\n\r\n"))
	if !ok {
		head, content, _ = bytes.Cut(b, []byte("\n\n"))
	}
	if complete {
		content = bytes.TrimSuffix(bytes.TrimSuffix(content, []byte{'\n'}), []byte{'\r'})
	}
	name, file := "", []byte(nil)
	for n := 0; len(head) > 0 && n < 32; n++ {
		var line []byte
		line, head, _ = bytes.Cut(head, []byte{'\n'})
		line = bytes.TrimRight(line, "\r")
		field, value, _ := bytes.Cut(line, []byte{':'})
		if strings.EqualFold(string(bytes.TrimSpace(field)), "content-disposition") {
			name = string(parameter(value, "name"))
			if file = parameter(value, "filename"); file == nil {
				file = parameter(value, "filename*")
			}
		}
		if len(line) > 0 {
			c.add(Value{
				Kind: Multipart, Name: strings.ToLower(string(bytes.TrimSpace(field))), Key: name,
				Raw: line, Text: string(line),
			})
		}
	}
	if file != nil {
		c.add(Value{Kind: Multipart, Name: "filename", Key: name, Raw: file, Text: string(file)})
		return
	}
	c.add(Value{Kind: Form, Name: name, Key: name, Raw: content, Text: string(content)})
}

// parameter is a parameter of a header's value, nil without one. Quotes are
// those of RFC 7578; a backslash is left alone, as browsers do.
func parameter(value []byte, name string) []byte {
	for len(value) > 0 {
		var p []byte
		if i := nextSemicolon(value); i >= 0 {
			p, value = value[:i], value[i+1:]
		} else {
			p, value = value, nil
		}
		k, v, ok := bytes.Cut(p, []byte{'='})
		if ok && strings.EqualFold(string(bytes.TrimSpace(k)), name) {
			v = bytes.TrimSpace(v)
			if len(v) >= 2 && v[0] == '"' && v[len(v)-1] == '"' {
				v = v[1 : len(v)-1]
			}
			if v == nil {
				v = []byte{}
			}
			return v
		}
	}
	return nil
}

// nextSemicolon is the first one outside quotes.
func nextSemicolon(b []byte) int {
	quoted := false
	for i, c := range b {
		switch {
		case c == '"':
			quoted = !quoted
		case c == ';' && !quoted:
			return i
		}
	}
	return -1
}

// xml reads text, attribute values, CDATA and declarations. It expands no
// entity but the predefined and numeric ones.
func (c *collector) xml(b []byte) {
	var path []byte
	var lens []int
	for len(b) > 0 {
		open := bytes.IndexByte(b, '<')
		if open < 0 {
			open = len(b)
		}
		if text := bytes.TrimSpace(b[:open]); len(text) > 0 {
			c.xmlValue(string(path), text)
		}
		if b = b[open:]; len(b) == 0 {
			return
		}
		switch {
		case bytes.HasPrefix(b, []byte("<!--")):
			b = after(b[4:], "-->")
		case bytes.HasPrefix(b, []byte("<![CDATA[")):
			text, rest, _ := bytes.Cut(b[9:], []byte("]]>"))
			if len(text) > 0 {
				c.add(Value{Kind: XML, Name: string(path), Key: c.xmlKey(), Raw: text, Text: string(text)})
			}
			b = rest
		case bytes.HasPrefix(b, []byte("<!")):
			end := declarationEnd(b)
			c.add(Value{Kind: XML, Name: "!DOCTYPE", Key: DoctypeKey, Raw: b[:end], Text: string(b[:end])})
			b = b[end:]
		case bytes.HasPrefix(b, []byte("<?")):
			b = after(b[2:], "?>")
		case bytes.HasPrefix(b, []byte("</")):
			if n := len(lens); n > 0 {
				path, lens = path[:lens[n-1]], lens[:n-1]
			}
			b = after(b, ">")
		default:
			end := tagEnd(b)
			tag := bytes.TrimSuffix(b[1:end], []byte{'>'})
			b = b[end:]
			name, attributes := cutName(bytes.TrimSuffix(tag, []byte{'/'}))
			before := len(path)
			if len(path)+len(name) < maxNameBytes {
				path = append(append(path, '/'), name...)
			}
			c.attributes(string(path), attributes)
			if bytes.HasSuffix(tag, []byte{'/'}) {
				path = path[:before]
			} else if len(lens) < maxDepth {
				lens = append(lens, before)
			}
		}
	}
}

func (c *collector) xmlValue(path string, raw []byte) {
	c.add(Value{Kind: XML, Name: path, Key: c.xmlKey(), Raw: raw, Text: html.UnescapeString(string(raw))})
}

// xmlKey numbers values: rules read keys as names of arguments, and the names
// of XML's elements, unlike those of JSON's members, are fixed by schemas.
func (c *collector) xmlKey() string { return "xml." + strconv.Itoa(len(c.values)) }

// attributes adds a tag's attribute values.
func (c *collector) attributes(path string, b []byte) {
	for {
		name, rest, ok := bytes.Cut(b, []byte{'='})
		if !ok {
			return
		}
		rest = bytes.TrimLeft(rest, " \t\r\n")
		if len(rest) == 0 {
			return
		}
		var value []byte
		if q := rest[0]; q == '"' || q == '\'' {
			value, b, _ = bytes.Cut(rest[1:], []byte{q})
		} else {
			value, b = cutName(rest)
			if len(value) == 0 {
				return
			}
		}
		name = bytes.TrimSpace(name)
		if len(value) > 0 && !bytes.HasPrefix(name, []byte("xmlns")) {
			c.xmlValue(path+"/@"+string(name), value)
		}
	}
}

func cutName(b []byte) (name, rest []byte) {
	if i := bytes.IndexAny(b, " \t\r\n"); i >= 0 {
		return b[:i], b[i+1:]
	}
	return b, nil
}

func after(b []byte, end string) []byte {
	_, rest, _ := bytes.Cut(b, []byte(end))
	return rest
}

// tagEnd is the length of a tag, quotes respected.
func tagEnd(b []byte) int {
	var quote byte
	for i, c := range b {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '>':
			return i + 1
		}
	}
	return len(b)
}

// declarationEnd is the length of a <!…> with its internal subset.
func declarationEnd(b []byte) int {
	depth := 0
	for i, c := range b {
		switch c {
		case '<', '[':
			depth++
		case ']':
			depth--
		case '>':
			if depth--; depth <= 0 {
				return i + 1
			}
		}
	}
	return len(b)
}
