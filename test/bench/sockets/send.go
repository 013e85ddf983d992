package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/ingest"
)

// addresses are where gateways' connections come from.
const addresses = 50

func gatewayAddress(i int) net.IP { return net.IPv4(127, 0, 1, byte(i%addresses)) }

// exchanges are events as the plugin writes them, with bodies of so many bytes in
// either direction.
func exchanges(n, bodyBytes int) []byte {
	field := func(name, value string) event.Field { return event.Field{Name: []byte(name), Value: []byte(value)} }
	request := []event.Field{field(":method", "POST"), field(":path", "/api/v1/orders?page=2"), field(":authority", "shop.example"), field(":scheme", "https")}
	response := []event.Field{field(":status", "200")}
	for i := range 10 {
		request = append(request, field(fmt.Sprint("x-request-header-", i), "an ordinary value"))
		response = append(response, field(fmt.Sprint("x-response-header-", i), "an ordinary value"))
	}
	body := bytes.Repeat([]byte("x"), bodyBytes)
	var out []byte
	for i := range n {
		out = event.Append(out, &event.Event{N: uint64(i), Policy: "ingress/public", SharePPM: 1e6, StartUS: 1_800_000_000_000_000, EndUS: 5000,
			Source: "203.0.113.7:40000", Protocol: "HTTP/2", Route: "orders",
			Request:  event.Message{Headers: request, Body: body, BodyBytes: uint64(bodyBytes)},
			Response: event.Message{Headers: response, Body: body, BodyBytes: uint64(bodyBytes)}})
	}
	return out
}

// batch ends events with the header of the plugin's batch.
func batch(events []byte, seq uint64, sent time.Time) []byte {
	b := append(make([]byte, 0, len(events)+512), events...)
	return event.AppendHeader(b, &event.Header{Version: event.Version, Gateway: "ingress/public", VM: "bench", Plugin: "bench", Seq: seq, SentUS: uint64(sent.UnixMicro()),
		Policy: "ingress/public", Eligible: seq, Mirrored: seq, Counters: map[string]uint64{event.CounterSeen: seq, event.CounterMirrored: seq}})
}

// Ways to send batches.
const (
	kept  = "HTTP/1.1"        // connections are kept
	once  = "new connections" // one for each batch
	mixed = "h2c"             // HTTP/2 in plain text, many batches at a time on few connections
)

// mixedConns is how many connections those of mixed are.
const mixedConns = 4

// sender is an open loop: batches become due by a Poisson process, whatever became
// of earlier ones. One for which there is no room is dropped, as a gateway's circuit
// breaker does.
type sender struct {
	events  []byte
	clients []*http.Client
	room    chan *http.Client // one for each batch that may be under way
	rate    atomic.Int64      // batches a second
	seq     atomic.Uint64
	dropped atomic.Uint64
	fault   atomic.Pointer[error] // the first
}

// newSender sends to the node; at most so many batches are under way. Each has a
// connection of its own, but for mixed.
func newSender(way string, events []byte, underWay int) *sender {
	s := &sender{events: events, room: make(chan *http.Client, underWay)}
	n := underWay
	if way == mixed {
		n = mixedConns
	}
	for i := range n {
		var dialled int
		t := &http.Transport{
			MaxConnsPerHost: 1, DisableKeepAlives: way == once, DisableCompression: true, Protocols: new(http.Protocols),
			DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				dialled++ // by one at a time, see MaxConnsPerHost
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: gatewayAddress(i + dialled)}}
				return d.DialContext(ctx, network, address)
			},
		}
		t.Protocols.SetHTTP1(way != mixed)
		t.Protocols.SetUnencryptedHTTP2(way == mixed)
		s.clients = append(s.clients, &http.Client{Transport: t})
	}
	for i := range underWay {
		s.room <- s.clients[i%n]
	}
	return s
}

func (s *sender) close() {
	for _, c := range s.clients {
		c.CloseIdleConnections()
	}
}

// run sends until the context ends, and waits for what is under way.
func (s *sender) run(ctx context.Context) error {
	var group sync.WaitGroup
	// Not a queue of due times: a change of the rate counts from its moment on.
	due := rand.ExpFloat64()
	last := time.Now()
	for ctx.Err() == nil {
		rate := float64(s.rate.Load())
		t := time.Now()
		due -= t.Sub(last).Seconds() * rate
		last = t
		for ; due <= 0; due += rand.ExpFloat64() {
			select {
			case c := <-s.room:
				group.Go(func() { s.send(c) })
			default:
				s.dropped.Add(1)
			}
		}
		wait := time.Millisecond
		if rate > 0 {
			wait = min(wait, time.Duration(due/rate*float64(time.Second)))
		}
		time.Sleep(wait)
	}
	group.Wait()
	return s.err()
}

// saturate keeps as many batches under way as there may be.
func (s *sender) saturate(d time.Duration) error {
	end := time.Now().Add(d)
	var group sync.WaitGroup
	for range cap(s.room) {
		group.Go(func() {
			for time.Now().Before(end) {
				s.send(<-s.room)
			}
		})
	}
	group.Wait()
	return s.err()
}

func (s *sender) send(c *http.Client) {
	defer func() { s.room <- c }()
	if err := s.post(c, batch(s.events, s.seq.Add(1), time.Now())); err != nil {
		s.fault.CompareAndSwap(nil, &err)
	}
}

func (s *sender) post(c *http.Client, body []byte) error {
	// What is under way ends by itself: the node has time limits.
	req, err := http.NewRequest(http.MethodPost, "http://"+listenAddress.String()+ingest.Path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	req.Header.Set("Content-Type", event.ContentType)
	res, err := c.Do(req)
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	_, err = io.Copy(io.Discard, res.Body)
	if err := errors.Join(err, res.Body.Close()); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if res.StatusCode != http.StatusAccepted {
		return fmt.Errorf("send: the node answers %s", res.Status)
	}
	return nil
}

func (s *sender) err() error {
	if err := s.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// holdOpen opens connections from all addresses, and sends a few bytes by every
// other one.
func holdOpen(to netip.AddrPort, n int) (closeAll func(), err error) {
	var conns []net.Conn
	closeAll = func() {
		for _, c := range conns {
			c.Close()
		}
	}
	for i := range n {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: gatewayAddress(i)}}
		c, err := d.Dial("tcp", to.String())
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("connect: %w", err)
		}
		conns = append(conns, c)
		if i%2 == 0 {
			if _, err := c.Write(make([]byte, 100)); err != nil {
				closeAll()
				return nil, fmt.Errorf("send: %w", err)
			}
		}
	}
	return closeAll, nil
}
