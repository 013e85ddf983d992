package event

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
	"unsafe"

	"github.com/tinylib/msgp/msgp"
)

// ContentType of a batch.
const ContentType = "application/msgpack"

// Reason says what is wrong with a batch or an event; the closed set of labels
// of every counter of rejected input.
type Reason string

const (
	ReasonTruncated Reason = "truncated"   // ends within an object
	ReasonNotMsgp   Reason = "not_msgpack" // not the format, or not the object expected here
	ReasonVersion   Reason = "version"     // a contract version this build does not read
	ReasonType      Reason = "type"        // a field of the wrong type or out of range
	ReasonMissing   Reason = "missing"     // a required field is not there
	ReasonTooLarge  Reason = "too_large"   // beyond Limits
)

// Error is a fault of a batch or an event.
type Error struct {
	Reason Reason
	Where  string // the field's key, or a part of the layout
	Detail string
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s in %s: %s", e.Reason, e.Where, e.Detail)
}

// Limits bound what Decode accepts. The zero value accepts nothing.
type Limits struct {
	MaxEvents     int // events a batch
	MaxEventBytes int // one event's encoded size
	MaxFields     int // header or trailer lines kept per message; further ones are dropped and flagged
}

// DefaultLimits fit what the plugin writes, with room.
func DefaultLimits() Limits {
	return Limits{MaxEvents: 1024, MaxEventBytes: 4 << 20, MaxFields: 1024}
}

const (
	maxCounters   = 64
	maxName       = 256  // bytes of an identifier of the header
	maxTexts      = 64   // elements of a list of texts
	maxSkipDepth  = 8    // nesting of values under unknown keys
	bin32         = 0xc6 // MessagePack bin 32
	frameOverhead = 5
)

// Batch is a decoded batch. It aliases the buffer it was decoded from.
type Batch struct {
	Header   Header
	Events   []Event
	Rejected []Rejection
	// Discarded are events that were not read, see DecodeSome.
	Discarded int
}

// Rejection is an event that could not be read.
type Rejection struct {
	Index int // position in the batch
	// Rest is set when the bounds of the following events could not be known,
	// so that they are lost with this one.
	Rest bool
	Err  *Error
}

// Decode reads a batch. The error, always an *Error, means that the header is
// unusable and with it everything; a bad event only fills Rejected.
func Decode(buf []byte, limits Limits) (*Batch, error) { return DecodeSome(buf, limits, nil) }

// DecodeSome is Decode without the events of which discard says so: they are
// counted and not read. What it lets pass stands for weight exchanges, by which
// the event's share becomes less. priority tells that the event is of a class that
// sampling spares. nil discards nothing.
func DecodeSome(buf []byte, limits Limits, discard func(priority bool) (discard bool, weight float64)) (*Batch, error) {
	b := &Batch{}
	first, err := skipFrames(buf)
	if err != nil {
		return nil, err
	}
	rest, err := b.Header.decode(buf[first:])
	if err != nil {
		return nil, err
	}
	if first > 0 {
		if len(rest) > 0 {
			return nil, &Error{ReasonNotMsgp, "batch", fmt.Sprintf("%d bytes behind a header that comes last", len(rest))}
		}
		rest = buf[:first]
	}
	for i := 0; len(rest) > 0; i++ {
		if i >= limits.MaxEvents {
			b.reject(i, true, &Error{ReasonTooLarge, "batch", fmt.Sprintf("more than %d events", limits.MaxEvents)})
			break
		}
		frame, after, err := cutFrame(rest)
		if err != nil {
			b.reject(i, true, err)
			break
		}
		rest = after
		weight := 1.0
		if discard != nil {
			var gone bool
			if gone, weight = discard(priority(frame)); gone {
				b.Discarded++
				continue
			}
		}
		if len(frame) > limits.MaxEventBytes {
			b.reject(i, false, &Error{ReasonTooLarge, "event", fmt.Sprintf("%d bytes, the limit is %d", len(frame), limits.MaxEventBytes)})
			continue
		}
		var e Event
		if err := e.decode(frame, limits); err != nil {
			b.reject(i, false, err)
			continue
		}
		e.Weigh(weight)
		b.Events = append(b.Events, e)
	}
	return b, nil
}

