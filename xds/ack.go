package xds

import (
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/status"
)

const (
	maxErrorBytes = 1 << 10
	maxInflight   = 4   // responses of one type that wait for a reply
	maxRejected   = 16  // rejected resources kept a type
	maxDelivered  = 256 // resources followed a type; of the others only the type's version is known
)

// TypeState is what a connection was sent of a type and what it said to that.
type TypeState struct {
	Sent     string      `json:"sent,omitempty"`    // version of the last response
	Nonce    string      `json:"nonce,omitempty"`   // of the last response
	SentAt   time.Time   `json:"sentTime,omitzero"` // of the last response
	Acked    string      `json:"acked,omitempty"`   // version that is in force whole
	AckedAt  time.Time   `json:"ackedTime,omitzero"`
	Rejected []Rejection `json:"rejected,omitempty"`
	// LastError is the newest rejection's reason, as long as it stands.
	LastError string `json:"lastError,omitempty"`
	// Watched are the names that the client asked for; none: all there are.
	Watched []string `json:"watched,omitempty"`
}

// Delivery is what a connection was sent last of one resource, and what of that
// it acknowledged last: an Acked without a name is nothing.
//
// What a client that came back says to have already counts as both. Content is
// nil where only the version is known.
type Delivery struct{ Sent, Acked Resource }

// Rejection is a resource in a version that the client refused: the one it had
// before, if any, is in force. It stands until another version is accepted.
type Rejection struct {
	Name    string    `json:"name"`
	Version string    `json:"version"`
	Reason  string    `json:"reason"` // at most 1 KiB
	At      time.Time `json:"time"`
}

// push is a response that was sent.
type push struct {
	nonce     string
	version   string
	at        time.Time
	resources map[string]string // name to version
	removed   []string
	more      bool
	known     []Resource // all that the client knows then, at most maxDelivered
}

// tracker follows the responses of one type on one connection. Replies that
// belong to none of the last few are ignored: a client's first request may
// carry a nonce of its own making.
type tracker struct {
	state    TypeState
	inflight []push
	rejected map[string]Rejection
	// delivered is by name, and shares its content with snapshots. At most
	// maxDelivered.
	delivered []Delivery
	building  push   // the response being made, until it is sent
	logged    string // version whose rejection was logged
}

func (t *tracker) sent(p push) {
	t.state.Sent, t.state.Nonce, t.state.SentAt = p.version, p.nonce, p.at
	if len(t.inflight) == maxInflight {
		t.inflight = slices.Delete(t.inflight, 0, 1)
	}
	t.inflight = append(t.inflight, p)
	delivered := make([]Delivery, 0, len(p.known))
	for _, r := range p.known {
		d := Delivery{Sent: r}
		if before := t.delivery(r.Name); before != nil {
			d.Acked = before.Acked
		}
		if _, now := p.resources[r.Name]; !now && d.Acked.Name == "" {
			d.Acked = r // it said so itself
		}
		delivered = append(delivered, d)
	}
	t.delivered = delivered
}

// delivery finds what is known of a resource; nil: nothing.
func (t *tracker) delivery(name string) *Delivery {
	i, ok := slices.BinarySearchFunc(t.delivered, name, func(d Delivery, name string) int { return strings.Compare(d.Sent.Name, name) })
	if !ok {
		return nil
	}
	return &t.delivered[i]
}

// claimed notes what a client that came back says to have. If nothing is due
// to it, then that is all there is.
func (t *tracker) claimed(set *typeSet, versions map[string]string) {
	names := slices.Sorted(maps.Keys(versions))
	t.delivered = make([]Delivery, 0, min(len(names), maxDelivered))
	for _, name := range names[:min(len(names), maxDelivered)] {
		r, ok := set.byName[name]
		if !ok || r.Version != versions[name] {
			r = Resource{Name: name, Version: clip(versions[name], maxNameBytes)}
		}
		t.delivered = append(t.delivered, Delivery{Sent: r, Acked: r})
	}
}

