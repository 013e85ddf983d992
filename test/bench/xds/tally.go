package main

import (
	"net"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
)

// tally counts, inside the server under test, what its clients acknowledge and
// what it sends them: outside of the server's own code, so alike for all.
type tally struct {
	acks   atomic.Int64
	nacks  atomic.Int64
	sent   atomic.Int64 // bytes on the wire, HTTP/2's own included
	target atomic.Int64 // of acks
	done   chan time.Time
}

func newTally() *tally { return &tally{done: make(chan time.Time, 1)} }

// expect has done tell when n more acknowledgements have come. All earlier ones
// must be in.
func (t *tally) expect(n int) {
	select {
	case <-t.done:
	default:
	}
	t.target.Store(t.acks.Load() + int64(n))
}

// received takes a client's message.
func (t *tally) received(m any) {
	var nonce string
	var fault bool
	switch r := m.(type) {
	case *discovery.DeltaDiscoveryRequest:
		nonce, fault = r.GetResponseNonce(), r.GetErrorDetail() != nil
	case *discovery.DiscoveryRequest:
		// istiod makes up a nonce for its first requests, but no version.
		if r.GetVersionInfo() != "" {
			nonce = r.GetResponseNonce()
		}
		fault = r.GetErrorDetail() != nil
	}
	switch {
	case fault:
		t.nacks.Add(1)
	case nonce != "" && t.acks.Add(1) == t.target.Load():
		t.done <- time.Now() // has room: a target is hit once
	}
}

// intercept is a gRPC server's option.
func (t *tally) intercept(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return next(srv, &talliedStream{stream, t})
}

type talliedStream struct {
	grpc.ServerStream
	tally *tally
}

func (s *talliedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.tally.received(m)
	}
	return err
}

// listen wraps a listener.
func (t *tally) listen(l net.Listener) net.Listener { return &talliedListener{l, t} }

type talliedListener struct {
	net.Listener
	tally *tally
}

func (l *talliedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &talliedConn{c, l.tally}, nil
}

type talliedConn struct {
	net.Conn
	tally *tally
}

func (c *talliedConn) Write(b []byte) (int, error) {
	c.tally.sent.Add(int64(len(b))) // before: the answer may be quicker than our return
	return c.Conn.Write(b)
}
