package conformance

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// want is what becomes of an exchange at the plugin.
type want int

const (
	oneEvent want = iota
	refused       // by Envoy's codec, before any filter: Envoy counts it
	either        // one of them: Envoy's codec decides
	legs          // an internal redirect: what it leads to has its event, and so may what led there
)

type testCase struct {
	name      string
	protocols []string // default HTTP/1.1 and HTTP/2
	x         exchange
	want      want
	// loose: how much arrives before a reset differs from run to run.
	loose bool
	check func(f *faults, ev *event.Event, tr *truth)
}

// cut tells whether the exchange may have no end that the plugin sees.
func (c *testCase) cut() bool {
	s := &c.x.script
	return c.x.abort != nowhere || c.x.tunnel != nil || s.fail != nowhere || s.early || s.endless || c.want == legs
}

var (
	one = []string{h11}
	two = []string{h2}
	all = []string{h10, h11, h2, h3}
)

// noise is n bytes, all values among them.
func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

func pieces(b []byte, n int) [][]byte {
	out := [][]byte{}
	if len(b) == 0 {
		out = append(out, b)
	}
	for len(b) > 0 {
		k := min(n, len(b))
		out = append(out, b[:k])
		b = b[k:]
	}
	return out
}

func reply(status int, body [][]byte, fields ...Field) script {
	size := 0
	for _, b := range body {
		size += len(b)
	}
	head := append([]Field{{":status", fmt.Sprint(status)}, {"content-length", fmt.Sprint(size)}}, fields...)
	return script{head: head, body: body}
}

// streamed is an answer of unknown length.
func streamed(body [][]byte, fields ...Field) script {
	return script{head: append([]Field{{":status", "200"}, {"transfer-encoding", "chunked"}}, fields...), body: body}
}

func with(s script, change func(*script)) script { change(&s); return s }

func repeat(n int, f func(i int) Field) []Field {
	var out []Field
	for i := range n {
		out = append(out, f(i))
	}
	return out
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	_ = w.Close()
	return out.Bytes()
}

// message is a gRPC message's frame.
func message(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b))), b...)
}

func status(code string) func(*faults, *event.Event, *truth) {
	return func(f *faults, _ *event.Event, tr *truth) {
		if s := Get(tr.got.Head, ":status"); s != code {
			f.add("the client got status %q, the case is about %s", s, code)
		}
	}
}

func routeIs(name string) func(*faults, *event.Event, *truth) {
	return func(f *faults, ev *event.Event, _ *truth) {
		if ev.Route != name {
			f.add("route %q, want %q", ev.Route, name)
		}
	}
}

func both(checks ...func(*faults, *event.Event, *truth)) func(*faults, *event.Event, *truth) {
	return func(f *faults, ev *event.Event, tr *truth) {
		for _, c := range checks {
			c(f, ev, tr)
		}
	}
}

func attempts(n int) func(*faults, *event.Event, *truth) {
	return func(f *faults, _ *event.Event, tr *truth) {
		if len(tr.seen) != n {
			f.add("the upstream saw %d attempts, want %d", len(tr.seen), n)
		}
	}
}

