// Package event is the wire contract from gateway to node: what the plugin
// writes, and a decoder that survives whatever else arrives.
//
// It never allocates in proportion to what a sender claims, only to what it
// sent, and never interprets an exchange. Everything on the path of mirrored
// traffic may import it; it imports nothing of ours.
//
// # Layout
//
// A batch is the body of POST /v1/events, content type application/msgpack
// (https://github.com/msgpack/msgpack/blob/master/spec.md). It is a sequence
// of MessagePack objects without an outer array:
//
//	bin 32 (0xc6) × n   one event each: a map, see Event
//	map                 the batch header, see Header
//
// In version 1 the header comes first; a node reads both. The bin framing gives each event's bounds, so that a bad event never costs
// its neighbours. Every event of a batch was made under the header's policy
// revision.
package event

import "math"

// Version is the contract's version written by this build; a node reads it
// and the one before.
const Version = 2

// Versions are those that Decode reads.
func Versions() []int { return []int{Version - 1, Version} }

// Header is the last object of a batch, the first in version 1. Keys in parentheses.
type Header struct {
	Version   uint64            // (v) contract version
	Gateway   string            // (gateway) the gateway's claim; ingest replaces it with the authenticated identity
	Pod       string            // (pod) the gateway's pod by its own word; empty: it doesn't know
	VM        string            // (vm) random id of the Lua VM; seq and counters are cumulative per VM
	Plugin    string            // (plugin) build of the plugin, "version+digest"
	PolicyRev string            // (policy_rev) policy revision the events were made under
	ShareRev  string            // (share_rev) of load control's shares, see mirror.Shares; empty: there were none
	Seq       uint64            // (seq) 1, 2, 3 … per VM; a gap is lost batches
	SentUS    uint64            // (sent_us) gateway clock, µs since the epoch
	Counters  map[string]uint64 // (counters) see the Counter constants; unknown names are kept

	// Of the batch's policy, cumulative per VM and policy, over revisions. Plugins
	// from before there was a share to compute leave all four out.
	Policy   string // (policy) its id
	Eligible uint64 // (eligible) exchanges that it wants, before sampling
	Priority uint64 // (priority) of those, the ones of an always-class; none while all are mirrored, as then nothing is classified
	Mirrored uint64 // (mirrored) events put into its batches
}

// Weigh has the event stand for so many times as many exchanges, at least 1.
func (e *Event) Weigh(weight float64) {
	if weight > 1 {
		e.SharePPM = max(1, uint64(math.Round(float64(e.SharePPM)/weight)))
	}
}

// Cumulative counters of a VM.
const (
	CounterSeen        = "seen"         // exchanges that reached the plugin
	CounterMirrored    = "mirrored"     // events put into batches
	CounterOff         = "off"          // not mirrored: no policy, or mode Off
	CounterExcluded    = "excluded"     // not mirrored: the policy does not match, or excludes it
	CounterSampled     = "sampled_out"  // not mirrored: sampling
	CounterEvicted     = "evicted"      // copies given up for memory
	CounterUnfinished  = "unfinished"   // sent request-only: no end was seen in time
	CounterCutBytes    = "cut_bytes"    // body bytes beyond the policy's limits
	CounterErrors      = "errors"       // plugin errors caught
	CounterLostBatches = "lost_batches" // batches that could not be handed to Envoy
	CounterLostEvents  = "lost_events"  // events in them
)

// Event is one exchange: a request and, unless FlagNoResponse, its response.
// Keys in parentheses. Byte slices and the strings' bytes alias the decoded
// buffer: whoever keeps an Event keeps the buffer.
type Event struct {
	N         uint64 // (n) number of the exchange within its VM
	Policy    string // (p) policy id, "namespace/name"
	SharePPM  uint64 // (s) probability of the sample in parts per million, 1…1,000,000; the weight is its inverse
	Class     string // (c) the always-class that chose it, or empty; the first key, if it is there
	StartUS   uint64 // (t) request headers seen, µs since the epoch, gateway clock
	HeadersUS uint64 // (th) response headers, µs after StartUS
	EndUS     uint64 // (te) end of the exchange, µs after StartUS
	Source    string // (src) client "ip:port" by Envoy's trusted-hop rules
	Peer      string // (peer) the connection's own remote address, if it differs from Source
	Local     string // (dst) the listener's address
	Protocol  string // (proto) HTTP/1.0, HTTP/1.1, HTTP/2, HTTP/3
	SNI       string // (sni) TLS server name
	TLS       string // (tls) TLS version, empty for plain text
	Route     string // (route) Envoy route name
	// RequestEndUS is the request's last byte, µs after StartUS; 0: not seen.
	RequestEndUS uint64 // (tq)
	// PeerSubject and PeerSANs are of the client's certificate: its subject
	// (RFC 2253), its URI and DNS subject alternative names.
	PeerSubject string   // (tsub)
	PeerSANs    []string // (tsan)
	// ResponseFlags and ResponseDetails are Envoy's own account of an exchange
	// that did not end well, "UF,URX" and "upstream_reset_before_response_started{…}":
	// https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage.
	// Lua does not know them; they come by access log or ext_proc.
	ResponseFlags   string // (rf)
	ResponseDetails string // (rd)
	Flags           Flags  // (f)
	Request         Message
	Response        Message
}

// Message is one direction. Keys with q for requests, r for responses.
type Message struct {
	Headers   []Field // (qh, rh) flat array name, value, …; in order, duplicates kept, pseudo-headers (RFC 9113) first
	Body      []byte  // (qb, rb) up to the policy's limit
	BodyBytes uint64  // (qn, rn) true length
	Trailers  []Field // (qt, rt) like Headers
}

// Field is a header or trailer line.
type Field struct{ Name, Value []byte }

// Flags are facts about the copy.
type Flags uint64

const (
	FlagNoResponse    Flags = 1 << iota // the response was not seen to its headers
	FlagRequestCut                      // request body longer than the copy
	FlagResponseCut                     // response body longer than the copy
	FlagResponseSkip                    // response body not copied by content type; BodyBytes is its Content-Length, if any
	FlagStream                          // sent before the end: upgrade, event stream or gRPC
	FlagHeadersCut                      // header lines beyond the plugin's bound were left out
	FlagMasked                          // something was masked
	FlagRequestOpen                     // the request had not ended when the event was made
	FlagFieldsDropped                   // set by the decoder: header lines beyond Limits.MaxFields were dropped
	FlagResponseOpen                    // the response had begun and not ended when the event was made
	FlagLogOnly                         // made from Envoy's access log alone: nothing else of the exchange is known
)
