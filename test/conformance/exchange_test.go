package conformance

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"hash/crc32"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// Protocols, as events name them.
const (
	h10 = "HTTP/1.0"
	h11 = "HTTP/1.1"
	h2  = "HTTP/2"
	h3  = "HTTP/3"
)

// exchange is what a client does, and what the upstream does to it.
type exchange struct {
	listener  string // default "http"; its twin without our filters is beside it
	method    string // default GET
	path      string // default /
	authority string // default gateway.example
	head      []Field
	body      [][]byte // nil: no body
	unsized   bool     // of unknown length
	gap       time.Duration
	trailers  []Field
	wait      bool  // for an interim response before the body, as Expect asks
	abort     point // where the client gives up
	script    script
	pad       uint8 // HTTP/2 padding
	// tunnel is sent, piece by piece, once the response's header is there; each
	// comes back before the next goes.
	tunnel [][]byte

	// raw is sent instead, HTTP/1 only: {case} is where the case's header goes.
	raw       string
	rawMethod string // if the text doesn't begin with it
}

func (x *exchange) defaults() exchange {
	y := *x
	if y.listener == "" {
		y.listener = "http"
	}
	if y.method == "" {
		y.method = "GET"
	}
	if y.path == "" {
		y.path = "/"
	}
	if y.authority == "" {
		y.authority = "gateway.example"
	}
	return y
}

// truth is what the client and the upstream saw.
type truth struct {
	id       string
	protocol string
	began    time.Time
	ended    time.Time
	local    string // the client's address
	at       string // the listener's
	sent     []Field
	body     []byte // that the client sent
	whole    bool   // the client sent all of the request
	early    bool   // the upstream answered before the request's end
	left     bool   // the client left before the end
	trailers []Field
	got      *Message
	seen     []*Message  // by attempt
	sentAt   []time.Time // when each piece of a tunnel was
}

func (r *rig) dial(listener string, alpn ...string) (net.Conn, error) {
	c, err := net.Dial("tcp", r.addr[listener])
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	for _, k := range r.listeners {
		if k.name == listener && k.secure {
			s := tls.Client(c, r.tls(listener, alpn...))
			return s, s.Handshake()
		}
	}
	return c, nil
}

// open begins a stream of its own on a connection of its own.
func (r *rig) open(x *exchange, protocol string) (s Stream, local string, err error) {
	switch protocol {
	case h3:
		return r.openHTTP3(x.listener)
	case h2:
		c, err := r.dial(x.listener, "h2")
		if err != nil {
			return nil, "", err
		}
		h, err := NewH2Client(c)
		if err != nil {
			return nil, "", err
		}
		s := h.Open()
		s.PadTo = x.pad
		return s, c.LocalAddr().String(), nil
	}
	c, err := r.dial(x.listener, "http/1.1")
	if err != nil {
		return nil, "", err
	}
	h := NewH1(c, true)
	h.Version = protocol
	return h, c.LocalAddr().String(), nil
}

// do runs an exchange on a connection of its own.
func (r *rig) do(x exchange, protocol, id string) (*truth, error) {
	x = x.defaults()
	r.up.expect(id, &x.script)
	s, local, err := r.open(&x, protocol)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", x.listener, err)
	}
	defer s.Close()
	return r.doOn(s, &x, protocol, id, local), nil
}

// doOn runs an exchange on a stream.
func (r *rig) doOn(s Stream, x *exchange, protocol, id, local string) *truth {
	tr := &truth{id: id, protocol: protocol, local: local, at: r.addr[x.listener], began: time.Now(), early: x.script.early || x.script.echo}
	if x.raw != "" {
		r.sendRaw(s.(*H1), x, tr)
	} else {
		r.send(s, x, tr)
	}
	tr.ended = time.Now()
	return tr
}

func (r *rig) sendRaw(h *H1, x *exchange, tr *truth) {
	method := x.rawMethod
	if method == "" {
		method, _, _ = strings.Cut(x.raw, " ")
	}
	h.Expect(method)
	_, _ = h.Write([]byte(strings.ReplaceAll(x.raw, "{case}", caseHeader+": "+tr.id+"\r\n")))
	tr.got = Receive(h)
}

