package event

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// LogPath is the gRPC method that takes Envoy's OpenTelemetry access log.
const LogPath = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"

// LogGateway is the resource attribute that claims the gateway: one of Envoy's
// own labels, its cluster's name.
const LogGateway = "cluster_name"

// LogField is a field of a log entry: its key, and Envoy's format of the value
// (https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage).
type LogField struct{ Key, Format string }

// Bounds of a log entry's texts; in the format, so that Envoy cuts them.
const (
	maxLogPath   = 8192
	maxLogHeader = 1024
	maxLogText   = 256
	maxLogFields = 64 // of an entry; further ones are not looked at
)

// always are of every entry: keys like an Event's. te is in milliseconds.
func always() []LogField {
	return []LogField{{"rf", "%RESPONSE_FLAGS%"}, {"rd", "%RESPONSE_CODE_DETAILS%"}, {":status", "%RESPONSE_CODE%"}, {"te", "%DURATION%"},
		{"peer", "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"}, {"dst", "%DOWNSTREAM_LOCAL_ADDRESS%"}, {"proto", "%PROTOCOL%"}}
}

// CopiedLog is how an exchange ended that the plugin may have copied. What names
// it is Event.LogID, or the connection and the time. Nothing is in it that a
// policy masks.
func CopiedLog() []LogField {
	return append(always(), LogField{"copied", "1"}, LogField{"n", "%DYNAMIC_METADATA(periscope:n)%"})
}

// LogID is the plugin's name of an exchange in the access log, its own among the
// VMs of a gateway; 0 if the exchange goes by connection.
func (e *Event) LogID(vm string) uint64 {
	if e.ByConnection() {
		return 0
	}
	first, _ := strconv.ParseUint(vm[:min(len(vm), 5)], 16, 64) // of 20 bits: a Lua number is exact up to 53
	return first<<32 + e.N
}

// ByConnection tells whether the plugin finds an exchange by its connection, and
// gives the log no name of it: HTTP/1 has one at a time on each.
func (e *Event) ByConnection() bool {
	if e.Protocol != "HTTP/1.1" && e.Protocol != "HTTP/1.0" {
		return false
	}
	peer := e.Connection()
	port := strings.TrimRight(peer, "0123456789")
	return len(port) < len(peer) && strings.HasSuffix(port, ":")
}

// Connection is the remote address of an exchange's connection.
func (e *Event) Connection() string { return cmp.Or(e.Peer, e.Source) }

// UnseenLog is an exchange that ended before the plugin saw it. Header lines are
// under their own names. What the codec refuses has none, and no path.
func UnseenLog() []LogField {
	out := append(always(), LogField{"src", "%DOWNSTREAM_REMOTE_ADDRESS%"},
		LogField{"sni", "%REQUESTED_SERVER_NAME%"}, LogField{"tls", "%DOWNSTREAM_TLS_VERSION%"},
		LogField{"tsub", "%DOWNSTREAM_PEER_SUBJECT%"}, LogField{"tsan", "%DOWNSTREAM_PEER_URI_SAN%"}, LogField{"tdns", "%DOWNSTREAM_PEER_DNS_SAN%"},
		LogField{"qn", "%BYTES_RECEIVED%"}, LogField{"rn", "%BYTES_SENT%"})
	for _, name := range []string{":method", ":scheme", ":authority", ":path", "user-agent", "referer", "x-forwarded-for", "x-request-id",
		"content-type", "content-length", "upgrade"} {
		size := maxLogHeader
		if name == ":path" {
			size = maxLogPath
		}
		out = append(out, LogField{name, fmt.Sprintf("%%REQ(%s):%d%%", strings.ToUpper(name), size)})
	}
	return out
}

// LogEntry is one entry of a gateway's log.
type LogEntry struct {
	Copied bool   // it adds to another event, the plugin's; or Event is all there is
	ID     uint64 // that event's LogID
	Event
}

// Log is one call's worth of entries. It aliases the buffer that it was decoded
// from.
type Log struct {
	Gateway  string // the gateway's claim
	Entries  []LogEntry
	Rejected []*Error // entries that could not be read
}

// DecodeLog reads the message of a call of LogPath, an ExportLogsServiceRequest
// (https://github.com/open-telemetry/opentelemetry-proto), as far as Envoy writes
// it. Texts may be any bytes, which is why it does not use the generated code.
// The error means that nothing could be read of it.
func DecodeLog(buf []byte, limits Limits) (*Log, error) {
	l := &Log{}
	if !each(buf, func(num protowire.Number, resource []byte) bool {
		return num != 1 || l.resource(resource, limits)
	}) {
		return nil, &Error{ReasonTruncated, "log", "it is no ExportLogsServiceRequest"}
	}
	if len(l.Entries)+len(l.Rejected) > limits.MaxEvents {
		return nil, &Error{ReasonTooLarge, "log", fmt.Sprintf("more than %d entries", limits.MaxEvents)}
	}
	return l, nil
}

