package conformance

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// pace of streams. They are measured through our filters, past them, and past
// them once more: what the latter two differ by is noise.
type pace struct {
	rounds int
	gap    time.Duration // between pieces
	held   time.Duration // what a held piece would be late by, at the least
}

var (
	luaPace = pace{50, 2 * time.Millisecond, time.Millisecond}
	// A gRPC stream for each exchange takes time of the same cores, which is not
	// to be taken for a wait.
	extProcPace = pace{20, 6 * time.Millisecond, 4 * time.Millisecond}
)

var timed = []struct {
	name, protocol string
	x              exchange
}{
	{"server-sent events", h11, exchange{script: streamed(pieces([]byte("data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\ndata: 5\n\n"), 9), Field{"content-type", "text/event-stream"})}},
	{"server-sent events", h2, exchange{script: streamed(pieces([]byte("data: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\ndata: 5\n\n"), 9), Field{"content-type", "text/event-stream"})}},
	{"download of unknown length", h2, exchange{script: streamed(pieces(noise(5000), 1000))}},
	{"gRPC server streaming", h2, exchange{method: "POST", path: "/h2/Shop/List", head: grpcRequest, body: [][]byte{message(noise(50))}, unsized: true,
		script: script{head: []Field{{":status", "200"}, {"content-type", "application/grpc"}}, body: pieces(noise(5000), 1000), trailers: []Field{{"grpc-status", "0"}}}}},
	{"gRPC bidirectional", h2, exchange{method: "POST", path: "/h2/Shop/Chat", head: grpcRequest, tunnel: pieces(noise(500), 100),
		script: script{echo: true, head: []Field{{":status", "200"}, {"content-type", "application/grpc"}}}}},
	{"WebSocket", h11, exchange{head: []Field{{"connection", "Upgrade"}, {"upgrade", "websocket"}}, tunnel: pieces(noise(500), 100),
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
// without our filters.
func TestStreamsAreNotHeld(t *testing.T) {
	t.Run("Lua", func(t *testing.T) { runTimed(t, transports[0], luaPace) })
	t.Run("ExtProc", func(t *testing.T) { runTimed(t, extProc, extProcPace) })
}

func runTimed(t *testing.T, tr transport, p pace) {
	r := newRig(t, tr, "http", "bare")
	var table strings.Builder
	fmt.Fprintf(&table, "\n%-32s %-8s %-15s %10s %10s %10s %10s\n", "stream", "", "", "first p50", "p90", "piece p50", "p90")
	for _, c := range timed {
		if c.x.tunnel != nil {
			c.x.gap = p.gap
		} else {
			c.x.script.gap = p.gap
		}
		fault := ""
		for range 2 { // a slow machine may have a bad second; a filter that holds has two
			var with, without, again measured
			for i := range p.rounds {
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
			if fault = with.slowerThan(&without, &again, p); fault == "" {
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
func (m *measured) slowerThan(a, b *measured, p pace) string {
	for _, v := range []struct {
		what    string
		m, a, b []time.Duration
	}{{"first byte", m.first, a.first, b.first}, {"piece", m.piece, a.piece, b.piece}} {
		if few := min(len(v.m), len(v.a), len(v.b)); few < p.rounds/2 {
			return fmt.Sprintf("only %d times are known of the %s", few, v.what)
		}
		with, x, y := quantile(v.m, 0.5), quantile(v.a, 0.5), quantile(v.b, 0.5)
		if noise := max(x, y) - min(x, y); with > max(x, y)+p.held+3*noise {
			return fmt.Sprintf("the median %s takes %v with our filters, %v and %v without", v.what, with, x, y)
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