// complete: of the request and of what is said of it.
func complete() []testCase {
	var out []testCase
	for _, m := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "PROPFIND"} {
		out = append(out, testCase{name: "method " + m, protocols: all, x: exchange{method: m}})
	}
	out = append(out, testCase{name: "method QUERY", protocols: all, x: exchange{method: "QUERY", body: [][]byte{[]byte("q")}}, want: either})
	for _, size := range []int{0, 1, 1 << 10, bodyLimit - 1, bodyLimit, bodyLimit + 1, 1 << 20} {
		body, protocols := [][]byte{noise(size)}, all
		if size > 2*bodyLimit {
			protocols = all[:3] // loopback drops datagrams by the score
		}
		out = append(out,
			testCase{name: fmt.Sprintf("request body %d", size), protocols: protocols, x: exchange{method: "POST", body: body}},
			testCase{name: fmt.Sprintf("response body %d", size), protocols: protocols, x: exchange{script: reply(200, body)}},
			testCase{name: fmt.Sprintf("bodies %d unsized", size), x: exchange{method: "POST", body: pieces(body[0], 10_000), unsized: true, script: streamed(pieces(body[0], 7_000))}},
			testCase{name: fmt.Sprintf("bodies %d over h2 upstream", size), x: exchange{method: "POST", path: "/h2/x", body: pieces(body[0], 9_000), script: script{head: []Field{{":status", "200"}}, body: pieces(body[0], 5_000)}}},
		)
	}
	values := []Field{
		{"x-dup", "one"}, {"x-other", ""}, {"x-dup", "two"}, {"x-dup", "one"}, {"x-utf8", "é€𝄞"}, {"x-bytes", "\x80\xff\xfe\xc3\x28"},
		{"x-spaces", "a  b\tc"}, {"x-comma", "a,b, c"}, {"x-long", strings.Repeat("v", 5000)}, {"authorization", "Bearer s3cret"}, {"accept-encoding", "gzip;q=0, *"},
	}
	plainValues := slices.DeleteFunc(slices.Clone(values), func(f Field) bool { return f.Name == "x-utf8" || f.Name == "x-bytes" })
	out = append(out,
		testCase{name: "header lines in order, with duplicates and all bytes", protocols: all[:3], x: exchange{head: values, script: reply(200, nil, append(slices.Clone(values), Field{"set-cookie", "a=1; path=/"}, Field{"set-cookie", "b=2"})...)}},
		testCase{name: "header lines in order, with duplicates", protocols: all, x: exchange{head: plainValues, script: reply(200, nil, plainValues...)}},
		testCase{name: "masked header", protocols: all, x: exchange{head: []Field{{"x-secret", "one"}, {"x-secret", "two"}}}, check: masks("x-secret", 2)},
		testCase{name: "cookie crumbs", x: exchange{head: []Field{{"cookie", "a=1"}, {"x-between", "1"}, {"cookie", "b=2; c=3"}}}, protocols: two},
		testCase{name: "path as it is", protocols: all, x: exchange{path: "/a//b/../%2e%2e/%2F/c;v=1/%00%ff?q=%27%20or%201=1&q=2&x=a%00b"}},
		testCase{name: "authority with a port and capitals", protocols: all, x: exchange{authority: "Gateway.EXAMPLE:8443"}},
		testCase{name: "padded frames", protocols: two, x: exchange{method: "POST", body: pieces(noise(30_000), 999), pad: 100}},
		testCase{name: "request trailers", x: exchange{method: "POST", body: [][]byte{[]byte("hello")}, unsized: true, trailers: []Field{{"x-sum", "1"}, {"x-sum", "\xe9"}}}},
		testCase{name: "response trailers", protocols: []string{h11, h2, h3}, x: exchange{script: with(streamed([][]byte{[]byte("hello")}), func(s *script) { s.trailers = []Field{{"x-sum", "1"}, {"x-sum", "\xe9"}} })}},
		testCase{name: "trailers of bodies that are cut", x: exchange{method: "POST", body: pieces(noise(100_000), 20_000), unsized: true, trailers: []Field{{"x-sum", "1"}},
			script: with(streamed(pieces(noise(100_000), 20_000)), func(s *script) { s.trailers = []Field{{"x-sum", "2"}} })}},
		testCase{name: "response trailers without a body", protocols: two, x: exchange{path: "/h2/x", script: script{head: []Field{{":status", "200"}}, trailers: []Field{{"x-end", "1"}}}}},
		testCase{name: "compressed bodies", x: exchange{method: "POST", head: []Field{{"content-encoding", "gzip"}}, body: [][]byte{gzipped(noise(5000))}, script: reply(200, [][]byte{gzipped(bytes.Repeat([]byte("a"), 1<<20))}, Field{"content-encoding", "gzip"})}},
		testCase{name: "content type that is not copied", protocols: all, x: exchange{path: "/some/x", script: reply(200, [][]byte{noise(5000)}, Field{"content-type", "image/png"})}, check: skips},
		testCase{name: "no content type, unsized, not copied", x: exchange{path: "/some/x", script: streamed(pieces(noise(5000), 1000))}, check: skips},
		testCase{name: "content type that is copied", protocols: all, x: exchange{path: "/some/x", script: reply(200, [][]byte{noise(5000)}, Field{"content-type", "Application/JSON; charset=utf-8"})}},
		testCase{name: "gRPC that is not copied", protocols: two, x: exchange{method: "POST", path: "/h2/some/Get", head: []Field{{"content-type", "application/grpc"}, {"te", "trailers"}}, body: [][]byte{message(noise(100))}, unsized: true,
			script: script{head: []Field{{":status", "200"}, {"content-type", "application/grpc"}}, body: [][]byte{message(noise(200))}, trailers: []Field{{"grpc-status", "0"}}}}, check: skips},
		testCase{name: "times", x: exchange{method: "POST", body: pieces(noise(3000), 1000), gap: 15 * time.Millisecond, script: with(streamed(pieces(noise(2000), 1000)), func(s *script) { s.wait, s.gap = 40*time.Millisecond, 20*time.Millisecond })},
			check: func(f *faults, ev *event.Event, _ *truth) {
				// A busy machine makes one of several pieces, but nothing makes the upstream wait less.
				if ev.RequestEndUS == 0 || ev.HeadersUS < ev.RequestEndUS+35_000 || ev.EndUS < ev.HeadersUS || ev.EndUS > 5_000_000 {
					f.add("request's end, response's header and end after %d, %d, %d µs; about 45, 85 and 125 ms it was", ev.RequestEndUS, ev.HeadersUS, ev.EndUS)
				}
			}},
		testCase{name: "TLS", x: exchange{listener: "https"}, check: tlsFacts("")},
		testCase{name: "TLS with the client's certificate", x: exchange{listener: "mtls"}, check: tlsFacts(`CN=cart,O=Shop\, Ltd`, clientURI, serverDNS, "localhost")},
		testCase{name: "client behind a trusted hop", x: exchange{listener: "hops", head: []Field{{"x-forwarded-for", "203.0.113.9, 198.51.100.7"}}},
			check: func(f *faults, ev *event.Event, tr *truth) {
				if ev.Source != "198.51.100.7:0" || ev.Peer != tr.local {
					f.add("source %q, peer %q, want 198.51.100.7:0 and %s", ev.Source, ev.Peer, tr.local)
				}
			}},
		testCase{name: "client that claims another's address", x: exchange{head: []Field{{"x-forwarded-for", "203.0.113.9"}}}, check: func(f *faults, ev *event.Event, tr *truth) {
			if ev.Source != tr.local {
				f.add("source %q, want %s", ev.Source, tr.local)
			}
		}},
	)
	return out
}