// resource reads a ResourceLogs: 1 is its Resource, 2 are ScopeLogs.
func (l *Log) resource(b []byte, limits Limits) bool {
	return each(b, func(num protowire.Number, v []byte) bool {
		switch num {
		case 1:
			return each(v, func(num protowire.Number, v []byte) bool {
				if num != 1 {
					return true
				}
				key, value, ok := attribute(v)
				if ok && string(key) == LogGateway && len(value) <= maxName {
					l.Gateway = alias(value)
				}
				return ok
			})
		case 2:
			return each(v, func(num protowire.Number, record []byte) bool {
				if num == 2 && len(l.Entries)+len(l.Rejected) <= limits.MaxEvents {
					l.record(record)
				}
				return true
			})
		}
		return true
	})
}

// record reads a LogRecord: 1 is the exchange's start, 6 are its fields.
func (l *Log) record(b []byte) {
	var e LogEntry
	fields := 0
	var fault *Error
	ok := each(b, func(num protowire.Number, v []byte) bool {
		if num == 1 && len(v) == 8 {
			e.StartUS = binary.LittleEndian.Uint64(v) / 1000 // ns
		}
		if num != 6 || fields == maxLogFields || fault != nil {
			return true
		}
		fields++
		key, value, ok := attribute(v)
		if ok && string(value) != "-" && len(value) > 0 { // what Envoy writes for nothing
			fault = e.set(alias(key), value)
		}
		return ok
	})
	switch {
	case !ok:
		fault = &Error{ReasonTruncated, "log entry", "it is no LogRecord"}
	case fault != nil:
	case e.ID > 0 && !e.Copied:
		fault = &Error{ReasonMissing, "copied", "what has n is a copied exchange"}
	}
	if fault != nil {
		l.Rejected = append(l.Rejected, fault)
		return
	}
	if !e.Copied {
		e.unseen()
	}
	l.Entries = append(l.Entries, e)
}

func (e *LogEntry) set(key string, v []byte) *Error {
	short := alias(v[:min(len(v), maxLogText)])
	switch key {
	case "copied":
		e.Copied = true
	case "n":
		return exact(key, v, &e.ID)
	case "rf":
		e.ResponseFlags = short
	case "rd":
		e.ResponseDetails = short
	case "te":
		if err := number(key, v, &e.EndUS); err != nil {
			return err
		}
		e.EndUS = min(e.EndUS, 1<<40) * 1000
	case "src":
		e.Source = short
	case "peer":
		e.Peer = short
	case "dst":
		e.Local = short
	case "proto":
		e.Protocol = short
	case "sni":
		e.SNI = short
	case "tls":
		e.TLS = short
	case "tsub":
		e.PeerSubject = alias(v)
	case "tsan", "tdns":
		if len(e.PeerSANs) == 0 || key == "tdns" && len(e.PeerSANs) < maxTexts {
			e.PeerSANs = append(e.PeerSANs, strings.SplitN(alias(v), ",", maxTexts)...)
		}
	case "qn":
		return number(key, v, &e.Request.BodyBytes)
	case "rn":
		return number(key, v, &e.Response.BodyBytes)
	case ":status":
		if string(v) != "0" {
			e.Response.Headers = []Field{{[]byte(key), v}}
		}
	default:
		e.Request.Headers = append(e.Request.Headers, Field{[]byte(key), v})
	}
	return nil
}

// unseen completes the event of an exchange of which only the log knows.
func (e *LogEntry) unseen() {
	if e.Peer == e.Source {
		e.Peer = ""
	}
	e.SharePPM = 1e6
	e.Flags = FlagLogOnly | FlagHeadersCut
	if e.Request.BodyBytes > 0 {
		e.Flags |= FlagRequestCut
	}
	switch {
	case len(e.Response.Headers) == 0:
		e.Flags |= FlagNoResponse
	case e.Response.BodyBytes > 0:
		e.Flags |= FlagResponseCut
	}
}

// number reads a decimal.
func number(key string, v []byte, to *uint64) *Error {
	n, err := strconv.ParseUint(alias(v), 10, 64)
	if err != nil {
		return &Error{ReasonType, strings.Clone(key), "it is not a number"}
	}
	*to = n
	return nil
}

// exact reads a Lua number: as JSON, which may have 12e3 for 12000.
func exact(key string, v []byte, to *uint64) *Error {
	n, err := strconv.ParseFloat(alias(v), 64)
	if err != nil || n < 1 || n >= 1<<53 || n != math.Trunc(n) {
		return &Error{ReasonType, strings.Clone(key), "it is not a whole number from 1 to 2^53"}
	}
	*to = uint64(n)
	return nil
}

// attribute reads a KeyValue whose value is a string.
func attribute(b []byte) (key, value []byte, ok bool) {
	ok = each(b, func(num protowire.Number, v []byte) bool {
		switch num {
		case 1:
			key = v
		case 2:
			return each(v, func(num protowire.Number, v []byte) bool {
				if num == 1 {
					value = v
				}
				return true
			})
		}
		return true
	})
	return key, value, ok && len(key) > 0
}

// each gives a message's fields of length-delimited type and of 64 bits, and
// passes over others; false when b is no message, or when f says so.
func each(b []byte, f func(num protowire.Number, v []byte) bool) bool {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return false
		}
		v := b[:n]
		b = b[n:]
		switch typ {
		case protowire.BytesType:
			v, _ = protowire.ConsumeBytes(v)
		case protowire.Fixed64Type:
		default:
			continue
		}
		if !f(num, v) {
			return false
		}
	}
	return true
}