// priority tells whether an event's first key is that of its class, where the
// plugin puts it.
func priority(frame []byte) bool {
	n, rest, err := msgp.ReadMapHeaderBytes(frame)
	if err != nil || n == 0 {
		return false
	}
	const fixstr = 0xa0
	return len(rest) > 2 && rest[0] == fixstr+1 && rest[1] == 'c' && rest[2] != fixstr
}

func (b *Batch) reject(i int, rest bool, err *Error) {
	b.Rejected = append(b.Rejected, Rejection{Index: i, Rest: rest, Err: err})
}

// skipFrames gives the place of the header, which is first or last.
func skipFrames(b []byte) (int, error) {
	rest := b
	for len(rest) > 0 && rest[0] == bin32 {
		_, after, err := cutFrame(rest)
		if err != nil {
			return 0, err
		}
		rest = after
	}
	return len(b) - len(rest), nil
}

// cutFrame takes one bin 32 object off b.
func cutFrame(b []byte) (frame, rest []byte, err *Error) {
	if b[0] != bin32 {
		return nil, nil, &Error{ReasonNotMsgp, "frame", fmt.Sprintf("want bin 32 (0xc6), got 0x%02x", b[0])}
	}
	if len(b) < frameOverhead {
		return nil, nil, &Error{ReasonTruncated, "frame", "ends within its length"}
	}
	n := uint64(b[1])<<24 | uint64(b[2])<<16 | uint64(b[3])<<8 | uint64(b[4])
	if n > uint64(len(b)-frameOverhead) {
		return nil, nil, &Error{ReasonTruncated, "frame", fmt.Sprintf("says %d bytes, %d are left", n, len(b)-frameOverhead)}
	}
	end := frameOverhead + int(n)
	return b[frameOverhead:end:end], b[end:], nil
}

func (h *Header) decode(b []byte) ([]byte, error) {
	seen := false
	r := reader{b: b, where: "header"}
	for range r.mapLen() {
		switch key := r.key(); key {
		case "v":
			h.Version, seen = r.uint(key), true
			if r.err == nil && !slices.Contains(Versions(), int(h.Version)) {
				// Whatever else an unknown version holds is not looked at.
				return nil, &Error{ReasonVersion, "v", fmt.Sprintf("version %d, this node reads %v", h.Version, Versions())}
			}
		case "gateway":
			h.Gateway = r.word(key)
		case "pod":
			h.Pod = r.word(key)
		case "vm":
			h.VM = r.word(key)
		case "plugin":
			h.Plugin = r.word(key)
		case "policy_rev":
			h.PolicyRev = r.word(key)
		case "share_rev":
			h.ShareRev = r.word(key)
		case "seq":
			h.Seq = r.uint(key)
		case "sent_us":
			h.SentUS = r.uint(key)
		case "counters":
			h.Counters = r.counters()
		case "policy":
			h.Policy = r.word(key)
		case "eligible":
			h.Eligible = r.uint(key)
		case "priority":
			h.Priority = r.uint(key)
		case "mirrored":
			h.Mirrored = r.uint(key)
		default:
			r.skip(0)
		}
		if r.err != nil {
			return nil, r.err
		}
	}
	switch {
	case r.err != nil:
		return nil, r.err
	case !seen:
		return nil, &Error{ReasonMissing, "v", "the header names no version"}
	case h.VM == "":
		return nil, &Error{ReasonMissing, "vm", "the header names no VM"}
	}
	return r.b, nil
}

