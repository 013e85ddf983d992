package extproc

import (
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// Bounds of one exchange's header lines: the plugin's.
const (
	maxFields     = 1000
	maxFieldBytes = 256 << 10
	maxAttributes = 64
)

// kind is what a message carries; its values are ProcessingRequest's field
// numbers.
type kind protowire.Number

const (
	requestHeaders   kind = 2
	responseHeaders  kind = 3
	requestBody      kind = 4
	responseBody     kind = 5
	requestTrailers  kind = 6
	responseTrailers kind = 7
	attributesField       = 9
)

// message is a ProcessingRequest
// (envoy/service/ext_proc/v3/external_processor.proto) as far as an exchange
// needs it. It aliases the buffer it was decoded from.
//
// It isn't read by the generated code: that refuses a message with a text which
// is no UTF-8, and such a text may come from a user, as the TLS server name.
type message struct {
	kind       kind
	fields     []event.Field
	cut        bool // there were more fields
	body       []byte
	end        bool // of the request or response
	attributes map[string]value
}

// value is an attribute: a text or a number, 1 for true.
type value struct {
	text   string
	number float64
}

// decode reads a message, of a kind that Envoy sends in observability mode.
func decode(b []byte) (message, error) {
	var m message
	ok := fields(b, func(n protowire.Number, v []byte, _ uint64) bool {
		switch k := kind(n); k {
		case requestHeaders, responseHeaders:
			m.kind = k
			return m.headers(v)
		case requestBody, responseBody:
			m.kind = k
			return m.chunk(v)
		case requestTrailers, responseTrailers:
			m.kind, m.end = k, true
			return m.trailers(v)
		case attributesField:
			return m.attribute(v)
		}
		return true
	})
	if !ok || m.kind == 0 {
		return message{}, errMalformed
	}
	return m, nil
}

// fields gives each field of a message: its bytes, or its number; a fixed64 as
// its bits.
func fields(b []byte, each func(n protowire.Number, v []byte, number uint64) bool) bool {
	for len(b) > 0 {
		n, t, size := protowire.ConsumeTag(b)
		if size < 0 {
			return false
		}
		b = b[size:]
		var v []byte
		var number uint64
		switch t {
		case protowire.BytesType:
			v, size = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			number, size = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			number, size = protowire.ConsumeFixed64(b)
		default:
			size = protowire.ConsumeFieldValue(n, t, b)
		}
		if size < 0 || !each(n, v, number) {
			return false
		}
		b = b[size:]
	}
	return true
}

// headers reads an HttpHeaders.
func (m *message) headers(b []byte) bool {
	return fields(b, func(n protowire.Number, v []byte, number uint64) bool {
		switch n {
		case 1:
			return m.headerMap(v)
		case 3:
			m.end = number != 0
		}
		return true
	})
}

// trailers reads an HttpTrailers.
func (m *message) trailers(b []byte) bool {
	return fields(b, func(n protowire.Number, v []byte, _ uint64) bool {
		return n != 1 || m.headerMap(v)
	})
}

// chunk reads an HttpBody.
func (m *message) chunk(b []byte) bool {
	return fields(b, func(n protowire.Number, v []byte, number uint64) bool {
		switch n {
		case 1:
			m.body = v
		case 2:
			m.end = number != 0
		}
		return true
	})
}

// headerMap reads a HeaderMap: each line in its place, its value in raw_value
// or, from another sender, in value.
func (m *message) headerMap(b []byte) bool {
	size := 0
	return fields(b, func(n protowire.Number, line []byte, _ uint64) bool {
		if n != 1 {
			return true
		}
		if len(m.fields) >= maxFields || size > maxFieldBytes {
			m.cut = true
			return true
		}
		var f event.Field
		ok := fields(line, func(n protowire.Number, v []byte, _ uint64) bool {
			switch {
			case n == 1:
				f.Name = v
			case n == 3, n == 2 && f.Value == nil:
				f.Value = v
			}
			return true
		})
		size += len(f.Name) + len(f.Value)
		m.fields = append(m.fields, f)
		return ok
	})
}

// attribute reads an entry of the map of attributes, of which each value is a
// Struct.
func (m *message) attribute(b []byte) bool {
	return fields(b, func(n protowire.Number, v []byte, _ uint64) bool {
		return n != 2 || fields(v, func(n protowire.Number, v []byte, _ uint64) bool {
			return n != 1 || m.member(v)
		})
	})
}

// member reads an entry of a Struct.
func (m *message) member(b []byte) bool {
	var name string
	var out value
	ok := fields(b, func(n protowire.Number, v []byte, _ uint64) bool {
		switch n {
		case 1:
			name = string(v)
		case 2:
			return out.read(v)
		}
		return true
	})
	if ok && name != "" && len(m.attributes) < maxAttributes {
		if m.attributes == nil {
			m.attributes = map[string]value{}
		}
		m.attributes[name] = out
	}
	return ok
}

// read reads a Value; of a list or a struct nothing is kept.
func (out *value) read(b []byte) bool {
	return fields(b, func(n protowire.Number, v []byte, number uint64) bool {
		switch n {
		case 2:
			out.number = math.Float64frombits(number)
		case 3:
			out.text = string(v)
		case 4: // false and true
			out.number = float64(number)
		}
		return true
	})
}