// upToDate notes that the client lacks nothing.
func (t *tracker) upToDate(set *typeSet) {
	if t.state.Sent == "" && len(t.delivered) > 0 {
		t.state.Sent, t.state.Acked = set.version, set.version
	}
}

// subscribe notes a state-of-the-world subscription, which replaces the last.
func (t *tracker) subscribe(names []string) { t.state.Watched = names }

// resubscribe notes an incremental subscription.
func (t *tracker) resubscribe(add, remove []string) {
	if len(add)+len(remove) == 0 {
		return
	}
	set := make(map[string]struct{}, len(t.state.Watched)+len(add))
	for _, name := range t.state.Watched {
		set[name] = struct{}{}
	}
	for _, name := range add {
		set[name] = struct{}{}
	}
	for _, name := range remove {
		delete(set, name)
	}
	names := slices.Sorted(maps.Keys(set))
	t.state.Watched = names[:min(len(names), maxNames)] // with more the stream ends
}

// known lists what the client knows once it was sent a difference.
func (t *tracker) known(set *typeSet, d difference) []Resource {
	out := make([]Resource, 0, min(len(d.known), maxDelivered))
	for _, name := range set.names {
		version, ok := d.known[name]
		if !ok || version == absent {
			continue
		}
		if len(out) == maxDelivered {
			break
		}
		r := set.byName[name]
		if r.Version != version { // the new one follows
			r = Resource{Name: name, Version: version}
			if d := t.delivery(name); d != nil && d.Sent.Version == version {
				r = d.Sent
			}
		}
		out = append(out, r)
	}
	return out
}

// replied takes a reply; ok tells that it answers a response of ours.
func (t *tracker) replied(nonce string, fault *status.Status, now time.Time) (p push, ok bool) {
	i := slices.IndexFunc(t.inflight, func(p push) bool { return p.nonce == nonce })
	if nonce == "" || i < 0 {
		return push{}, false
	}
	p = t.inflight[i]
	t.inflight = slices.Delete(t.inflight, 0, i+1)
	if fault != nil {
		t.reject(p, clip(fault.GetMessage(), maxErrorBytes), now)
		return p, true
	}
	for name := range p.resources {
		delete(t.rejected, name)
	}
	for _, r := range p.known {
		if _, now := p.resources[r.Name]; now {
			if d := t.delivery(r.Name); d != nil {
				d.Acked = r
			}
		}
	}
	for _, name := range p.removed {
		delete(t.rejected, name)
	}
	t.settle()
	if len(t.rejected) == 0 && !p.more {
		t.state.Acked, t.state.AckedAt = p.version, now
	}
	return p, true
}

// reject notes each resource of p: which of them was at fault is only in the
// client's words.
func (t *tracker) reject(p push, reason string, now time.Time) {
	if t.rejected == nil {
		t.rejected = map[string]Rejection{}
	}
	for _, name := range slices.Sorted(maps.Keys(p.resources)) {
		if _, known := t.rejected[name]; !known && len(t.rejected) >= maxRejected {
			break
		}
		t.rejected[name] = Rejection{Name: name, Version: p.resources[name], Reason: reason, At: now}
	}
	t.settle()
	t.state.LastError = reason
}

// forget drops rejections of resources that exist no more.
func (t *tracker) forget(set *typeSet) {
	for name := range t.rejected {
		if _, ok := set.byName[name]; !ok {
			delete(t.rejected, name)
		}
	}
	t.settle()
}

func (t *tracker) settle() {
	t.state.Rejected = nil
	t.state.LastError = ""
	var newest time.Time
	for _, name := range slices.Sorted(maps.Keys(t.rejected)) {
		r := t.rejected[name]
		t.state.Rejected = append(t.state.Rejected, r)
		if !r.At.Before(newest) {
			newest, t.state.LastError = r.At, r.Reason
		}
	}
}

// clip bounds text from a client: at most n bytes, valid UTF-8.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "")
}
