package conformance

import (
	"bufio"
	"net"
	"sync"
	"testing"
	"time"
)

// script is what the upstream does with an exchange. The zero value answers 200
// with a short text.
type script struct {
	interim  [][]Field
	head     []Field // default 200
	body     [][]byte
	gap      time.Duration // before each piece of the body
	wait     time.Duration // before the answer
	trailers []Field
	early    bool   // answers once it has the request's header
	fail     point  // where it resets
	closes   bool   // instead of resetting, it closes
	fails    int    // how many attempts fail; 0: all
	echo     bool   // sends back what arrives, piece by piece, to the end
	endless  bool   // the last piece again and again
	sent     *times // when each piece was sent, if asked for
}

// times are noted at one end and read at the other.
type times struct {
	mu sync.Mutex
	at []time.Time
}

func (t *times) note() {
	if t != nil {
		t.mu.Lock()
		t.at = append(t.at, time.Now())
		t.mu.Unlock()
	}
}

func (t *times) list() []time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.at
}

// point is where an exchange is broken off.
type point string

const (
	nowhere      point = ""
	atHead       point = "at the request's header"
	amidRequest  point = "amid the request"
	afterRequest point = "after the request"
	never        point = "never answers"
	atResponse   point = "after the response's header"
	amidResponse point = "amid the response"
)

// upstream records what arrives and answers by scripts, over HTTP/1.1 and HTTP/2.
type upstream struct {
	addr string

	mu      sync.Mutex
	scripts map[string]*script
	seen    map[string][]*Message
	conns   map[net.Conn]bool
}

func newUpstream(t testing.TB) *upstream {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{addr: l.Addr().String(), scripts: map[string]*script{}, seen: map[string][]*Message{}, conns: map[net.Conn]bool{}}
	var wait sync.WaitGroup
	wait.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			u.mu.Lock()
			u.conns[c] = true
			u.mu.Unlock()
			wait.Go(func() {
				u.connection(c)
				c.Close()
				u.mu.Lock()
				defer u.mu.Unlock()
				delete(u.conns, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		u.mu.Lock()
		for c := range u.conns {
			c.Close()
		}
		u.mu.Unlock()
		wait.Wait()
	})
	return u
}

// buffered is a connection some of whose bytes were read ahead.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }
func (b buffered) SetLinger(n int) error      { return b.Conn.(*net.TCPConn).SetLinger(n) }

func (u *upstream) connection(c net.Conn) {
	r := bufio.NewReader(c)
	first, err := r.Peek(3)
	if err != nil {
		return
	}
	if string(first) == "PRI" {
		h, err := NewH2Server(c, r, func(s *H2Stream) { u.exchange(s) })
		if err != nil {
			return
		}
		h.Wait()
		return
	}
	h := NewH1(buffered{c, r}, false)
	for u.exchange(h) {
		h.Next()
	}
}

func (u *upstream) expect(id string, s *script) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.scripts[id] = s
}

// forget gives what the upstream saw of an exchange, attempt by attempt.
func (u *upstream) forget(id string) []*Message {
	u.mu.Lock()
	defer u.mu.Unlock()
	var seen []*Message
	for _, m := range u.seen[id] {
		now := *m // more may arrive
		seen = append(seen, &now)
	}
	delete(u.scripts, id)
	delete(u.seen, id)
	return seen
}

// exchange serves one; false: the connection is not fit for another.
func (u *upstream) exchange(s Stream) bool {
	i := s.Recv()
	if i.Kind != Head {
		return false
	}
	m := &Message{}
	m.Add(i)
	id := Get(i.Fields, caseHeader)
	u.mu.Lock()
	p := u.scripts[id]
	if p == nil {
		p = &script{}
	} else {
		u.seen[id] = append(u.seen[id], m)
	}
	attempt := len(u.seen[id])
	u.mu.Unlock()
	run := *p
	switch {
	case p.fails > 0 && attempt > p.fails:
		run.fail = nowhere
	case p.fail == redirectOnce && attempt > 1:
		run = script{}
	}
	return u.play(s, m, &run)
}

