package conformance

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	seed      = flag.Uint64("conformance.seed", 0, "seed of random exchanges; 0: the clock")
	exchanges = flag.Int("conformance.exchanges", 10_000, "number of random exchanges; by ExtProc a fifth of it")
	only      = flag.Int("conformance.only", -1, "run this random exchange alone")
)

// randomWait is how long the plugin waits for the end of a random exchange.
const randomWait = 5 * time.Second

// random makes exchange number n of a seed, and its protocol.
func random(seed, n uint64) (x exchange, protocol string) {
	g := gen{rand.New(rand.NewPCG(seed, n))}
	protocol = []string{h11, h2}[g.IntN(2)]
	x.listener = "http"
	x.method = pick(g, "GET", "GET", "GET", "POST", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS")
	x.path = pick(g, "/", "/", "/", "/h2/") + g.path()
	x.head = g.fields(12)
	if g.one(2) && x.method != "HEAD" {
		x.body = g.body()
		x.unsized = g.one(3)
		if x.unsized && g.one(4) {
			x.trailers = g.fields(3)
		}
	}
	if g.one(20) {
		x.gap = time.Duration(g.IntN(3)) * time.Millisecond
	}
	if protocol == h2 && g.one(5) {
		x.pad = uint8(g.IntN(200))
	}
	x.script = g.script(x.method)
	if g.one(25) {
		x.abort = pick(g, atHead, amidRequest, afterRequest, atResponse, amidResponse)
		if x.body == nil || len(x.body[0]) == 0 {
			x.abort = pick(g, afterRequest, atResponse, amidResponse)
		}
		if x.abort == atHead || x.abort == amidRequest || x.abort == afterRequest {
			x.script = script{fail: never}
		}
	}
	return x.defaults(), protocol
}

type gen struct{ *rand.Rand }

func pick[T any](g gen, of ...T) T { return of[g.IntN(len(of))] }

func (g gen) one(in int) bool { return g.IntN(in) == 0 }

func (g gen) path() string {
	var b strings.Builder
	for range g.IntN(20) {
		b.WriteString(pick(g, "a", "bc", "/", "//", "..", "%2e", "%00", "%ff", ";v=1", "?q=", "&", "=", "'", "<", "%", "+", "~", "items", "17"))
	}
	return b.String()
}

// fields have names of few kinds, so that some repeat, and values of all bytes.
func (g gen) fields(most int) []Field {
	var out []Field
	for range g.IntN(most) {
		v := make([]byte, g.IntN(40))
		if g.one(30) {
			v = make([]byte, g.IntN(4000))
		}
		for i := range v {
			c := byte(0x20 + g.IntN(0x5f))
			if g.one(10) {
				c = byte(0x80 + g.IntN(0x80))
			}
			v[i] = c
		}
		out = append(out, Field{fmt.Sprintf("x-%d", g.IntN(8)), strings.Trim(string(v), " ")})
	}
	return out
}

func (g gen) body() [][]byte {
	n := g.IntN(1000)
	switch {
	case g.one(10):
		n = 0
	case g.one(5):
		n = g.IntN(16 << 10)
	case g.one(20):
		n = g.IntN(100 << 10)
	case g.one(100):
		n = bodyLimit - 1 + g.IntN(3)
	}
	return pieces(noise(n), 1+g.IntN(max(n, 1)))
}

func (g gen) script(method string) script {
	s := reply(pick(g, 200, 200, 200, 200, 201, 204, 304, 400, 404, 500), nil, g.fields(8)...)
	bodiless := s.head[0].Value == "204" || s.head[0].Value == "304" || method == "HEAD"
	switch {
	case bodiless:
		s.head = without(s.head, "content-length")
	case g.one(3):
		s.head = append(without(s.head, "content-length"), Field{"transfer-encoding", "chunked"})
		s.body = g.body()
		if g.one(4) {
			s.trailers = g.fields(3)
		}
	default:
		s.body = g.body()
		if len(s.body) > 0 {
			n := 0
			for _, b := range s.body {
				n += len(b)
			}
			s.head[1].Value = fmt.Sprint(n)
		}
	}
	if g.one(20) {
		s.interim = [][]Field{{{":status", "103"}, {"link", "</a>"}}}
	}
	if g.one(10) {
		s.wait = time.Duration(g.IntN(5)) * time.Millisecond
	}
	if g.one(30) {
		s.early = true
	}
	if g.one(25) {
		s.fail = pick(g, atHead, afterRequest, atResponse, amidResponse)
		s.closes = g.one(2)
	}
	return s
}

// client has one connection of each protocol, and a new one when it is spent.
type client struct {
	r   *rig
	one *H1
	two *H2
}

// do runs an exchange. A connection that Envoy was about to end, as it does after
// a response that came before the request's end, is no fault of the exchange's:
// it is begun again on a new one.
func (c *client) do(x exchange, protocol, id string) (*truth, error) {
	c.r.up.expect(id, &x.script)
	fresh := c.one == nil && protocol == h11 || c.two == nil && protocol == h2
	tr, err := c.try(x, protocol, id)
	if err == nil && !fresh && tr.got.End == Reset && tr.got.Head == nil && len(c.r.up.attempts(id)) == 0 {
		c.close()
		tr, err = c.try(x, protocol, id)
	}
	return tr, err
}

func (c *client) try(x exchange, protocol, id string) (*truth, error) {
	if protocol == h2 {
		if c.two == nil || c.two.Ended() {
			conn, err := c.r.dial(x.listener, "h2")
			if err != nil {
				return nil, err
			}
			if c.two, err = NewH2Client(conn); err != nil {
				return nil, err
			}
		}
		_ = c.two.conn.SetDeadline(time.Now().Add(20 * time.Second))
		s := c.two.Open()
		s.PadTo = x.pad
		return c.r.doOn(s, &x, protocol, id, c.two.conn.LocalAddr().String()), nil
	}
	if c.one == nil {
		conn, err := c.r.dial(x.listener, "http/1.1")
		if err != nil {
			return nil, err
		}
		c.one = NewH1(conn, true)
	}
	_ = c.one.SetDeadline(time.Now().Add(20 * time.Second))
	tr := c.r.doOn(c.one, &x, protocol, id, c.one.LocalAddr().String())
	c.one.Next()
	if tr.got.End != End || !tr.whole || Get(tr.got.Head, "connection") == "close" {
		c.one.Close()
		c.one = nil
	}
	return tr, nil
}

func (c *client) close() {
	if c.one != nil {
		c.one.Close()
	}
	if c.two != nil {
		c.two.Close()
	}
	c.one, c.two = nil, nil
}

// TestRandom: each of many random exchanges has its event, and the counters add up.
func TestRandom(t *testing.T) {
	seed := *seed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	for _, m := range []struct {
		transport
		exchanges int
	}{{transports[0], *exchanges}, {extProc, *exchanges / 5}} {
		t.Run(m.name, func(t *testing.T) { runRandom(t, m.transport, seed, m.exchanges) })
	}
}

func runRandom(t *testing.T, tr transport, seed uint64, count int) {
	r := newRig(t, tr.waits(randomWait), "http")
	r.nudges(t)
	again := func(n int) string {
		return fmt.Sprintf("run it alone: go test ./test/conformance -run TestRandom/%s -args -conformance.seed=%d -conformance.only=%d", tr.name, seed, n)
	}
	first, last := 0, count
	if *only >= 0 {
		first, last = *only, *only+1
	}
	truths := make([]*truth, last)
	var next atomic.Int64
	next.Store(int64(first))
	began := time.Now()
	var wait sync.WaitGroup
	for range 16 {
		wait.Go(func() {
			c := &client{r: r}
			defer c.close()
			for n := int(next.Add(1)) - 1; n < last; n = int(next.Add(1)) - 1 {
				x, protocol := random(seed, uint64(n))
				id := fmt.Sprint(n)
				r.node.expect(id)
				tr, err := c.do(x, protocol, id)
				if err != nil {
					t.Errorf("exchange %d: %v", n, err)
					continue
				}
				tr.seen = r.up.forget(id)
				truths[n] = tr
			}
		})
	}
	wait.Wait()
	t.Logf("%d exchanges in %v", last-first, time.Since(began).Round(time.Millisecond))
	var ids []string
	for _, tr := range truths[first:] {
		if tr != nil {
			ids = append(ids, tr.id)
		}
	}
	bad := 0
	for _, id := range r.node.missing(ids, randomWait+3*time.Second) {
		if bad++; bad <= 10 {
			n, _ := strconv.Atoi(id)
			t.Errorf("exchange %s has no event\n%s\n%s", id, truths[n].describe(), again(n))
		}
	}
	for n, tr := range truths[first:] {
		if tr == nil || bad > 10 {
			continue
		}
		f := &faults{}
		(&testCase{}).judge(f, tr, r.node.of(tr.id, 0, 0))
		f.list = slices.DeleteFunc(f.list, func(s string) bool { return strings.HasPrefix(s, "no event") || isKnownOfRandom(s) })
		for _, s := range f.list {
			bad++
			t.Errorf("exchange %d: %s\n%s\n%s", n+first, s, tr.describe(), again(n+first))
		}
	}
	r.checkCounters(t)
}

// describe tells an exchange in short.
func (tr *truth) describe() string {
	return fmt.Sprintf("%s, body %d, whole %v\nthe client got %s, body %d, %s; the upstream saw %d attempts", clip(text(tr.sent)), len(tr.body), tr.whole, clip(text(tr.got.Head)), len(tr.got.Body), tr.got.End, len(tr.seen))
}

// isKnownOfRandom tells known faults that random exchanges may show.
func isKnownOfRandom(fault string) bool {
	return known["client aborts amid the response"] != "" && strings.HasPrefix(fault, "no response, the client got") ||
		known["response trailers without a body"] != "" && strings.Contains(fault, "trailers differ")
}