// fields are the header that a client sends.
func (x *exchange) fields(protocol, id string) []Field {
	one := protocol == h10 || protocol == h11
	out := []Field{{":method", x.method}, {":scheme", "http"}, {":authority", x.authority}, {":path", x.path}}
	if strings.HasPrefix(x.listener, "https") || x.listener == "mtls" || protocol == h3 {
		out[1].Value = "https"
	}
	if x.method == "CONNECT" && !one {
		out = []Field{{":method", x.method}, {":authority", x.authority}}
	}
	out = append(out, Field{caseHeader, id})
	out = append(out, x.head...)
	size := 0
	for _, b := range x.body {
		size += len(b)
	}
	switch {
	case x.body == nil || !one && x.unsized:
	case x.unsized:
		out = append(out, Field{"transfer-encoding", "chunked"})
	default:
		out = append(out, Field{"content-length", fmt.Sprint(size)})
	}
	return out
}

// send plays the client's side to the end of both directions.
func (r *rig) send(s Stream, x *exchange, tr *truth) {
	tr.sent = x.fields(tr.protocol, tr.id)
	tr.got = &Message{}
	arrived := make(chan Item, 1<<12)
	go func() {
		defer close(arrived)
		for {
			i := s.Recv()
			arrived <- i
			if i.Kind == End || i.Kind == Reset {
				return
			}
		}
	}()
	drain := func(until ...Kind) {
		for i := range arrived {
			tr.got.Add(i)
			if slices.Contains(until, i.Kind) {
				return
			}
		}
	}
	giveUp := func(at point) bool {
		if x.abort != at {
			return false
		}
		// Of what is sent when the connection is reset, Envoy may see nothing.
		for end := time.Now().Add(5 * time.Second); len(r.up.attempts(tr.id)) == 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(20 * time.Millisecond)
		tr.left = true
		s.Abort()
		drain()
		return true
	}
	empty := x.body == nil && x.trailers == nil && x.tunnel == nil
	if s.SendHead(tr.sent, empty && x.abort != atHead) != nil {
		drain()
		return
	}
	if giveUp(atHead) {
		return
	}
	if x.wait {
		drain(Interim, Head, Reset)
	}
	for n, b := range x.body {
		time.Sleep(x.gap)
		if x.abort == amidRequest {
			b = b[:len(b)/2]
		}
		tr.body = append(tr.body, b...)
		if s.SendData(b, n == len(x.body)-1 && x.trailers == nil && x.abort != amidRequest) != nil {
			drain()
			return
		}
		if giveUp(amidRequest) {
			return
		}
	}
	if x.trailers != nil {
		_ = s.SendTrailers(x.trailers)
		tr.trailers = x.trailers
	}
	tr.whole = true
	if giveUp(afterRequest) {
		return
	}
	if x.tunnel != nil {
		drain(Head, Reset)
		for _, b := range x.tunnel {
			time.Sleep(x.gap)
			tr.body = append(tr.body, b...)
			tr.sentAt = append(tr.sentAt, time.Now())
			if s.SendData(b, false) != nil {
				break
			}
			for have := len(tr.got.Body) + len(b); len(tr.got.Body) < have && tr.got.End == ""; {
				drain(Data, End, Reset)
			}
		}
		tr.whole = false
		s.Close()
		drain()
		return
	}
	if x.abort == atResponse {
		drain(Head, Reset)
		giveUp(atResponse)
		return
	}
	if x.abort == amidResponse {
		drain(Data, End, Reset)
		giveUp(amidResponse)
		return
	}
	drain()
}

// hop are fields between two ends of a connection, or that each proxy sets anew.
var hop = []string{"connection", "transfer-encoding", "keep-alive", "proxy-connection", "date", "server", "alt-svc", ":version"}

// plain gives fields as HTTP/2 writes them, without hop-by-hop ones.
func plain(fields []Field, drop ...string) []Field {
	var out []Field
	for _, f := range fields {
		f.Name = strings.ToLower(f.Name)
		if !slices.Contains(hop, f.Name) && !slices.Contains(drop, f.Name) && !strings.HasPrefix(f.Name, "x-envoy-") {
			out = append(out, f)
		}
	}
	return out
}

func without(fields []Field, names ...string) []Field {
	return slices.DeleteFunc(slices.Clone(fields), func(f Field) bool { return slices.Contains(names, f.Name) })
}

func fieldsOf(list []event.Field) []Field {
	var out []Field
	for _, f := range list {
		out = append(out, Field{string(f.Name), string(f.Value)})
	}
	return out
}

