package event

import "github.com/tinylib/msgp/msgp"

// AppendHeader appends a batch's header to b, as the plugin writes it.
func AppendHeader(b []byte, h *Header) []byte {
	b = msgp.AppendMapHeader(b, 14)
	b = msgp.AppendUint64(msgp.AppendString(b, "v"), h.Version)
	b = appendText(b, "gateway", h.Gateway)
	b = appendText(b, "pod", h.Pod)
	b = appendText(b, "vm", h.VM)
	b = appendText(b, "plugin", h.Plugin)
	b = appendText(b, "policy_rev", h.PolicyRev)
	b = appendText(b, "share_rev", h.ShareRev)
	b = msgp.AppendUint64(msgp.AppendString(b, "seq"), h.Seq)
	b = msgp.AppendUint64(msgp.AppendString(b, "sent_us"), h.SentUS)
	b = appendText(b, "policy", h.Policy)
	b = appendNumber(b, "eligible", h.Eligible)
	b = appendNumber(b, "priority", h.Priority)
	b = appendNumber(b, "mirrored", h.Mirrored)
	b = msgp.AppendMapHeader(msgp.AppendString(b, "counters"), uint32(len(h.Counters)))
	for k, v := range h.Counters {
		b = msgp.AppendUint64(msgp.AppendString(b, k), v)
	}
	return b
}

// Append appends one framed event to b: for tools and tests that stand in for
// a gateway.
func Append(b []byte, e *Event) []byte {
	start := len(b)
	b = append(b, bin32, 0, 0, 0, 0)
	b = msgp.AppendMapHeader(b, 28)
	b = appendText(b, "c", e.Class) // first, see priority
	b = appendNumber(b, "n", e.N)
	b = appendText(b, "p", e.Policy)
	b = appendNumber(b, "s", e.SharePPM)
	b = appendNumber(b, "t", e.StartUS)
	b = appendNumber(b, "th", e.HeadersUS)
	b = appendNumber(b, "te", e.EndUS)
	b = appendText(b, "src", e.Source)
	b = appendText(b, "peer", e.Peer)
	b = appendText(b, "dst", e.Local)
	b = appendText(b, "proto", e.Protocol)
	b = appendText(b, "sni", e.SNI)
	b = appendText(b, "tls", e.TLS)
	b = appendText(b, "route", e.Route)
	b = appendNumber(b, "tq", e.RequestEndUS)
	b = appendText(b, "tsub", e.PeerSubject)
	b = msgp.AppendArrayHeader(msgp.AppendString(b, "tsan"), uint32(len(e.PeerSANs)))
	for _, n := range e.PeerSANs {
		b = msgp.AppendString(b, n)
	}
	b = appendText(b, "rf", e.ResponseFlags)
	b = appendText(b, "rd", e.ResponseDetails)
	b = appendNumber(b, "f", uint64(e.Flags))
	b = appendMessage(b, "q", &e.Request)
	b = appendMessage(b, "r", &e.Response)
	n := len(b) - start - frameOverhead
	b[start+1], b[start+2], b[start+3], b[start+4] = byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
	return b
}

func appendText(b []byte, key, v string) []byte {
	return msgp.AppendString(msgp.AppendString(b, key), v)
}

func appendNumber(b []byte, key string, v uint64) []byte {
	return msgp.AppendUint64(msgp.AppendString(b, key), v)
}

func appendMessage(b []byte, prefix string, m *Message) []byte {
	b = appendFields(b, prefix+"h", m.Headers)
	b = msgp.AppendBytes(msgp.AppendString(b, prefix+"b"), m.Body)
	b = appendNumber(b, prefix+"n", m.BodyBytes)
	return appendFields(b, prefix+"t", m.Trailers)
}

func appendFields(b []byte, key string, fields []Field) []byte {
	b = msgp.AppendArrayHeader(msgp.AppendString(b, key), uint32(2*len(fields)))
	for _, f := range fields {
		b = msgp.AppendStringFromBytes(b, f.Name)
		b = msgp.AppendStringFromBytes(b, f.Value)
	}
	return b
}
