package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/sockstat"
)

// sockets watches the node's sockets for mirrored traffic.
type sockets struct {
	conns   sockstat.Conns
	sampler *sockstat.Sampler // nil: none

	mu    sync.Mutex
	last  sockstat.Snapshot
	fault string // of the last sample
}

// openSockets opens the sampler, in the node before the listener: what is opened
// later, eBPF sees from its first byte on. c has what address and process don't tell.
func openSockets(address string, c sockstat.Config) (*sockets, error) {
	s := &sockets{}
	tcp, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for mirrored traffic: %w", err)
	}
	ip, ok := netip.AddrFromSlice(tcp.IP)
	if !ok {
		ip = netip.IPv6Unspecified()
	}
	if tcp.Port == 0 || len(c.Backends) == 0 {
		return s, nil // an address that nobody knows, as in tests; or nothing is wanted
	}
	c.Listen, c.Conns, c.Version = netip.AddrPortFrom(ip.Unmap(), uint16(tcp.Port)), &s.conns, version
	s.sampler, err = sockstat.Open(c)
	return s, err
}

func (s *sockets) close() error {
	if s.sampler == nil {
		return nil
	}
	return s.sampler.Close()
}

// log says which back end counts, and why no better one.
func (s *sockets) log(logger *slog.Logger) {
	if s.sampler == nil {
		logger.Info("sockets are not watched: only what has been read tells of overload")
		return
	}
	logger.Info("sockets are watched", "backend", s.sampler.Backend())
	for _, r := range s.sampler.Refusals() {
		logger.Info("sockets can't be watched by a better back end", "backend", r.Backend, "reason", r.Reason)
	}
}

// sample gives how long the oldest bytes have waited in a socket, if that can be
// known.
func (s *sockets) sample() (age time.Duration, known bool) {
	if s == nil || s.sampler == nil {
		return 0, false
	}
	now, err := s.sampler.Sample()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = ""
	if err != nil {
		s.fault = err.Error()
	}
	s.last = now
	if now.Known&sockstat.Connected == 0 {
		return 0, false
	}
	return now.Total.Age, true
}

// fill puts the counters into a load report.
func (s *sockets) fill(r *load.Report) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &s.last
	r.Sockets = load.Sockets{
		Backend: l.Backend, Connections: l.Total.Connections, Bytes: l.Total.Bytes, Backlog: l.Listener.Backlog, BacklogMax: l.Listener.BacklogMax,
		ZeroWindows: l.Total.ZeroWindows, Drops: l.Total.Drops + l.Listener.Drops, Retransmits: l.Total.Retransmits,
	}
}

// socketState is the part of the node's /debug/pressurez about sockets.
type socketState struct {
	Backend string            `json:"backend"`
	Refused map[string]string `json:"refused,omitempty"` // better back ends, with the reasons
	Fault   string            `json:"fault,omitempty"`
	Sockets int               `json:"listeningSockets"`
	Backlog int               `json:"backlog"` // connections that wait to be accepted
	Limit   int               `json:"backlogMax"`
	Dropped uint64            `json:"connectionsDropped"`
	Total   socketCounters    `json:"total"`
	Peers   []socketCounters  `json:"peers"` // gateways, by address
}

type socketCounters struct {
	Peer        string  `json:"peer,omitempty"`
	Connections int     `json:"connections"`
	Waiting     int     `json:"waiting"` // connections with bytes not yet read
	Bytes       int64   `json:"bytes"`   // of them
	Age         float64 `json:"ageSeconds"`
	SRTT        float64 `json:"srttSeconds"`
	ZeroWindows uint64  `json:"zeroWindows"`
	Received    uint64  `json:"receivedBytes"`
	Retransmits uint64  `json:"retransmits"`
	Drops       uint64  `json:"drops"`
}

func showCounters(peer string, c sockstat.Counters) socketCounters {
	return socketCounters{peer, c.Connections, c.Waiting, c.Bytes, c.Age.Seconds(), c.SRTT.Seconds(), c.ZeroWindows, c.Received, c.Retransmits, c.Drops}
}

func (s *sockets) state() socketState {
	if s.sampler == nil {
		return socketState{Backend: sockstat.None}
	}
	out := socketState{Backend: s.sampler.Backend(), Refused: map[string]string{}}
	for _, r := range s.sampler.Refusals() {
		out.Refused[r.Backend] = r.Reason.Error()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &s.last.Listener
	out.Fault, out.Sockets, out.Backlog, out.Limit, out.Dropped = s.fault, l.Sockets, l.Backlog, l.BacklogMax, l.Drops
	out.Total = showCounters("", s.last.Total)
	for _, p := range s.last.Peers {
		out.Peers = append(out.Peers, showCounters(p.Address.String(), p.Counters))
	}
	return out
}
