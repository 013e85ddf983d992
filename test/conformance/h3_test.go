package conformance

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/quic-go/qpack"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/quicvarint"
)

// Of HTTP/3 (RFC 9114).
const (
	h3Data     = 0x0
	h3Headers  = 0x1
	h3Settings = 0x4
	h3Control  = 0x0   // type of a unidirectional stream
	h3Cancel   = 0x10c // H3_REQUEST_CANCELLED
)

// H3 is one HTTP/3 connection of a client.
type H3 struct{ conn *quic.Conn }

// DialH3 connects by UDP.
func DialH3(ctx context.Context, addr string, c *tls.Config) (*H3, error) {
	c = c.Clone()
	c.NextProtos = []string{"h3"}
	conn, err := quic.DialAddr(ctx, addr, c, &quic.Config{MaxIdleTimeout: 20 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	control, err := conn.OpenUniStream()
	if err != nil {
		return nil, fmt.Errorf("open control stream: %w", err)
	}
	if _, err := control.Write([]byte{h3Control, h3Settings, 0}); err != nil {
		return nil, fmt.Errorf("send settings: %w", err)
	}
	go func() { // the other side's control and QPACK streams say nothing that we need
		for {
			s, err := conn.AcceptUniStream(context.Background())
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, s) }()
		}
	}()
	return &H3{conn}, nil
}

// LocalAddr is the client's own.
func (h *H3) LocalAddr() string { return h.conn.LocalAddr().String() }

// Close ends the connection.
func (h *H3) Close() { _ = h.conn.CloseWithError(0x100, "") }

// Open begins a stream.
func (h *H3) Open() (*H3Stream, error) {
	s, err := h.conn.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	return &H3Stream{conn: h, s: s, r: quicvarint.NewReader(s)}, nil
}

// H3Stream is one stream of an H3.
type H3Stream struct {
	conn *H3
	s    *quic.Stream
	r    quicvarint.Reader
	left uint64 // of a DATA frame
	head bool   // has arrived
}

func (s *H3Stream) frame(kind uint64, payload []byte, end bool) error {
	b := quicvarint.Append(quicvarint.Append(nil, kind), uint64(len(payload)))
	if _, err := s.s.Write(append(b, payload...)); err != nil {
		return ErrEnded
	}
	if end {
		return s.s.Close()
	}
	return nil
}

// SendHead implements Stream.
func (s *H3Stream) SendHead(fields []Field, end bool) error {
	var b bytes.Buffer
	e := qpack.NewEncoder(&b)
	for _, f := range fields {
		if err := e.WriteField(qpack.HeaderField{Name: f.Name, Value: f.Value}); err != nil {
			return fmt.Errorf("encode header: %w", err)
		}
	}
	return s.frame(h3Headers, b.Bytes(), end)
}

// SendInterim implements Stream.
func (s *H3Stream) SendInterim(fields []Field) error { return s.SendHead(fields, false) }

// SendTrailers implements Stream.
func (s *H3Stream) SendTrailers(fields []Field) error { return s.SendHead(fields, true) }

// SendData implements Stream.
func (s *H3Stream) SendData(p []byte, end bool) error { return s.frame(h3Data, p, end) }

// Abort implements Stream.
func (s *H3Stream) Abort() {
	s.s.CancelWrite(h3Cancel)
	s.s.CancelRead(h3Cancel)
}

// Close implements Stream: it ends the whole connection.
func (s *H3Stream) Close() { s.conn.Close() }

// Gone implements Stream.
func (s *H3Stream) Gone() { <-s.s.Context().Done() }

// Recv implements Stream.
func (s *H3Stream) Recv() Item {
	i, err := s.recv()
	switch {
	case errors.Is(err, io.EOF):
		i = Item{Kind: End}
	case err != nil:
		i = Item{Kind: Reset}
	}
	i.At = time.Now()
	return i
}

func (s *H3Stream) recv() (Item, error) {
	for s.left == 0 {
		kind, err := quicvarint.Read(s.r)
		if err != nil {
			return Item{}, err
		}
		n, err := quicvarint.Read(s.r)
		if err != nil {
			return Item{}, fmt.Errorf("frame: %w", io.ErrUnexpectedEOF)
		}
		if kind == h3Data {
			s.left = n
			continue
		}
		b, err := io.ReadAll(io.LimitReader(s.r, int64(n)))
		if err != nil {
			return Item{}, err
		}
		if kind == h3Headers {
			return s.fields(b)
		}
	}
	b := make([]byte, min(s.left, 64<<10))
	n, err := s.r.Read(b)
	s.left -= uint64(n)
	if n == 0 && err != nil {
		return Item{}, fmt.Errorf("data: %w", io.ErrUnexpectedEOF)
	}
	return Item{Kind: Data, Data: b[:n]}, nil
}

func (s *H3Stream) fields(block []byte) (Item, error) {
	next := qpack.NewDecoder().Decode(block)
	var out []Field
	for {
		f, err := next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Item{}, fmt.Errorf("header: %w", err)
		}
		out = append(out, Field{f.Name, f.Value})
	}
	status := Get(out, ":status")
	switch {
	case s.head:
		return Item{Kind: Trailers, Fields: out}, nil
	case len(status) == 3 && status[0] == '1':
		return Item{Kind: Interim, Fields: out}, nil
	}
	s.head = true
	return Item{Kind: Head, Fields: out}, nil
}