func (e *Event) decode(b []byte, limits Limits) *Error {
	r := reader{b: b, where: "event", maxFields: limits.MaxFields}
	for range r.mapLen() {
		switch key := r.key(); key {
		case "n":
			e.N = r.uint(key)
		case "p":
			e.Policy = r.name(key)
		case "s":
			e.SharePPM = r.uint(key)
		case "c":
			e.Class = r.name(key)
		case "t":
			e.StartUS = r.uint(key)
		case "th":
			e.HeadersUS = r.uint(key)
		case "te":
			e.EndUS = r.uint(key)
		case "src":
			e.Source = r.name(key)
		case "peer":
			e.Peer = r.name(key)
		case "dst":
			e.Local = r.name(key)
		case "proto":
			e.Protocol = r.name(key)
		case "sni":
			e.SNI = r.name(key)
		case "tls":
			e.TLS = r.name(key)
		case "route":
			e.Route = r.text(key)
		case "tq":
			e.RequestEndUS = r.uint(key)
		case "tsub":
			e.PeerSubject = r.text(key)
		case "tsan":
			e.PeerSANs = r.texts(key)
		case "rf":
			e.ResponseFlags = r.name(key)
		case "rd":
			e.ResponseDetails = r.text(key)
		case "f":
			e.Flags |= Flags(r.uint(key)) &^ FlagFieldsDropped
		case "qh":
			e.Request.Headers = r.fields(key, &e.Flags)
		case "qb":
			e.Request.Body = r.bytes(key)
		case "qn":
			e.Request.BodyBytes = r.uint(key)
		case "qt":
			e.Request.Trailers = r.fields(key, &e.Flags)
		case "rh":
			e.Response.Headers = r.fields(key, &e.Flags)
		case "rb":
			e.Response.Body = r.bytes(key)
		case "rn":
			e.Response.BodyBytes = r.uint(key)
		case "rt":
			e.Response.Trailers = r.fields(key, &e.Flags)
		default:
			r.skip(0)
		}
		if r.err != nil {
			return r.err
		}
	}
	switch {
	case r.err != nil:
		return r.err
	case len(r.b) > 0:
		return &Error{ReasonNotMsgp, "event", fmt.Sprintf("%d bytes behind its map", len(r.b))}
	case len(e.Request.Headers) == 0:
		return &Error{ReasonMissing, "qh", "an event without request headers"}
	case e.SharePPM < 1 || e.SharePPM > 1e6:
		return &Error{ReasonType, "s", fmt.Sprintf("sampling probability %d ppm is not from 1 to 1000000", e.SharePPM)}
	}
	return nil
}

// reader takes objects off b and remembers the first fault.
type reader struct {
	b         []byte
	where     string
	maxFields int
	err       *Error
}

func (r *reader) fail(key string, err error) {
	if r.err != nil || err == nil {
		return
	}
	reason := ReasonNotMsgp
	var te msgp.TypeError
	var over msgp.UintOverflow
	var below msgp.UintBelowZero
	switch {
	case errors.Is(err, msgp.ErrShortBytes):
		reason = ReasonTruncated
	case errors.As(err, &te), errors.As(err, &over), errors.As(err, &below):
		reason = ReasonType
	}
	r.err = &Error{reason, strings.Clone(key), err.Error()}
}

func (r *reader) mapLen() uint32 {
	n, rest, err := msgp.ReadMapHeaderBytes(r.b)
	if err != nil {
		reason := ReasonNotMsgp
		if errors.Is(err, msgp.ErrShortBytes) {
			reason = ReasonTruncated
		}
		r.err = &Error{reason, r.where, "want a map: " + err.Error()}
		return 0
	}
	r.b = rest
	return n
}

// raw reads a str or a bin; the contract treats both as bytes.
func (r *reader) raw(key string) []byte {
	var v, rest []byte
	var err error
	if msgp.NextType(r.b) == msgp.BinType {
		v, rest, err = msgp.ReadBytesZC(r.b)
	} else {
		v, rest, err = msgp.ReadStringZC(r.b)
	}
	if err != nil {
		r.fail(key, err)
		return nil
	}
	r.b = rest
	return v
}

func (r *reader) bytes(key string) []byte { return r.raw(key) }
func (r *reader) text(key string) string  { return alias(r.raw(key)) }
func alias(b []byte) string               { return unsafe.String(unsafe.SliceData(b), len(b)) }

// key reads a map's key. It aliases the buffer: a fault clones it.
func (r *reader) key() string { return alias(r.raw(r.where)) }