// text is a header for comparison: pseudo-header fields sorted, the rest in order.
func text(fields []Field) string {
	var pseudo, rest []string
	for _, f := range fields {
		s := fmt.Sprintf("%s: %q", f.Name, f.Value)
		if strings.HasPrefix(f.Name, ":") {
			pseudo = append(pseudo, s)
		} else {
			rest = append(rest, s)
		}
	}
	slices.Sort(pseudo)
	return join(append(pseudo, rest...))
}

// cutAlike leaves the lines that both have room for; pseudo-header fields are first.
func cutAlike(got, want []Field) (a, b []Field) {
	first := func(f Field) bool { return strings.HasPrefix(f.Name, ":") }
	slices.SortStableFunc(want, func(a, b Field) int {
		switch {
		case first(a) && !first(b):
			return -1
		case first(b) && !first(a):
			return 1
		}
		return 0
	})
	n := min(len(got), len(want))
	return got[:n], want[:n]
}

// faults collects what is wrong, so that a known fault can be told from none.
type faults struct{ list []string }

func (f *faults) add(format string, args ...any) {
	f.list = append(f.list, fmt.Sprintf(format, args...))
}

func (f *faults) equal(what, got, want string) {
	if got != want {
		f.add("%s differs:\n%s", what, difference(got, want))
	}
}

// difference shows lines that one text has and the other has not.
func difference(got, want string) string {
	a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
	var out []string
	only := func(mark string, list, other []string) {
		for _, l := range list {
			if !slices.Contains(other, l) && len(out) < 20 {
				out = append(out, mark+clip(l))
			}
		}
	}
	only("event: ", a, b)
	only("truth: ", b, a)
	if out == nil {
		return clip("the order: " + strings.Join(a, " | ") + "\nbut truth: " + strings.Join(b, " | "))
	}
	return join(out)
}

// compare holds an event against what the client and the upstream saw.
func (tr *truth) compare(f *faults, ev *event.Event) {
	tr.compareRequest(f, ev)
	tr.compareResponse(f, ev)
	if tr.sent != nil && ev.Protocol != tr.protocol {
		f.add("protocol %q, want %q", ev.Protocol, tr.protocol)
	}
	if ev.Source != tr.local && tr.protocol != h3 && Get(tr.sent, "x-forwarded-for") == "" {
		f.add("source %q, the client is %s", ev.Source, tr.local)
	}
	by := "default/all"
	if path := Get(fieldsOf(ev.Request.Headers), ":path"); strings.HasPrefix(path, "/some/") || strings.HasPrefix(path, "/h2/some/") {
		by = "default/some"
	}
	if ev.Policy != by || ev.SharePPM != 1e6 {
		f.add("policy %q, share %d", ev.Policy, ev.SharePPM)
	}
	if tr.at != "" && ev.Local != tr.at {
		f.add("it arrived at %q, the client sent it to %s", ev.Local, tr.at)
	}
	began := time.UnixMicro(int64(ev.StartUS))
	if began.Before(tr.began.Add(-2*time.Millisecond)) || began.After(tr.ended.Add(time.Millisecond)) && tr.got.End == End {
		f.add("began %v after the client did, which ended %v after", began.Sub(tr.began), tr.ended.Sub(tr.began))
	}
	if ev.HeadersUS > ev.EndUS && ev.EndUS > 0 {
		f.add("header of the response at %d µs, end at %d µs", ev.HeadersUS, ev.EndUS)
	}
}

