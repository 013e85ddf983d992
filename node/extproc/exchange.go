package extproc

import (
	"bytes"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/mask"
	"github.com/periscope-mesh/periscope/policy"
)

// exchange is one until its event is made.
type exchange struct {
	handler  *Handler
	settings *mirror.Settings // of the policy that governs it
	mask     *mask.Masker
	started  time.Time // this node's clock
	event    event.Event
	request  part
	response part
	begun    bool   // the response has
	length   string // of its body, as declared
	done     bool
	held     int64 // bytes of copies, of the handler's budget
	grown    int   // bytes that masking added to them
}

// part is one direction.
type part struct {
	message     *event.Message
	contentType string
	kind        string // what masking goes by: contentType, or anyKind
	encoding    string // of the content, or unknown
	max         int    // bytes of the body that are copied
	ended       bool
}

// What masking goes by where a policy withholds the header that tells.
const (
	anyKind = "json urlencoded multipart/"
	unknown = "?"
)

// begin starts an exchange under the settings that govern it.
func (h *Handler) begin(s *mirror.Settings, mask *mask.Masker, share int, m *message, now time.Time) *exchange {
	x := &exchange{handler: h, settings: s, mask: mask, started: now}
	x.request.message, x.response.message = &x.event.Request, &x.event.Response
	e := &x.event
	e.N, e.Policy, e.SharePPM = h.number.Add(1), s.PolicyID, uint64(share)
	e.StartUS = uint64(startOf(m.attributes["request.time"].text, now).UnixMicro())
	e.Source, e.Local = m.attributes["source.address"].text, m.attributes["destination.address"].text
	e.Protocol, e.Route = m.attributes["request.protocol"].text, m.attributes["xds.route_name"].text
	e.SNI, e.TLS = m.attributes["connection.requested_server_name"].text, m.attributes["connection.tls_version"].text
	e.PeerSubject = m.attributes["connection.subject_peer_certificate"].text
	for _, name := range []string{"connection.uri_san_peer_certificate", "connection.dns_san_peer_certificate"} {
		if san := m.attributes[name].text; san != "" {
			e.PeerSANs = append(e.PeerSANs, san)
		}
	}
	x.headers(&x.request, m, "request")
	if wants(s.Request.ContentTypes, x.request.contentType) {
		x.copies(&x.request, s.Request.MaxBytes)
	}
	x.requestEnds(m.end, now)
	return x
}

// startOf is the gateway's time of an exchange's start or, if it tells none that
// can be, this node's.
func startOf(text string, now time.Time) time.Time {
	if t, err := time.Parse(time.RFC3339Nano, text); err == nil && t.After(now.Add(-24*time.Hour)) && t.Before(now.Add(24*time.Hour)) {
		return t
	}
	return now
}

// take adds a message. It tells how many of its bytes are kept, and whether the
// buffer behind it is.
func (x *exchange) take(m *message, now time.Time) (kept int, aliased bool) {
	switch m.kind {
	case requestBody:
		kept, aliased = x.body(&x.request, m)
		x.requestEnds(m.end, now)
	case requestTrailers:
		kept, aliased = x.trailers(&x.request, m)
		x.requestEnds(true, now)
	case responseHeaders:
		if x.begun {
			return 0, false
		}
		return x.respond(m, now), true
	case responseBody:
		kept, aliased = x.body(&x.response, m)
		x.responseEnds(m.end, now)
	case responseTrailers:
		kept, aliased = x.trailers(&x.response, m)
		x.responseEnds(true, now)
	}
	return kept, aliased
}

func (x *exchange) requestEnds(end bool, now time.Time) {
	if end && !x.request.ended {
		x.request.ended = true
		x.event.RequestEndUS = x.since(now)
	}
}

func (x *exchange) responseEnds(end bool, now time.Time) {
	if end {
		x.response.ended = true
		x.finish(now)
	}
}

