package sockstat

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"
)

const (
	maxPeers   = 4096
	peerMemory = time.Minute

	// minWindow is the least segment of IPv4: a peer that may send less waits
	// for the reader.
	minWindow = 536
)

// States of TCP sockets, as the kernel numbers them.
const (
	established = 1
	closeWait   = 8
	listening   = 10
)

// record is one socket as read: the form that the eBPF program writes, which the
// other back ends fill in likewise.
type record = socketsRecord

// table makes snapshots of the records of successive samples. It is pure: the
// time is given. What it remembers of a socket outlives a change of back end.
type table struct {
	port  uint16
	any   bool // every local address
	local [4]uint32
	netns uint32

	samples uint64
	epoch   time.Time // of the first sample
	last    time.Time
	conns   map[uint64]*conn // by cookie
	order   []*conn          // as the last sample had them; the next one's order is mostly the same
	spare   []*conn
	peers   map[netip.Addr]*peer
	sorted  []*peer
	total   Counters
	drops   uint64 // of listeners
}

// conn is what is remembered of a socket. It fits a cache line: most of a sample's
// time is spent waiting for these.
type conn struct {
	cookie uint64
	sample uint64 // the last that had it
	peer   *peer  // nil: a listener

	mark  uint64        // bytes received by the time since
	since time.Duration // from the first sample on

	received    uint64
	retransmits uint32
	drops       uint32
	index       int32 // in that sample's order
	shut        bool  // its window
}

type peer struct {
	Peer
	now    Counters  // of this sample alone
	sample uint64    // the last that had a connection of it
	seen   time.Time // then
}

func newTable(listen netip.AddrPort, netns uint32) *table {
	return &table{port: listen.Port(), any: listen.Addr().IsUnspecified(), local: words(listen.Addr()), netns: netns,
		conns: map[uint64]*conn{}, peers: map[netip.Addr]*peer{}}
}