// record keeps what arrives of the request; until: stop at its first piece of that kind.
func (u *upstream) record(s Stream, m *Message, until Kind) {
	for {
		i := s.Recv()
		u.mu.Lock()
		m.Add(i)
		u.mu.Unlock()
		if i.Kind == End || i.Kind == Reset || i.Kind == until {
			return
		}
	}
}

func (u *upstream) play(s Stream, m *Message, p *script) bool {
	broken := func(at point) bool {
		if p.fail != at {
			return false
		}
		if p.closes {
			s.Close()
		} else {
			s.Abort()
		}
		return true
	}
	if broken(atHead) {
		return false
	}
	if p.echo {
		return u.echo(s, m, p)
	}
	if p.fail == amidRequest {
		u.record(s, m, Data)
		broken(amidRequest)
		return false
	}
	done := make(chan struct{})
	go func() { defer close(done); u.record(s, m, "") }()
	if !p.early {
		<-done
	}
	defer func() { <-done }()
	if !p.early && m.End == Reset {
		return false
	}
	if broken(afterRequest) {
		return false
	}
	if p.fail == never {
		s.Gone()
		return false
	}
	time.Sleep(p.wait)
	for _, f := range p.interim {
		_ = s.SendInterim(f)
	}
	if u.answer(s, Get(m.Head, ":method"), p, broken) != nil {
		return false
	}
	<-done
	return m.End == End
}

func (u *upstream) answer(s Stream, method string, p *script, broken func(point) bool) error {
	head, body := p.head, p.body
	if head == nil {
		head, body = []Field{{":status", "200"}, {"content-length", "2"}}, [][]byte{[]byte("ok")}
	}
	if method == "HEAD" {
		body = nil
	}
	if err := s.SendHead(head, len(body) == 0 && p.trailers == nil && (p.fail == nowhere || p.fail == redirectOnce)); err != nil {
		return err
	}
	if broken(atResponse) {
		return ErrEnded
	}
	for n := 0; n < len(body); n++ {
		time.Sleep(p.gap)
		last := n == len(body)-1 && p.trailers == nil && !p.endless && p.fail == nowhere
		p.sent.note()
		if err := s.SendData(body[n], last); err != nil {
			return err
		}
		if p.fail == amidResponse {
			time.Sleep(20 * time.Millisecond) // so that what was sent isn't lost with the reset
			broken(amidResponse)
			return ErrEnded
		}
		if p.endless && n == len(body)-1 {
			n--
		}
	}
	if p.trailers != nil {
		return s.SendTrailers(p.trailers)
	}
	if p.closesAfter(head) {
		s.Close()
		return ErrEnded
	}
	return nil
}

// closesAfter tells whether only the connection's end ends the body.
func (p *script) closesAfter(head []Field) bool { return Get(head, "connection") == "close" }

// echo answers as the request goes on.
func (u *upstream) echo(s Stream, m *Message, p *script) bool {
	head := p.head
	if head == nil {
		head = []Field{{":status", "200"}, {"transfer-encoding", "chunked"}}
	}
	if _, two := s.(*H2Stream); two {
		head = without(head, "transfer-encoding")
	}
	if s.SendHead(head, false) != nil {
		return false
	}
	for {
		i := s.Recv()
		u.mu.Lock()
		m.Add(i)
		u.mu.Unlock()
		switch i.Kind {
		case Data:
			if s.SendData(i.Data, false) != nil {
				return false
			}
		case End:
			var err error
			if p.trailers != nil {
				err = s.SendTrailers(p.trailers)
			} else {
				err = s.SendData(nil, true)
			}
			tunnel := Get(head, "upgrade") != "" || Get(m.Head, ":method") == "CONNECT"
			return err == nil && !tunnel
		case Reset:
			return false
		}
	}
}

// attempts gives what the upstream has seen of an exchange so far.
func (u *upstream) attempts(id string) []*Message {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.seen[id]
}
