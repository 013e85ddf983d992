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
	maxInflight   = 4  // responses of one type that wait for a reply
	maxRejected   = 16 // rejected resources kept a type
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
}

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
}

// tracker follows the responses of one type on one connection. Replies that
// belong to none of the last few are ignored: a client's first request may
// carry a nonce of its own making.
type tracker struct {
	state    TypeState
	inflight []push
	rejected map[string]Rejection
	building push   // the response being made, until it is sent
	logged   string // version whose rejection was logged
}

func (t *tracker) sent(p push) {
	t.state.Sent, t.state.Nonce, t.state.SentAt = p.version, p.nonce, p.at
	if len(t.inflight) == maxInflight {
		t.inflight = slices.Delete(t.inflight, 0, 1)
	}
	t.inflight = append(t.inflight, p)
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
