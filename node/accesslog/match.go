package accesslog

import (
	"hash/maphash"
	"strconv"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// trace is what an event and a log entry both tell of an exchange.
type trace struct {
	from, to uint64 // ms of the gateway's clock
	status   uint16 // 0: none
}

// ofEntry is from an exchange's first byte to its end, which Envoy rounds down.
func ofEntry(e *event.LogEntry) trace {
	return trace{e.StartUS / 1000, (e.StartUS+e.EndUS)/1000 + 1, statusOf(&e.Event)}
}

// ofEvent is from the end of the request's header to the last that the plugin
// saw. Where that is no end, EndUS is when it gave up.
func ofEvent(e *event.Event) trace {
	t := trace{e.StartUS / 1000, e.StartUS / 1000, statusOf(e)}
	if e.Flags&(event.FlagNoResponse|event.FlagResponseOpen) == 0 {
		t.to += e.EndUS / 1000
	}
	return t
}

// fits tells whether an event may be of the exchange of an entry.
func (t trace) fits(entry trace) bool {
	return entry.from <= t.from && t.to <= entry.to && (t.status == 0 || t.status == entry.status)
}

func statusOf(e *event.Event) uint16 {
	for _, f := range e.Response.Headers {
		if string(f.Name) == ":status" {
			n, _ := strconv.ParseUint(string(f.Value), 10, 16)
			return uint16(n)
		}
	}
	return 0
}

// key is of an exchange with an id, or else of its connection, on which events
// and entries must fit.
func (l *Log) key(gateway string, id uint64, e *event.Event) uint64 {
	k := struct {
		gateway     string
		id          uint64
		peer, local string
	}{gateway: gateway, id: id}
	if id == 0 {
		k.peer, k.local = e.Connection(), e.Local
	}
	return maphash.Comparable(l.seed, k)
}

// entryOf takes the entry of an event: of several that it fits the first, as a
// connection's events come in order. That is its own wherever all exchanges of
// the ms, by the plugin's clock, are copied and flagged.
func (l *Log) entryOf(key, id uint64, t trace) (end, bool) {
	return l.waiting.take(key, func(e end) (uint64, bool) { return e.start, id > 0 || t.fits(e.trace) })
}

// eventOf takes the event of an entry from those that went, the first that fits.
func (l *Log) eventOf(key, id uint64, e end) bool {
	_, ok := l.recent.take(key, func(t trace) (uint64, bool) { return t.from, id > 0 || t.fits(e.trace) })
	return ok
}