// skips: the response's body is not copied, and the event says so.
func skips(f *faults, ev *event.Event, _ *truth) {
	if ev.Flags&(event.FlagResponseSkip|event.FlagResponseCut) != event.FlagResponseSkip {
		f.add("a body that is not copied: flags %b", ev.Flags)
	}
}

// masks: so many lines of that name, none with its value, are in the event, and
// it says so.
func masks(name string, lines int) func(*faults, *event.Event, *truth) {
	return func(f *faults, ev *event.Event, tr *truth) {
		n := 0
		for _, h := range fieldsOf(ev.Request.Headers) {
			if h.Name == name {
				n++
				if h.Value != "***" {
					f.add("%s is %q", name, h.Value)
				}
			}
		}
		if n != lines || ev.Flags&event.FlagMasked == 0 || Get(tr.seen[0].Head, name) == "***" {
			f.add("%d lines masked, flags %b, the upstream got %q", n, ev.Flags, Get(tr.seen[0].Head, name))
		}
	}
}

// tlsFacts: the connection's, with the subject and names of the client's certificate.
func tlsFacts(subject string, names ...string) func(*faults, *event.Event, *truth) {
	return func(f *faults, ev *event.Event, _ *truth) {
		if ev.SNI != serverDNS || ev.TLS != "TLSv1.3" {
			f.add("SNI %q, TLS %q", ev.SNI, ev.TLS)
		}
		if Get(fieldsOf(ev.Request.Headers), ":scheme") != "https" {
			f.add("scheme %q", Get(fieldsOf(ev.Request.Headers), ":scheme"))
		}
		if ev.PeerSubject != subject || !slices.Equal(ev.PeerSANs, names) {
			f.add("client's certificate: subject %q, alternative names %q; want %q, %q", ev.PeerSubject, ev.PeerSANs, subject, names)
		}
	}
}