// name reads an identifier, which is short.
func (r *reader) name(key string) string {
	v := r.raw(key)
	if len(v) > maxName && r.err == nil {
		r.err = &Error{ReasonTooLarge, strings.Clone(key), fmt.Sprintf("%d bytes, the limit is %d", len(v), maxName)}
		return ""
	}
	return alias(v)
}

// word reads an identifier of the gateway's own making: nobody else's bytes are
// in it, so it is UTF-8.
func (r *reader) word(key string) string {
	v := r.name(key)
	if !utf8.ValidString(v) && r.err == nil {
		r.err = &Error{ReasonType, strings.Clone(key), "it is not UTF-8"}
		return ""
	}
	return v
}

func (r *reader) uint(key string) uint64 {
	v, rest, err := msgp.ReadUint64Bytes(r.b)
	if err != nil {
		r.fail(key, err)
		return 0
	}
	r.b = rest
	return v
}

// texts reads an array of texts.
func (r *reader) texts(key string) []string {
	n, rest, err := msgp.ReadArrayHeaderBytes(r.b)
	if err != nil {
		r.fail(key, err)
		return nil
	}
	r.b = rest
	if n > maxTexts {
		r.err = &Error{ReasonTooLarge, strings.Clone(key), fmt.Sprintf("%d elements, the limit is %d", n, maxTexts)}
		return nil
	}
	var out []string
	for range n {
		out = append(out, r.text(key))
		if r.err != nil {
			return nil
		}
	}
	return out
}

// fields reads a flat array name, value, …
func (r *reader) fields(key string, flags *Flags) []Field {
	n, rest, err := msgp.ReadArrayHeaderBytes(r.b)
	if err != nil {
		r.fail(key, err)
		return nil
	}
	r.b = rest
	if n%2 != 0 {
		r.err = &Error{ReasonType, strings.Clone(key), fmt.Sprintf("%d elements, not pairs", n)}
		return nil
	}
	// The claim n is bounded by what is really there: two bytes a pair at least.
	pairs := min(int(n/2), len(r.b)/2, r.maxFields)
	out := make([]Field, 0, pairs)
	for i := range n / 2 {
		f := Field{Name: r.raw(key), Value: r.raw(key)}
		if r.err != nil {
			return nil
		}
		if int(i) < r.maxFields {
			out = append(out, f)
		} else {
			*flags |= FlagFieldsDropped
		}
	}
	return out
}

func (r *reader) counters() map[string]uint64 {
	n, rest, err := msgp.ReadMapHeaderBytes(r.b)
	if err != nil {
		r.fail("counters", err)
		return nil
	}
	if n > maxCounters {
		r.err = &Error{ReasonTooLarge, "counters", fmt.Sprintf("%d entries, the limit is %d", n, maxCounters)}
		return nil
	}
	r.b = rest
	out := make(map[string]uint64, n)
	for range n {
		k := r.name("counters")
		out[k] = r.uint("counters")
		if r.err != nil {
			return nil
		}
	}
	return out
}

// skip passes over the value of an unknown key, so that a later version may
// add keys; nesting is bounded.
func (r *reader) skip(depth int) {
	if r.err != nil {
		return
	}
	if depth > maxSkipDepth {
		r.err = &Error{ReasonTooLarge, "unknown key", fmt.Sprintf("nested deeper than %d", maxSkipDepth)}
		return
	}
	var n uint64
	var rest []byte
	var err error
	switch msgp.NextType(r.b) {
	case msgp.MapType:
		var m uint32
		m, rest, err = msgp.ReadMapHeaderBytes(r.b)
		n = 2 * uint64(m)
	case msgp.ArrayType:
		var a uint32
		a, rest, err = msgp.ReadArrayHeaderBytes(r.b)
		n = uint64(a)
	default:
		rest, err = msgp.Skip(r.b)
	}
	if err != nil {
		r.fail("unknown key", err)
		return
	}
	r.b = rest
	for ; n > 0 && r.err == nil; n-- {
		r.skip(depth + 1)
	}
}
