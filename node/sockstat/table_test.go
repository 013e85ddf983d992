package sockstat

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var (
	listen = netip.MustParseAddrPort("198.51.100.10:5050")
	start  = time.Unix(1e9, 0)
)

const poll = 10 * time.Millisecond

func connection(cookie uint64, peer string, received uint64, queue uint32) record {
	return record{Cookie: cookie, State: established, Local: words(listen.Addr()), LocalPort: listen.Port(), Netns: 1,
		Peer: words(netip.MustParseAddr(peer)), Received: received, Queue: queue, Window: 65535}
}

// One connection, one sample each 10 ms: what is received and unread by then,
// and how old the oldest unread byte must look.
func TestAge(t *testing.T) {
	type step struct {
		received uint64
		queue    uint32
		age      time.Duration
	}
	const ms = time.Millisecond
	for name, steps := range map[string][]step{
		"idle":            {{0, 0, 0}, {0, 0, 0}, {0, 0, 0}},
		"read at once":    {{100, 0, 0}, {200, 0, 0}, {900, 0, 0}},
		"stalled":         {{0, 0, 0}, {100, 100, 0}, {100, 100, 10 * ms}, {100, 100, 20 * ms}},
		"more comes":      {{0, 0, 0}, {100, 100, 0}, {500, 500, 10 * ms}, {900, 900, 20 * ms}},
		"resumed":         {{0, 0, 0}, {100, 100, 0}, {100, 100, 10 * ms}, {100, 0, 0}, {300, 200, 0}, {300, 200, 10 * ms}},
		"keeps pace":      {{100, 50, 0}, {200, 50, 0}, {300, 50, 0}, {400, 50, 0}},
		"falls behind":    {{100, 50, 0}, {150, 70, 10 * ms}, {200, 80, 0}, {300, 150, 10 * ms}, {400, 210, 20 * ms}},
		"read in part":    {{100, 100, 0}, {100, 60, 10 * ms}, {100, 1, 20 * ms}, {100, 0, 0}},
		"a byte a second": {{1, 1, 0}, {2, 2, 10 * ms}, {3, 3, 20 * ms}},
		"beyond 4 GiB":    {{1<<33 - 50, 50, 0}, {1<<33 + 50, 150, 10 * ms}, {1<<33 + 50, 50, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			tab := newTable(listen, 1)
			for i, s := range steps {
				got := tab.fold(start.Add(time.Duration(i)*poll), []record{connection(1, "192.0.2.1", s.received, s.queue)}).Total.Age
				if got != s.age {
					t.Errorf("sample %d: age %v, want %v", i, got, s.age)
				}
			}
		})
	}
}

// The peer's FIN counts as a byte to the kernel, and is none to read.
func TestCloseWait(t *testing.T) {
	tab := newTable(listen, 1)
	r := connection(1, "192.0.2.1", 101, 1)
	r.State = closeWait
	tab.fold(start, []record{r})
	if got := tab.fold(start.Add(poll), []record{r}).Total; got.Bytes != 0 || got.Age != 0 || got.Received != 0 || got.Connections != 1 {
		t.Errorf("with nothing but a FIN: %+v", got)
	}
	r.Received, r.Queue = 141, 41
	tab.fold(start.Add(2*poll), []record{r})
	if got := tab.fold(start.Add(3*poll), []record{r}).Total; got.Bytes != 40 || got.Age != poll || got.Received != 40 {
		t.Errorf("with 40 bytes before it: %+v", got)
	}
}

// What is not the listener's is left out, and what comes twice counts once.
func TestOurs(t *testing.T) {
	mine := connection(1, "192.0.2.1", 10, 10)
	port, local, netns := mine, mine, mine
	port.Cookie, port.LocalPort = 2, 5051
	local.Cookie, local.Local = 3, words(netip.MustParseAddr("198.51.100.11"))
	netns.Cookie, netns.Netns = 4, 2
	all := []record{port, mine, local, mine, netns}
	if got := newTable(listen, 1).fold(start, all).Total; got.Connections != 1 || got.Bytes != 10 {
		t.Errorf("one connection of the listener's: %+v", got)
	}
	wildcard := netip.AddrPortFrom(netip.IPv6Unspecified(), listen.Port())
	if got := newTable(wildcard, 1).fold(start, all).Total; got.Connections != 2 {
		t.Errorf("two of a listener on every address: %+v", got)
	}
}