func (tr *truth) compareRequest(f *faults, ev *event.Event) {
	got := plain(fieldsOf(ev.Request.Headers), "x-secret")
	if len(tr.seen) > 0 {
		want := plain(tr.seen[len(tr.seen)-1].Head, "x-secret")
		if Get(want, ":scheme") == "" {
			want = append(want, Field{":scheme", Get(got, ":scheme")}) // HTTP/1 doesn't tell it
		}
		if Get(got, ":method") == "CONNECT" {
			got, want = without(got, ":scheme", ":path"), without(want, ":scheme", ":path")
		}
		if Get(got, "content-length") == "" {
			want = without(want, "content-length") // the codec's or a later filter's own
		}
		if ev.Flags&(event.FlagHeadersCut|event.FlagFieldsDropped) != 0 {
			got, want = cutAlike(got, want)
		}
		f.equal("request header, as the upstream saw it,", text(got), text(want))
	}
	if ev.Flags&(event.FlagHeadersCut|event.FlagFieldsDropped) == 0 {
		tr.compareSent(f, got)
	}
	if tr.sent == nil {
		return
	}
	copied := tr.body[:min(len(tr.body), bodyLimit)]
	if tr.whole && ev.Flags&event.FlagRequestOpen == 0 {
		if ev.Request.BodyBytes != uint64(len(tr.body)) {
			f.add("request body of %d bytes, the client sent %d", ev.Request.BodyBytes, len(tr.body))
		}
		if !bytes.Equal(ev.Request.Body, copied) {
			f.add("request body: %d bytes copied, want %d", len(ev.Request.Body), len(copied))
		}
		if cut := ev.Flags&event.FlagRequestCut != 0; cut != (len(tr.body) > bodyLimit) {
			f.add("request body of %d bytes, flagged as cut: %v", len(tr.body), cut)
		}
		if t := plain(fieldsOf(ev.Request.Trailers)); text(t) != text(plain(tr.trailers)) {
			f.equal("request trailers", text(t), text(plain(tr.trailers)))
		}
	} else if ev.Request.BodyBytes > uint64(len(tr.body)) || !bytes.HasPrefix(copied, ev.Request.Body) {
		f.add("request body: %d of %d bytes, which the client did not send (%d)", len(ev.Request.Body), ev.Request.BodyBytes, len(tr.body))
	}
	if n := len(tr.seen); n > 0 && len(tr.body) > 0 && tr.seen[n-1].End == End && !tr.early && ev.Flags&event.FlagRequestOpen != 0 {
		f.add("the upstream had all of the request before it answered, and the request is flagged as open")
	}
	if !tr.whole && ev.Flags&event.FlagRequestOpen == 0 {
		f.add("the request did not end, and is not flagged as open")
	}
}

// compareSent: every line that the client sent is there, in its order.
func (tr *truth) compareSent(f *faults, got []Field) {
	rest := got
	for _, s := range plain(tr.sent, ":scheme", "cookie", "expect", "te", "x-forwarded-for", "x-secret") {
		if strings.HasPrefix(s.Name, ":") {
			if tr.protocol == h2 || s.Name != ":authority" {
				if v := Get(got, s.Name); v != s.Value && Get(tr.sent, ":method") != "CONNECT" {
					f.add("%s is %q, the client sent %q", s.Name, clip(v), clip(s.Value))
				}
			}
			continue
		}
		s.Value = strings.Trim(s.Value, " \t")
		at := slices.Index(rest, s)
		if at < 0 {
			f.add("the client's line %s: %q is missing, or out of order", s.Name, clip(s.Value))
			return
		}
		rest = rest[at+1:]
	}
	var crumbs []string
	for _, s := range plain(tr.sent) {
		if s.Name == "cookie" {
			crumbs = append(crumbs, s.Value)
		}
	}
	var have []string
	for _, s := range got {
		if s.Name == "cookie" {
			have = append(have, s.Value)
		}
	}
	if strings.Join(have, "; ") != strings.Join(crumbs, "; ") {
		f.equal("cookies", strings.Join(have, "; "), strings.Join(crumbs, "; "))
	}
}