// respond takes the response's headers. Of upgrades and event streams, which may
// last for days, and of bodies that are not copied, the event is made here.
func (x *exchange) respond(m *message, now time.Time) int {
	x.begun = true
	e := &x.event
	e.HeadersUS = x.since(now)
	x.length = get(m.fields, "content-length") // before it is masked
	size := x.headers(&x.response, m, "response")
	e.ResponseFlags = responseFlags(m.attributes["response.flags"].number)
	if e.ResponseFlags != "" { // as the plugin's events have it: Envoy's account of what did not end well
		e.ResponseDetails = m.attributes["response.code_details"].text
	}
	status, method := get(m.fields, ":status"), get(e.Request.Headers, ":method")
	length, types := x.length, strings.ToLower(x.response.contentType)
	grpc := strings.HasPrefix(types, "application/grpc")
	max := x.settings.Response.MaxBytes
	if !wants(x.settings.Response.ContentTypes, x.response.contentType) {
		max = 0
	}
	early := true // the event is made here: the response has ended, as far as it is looked at
	switch {
	case status == "101", strings.HasPrefix(types, "text/event-stream"), method == "CONNECT" && strings.HasPrefix(status, "2"):
		e.Flags |= event.FlagStream
	case status == "204", status == "304", method == "HEAD", length == "0" && !grpc: // RFC 9110, section 6.4.1: no body follows
	case max > 0:
		x.copies(&x.response, max)
		early = false
	default:
		e.Flags |= event.FlagResponseSkip
		early = !grpc // whose trailers say how it ended
		if n, err := strconv.ParseUint(length, 10, 53); err == nil && early {
			e.Response.BodyBytes = n
		}
	}
	if early {
		x.response.ended = true
		x.finish(now)
	} else {
		x.responseEnds(m.end, now)
	}
	return size
}

// headers takes the header lines of a direction, masked, and tells their size.
func (x *exchange) headers(p *part, m *message, direction string) int {
	p.contentType = get(m.fields, "content-type")
	p.kind, p.encoding = p.contentType, get(m.fields, "content-encoding")
	size := sizeOf(m.fields)
	withheld := x.withheld(m, direction)
	for _, f := range withheld {
		switch string(f.Name) {
		case "content-type":
			p.kind = anyKind
		case "content-encoding":
			p.encoding = unknown
		}
	}
	p.message.Headers = append(x.masked(m), withheld...)
	return size
}

// copies has so many bytes of a body copied, or none of one that can't be masked.
func (x *exchange) copies(p *part, limit policy.Quantity) {
	if limit == 0 {
		return
	}
	if _, hidden := x.mask.Body(p.kind, p.encoding, nil); hidden {
		x.event.Flags |= event.FlagMasked
		return
	}
	p.max = int(limit)
}

// withheld are the headers that masking kept in the gateway, which tells no more
// than that they were there: a line for each, wherever and how often it stood.
func (x *exchange) withheld(m *message, direction string) []event.Field {
	var out []event.Field
	for expression, v := range m.attributes {
		quoted, ok := strings.CutSuffix(expression, " in "+direction+".headers")
		if !ok || v.number != 1 {
			continue
		}
		name := []byte(strings.Trim(quoted, `"`))
		if slices.ContainsFunc(m.fields, func(f event.Field) bool { return bytes.Equal(f.Name, name) }) {
			continue // it came all the same
		}
		out = append(out, event.Field{Name: name, Value: []byte(mask.Hidden)})
		x.event.Flags |= event.FlagMasked
	}
	slices.SortFunc(out, func(a, b event.Field) int { return bytes.Compare(a.Name, b.Name) })
	return out
}

func (x *exchange) trailers(p *part, m *message) (int, bool) {
	if p.message.Trailers != nil || len(m.fields) == 0 {
		return 0, false
	}
	p.message.Trailers = x.masked(m)
	return sizeOf(m.fields), true
}

