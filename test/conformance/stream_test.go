package conformance

import (
	"errors"
	"strings"
	"time"
)

// Field is a header or trailer line. Pseudo-header fields (RFC 9113) stand for
// HTTP/1's first line too: its Host is ":authority".
type Field struct{ Name, Value string }

// Get gives a field's first value, or "".
func Get(fields []Field, name string) string {
	for _, f := range fields {
		if strings.EqualFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

// Kind of an Item.
type Kind string

// What arrives on a stream, in this order; End and Reset are the last.
const (
	Head     Kind = "head"
	Interim  Kind = "interim" // 1xx other than 101
	Data     Kind = "data"
	Trailers Kind = "trailers"
	End      Kind = "end"
	Reset    Kind = "reset" // the peer reset the stream, or its connection ended amid it
)

// Item is what arrived.
type Item struct {
	Kind   Kind
	Fields []Field
	Data   []byte
	At     time.Time
}

// Stream is one exchange, at either end. Sending and receiving may go on at
// once, each from one goroutine.
type Stream interface {
	// SendHead sends the first line and header; end: nothing follows.
	SendHead(fields []Field, end bool) error
	// SendInterim sends a 1xx response.
	SendInterim(fields []Field) error
	SendData(b []byte, end bool) error
	SendTrailers(fields []Field) error
	// Abort ends the stream at once: RST_STREAM, or the connection's reset.
	Abort()
	// Close ends the stream's connection in an orderly way, amid whatever.
	Close()
	// Recv waits for what arrives next. After End and Reset it is not called again.
	Recv() Item
	// Gone waits, once all has been received, until the other side has reset the
	// stream or ended the connection.
	Gone()
}

// ErrEnded is what sending gives once the other side has reset the stream or
// ended the connection.
var ErrEnded = errors.New("the stream has ended")

// Message is one direction of an exchange as its receiver saw it.
type Message struct {
	Head     []Field
	Interim  [][]Field
	Body     []byte
	Trailers []Field
	End      Kind // End, Reset, or empty while it goes on
	HeadAt   time.Time
	Pieces   []time.Time // when each piece of the body arrived
	EndAt    time.Time
}

// Add puts an item into the message.
func (m *Message) Add(i Item) {
	switch i.Kind {
	case Head:
		m.Head, m.HeadAt = i.Fields, i.At
	case Interim:
		m.Interim = append(m.Interim, i.Fields)
	case Data:
		m.Body = append(m.Body, i.Data...)
		m.Pieces = append(m.Pieces, i.At)
	case Trailers:
		m.Trailers = i.Fields
	case End, Reset:
		m.End, m.EndAt = i.Kind, i.At
	}
}

// Receive reads a message to its end.
func Receive(s Stream) *Message {
	m := &Message{}
	for m.End == "" {
		m.Add(s.Recv())
	}
	return m
}