// ends: every way in which an exchange ends.
func ends() []testCase {
	post := func(path string) exchange {
		return exchange{method: "POST", path: path, body: [][]byte{[]byte("a body")}}
	}
	out := []testCase{
		{name: "204", protocols: all, x: exchange{script: script{head: []Field{{":status", "204"}, {"x-a", "1"}}}}},
		{name: "304", protocols: all, x: exchange{script: script{head: []Field{{":status", "304"}, {"etag", `"1"`}, {"content-length", "77"}}}}},
		{name: "HEAD with a length", protocols: all, x: exchange{method: "HEAD", script: script{head: []Field{{":status", "200"}, {"content-length", "1000"}}}}},
		{name: "103 before 200", x: exchange{script: with(reply(200, [][]byte{[]byte("ok")}), func(s *script) {
			s.interim = [][]Field{{{":status", "103"}, {"link", "</a.css>; rel=preload"}}, {{":status", "103"}, {"link", "</b.css>"}}}
		})}, check: status("200")},
		{name: "Expect: 100-continue", x: exchange{method: "POST", body: [][]byte{noise(2000)}, head: []Field{{"expect", "100-continue"}}, wait: true}, check: status("200")},
		{name: "Expect: 100-continue, refused", protocols: one, x: exchange{method: "POST", path: "/direct/x", body: [][]byte{noise(2000)}, head: []Field{{"expect", "100-continue"}}, wait: true}, loose: true, check: status("418")},
		{name: "500 of the upstream", x: exchange{script: reply(500, [][]byte{[]byte("oops")})}, check: status("500")},
		{name: "no route", protocols: all, x: exchange{authority: "none.example"}, check: status("404")},
		{name: "redirect by route", protocols: all, x: exchange{path: "/redirect/x?y"}, check: both(status("301"), routeIs("redirect"))},
		{name: "direct response", protocols: all, x: exchange{path: "/direct/x"}, check: both(status("418"), routeIs("direct"))},
		{name: "direct response to a body", x: post("/direct/x"), loose: true, check: status("418")},
		{name: "upstream refuses the connection", x: post("/refused/x"), check: status("503")},
		{name: "time-out before the response", x: with2(post("/timeout/x"), func(x *exchange) { x.script.fail = never }), check: both(status("504"), routeIs("timeout"))},
		{name: "denied by a filter behind ours", x: post("/denied/x"), loose: true, check: status("403")},
		{name: "too large for a filter behind ours", x: exchange{method: "POST", path: "/buffer/x", body: pieces(noise(5000), 500), unsized: true}, loose: true, check: status("413")},
		{name: "buffered by a filter behind ours", x: exchange{method: "POST", path: "/buffer/x", body: pieces(noise(500), 100), unsized: true}, check: status("200")},
		{name: "retried twice", x: with2(post("/retry/x"), func(x *exchange) { x.script.fail, x.script.fails = afterRequest, 2 }), check: both(status("200"), attempts(3))},
		{name: "retried in vain", x: with2(post("/retry/x"), func(x *exchange) { x.script.fail = afterRequest }), check: both(status("503"), attempts(3))},
		{name: "internal redirect", x: exchange{path: "/internal/x", script: script{head: []Field{{":status", "302"}, {"location", "http://gateway.example/landed"}, {"content-length", "0"}}, fail: redirectOnce}}, want: legs, check: status("200")},
		{name: "response before the request's end", x: exchange{method: "POST", unsized: true, body: pieces(noise(30_000), 1000), gap: 2 * time.Millisecond, script: with(reply(413, [][]byte{[]byte("enough")}), func(s *script) { s.early = true })}, loose: true, check: status("413")},
		{name: "endless response, client leaves", x: exchange{abort: amidResponse, script: with(streamed([][]byte{noise(5000)}), func(s *script) { s.endless, s.gap = true, time.Millisecond })}, loose: true},
		{name: "endless request, client leaves", x: exchange{method: "POST", unsized: true, body: pieces(noise(1<<20), 50_000), abort: afterRequest, script: script{fail: never}}, loose: true},
		{name: "body until the connection's end", protocols: one, x: exchange{script: script{head: []Field{{":status", "200"}, {"connection", "close"}}, body: [][]byte{[]byte("until the end")}}}},
	}
	for _, fail := range []point{atHead, amidRequest, afterRequest, atResponse, amidResponse} {
		for _, closes := range []bool{false, true} {
			how := "resets "
			if closes {
				how = "closes "
			}
			x := exchange{method: "POST", body: pieces(noise(2000), 1000), unsized: true, gap: 5 * time.Millisecond, script: with(streamed(pieces(noise(5000), 1000)), func(s *script) { s.fail, s.closes = fail, closes })}
			out = append(out, testCase{name: "upstream " + how + string(fail), x: x, loose: true})
			if !closes {
				x.path = "/h2/x"
				x.script.head = without(x.script.head, "transfer-encoding")
				out = append(out, testCase{name: "h2 upstream " + how + string(fail), x: x, loose: true})
			}
		}
	}
	whole := reply(200, [][]byte{noise(267)}) // what a declared length ends, ends for an HTTP/1.1 client whatever comes then
	whole.fail = amidResponse
	out = append(out, testCase{name: "h2 upstream resets after all of the response", protocols: []string{h11, h2}, x: exchange{path: "/h2/x", script: whole}, loose: true})
	for _, abort := range []point{atHead, amidRequest, afterRequest, atResponse, amidResponse} {
		x := exchange{method: "POST", body: pieces(noise(2000), 1000), unsized: true, abort: abort, script: with(streamed(pieces(noise(200_000), 1000)), func(s *script) { s.gap = 5 * time.Millisecond })}
		if abort == afterRequest || abort == atHead || abort == amidRequest {
			x.script = script{fail: never}
		}
		out = append(out, testCase{name: "client aborts " + string(abort), protocols: []string{h11, h2, h3}, x: x, loose: true})
	}
	return out
}

