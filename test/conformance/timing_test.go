package conformance

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Streams are measured through the plugin, past it, and past it once more: what
// the latter two differ by is noise.
const (
	timingRounds = 50
	timingGap    = 2 * time.Millisecond
	// held is what a held piece would be late by, at the least.
	held = time.Millisecond
)

var timed = []struct {
	name, protocol string
	x              exchange
}{
	{"server-sent events", h11, exchange{script: with(streamed(pieces([]byte("data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\ndata: 5\n\n"), 9), Field{"content-type", "text/event-stream"}), func(s *script) { s.gap = timingGap })}},
	{"server-sent events", h2, exchange{script: with(streamed(pieces([]byte("data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\ndata: 5\n\n"), 9), Field{"content-type", "text/event-stream"}), func(s *script) { s.gap = timingGap })}},
	{"download of unknown length", h2, exchange{script: with(streamed(pieces(noise(5000), 1000)), func(s *script) { s.gap = timingGap })}},
	{"gRPC server streaming", h2, exchange{method: "POST", path: "/h2/Shop/List", head: grpcRequest, body: [][]byte{message(noise(50))}, unsized: true,
		script: script{head: []Field{{":status", "200"}, {"content-type", "application/grpc"}}, body: pieces(noise(5000), 1000), gap: timingGap, trailers: []Field{{"grpc-status", "0"}}}}},
	{"gRPC bidirectional", h2, exchange{method: "POST", path: "/h2/Shop/Chat", head: grpcRequest, tunnel: pieces(noise(500), 100), gap: timingGap,
		script: script{echo: true, head: []Field{{":status", "200"}, {"content-type", "application/grpc"}}}}},
	{"WebSocket", h11, exchange{head: []Field{{"connection", "Upgrade"}, {"upgrade", "websocket"}}, tunnel: pieces(noise(500), 100), gap: timingGap,
		script: script{echo: true, head: []Field{{":status", "101"}, {"connection", "Upgrade"}, {"upgrade", "websocket"}}}}},
}

var grpcRequest = []Field{{"content-type", "application/grpc"}, {"te", "trailers"}}

// measured are the latencies of first bytes and of pieces.
type measured struct{ first, piece []time.Duration }

func (m *measured) add(tr *truth, sent []time.Time) {
	m.first = append(m.first, tr.got.HeadAt.Sub(tr.began))
	if len(tr.got.Pieces) != len(sent) {
		return // two arrived as one: which is late can't be told
	}
	for n, at := range tr.got.Pieces {
		m.piece = append(m.piece, at.Sub(sent[n]))
	}
}

func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[int(q*float64(len(d)-1))]
}

// TestStreamsAreNotHeld: first bytes and pieces of streams take as long as
// without the plugin.
func TestStreamsAreNotHeld(t *testing.T) {
	r := newRig(t, transports[0], "http", "bare")
	var table strings.Builder
	fmt.Fprintf(&table, "\n%-32s %-8s %-15s %10s %10s %10s %10s\n", "stream", "", "", "first p50", "p90", "piece p50", "p90")
	for _, c := range timed {
		fault := ""
		for range 2 { // a slow machine may have a bad second; a plugin that holds has two
			var with, without, again measured
			for i := range timingRounds {
				for _, m := range []struct {
					into     *measured
					listener string
				}{{&with, "http"}, {&without, "bare"}, {&again, "bare"}} {
					r.timeStream(t, c.x, c.protocol, m.listener, fmt.Sprintf("%s-%s-%d", m.listener, c.protocol, i), m.into)
				}
			}
			for _, row := range []struct {
				name string
				m    *measured
			}{{"with", &with}, {"without", &without}, {"without again", &again}} {
				fmt.Fprintf(&table, "%-32s %-8s %-15s %10v %10v %10v %10v\n", c.name, c.protocol, row.name,
					quantile(row.m.first, 0.5).Round(time.Microsecond), quantile(row.m.first, 0.9).Round(time.Microsecond), quantile(row.m.piece, 0.5).Round(time.Microsecond), quantile(row.m.piece, 0.9).Round(time.Microsecond))
			}
			if fault = with.slowerThan(&without, &again); fault == "" {
				break
			}
		}
		if fault != "" {
			t.Errorf("%s over %s: %s", c.name, c.protocol, fault)
		}
	}
	t.Log(table.String())
}

// slowerThan tells in which median m is behind both others by more than they differ.
func (m *measured) slowerThan(a, b *measured) string {
	for _, v := range []struct {
		what    string
		m, a, b []time.Duration
	}{{"first byte", m.first, a.first, b.first}, {"piece", m.piece, a.piece, b.piece}} {
		if few := min(len(v.m), len(v.a), len(v.b)); few < timingRounds/2 {
			return fmt.Sprintf("only %d times are known of the %s", few, v.what)
		}
		with, x, y := quantile(v.m, 0.5), quantile(v.a, 0.5), quantile(v.b, 0.5)
		if noise := max(x, y) - min(x, y); with > max(x, y)+held+3*noise {
			return fmt.Sprintf("the median %s takes %v with the plugin, %v and %v without", v.what, with, x, y)
		}
	}
	return ""
}

func (r *rig) timeStream(t *testing.T, x exchange, protocol, listener, id string, m *measured) {
	t.Helper()
	x.listener = listener
	x.script.sent = &times{}
	tr, err := r.do(x, protocol, id)
	if err != nil {
		t.Fatal(err)
	}
	r.up.forget(id)
	sent := x.script.sent.list()
	if x.tunnel != nil {
		sent = tr.sentAt
	}
	m.add(tr, sent)
}
