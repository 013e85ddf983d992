package sockstat

import (
	"net/netip"
	"strings"
	"time"
)

// Snapshot is what the kernel counts at one time for the listener and for what
// it accepted. What Known leaves out is unknown, and zero only for that reason.
//
// Counters grow from the first sample on. What a connection counts between its
// last sample and its end is lost.
type Snapshot struct {
	Backend  string
	Time     time.Time
	Interval time.Duration // since the sample before; ages may be too low by this much; 0: the first one
	Known    Fields

	Listener Listener
	Total    Counters
	Peers    []Peer // by address; those without a connection stay for a minute

	// Multipath counts connections by Multipath TCP, whose bytes wait where this
	// back end cannot see them: neither Bytes nor Age know of them.
	Multipath int
}

// Listener is the state of the listening socket, or of several with one address.
type Listener struct {
	Sockets    int
	Backlog    int // connections that wait to be accepted
	BacklogMax int
	Drops      uint64 // connections dropped, for want of room mostly
}

// Counters sums up connections.
type Counters struct {
	Connections int           // established, or closed by the peer with bytes left to read
	Waiting     int           // of those, the ones with bytes received and not yet read
	Bytes       int64         // received, not yet read
	Age         time.Duration // how long the oldest of these have waited
	SRTT        time.Duration // the longest smoothed round trip
	ZeroWindows uint64        // times that a full socket stopped its peer, as far as samples saw
	Received    uint64        // bytes
	Retransmits uint64        // segments sent again
	Drops       uint64        // segments dropped, for want of room mostly
}

// Peer sums up the connections of one gateway.
type Peer struct {
	Address netip.Addr // the zero Addr: all beyond the 4096th
	Counters
}

// Fields are groups of a Snapshot's fields.
type Fields uint8

const (
	Listening Fields = 1 << iota // Snapshot.Listener
	Connected                    // all Counters but ZeroWindows
	Windows                      // Counters.ZeroWindows
)

// Has tells whether all of o are known.
func (f Fields) Has(o Fields) bool { return f&o == o }

// String names the fields: "listener, connections".
func (f Fields) String() string {
	var names []string
	for _, n := range []struct {
		field Fields
		name  string
	}{{Listening, "listener"}, {Connected, "connections"}, {Windows, "zero windows"}} {
		if f.Has(n.field) {
			names = append(names, n.name)
		}
	}
	if names == nil {
		return "nothing"
	}
	return strings.Join(names, ", ")
}