// redirectOnce answers the first attempt by the script, the rest as by default.
const redirectOnce point = "redirects once"

func with2(x exchange, change func(*exchange)) exchange { change(&x); return x }

// streams: those that are never held.
func streams() []testCase {
	streamFlag := func(f *faults, ev *event.Event, _ *truth) {
		if ev.Flags&event.FlagStream == 0 {
			f.add("a stream, not flagged as one: %b", ev.Flags)
		}
	}
	grpc := []Field{{":status", "200"}, {"content-type", "application/grpc"}}
	done := []Field{{"grpc-status", "0"}, {"grpc-message", ""}}
	return []testCase{
		{name: "server-sent events", x: exchange{script: with(streamed(pieces([]byte("data: 1\n\ndata: 2\n\ndata: 3\n\n"), 9), Field{"content-type", "text/event-stream"}), func(s *script) { s.gap = 5 * time.Millisecond })}, check: streamFlag},
		{name: "server-sent events, the client leaves", x: exchange{abort: amidResponse, script: with(streamed([][]byte{[]byte("data: 1\n\n")}, Field{"content-type", "text/event-stream"}), func(s *script) { s.gap, s.endless = 5*time.Millisecond, true })}, loose: true, check: streamFlag},
		{name: "gRPC unary", protocols: two, x: exchange{method: "POST", path: "/h2/Shop/Get", head: []Field{{"content-type", "application/grpc"}, {"te", "trailers"}}, body: [][]byte{message(noise(100))}, unsized: true, script: script{head: grpc, body: [][]byte{message(noise(200))}, trailers: done}}},
		{name: "gRPC, trailers only", protocols: two, x: exchange{method: "POST", path: "/h2/Shop/Get", head: []Field{{"content-type", "application/grpc"}, {"te", "trailers"}}, body: [][]byte{message(noise(100))}, unsized: true, script: script{head: append(slices.Clone(grpc), Field{"grpc-status", "12"})}}},
		{name: "gRPC server streaming", protocols: two, x: exchange{method: "POST", path: "/h2/Shop/List", head: []Field{{"content-type", "application/grpc"}, {"te", "trailers"}}, body: [][]byte{message(noise(100))}, unsized: true, script: script{head: grpc, body: pieces(bytes.Repeat(message(noise(95)), 20), 100), gap: time.Millisecond, trailers: done}}},
		{name: "gRPC bidirectional streaming", protocols: two, x: exchange{method: "POST", path: "/h2/Shop/Chat", head: []Field{{"content-type", "application/grpc"}, {"te", "trailers"}}, body: pieces(bytes.Repeat(message(noise(95)), 20), 100), gap: 2 * time.Millisecond, unsized: true, script: script{head: grpc, echo: true, trailers: done}}},
		{name: "echo of unknown length", x: exchange{method: "POST", body: pieces(noise(10_000), 1000), gap: 2 * time.Millisecond, unsized: true, script: script{echo: true}}},
		{name: "WebSocket", protocols: one, x: exchange{head: []Field{{"connection", "Upgrade"}, {"upgrade", "websocket"}, {"sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="}, {"sec-websocket-version", "13"}}, tunnel: pieces(noise(3000), 1000), gap: 5 * time.Millisecond,
			script: script{echo: true, head: []Field{{":status", "101"}, {"connection", "Upgrade"}, {"upgrade", "websocket"}, {"sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="}}}}, loose: true, check: both(status("101"), streamFlag)},
		{name: "WebSocket, refused by the upstream", protocols: one, x: exchange{head: []Field{{"connection", "Upgrade"}, {"upgrade", "websocket"}}, script: with(reply(403, [][]byte{[]byte("no")}, Field{"connection", "close"}), func(s *script) { s.early = true })}, loose: true, check: status("403")},
		{name: "CONNECT", x: exchange{method: "CONNECT", authority: "tunnel.example:443", path: "tunnel.example:443", tunnel: pieces(noise(3000), 1000), gap: 5 * time.Millisecond, script: script{echo: true, head: []Field{{":status", "200"}}}}, loose: true, check: status("200")},
	}
}

