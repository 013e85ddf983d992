// Package decode takes an exchange apart into flat values: path, query
// parameters, headers, cookies, form fields, JSON and XML leaves, file names,
// text in binary bodies. Each value keeps its raw bytes, so that whatever is
// found in it can be shown where it stands.
//
// It never judges, never fails and never recurses: it reads as much of a body
// as there is, cut or malformed, within the bounds below, and says by facts
// what it could not read. Detection may import it; it imports mirror/event
// alone.
package decode

import (
	"bytes"
	"strings"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// Bounds of what one exchange yields.
const (
	MaxBodyBytes = 1 << 20 // of a body, decompressed or not; the rest is left out
	MaxValues    = 1000    // of each group (query, cookies, body); beyond it, the rest is one value
	MaxFields    = 1000    // header lines of a message; the rest is left out
	maxNameBytes = 256     // of a value's name
	maxDepth     = 128     // of JSON and XML; deeper leaves bear the name of their ancestor there
)

// Kind is the part of a request a value comes from.
type Kind uint8

const (
	Path      Kind = iota + 1
	Query          // Name is the parameter
	Header         // Name is the header, lower case
	Cookie         // Name is the cookie
	Form           // Name is the field, also of multipart bodies
	JSON           // Name is the path, such as $.user.name
	XML            // Name is the path of elements, such as /a/b or /a/@href
	Multipart      // Name is "filename" or a part's header
	Body           // text without structure, or what a bound left over
)

// Value is one value of a request.
type Value struct {
	Kind Kind
	Name string
	Key  string // the name by CRS's conventions, such as json.user.name
	Raw  []byte // as it stands in the message (or in its decompressed body)
	Text string // decoded once
}

// Facts are what could not be read in full.
type Facts uint16

const (
	Cut             Facts = 1 << iota // the copy of the request is incomplete
	Malformed                         // the body is not what its content type says, and that is not our cutting
	UnknownEncoding                   // the content coding is not known: the body was not read
	InflateLimit                      // decompression stopped at its bound
	Folded                            // values beyond MaxValues are one value
	FieldsDropped                     // header lines beyond a bound were left out
	Opaque                            // the body's content type is not inspected, such as images
)

// Field is a header line.
type Field struct {
	Name  string // lower case
	Value string
	Raw   []byte
}

// Request is a request taken apart.
type Request struct {
	Method    string
	Scheme    string
	Authority string
	Target    string // :path, with the query
	Path      string // raw, without the query
	Query     string // raw
	Headers   []Field
	Values    []Value // path first, then query, cookies and body; headers are in Headers
	Body      []byte  // decompressed, at most MaxBodyBytes; nil if not inspected
	BodyKind  Kind    // Form, JSON, XML, Multipart or Body; 0 without one
	Facts     Facts
}

// Response is a response taken apart as far as detection needs it.
type Response struct {
	Status  string
	Headers []Field
	Body    []byte // decompressed; nil if not inspected
	Facts   Facts
}

// ParseRequest takes a request apart. The result shares the event's bytes.
func ParseRequest(e *event.Event) *Request {
	r := &Request{}
	for _, f := range e.Request.Headers {
		if len(f.Name) > 1 && f.Name[0] == ':' {
			switch string(f.Name) {
			case ":method":
				r.Method = string(f.Value)
			case ":scheme":
				r.Scheme = string(f.Value)
			case ":authority":
				r.Authority = string(f.Value)
			case ":path":
				r.Target = string(f.Value)
			}
		}
	}
	r.Headers, r.Facts = fields(e.Request.Headers)
	if e.Flags&(event.FlagRequestCut|event.FlagHeadersCut|event.FlagFieldsDropped|event.FlagRequestOpen) != 0 {
		r.Facts |= Cut
	}
	target := r.Target
	if i := strings.IndexByte(target, '#'); i >= 0 {
		target = target[:i]
	}
	r.Path, r.Query, _ = strings.Cut(target, "?")
	r.Values = append(r.Values, Value{Kind: Path, Raw: []byte(r.Path), Text: unescapeURL(r.Path, false)})
	c := collector{values: r.Values, start: len(r.Values)}
	c.urlencoded(Query, []byte(r.Query))
	c.group()
	for _, h := range r.Headers {
		if h.Name == "cookie" {
			c.cookies(h.Raw)
		}
	}
	c.group()
	r.Values = c.values
	r.parseBody(e, &c)
	r.Values = c.values
	r.Facts |= c.facts
	return r
}

// ParseResponse takes a response apart.
func ParseResponse(e *event.Event) *Response {
	r := &Response{}
	for _, f := range e.Response.Headers {
		if string(f.Name) == ":status" {
			r.Status = string(f.Value)
		}
	}
	r.Headers, r.Facts = fields(e.Response.Headers)
	if e.Flags&event.FlagResponseCut != 0 {
		r.Facts |= Cut
	}
	if isOpaque(mediaType(find(r.Headers, "content-type"))) {
		r.Facts |= Opaque
		return r
	}
	var facts Facts
	r.Body, facts = inflate(e.Response.Body, find(r.Headers, "content-encoding"))
	r.Facts |= facts
	return r
}

func fields(lines []event.Field) ([]Field, Facts) {
	out := make([]Field, 0, min(len(lines), MaxFields))
	for _, f := range lines {
		if len(f.Name) == 0 || f.Name[0] == ':' {
			continue
		}
		if len(out) == MaxFields {
			return out, FieldsDropped
		}
		out = append(out, Field{Name: strings.ToLower(string(f.Name)), Value: string(f.Value), Raw: f.Value})
	}
	return out, 0
}

func find(headers []Field, name string) string {
	for _, h := range headers {
		if h.Name == name {
			return h.Value
		}
	}
	return ""
}

// parseBody reads the body by its content type, but believes its first byte
// more where both disagree.
func (r *Request) parseBody(e *event.Event, c *collector) {
	if len(e.Request.Body) == 0 {
		return
	}
	media := find(r.Headers, "content-type")
	typ := mediaType(media)
	if isOpaque(typ) {
		r.Facts |= Opaque
		return
	}
	body, facts := inflate(e.Request.Body, find(r.Headers, "content-encoding"))
	r.Facts |= facts
	if r.Body = body; len(body) == 0 {
		return
	}
	cut := r.Facts&(Cut|InflateLimit) != 0
	before := len(c.values)
	switch r.BodyKind = bodyKind(typ, body); r.BodyKind {
	case Multipart:
		c.multipart(body, boundary(media), cut)
	case JSON:
		c.json(body, cut)
	case XML:
		c.xml(body)
	case Form:
		c.urlencoded(Form, body)
	default:
		if literals, ok := graphqlStrings(string(body)); ok && typ == "application/graphql" {
			for _, l := range literals {
				c.add(Value{Kind: Body, Key: "body", Raw: body, Text: l})
			}
		} else if isText(body) {
			c.add(Value{Kind: Body, Key: "body", Raw: body, Text: string(body)})
			if typ == "" && bytes.IndexByte(body, '=') > 0 && !bytes.ContainsAny(body[:min(len(body), 512)], " \n") {
				c.urlencoded(Form, body)
			}
		} else {
			c.runs(body)
		}
	}
	// A structured body that its parser could not make sense of, or that yields
	// nothing, is inspected as text: nothing gets past us by a wrong label.
	// Well-formed JSON without values holds numbers and the like.
	nothing := len(c.values) == before && r.BodyKind != JSON
	if r.BodyKind != Body && (nothing || c.facts&Malformed != 0) && isText(body) {
		c.add(Value{Kind: Body, Key: "body", Raw: body, Text: string(body)})
	}
	c.group()
}

func bodyKind(typ string, body []byte) Kind {
	first := byte(0)
	if t := bytes.TrimLeft(body, "\xef\xbb\xbf \t\r\n"); len(t) > 0 {
		first = t[0]
	}
	looksJSON := first == '{' || first == '['
	switch {
	case strings.HasPrefix(typ, "multipart/"):
		return Multipart
	case isJSON(typ):
		return JSON
	case typ == "application/x-www-form-urlencoded":
		if looksJSON {
			return JSON
		}
		return Form
	case typ == "application/xml", typ == "text/xml", strings.HasSuffix(typ, "+xml"):
		return XML
	case strings.HasPrefix(typ, "application/grpc"), strings.Contains(typ, "protobuf"), typ == "application/octet-stream":
		return Body
	case looksJSON:
		return JSON
	case first == '<' && typ != "text/html":
		return XML
	}
	return Body
}

func isJSON(typ string) bool {
	return typ == "application/json" || typ == "text/json" || strings.HasSuffix(typ, "+json") ||
		typ == "application/x-ndjson" || typ == "application/graphql-response+json" || typ == "application/json-seq"
}

// isOpaque names content whose bytes carry no text that a server interprets.
func isOpaque(typ string) bool {
	for _, p := range []string{"image/", "audio/", "video/", "font/"} {
		if strings.HasPrefix(typ, p) {
			return typ != "image/svg+xml"
		}
	}
	switch typ {
	case "application/zip", "application/gzip", "application/pdf", "application/wasm", "application/x-7z-compressed",
		"application/zstd", "application/java-archive":
		return true
	}
	return false
}

// mediaType is the type/subtype of a Content-Type, lower case.
func mediaType(v string) string {
	v, _, _ = strings.Cut(v, ";")
	return strings.ToLower(strings.TrimSpace(v))
}

// isText reports whether the body's head is text: no NUL, few control
// characters.
func isText(b []byte) bool {
	head := b[:min(len(b), 2048)]
	control := 0
	for _, c := range head {
		if c == 0 {
			return false
		}
		if c < 0x20 && c != '\t' && c != '\n' && c != '\r' || c == 0x7f {
			control++
		}
	}
	return control*20 <= len(head)
}