func (x *exchange) masked(m *message) []event.Field {
	if m.cut {
		x.event.Flags |= event.FlagHeadersCut
	}
	for i := range m.fields {
		f := &m.fields[i]
		var hidden bool
		if f.Value, hidden = x.mask.Header(f.Name, f.Value); hidden {
			x.event.Flags |= event.FlagMasked
		}
	}
	return m.fields
}

// body takes what is wanted of a chunk. The first is kept where it is, if all of
// it is wanted.
func (x *exchange) body(p *part, m *message) (int, bool) {
	p.message.BodyBytes += uint64(len(m.body))
	take := min(len(m.body), p.max-len(p.message.Body))
	if take <= 0 {
		return 0, false
	}
	if p.message.Body == nil && take == len(m.body) {
		p.message.Body = m.body[:take:take]
		return take, true
	}
	p.message.Body = append(p.message.Body, m.body[:take]...)
	return take, false
}

// partial makes the event of what has come before the stream's end. Whether the
// response's body had ended, its length tells, if it was declared.
func (x *exchange) partial(reason error, now time.Time) {
	counter := event.CounterUnfinished
	if errors.Is(reason, errNoRoom) {
		counter = event.CounterEvicted
	}
	x.handler.metrics.partial.WithLabelValues(counter).Inc()
	if n, err := strconv.ParseUint(x.length, 10, 64); err == nil && x.begun && n == x.event.Response.BodyBytes {
		x.response.ended = true
	}
	x.finish(now)
}

// finish makes the event: at the exchange's end, or with what there is of it.
func (x *exchange) finish(now time.Time) {
	if x.done {
		return
	}
	x.done = true
	e := &x.event
	e.EndUS = x.since(now)
	flag := func(f event.Flags, on bool) {
		if on {
			e.Flags |= f
		}
	}
	flag(event.FlagRequestOpen, !x.request.ended)
	flag(event.FlagRequestCut, e.Request.BodyBytes > uint64(len(e.Request.Body)))
	flag(event.FlagNoResponse, !x.begun)
	flag(event.FlagResponseOpen, x.begun && !x.response.ended)
	flag(event.FlagResponseCut, e.Flags&event.FlagResponseSkip == 0 && e.Response.BodyBytes > uint64(len(e.Response.Body)))
	e.Flags |= x.maskBody(&x.request, event.FlagRequestCut) | x.maskBody(&x.response, event.FlagResponseCut)
}

// maskBody masks what was copied of a body, which may make it longer, and gives
// flags.
func (x *exchange) maskBody(p *part, cut event.Flags) (flags event.Flags) {
	if p.message.Body == nil {
		return 0
	}
	body, hidden := x.mask.Body(p.kind, p.encoding, p.message.Body)
	if hidden {
		flags = event.FlagMasked
	}
	x.grown += max(0, cap(body)-len(p.message.Body))
	if len(body) > p.max {
		body, flags = body[:p.max], flags|cut
	}
	p.message.Body = body
	return flags
}

func (x *exchange) since(now time.Time) uint64 {
	return uint64(max(0, now.Sub(x.started).Microseconds()))
}

// get gives a header's value, those of several lines joined, as Envoy does.
func get(fields []event.Field, name string) string {
	out, found := "", false
	for _, f := range fields {
		if string(f.Name) != name {
			continue
		}
		if found {
			out += ","
		}
		out += string(f.Value)
		found = true
	}
	return out
}

func sizeOf(fields []event.Field) int {
	n := 0
	for _, f := range fields {
		n += len(f.Name) + len(f.Value)
	}
	return n
}

// wants tells whether bodies of a content type are copied.
func wants(types []string, contentType string) bool {
	t, _, _ := strings.Cut(contentType, ";")
	t = strings.ToLower(strings.TrimSpace(t))
	kind, _, _ := strings.Cut(t, "/")
	for _, w := range types {
		if w == "*/*" || t != "" && (w == t || w == kind+"/*") {
			return true
		}
	}
	return false
}