// hostile: what attackers send.
func hostile() []testCase {
	raw := func(s string) exchange { return exchange{raw: strings.ReplaceAll(s, "\n", "\r\n")} }
	many := func(n int, f func(i int) Field) []Field { return repeat(n, f) }
	x1000 := many(1000, func(i int) Field { return Field{"x-many", fmt.Sprint(i)} })
	crumbs := many(10_000, func(i int) Field { return Field{"cookie", fmt.Sprintf("c%d=%d", i, i)} })
	cookie := make([]string, len(crumbs))
	for i, c := range crumbs {
		cookie[i] = c.Value
	}
	large := many(60, func(i int) Field { return Field{fmt.Sprintf("x-large-%d", i), strings.Repeat("l", 900)} })
	cut := func(f *faults, ev *event.Event, _ *truth) {
		if ev.Flags&(event.FlagHeadersCut|event.FlagFieldsDropped) != 0 {
			f.add("header lines were left out: %b", ev.Flags)
		}
	}
	return []testCase{
		{name: "60 KiB of header", protocols: all, x: exchange{head: large}, check: both(status("200"), cut)},
		{name: "61 KiB of header", x: exchange{head: append(slices.Clone(large), Field{"x-more", strings.Repeat("m", 8000)})}, want: refused},
		{name: "200 KiB of header", x: exchange{listener: "wide", head: many(200, func(i int) Field { return Field{fmt.Sprintf("x-large-%d", i), strings.Repeat("l", 1000)} })}, check: both(status("200"), cut)},
		{name: "1 MiB of header", x: exchange{listener: "wide", head: many(500, func(i int) Field { return Field{fmt.Sprintf("x-large-%d", i), strings.Repeat("l", 2000)} })}, check: cutHeader},
		{name: "a header 1,000 times", x: exchange{listener: "wide", head: x1000[:900]}, check: both(status("200"), cut)},
		{name: "a header 5,000 times", x: exchange{listener: "wide", head: many(5000, func(i int) Field { return Field{"x-many", fmt.Sprint(i)} })}, check: cutHeader},
		{name: "a header 1,000 times, refused", x: exchange{head: x1000}, want: refused},
		{name: "10,000 cookies in a line", protocols: one, x: exchange{listener: "wide", head: []Field{{"cookie", strings.Join(cookie, "; ")}}}, check: both(status("200"), cut)},
		{name: "10,000 cookies", protocols: two, x: exchange{listener: "wide", head: crumbs}, check: both(status("200"), cut)},
		{name: "10,000 cookie lines", protocols: one, x: exchange{listener: "wide", head: crumbs}, check: cutHeader},
		{name: "a response of 900 header lines", x: exchange{script: reply(200, nil, x1000[:900]...)}, check: cut},
		{name: "a response of 5,000 header lines", x: exchange{script: reply(200, nil, many(5000, func(i int) Field { return Field{"x-many", fmt.Sprint(i)} })...)}, check: cutHeader},
		{name: "method of no standard", protocols: all, x: exchange{method: "FROB"}, want: either},
		{name: "method in lower case", x: exchange{method: "get"}, want: either},
		{name: "method of a thousand letters", protocols: two, x: exchange{method: strings.Repeat("M", 1000)}},
		{name: "illegal method", protocols: one, x: raw("G(T / HTTP/1.1\nHost: a\n{case}\n"), want: refused},
		{name: "no method", protocols: one, x: raw(" / HTTP/1.1\nHost: a\n{case}\n"), want: refused},
		{name: "absolute form", protocols: one, x: raw("GET http://other.example/p?q HTTP/1.1\nHost: a\n{case}connection: close\n\n")},
		{name: "absolute form, other scheme", protocols: one, x: raw("GET ftp://other.example/p HTTP/1.1\nHost: a\n{case}connection: close\n\n"), want: either},
		{name: "authority form of a GET", protocols: one, x: raw("GET other.example:80 HTTP/1.1\nHost: a\n{case}connection: close\n\n"), want: either},
		{name: "asterisk form", protocols: one, x: raw("OPTIONS * HTTP/1.1\nHost: a\n{case}connection: close\n\n"), want: either},
		{name: "NUL in the path", protocols: one, x: raw("GET /a\x00b HTTP/1.1\nHost: a\n{case}connection: close\n\n"), want: refused},
		{name: "%00 in the path", protocols: all, x: exchange{path: "/a%00b?c=%00"}},
		{name: "bytes beyond ASCII in the path", protocols: one, x: raw("GET /\xc3\xa9/\xff HTTP/1.1\nHost: a\n{case}connection: close\n\n"), want: either},
		{name: "fragment in the path", x: exchange{path: "/a?b#c"}, want: either},
		{name: "NUL in a value", protocols: one, x: raw("GET / HTTP/1.1\nHost: a\n{case}x-a: b\x00c\nconnection: close\n\n"), want: refused},
		{name: "NUL in a value, h2", protocols: two, x: exchange{head: []Field{{"x-a", "b\x00c"}}}, want: refused},
		{name: "line feed in a value, h2", protocols: two, x: exchange{head: []Field{{"x-a", "b\r\nc: d"}}}, want: refused},
		{name: "capitals in a name, h2", protocols: two, x: exchange{head: []Field{{"X-Case-Name", "1"}}}, want: refused},
		{name: "control bytes in a value", protocols: one, x: raw("GET / HTTP/1.1\nHost: a\n{case}x-a: b\x01c\x7f\nconnection: close\n\n"), want: either},
		{name: "space before the colon", protocols: one, x: raw("GET / HTTP/1.1\nHost: a\n{case}x-a : b\nconnection: close\n\n"), want: either},
		{name: "folded line", protocols: one, x: raw("GET / HTTP/1.1\nHost: a\n{case}x-a: b\n c\n\td\nconnection: close\n\n"), want: either},
		{name: "underscores in a name", x: exchange{head: []Field{{"x_under_score", "1"}}}},
		{name: "no host", protocols: one, x: raw("GET / HTTP/1.1\n{case}connection: close\n\n"), want: refused},
		{name: "no host, HTTP/1.0", protocols: one, x: raw("GET / HTTP/1.0\n{case}\n"), want: either},
		{name: "two hosts", protocols: one, x: raw("GET / HTTP/1.1\nHost: a\nHost: b\n{case}connection: close\n\n"), want: either},
		{name: "bare line feeds", protocols: one, x: exchange{raw: "GET / HTTP/1.1\nHost: a\n{case}connection: close\n\n"}, want: either},
		{name: "length and chunks", protocols: one, x: raw("POST / HTTP/1.1\nHost: a\n{case}content-length: 6\ntransfer-encoding: chunked\nconnection: close\n\n0\n\nX"), want: refused},
		{name: "two lengths", protocols: one, x: raw("POST / HTTP/1.1\nHost: a\n{case}content-length: 6\ncontent-length: 5\nconnection: close\n\nhello!"), want: refused},
		{name: "chunks of an unknown coding", protocols: one, x: raw("POST / HTTP/1.1\nHost: a\n{case}transfer-encoding: xchunked\nconnection: close\n\n5\nhello\n0\n\n"), want: refused},
		{name: "length with a sign", protocols: one, x: raw("POST / HTTP/1.1\nHost: a\n{case}content-length: +5\nconnection: close\n\nhello"), want: refused},
		{name: "chunk extensions", protocols: one, x: raw("POST / HTTP/1.1\nHost: a\n{case}transfer-encoding: chunked\nconnection: close\n\n5;a=b;c=\"d\"\nhello\n0\n\n")},
		{name: "chunk of no length", protocols: one, x: raw("POST / HTTP/1.1\nHost: a\n{case}transfer-encoding: chunked\nconnection: close\n\nzz\nhello\n0\n\n"), want: either, loose: true},
		{name: "no version", protocols: one, x: raw("GET /\n{case}\n"), want: refused},
		{name: "version of the future", protocols: one, x: raw("GET / HTTP/7.7\nHost: a\n{case}\n"), want: either},
		{name: "body of a GET", x: exchange{method: "GET", body: [][]byte{noise(1000)}}},
		{name: "case header of an attacker's bytes", x: exchange{head: []Field{{"x-evil", "\xc4\xff\xdf\x80'\"\\<script>"}}}},
		{name: "h2c upgrade", protocols: one, x: raw("GET / HTTP/1.1\nHost: a\n{case}connection: Upgrade, HTTP2-Settings, close\nupgrade: h2c\nhttp2-settings: AAMAAABkAAQAAP__\n\n"), want: either},
	}
}

// cutHeader: lines beyond a bound are left out, the rest is as it was.
func cutHeader(f *faults, ev *event.Event, _ *truth) {
	if ev.Flags&(event.FlagHeadersCut|event.FlagFieldsDropped) == 0 {
		f.add("more header than is copied, and not flagged as cut")
	}
}

func allCases() []testCase {
	return slices.Concat(complete(), ends(), streams(), hostile())
}