// Sums by peer and over all; counters start at the first sample and never fall.
func TestCounters(t *testing.T) {
	tab := newTable(listen, 1)
	l := record{Cookie: 9, State: listening, Local: words(listen.Addr()), LocalPort: listen.Port(), Netns: 1, Queue: 3, Limit: 128, Drops: 7}
	a, b, c := connection(1, "192.0.2.1", 1000, 0), connection(2, "192.0.2.2", 500, 20), connection(3, "192.0.2.1", 10, 10)
	a.Retransmits, b.Drops, b.SrttUs = 2, 5, 8*1500
	s := tab.fold(start, []record{l, a, b})
	want := Snapshot{Time: start, Listener: Listener{Sockets: 1, Backlog: 3, BacklogMax: 128},
		Total: Counters{Connections: 2, Waiting: 1, Bytes: 20, SRTT: 1500 * time.Microsecond},
		Peers: []Peer{
			{Address: netip.MustParseAddr("192.0.2.1"), Counters: Counters{Connections: 1}},
			{Address: netip.MustParseAddr("192.0.2.2"), Counters: Counters{Connections: 1, Waiting: 1, Bytes: 20, SRTT: 1500 * time.Microsecond}},
		}}
	equal := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if d := cmp.Diff(want, s, equal); d != "" {
		t.Errorf("first sample (-want +got)\n%s", d)
	}

	l.Drops, l.Queue = 8, 0
	a.Received, a.Retransmits, b.Drops, b.Window = 1100, 4, 6, 0
	s = tab.fold(start.Add(poll), []record{c, l, a, b})
	want = Snapshot{Time: start.Add(poll), Interval: poll, Listener: Listener{Sockets: 1, BacklogMax: 128, Drops: 1},
		Total: Counters{Connections: 3, Waiting: 2, Bytes: 30, Age: poll, SRTT: 1500 * time.Microsecond, ZeroWindows: 1, Received: 110, Retransmits: 2, Drops: 1},
		Peers: []Peer{
			{Address: netip.MustParseAddr("192.0.2.1"), Counters: Counters{Connections: 2, Waiting: 1, Bytes: 10, Received: 110, Retransmits: 2}},
			{Address: netip.MustParseAddr("192.0.2.2"), Counters: Counters{Connections: 1, Waiting: 1, Bytes: 20, Age: poll, SRTT: 1500 * time.Microsecond, ZeroWindows: 1, Drops: 1}},
		}}
	if d := cmp.Diff(want, s, equal); d != "" {
		t.Errorf("second sample (-want +got)\n%s", d)
	}

	s = tab.grown(start.Add(2 * poll))
	want = Snapshot{Backend: None, Time: start.Add(2 * poll), Listener: Listener{Drops: 1}, Total: Counters{ZeroWindows: 1, Received: 110, Retransmits: 2, Drops: 1},
		Peers: []Peer{
			{Address: netip.MustParseAddr("192.0.2.1"), Counters: Counters{Received: 110, Retransmits: 2}},
			{Address: netip.MustParseAddr("192.0.2.2"), Counters: Counters{ZeroWindows: 1, Drops: 1}},
		}}
	if d := cmp.Diff(want, s, equal); d != "" {
		t.Errorf("with nobody to read (-want +got)\n%s", d)
	}

	s = tab.fold(start.Add(2*poll), nil)
	if s.Total.Received != 110 || s.Total.Connections != 0 || len(s.Peers) != 2 {
		t.Errorf("without connections: %+v", s)
	}
	tab.fold(start.Add(2*time.Minute), nil)
	s = tab.fold(start.Add(2*time.Minute), nil)
	if s.Total.Received != 110 || len(s.Peers) != 0 || len(tab.conns) != 0 || len(tab.peers) != 0 {
		t.Errorf("two minutes later: %+v, %d sockets remembered", s, len(tab.conns))
	}
}

// An iterator may skip a socket once, and its order may change.
func TestOrder(t *testing.T) {
	tab := newTable(listen, 1)
	var all []record
	for i := range uint64(50) {
		all = append(all, connection(i, "192.0.2.1", 100, 100))
	}
	tab.fold(start, all)
	for i := 1; i < 50; i++ {
		all = append(all[1:], all[0])
		s := tab.fold(start.Add(time.Duration(i)*poll), all[:49])
		if s.Total.Age != time.Duration(i)*poll || s.Total.Connections != 49 || s.Total.Received != 0 {
			t.Fatalf("sample %d: %+v", i, s.Total)
		}
	}
}

// A socket that the first sample after a long pause skips keeps its peer.
func TestPause(t *testing.T) {
	tab := newTable(listen, 1)
	r := []record{connection(1, "192.0.2.1", 5, 5)}
	tab.fold(start, r)
	tab.fold(start.Add(time.Hour), nil)
	if s := tab.fold(start.Add(time.Hour+poll), r); len(s.Peers) != 1 || s.Total.Connections != 1 || s.Total.Age != time.Hour+poll {
		t.Errorf("%+v", s)
	}
}

func TestPeersBounded(t *testing.T) {
	tab := newTable(listen, 1)
	var all []record
	for i := range maxPeers + 10 {
		r := connection(uint64(i), "::", 0, 0)
		r.Peer[3] = uint32(i) + 2
		all = append(all, r)
	}
	s := tab.fold(start, all)
	if len(s.Peers) != maxPeers+1 || s.Total.Connections != maxPeers+10 || s.Peers[0].Address.IsValid() || s.Peers[0].Connections != 10 {
		t.Errorf("%d peers, %d connections, first %+v", len(s.Peers), s.Total.Connections, s.Peers[0])
	}
}
