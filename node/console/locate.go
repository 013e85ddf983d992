package console

import (
	"bytes"
	"strings"

	"github.com/periscope-mesh/periscope/node/attack"
)

// marked is an exchange with the ranges of its parts that rules matched.
type marked struct {
	path     []span
	request  markedMessage
	response markedMessage
}

type markedMessage struct {
	fields  []attack.Field
	headers [][]span // by field: of its value
	body    []span
}

// region is a part of an exchange where a match can be.
type region struct {
	data    []byte
	base    int     // of data in the part that marks belong to
	marks   *[]span // of that part
	decoded []text  // made when first needed
}

// locator finds matches in one exchange.
type locator struct {
	x     *attack.Exchange
	out   *marked
	cache map[string]*region
}

// locate finds where the matches of an exchange are in the bytes as they came.
// found[i] tells whether match i is among the marks.
func locate(x *attack.Exchange, matches []attack.Match) (out *marked, found []bool) {
	out = &marked{request: markedMessage{fields: withHost(x)}, response: markedMessage{fields: x.Response.Headers}}
	for _, m := range []*markedMessage{&out.request, &out.response} {
		m.headers = make([][]span, len(m.fields))
	}
	l := &locator{x: x, out: out, cache: make(map[string]*region)}
	found = make([]bool, len(matches))
	for i := range matches {
		found[i] = l.mark(&matches[i])
	}
	return out, found
}

// withHost is the request's header list with its authority in front, as
// HTTP/1.1 has it.
func withHost(x *attack.Exchange) []attack.Field {
	if x.Host == "" {
		return x.Request.Headers
	}
	for _, f := range x.Request.Headers {
		if strings.EqualFold(f.Name, "host") {
			return x.Request.Headers
		}
	}
	return append([]attack.Field{{Name: "host", Value: x.Host}}, x.Request.Headers...)
}

// mark marks the match in the narrowest region that has it.
func (l *locator) mark(m *attack.Match) bool {
	start, end := m.Start, m.End
	if start < 0 || start >= end || end > len(m.Value) {
		start, end = 0, len(m.Value)
	}
	if start == end {
		return false
	}
	narrow, wide := l.regions(m.Location)
	for _, regions := range [][]*region{narrow, wide} {
		for _, r := range regions {
			if s, ok := r.find(m.Value, start, end); ok {
				*r.marks = append(*r.marks, span{r.base + s.start, r.base + s.end, m.Excluded})
				return true
			}
		}
	}
	return false
}

// regions are the parts that a location names: the one value, and then all
// that is around it, because a rule can also match a name, or values joined.
func (l *locator) regions(at attack.Location) (narrow, wide []*region) {
	request, response := &l.out.request, &l.out.response
	path, query := l.target()
	switch at.Place {
	case attack.InPath:
		return []*region{path}, []*region{l.whole()}
	case attack.InQuery:
		return l.pairs(query, '&', at.Name), []*region{query}
	case attack.InHeader:
		return l.headers("q", request, at.Name), nil
	case attack.InCookie:
		cookies := l.headers("q", request, "cookie")
		for _, c := range cookies {
			narrow = append(narrow, l.pairs(c, ';', at.Name)...)
		}
		return narrow, cookies
	case attack.InForm:
		body := l.body("qb", l.x.Request.Body, &request.body)
		return l.pairs(body, '&', at.Name), []*region{body}
	case attack.InJSON:
		body := l.body("qb", l.x.Request.Body, &request.body)
		for _, v := range jsonValues(body.data, at.Name) {
			narrow = append(narrow, &region{data: body.data[v.start:v.end], base: v.start, marks: body.marks})
		}
		return narrow, []*region{body}
	case attack.InXML, attack.InBody, attack.InMultipart:
		return []*region{l.body("qb", l.x.Request.Body, &request.body)}, nil
	case attack.InResponse:
		return []*region{l.body("rb", l.x.Response.Body, &response.body)}, nil
	case attack.InRespHeader:
		return l.headers("r", response, at.Name), nil
	}
	all := append([]*region{l.whole()}, l.headers("q", request, "")...)
	return append(all, l.body("qb", l.x.Request.Body, &request.body)), nil
}

func (l *locator) cached(key string, make func() *region) *region {
	r, ok := l.cache[key]
	if !ok {
		r = make()
		l.cache[key] = r
	}
	return r
}

func (l *locator) whole() *region {
	return l.cached("target", func() *region { return &region{data: []byte(l.x.Path), marks: &l.out.path} })
}

func (l *locator) target() (path, query *region) {
	i := strings.IndexByte(l.x.Path, '?')
	if i < 0 {
		i = len(l.x.Path)
	}
	path = l.cached("path", func() *region { return &region{data: []byte(l.x.Path[:i]), marks: &l.out.path} })
	query = l.cached("query", func() *region {
		from := min(i+1, len(l.x.Path))
		return &region{data: []byte(l.x.Path[from:]), base: from, marks: &l.out.path}
	})
	return path, query
}

func (l *locator) body(key string, data []byte, marks *[]span) *region {
	return l.cached(key, func() *region { return &region{data: data, marks: marks} })
}

// headers are the values of the header lines with the name; of all of them if
// it is empty.
func (l *locator) headers(side string, m *markedMessage, name string) (list []*region) {
	for i, f := range m.fields {
		if name == "" || strings.EqualFold(f.Name, name) {
			list = append(list, l.cached(side+string(rune('0'+i)), func() *region {
				return &region{data: []byte(f.Value), marks: &m.headers[i]}
			}))
		}
	}
	return list
}

// pairs are the values of name in a list such as a=1&b=2.
func (l *locator) pairs(r *region, separator byte, name string) (list []*region) {
	at := 0
	for _, pair := range bytes.Split(r.data, []byte{separator}) {
		key, value, ok := bytes.Cut(pair, []byte("="))
		if ok && sameName(key, name) {
			list = append(list, &region{data: value, base: r.base + at + len(key) + 1, marks: r.marks})
		}
		at += len(pair) + 1
	}
	return list
}

func sameName(key []byte, name string) bool {
	key = bytes.TrimSpace(key)
	return string(key) == name || string(percentDecoded(asText(key)).data) == name
}

// find looks for the value in the region: as it is, then as each decoding that
// detection may have seen, then for the matched part alone.
func (r *region) find(value []byte, start, end int) (span, bool) {
	part := value[start:end]
	if s, ok := r.index(value, start, end); ok {
		return s, true
	}
	if len(part) < len(value) && len(part) >= 3 {
		return r.index(part, 0, len(part))
	}
	return span{}, false
}

func (r *region) index(value []byte, start, end int) (span, bool) {
	if r.decoded == nil {
		r.decoded = decodings(r.data)
	}
	for _, t := range r.decoded {
		if i := bytes.Index(t.data, value); i >= 0 {
			return span{start: t.from(i + start), end: t.to(i + end)}, true
		}
	}
	lower := asciiLower(value)
	for _, t := range r.decoded {
		if i := bytes.Index(asciiLower(t.data), lower); i >= 0 {
			return span{start: t.from(i + start), end: t.to(i + end)}, true
		}
	}
	return span{}, false
}

// asciiLower keeps lengths, as bytes.ToLower may not.
func asciiLower(b []byte) []byte {
	out := make([]byte, len(b))
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		out[i] = c
	}
	return out
}