// words is an address as a record has it.
func words(a netip.Addr) (w [4]uint32) {
	b := a.As16()
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

func address(w [4]uint32) netip.Addr {
	var b [16]byte
	for i := range w {
		binary.NativeEndian.PutUint32(b[4*i:], w[i])
	}
	return netip.AddrFrom16(b).Unmap()
}

func (t *table) ours(r *record) bool {
	return r.LocalPort == t.port && r.Netns == t.netns && (t.any || r.Local == t.local)
}

// normalise leaves bytes alone in Queue and Received.
func (r *record) normalise() {
	if int32(r.Queue) < 0 {
		r.Queue = 0 // read while it was being emptied
	}
	if r.State == closeWait { // the kernel counts the peer's FIN as a byte
		r.Queue -= min(r.Queue, 1)
		r.Received -= min(r.Received, 1)
	}
}

// fold takes the records of one sample, read at now, and may change them. It
// leaves out what is not the listener's, and counts once what comes twice.
func (t *table) fold(now time.Time, records []record) Snapshot {
	first := t.samples == 0
	s := Snapshot{Time: now}
	if first {
		t.epoch = now
	} else {
		s.Interval = now.Sub(t.last)
	}
	at := now.Sub(t.epoch)
	t.samples++
	t.last = now
	for _, p := range t.sorted {
		p.now = Counters{}
	}
	order, next := t.spare[:0], 0
	for i := range records {
		r := &records[i]
		if !t.ours(r) {
			continue
		}
		r.normalise()
		var c *conn
		if next < len(t.order) && t.order[next].cookie == r.Cookie {
			c = t.order[next]
		} else if c = t.conns[r.Cookie]; c == nil {
			c = t.add(at, r, first)
		}
		if c.sample == t.samples {
			continue
		}
		next = int(c.index) + 1
		c.sample, c.index = t.samples, int32(len(order))
		order = append(order, c)
		if r.State == listening {
			s.Listener.Sockets++
			s.Listener.Backlog += int(r.Queue)
			s.Listener.BacklogMax += int(r.Limit)
			t.drops += uint64(r.Drops - c.drops)
			c.drops = r.Drops
			continue
		}
		c.count(at, r)
	}
	t.order, t.spare = order, t.order
	t.total.reset()
	for _, p := range t.sorted {
		if p.now.Connections > 0 {
			p.sample, p.seen = t.samples, now
		}
		p.reset()
		p.add(&p.now)
		t.total.add(&p.now)
	}
	t.forget(now, len(order))
	s.Listener.Drops = t.drops
	s.Total = t.total
	s.Peers = make([]Peer, len(t.sorted))
	for i, p := range t.sorted {
		s.Peers[i] = p.Peer
	}
	return s
}

// grown is a sample without records, as there is nobody to read them: what had been
// counted stays.
func (t *table) grown(now time.Time) Snapshot {
	s := Snapshot{Backend: None, Time: now, Total: t.total}
	s.Total.reset()
	s.Listener.Drops = t.drops
	for _, p := range t.sorted {
		p.reset()
		s.Peers = append(s.Peers, p.Peer)
	}
	return s
}

// add remembers a socket. What it counted before the first sample is not ours.
func (t *table) add(at time.Duration, r *record, first bool) *conn {
	c := &conn{cookie: r.Cookie, since: at}
	if r.State != listening {
		c.peer = t.peerOf(address(r.Peer))
	}
	if first {
		c.received, c.retransmits, c.drops = r.Received, r.Retransmits, r.Drops
	}
	t.conns[r.Cookie] = c
	return c
}

func (t *table) peerOf(a netip.Addr) *peer {
	if _, known := t.peers[a]; !known && len(t.peers) >= maxPeers {
		a = netip.Addr{}
	}
	p := t.peers[a]
	if p == nil {
		p = &peer{Peer: Peer{Address: a}}
		t.peers[a] = p
		i, _ := slices.BinarySearchFunc(t.sorted, a, func(p *peer, a netip.Addr) int { return p.Address.Compare(a) })
		t.sorted = slices.Insert(t.sorted, i, p)
	}
	return p
}

// count adds a connection to its peer's sums.
func (c *conn) count(at time.Duration, r *record) {
	p := &c.peer.now
	p.Connections++
	p.Received += r.Received - c.received
	p.Retransmits += uint64(r.Retransmits - c.retransmits)
	p.Drops += uint64(r.Drops - c.drops)
	p.SRTT = max(p.SRTT, time.Duration(r.SrttUs>>3)*time.Microsecond)
	p.Age = max(p.Age, c.age(at, r.Received, uint64(r.Queue)))
	shut := false
	if r.Queue > 0 {
		p.Waiting++
		p.Bytes += int64(r.Queue)
		shut = r.Window < minWindow
		if shut && !c.shut {
			p.ZeroWindows++
		}
	}
	c.received, c.retransmits, c.drops, c.shut = r.Received, r.Retransmits, r.Drops, shut
}

// age is how long the oldest unread byte has waited: bytes received by the time
// since are unread until reading has passed mark. At most one sample's interval
// too little, never too much.
func (c *conn) age(at time.Duration, received, queue uint64) time.Duration {
	if queue == 0 || int64(received-queue-c.mark) >= 0 {
		c.mark, c.since = received, at
	}
	return at - c.since
}

// forget leaves sockets that two samples did not have, the first of which may
// have skipped them, and peers that have long had none.
func (t *table) forget(now time.Time, seen int) {
	if seen < len(t.conns) {
		for cookie, c := range t.conns {
			if c.sample+1 < t.samples {
				delete(t.conns, cookie)
			}
		}
	}
	t.sorted = slices.DeleteFunc(t.sorted, func(p *peer) bool {
		gone := now.Sub(p.seen) > peerMemory && p.sample+1 < t.samples
		if gone {
			delete(t.peers, p.Address)
		}
		return gone
	})
}

// reset leaves what grows.
func (c *Counters) reset() {
	*c = Counters{ZeroWindows: c.ZeroWindows, Received: c.Received, Retransmits: c.Retransmits, Drops: c.Drops}
}

func (c *Counters) add(d *Counters) {
	c.Connections += d.Connections
	c.Waiting += d.Waiting
	c.Bytes += d.Bytes
	c.Age = max(c.Age, d.Age)
	c.SRTT = max(c.SRTT, d.SRTT)
	c.ZeroWindows += d.ZeroWindows
	c.Received += d.Received
	c.Retransmits += d.Retransmits
	c.Drops += d.Drops
}