func (tr *truth) compareResponse(f *faults, ev *event.Event) {
	if tr.got.Head == nil {
		if len(ev.Response.Headers) > 0 && ev.Flags&(event.FlagStream|event.FlagResponseOpen) == 0 && Get(fieldsOf(ev.Response.Headers), ":status") == "" {
			f.add("a response of status %s that the client did not get", Get(fieldsOf(ev.Response.Headers), ":status"))
		}
		return
	}
	if ev.Flags&event.FlagNoResponse != 0 {
		f.add("no response, the client got %s", Get(tr.got.Head, ":status"))
		return
	}
	got, want := plain(fieldsOf(ev.Response.Headers)), plain(tr.got.Head)
	if Get(got, "content-length") == "" && Get(want, "content-length") == "0" {
		want = without(want, "content-length") // the codec's own
	}
	if ev.Flags&(event.FlagHeadersCut|event.FlagFieldsDropped) != 0 {
		got, want = cutAlike(got, want)
	}
	if tr.protocol == h3 { // whose codec puts lines of one name together
		byName := func(a, b Field) int { return strings.Compare(a.Name, b.Name) }
		slices.SortStableFunc(got, byName)
		slices.SortStableFunc(want, byName)
	}
	f.equal("response header", text(got), text(want))
	body := tr.got.Body
	switch {
	case ev.Flags&event.FlagStream != 0:
		if !bytes.HasPrefix(body, ev.Response.Body) && !bytes.HasPrefix(ev.Response.Body, body) {
			f.add("a stream's copied beginning of %d bytes is not what the client got", len(ev.Response.Body))
		}
	case ev.Flags&event.FlagResponseSkip != 0:
		bytes, _ := strconv.Atoi(Get(got, "content-length"))
		if strings.HasPrefix(Get(got, "content-type"), "application/grpc") { // read for its trailers
			bytes = len(body)
			f.equal("response trailers", text(plain(fieldsOf(ev.Response.Trailers))), text(plain(tr.got.Trailers)))
		}
		if len(ev.Response.Body) > 0 || ev.Response.BodyBytes != uint64(bytes) || ev.Flags&event.FlagResponseOpen != 0 {
			f.add("response body that is not copied: %d bytes of %d, flags %b; the client got %d", len(ev.Response.Body), ev.Response.BodyBytes, ev.Flags, len(body))
		}
	case tr.got.End == End:
		if ev.Flags&event.FlagResponseOpen != 0 {
			f.add("the response ended, and is flagged as open")
		}
		if ev.Response.BodyBytes != uint64(len(body)) {
			f.add("response body of %d bytes, the client got %d", ev.Response.BodyBytes, len(body))
		}
		if copied := body[:min(len(body), bodyLimit)]; !bytes.Equal(ev.Response.Body, copied) {
			f.add("response body: %d bytes copied, want %d", len(ev.Response.Body), len(copied))
		}
		if cut := ev.Flags&event.FlagResponseCut != 0; cut != (len(body) > bodyLimit) {
			f.add("response body of %d bytes, flagged as cut: %v", len(body), cut)
		}
		f.equal("response trailers", text(plain(fieldsOf(ev.Response.Trailers))), text(plain(tr.got.Trailers)))
	default:
		// Who leaves amid a response may leave behind its end.
		status := Get(want, ":status")
		bodiless := status == "204" || status == "304" || Get(tr.sent, ":method") == "HEAD" // these end at their header
		all := bodiless || Get(want, "content-length") == fmt.Sprint(len(body)) || tr.left && ev.Response.BodyBytes >= uint64(len(body))
		if ev.Flags&event.FlagResponseOpen == 0 && !all {
			f.add("the response did not end, and is not flagged as open")
		}
		n := min(len(body), len(ev.Response.Body))
		if !bytes.Equal(body[:n], ev.Response.Body[:n]) {
			f.add("the copied beginning of the response is not what the client got")
		}
	}
}

// sameAs: the user's exchange is what it is without us.
func (tr *truth) sameAs(f *faults, bare *truth) {
	view := func(t *truth) string {
		var out []string
		for _, i := range t.got.Interim {
			out = append(out, "interim "+text(i))
		}
		out = append(out, "response "+text(without(plain(t.got.Head), "date")), fmt.Sprintf("body %d %x", len(t.got.Body), crc32.ChecksumIEEE(t.got.Body)), "trailers "+text(t.got.Trailers), "end "+string(t.got.End))
		for n, m := range t.seen {
			out = append(out, fmt.Sprintf("upstream %d %s", n, text(without(plain(m.Head), caseHeader, "x-forwarded-for"))), fmt.Sprintf("body %d %x", len(m.Body), crc32.ChecksumIEEE(m.Body)), "trailers "+text(m.Trailers), "end "+string(m.End))
		}
		return join(out)
	}
	if a, b := view(tr), view(bare); a != b {
		f.add("the exchange is not what it is without the plugin:\n--- with\n%s\n--- without\n%s", a, b)
	}
}

// report fails the test by faults; those of a known one must be there.
func (f *faults) report(t *testing.T, known string) {
	t.Helper()
	if known != "" {
		if len(f.list) == 0 {
			t.Errorf("a known fault is gone, take it off the list: %s", known)
		}
		t.Logf("known: %s", known)
		for _, s := range f.list {
			t.Logf("known fault: %s", s)
		}
		return
	}
	for _, s := range f.list {
		t.Error(s)
	}
}

func (r *rig) openHTTP3(listener string) (Stream, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := DialH3(ctx, r.addr[listener], r.tls(listener))
	if err != nil {
		return nil, "", err
	}
	s, err := c.Open()
	return s, c.LocalAddr(), err
}
