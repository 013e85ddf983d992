package conformance

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"strconv"
	"strings"
	"time"
)

// H1 is one HTTP/1.x connection: one exchange after the other, each begun with
// Next. The client may send anything by Write.
type H1 struct {
	net.Conn
	Version string // in first lines that are sent, default HTTP/1.1
	client  bool
	r       *bufio.Reader

	// Of the message being sent.
	chunked bool
	// Of the message being received.
	state   int
	left    int64 // of a body or chunk
	framing framing
	method  string // of the request, which tells whether a response has a body
	tunnel  bool   // from a 101, or a 200 to CONNECT, on
}

type framing int

const (
	none framing = iota
	length
	chunks
	untilClose
)

// States of receiving.
const (
	wantHead = iota
	wantBody
	wantEnd
)

// NewH1 speaks HTTP/1 on a connection.
func NewH1(c net.Conn, client bool) *H1 {
	return &H1{Conn: c, Version: "HTTP/1.1", client: client, r: bufio.NewReaderSize(c, 64<<10)}
}

// Next readies the connection for its next exchange.
func (h *H1) Next() { h.state, h.chunked, h.tunnel = wantHead, false, false }

// Expect tells a client the method of a request that it sent by Write.
func (h *H1) Expect(method string) { h.method = method }

// SendHead implements Stream.
func (h *H1) SendHead(fields []Field, end bool) error {
	var b strings.Builder
	if h.client {
		h.method = Get(fields, ":method")
		fmt.Fprintf(&b, "%s %s %s\r\n", h.method, Get(fields, ":path"), h.Version)
	} else {
		fmt.Fprintf(&b, "%s %s Scripted\r\n", h.Version, Get(fields, ":status"))
	}
	for _, f := range fields {
		if f.Name == ":authority" {
			f.Name = "host"
		}
		if !strings.HasPrefix(f.Name, ":") {
			fmt.Fprintf(&b, "%s: %s\r\n", f.Name, f.Value)
		}
	}
	h.chunked = strings.EqualFold(Get(fields, "transfer-encoding"), "chunked")
	b.WriteString("\r\n")
	if h.chunked && end {
		b.WriteString("0\r\n\r\n")
	}
	return h.write(b.String(), end)
}

// SendInterim implements Stream.
func (h *H1) SendInterim(fields []Field) error {
	chunked := h.chunked
	err := h.SendHead(fields, false)
	h.chunked = chunked
	return err
}

// SendData implements Stream.
func (h *H1) SendData(p []byte, end bool) error {
	if !h.chunked {
		return h.write(string(p), end)
	}
	s := ""
	if len(p) > 0 {
		s = fmt.Sprintf("%x\r\n%s\r\n", len(p), p)
	}
	if end {
		s += "0\r\n\r\n"
	}
	return h.write(s, end)
}

// SendTrailers implements Stream.
func (h *H1) SendTrailers(fields []Field) error {
	s := "0\r\n"
	for _, f := range fields {
		s += f.Name + ": " + f.Value + "\r\n"
	}
	return h.write(s+"\r\n", true)
}

func (h *H1) write(s string, _ bool) error {
	if _, err := io.WriteString(h.Conn, s); err != nil {
		return ErrEnded
	}
	return nil
}

// Abort implements Stream.
func (h *H1) Abort() {
	if c, ok := h.Conn.(interface{ NetConn() net.Conn }); ok {
		_ = c.NetConn().Close() // TLS's own goodbye is left unsaid
		return
	}
	if c, ok := h.Conn.(interface{ SetLinger(int) error }); ok {
		_ = c.SetLinger(0)
	}
	_ = h.Conn.Close()
}

// Close implements Stream.
func (h *H1) Close() { _ = h.Conn.Close() }

// Gone implements Stream.
func (h *H1) Gone() {
	for {
		if _, err := h.r.ReadByte(); err != nil {
			return
		}
	}
}

// Recv implements Stream.
func (h *H1) Recv() Item {
	i, err := h.recv()
	if err != nil {
		i = Item{Kind: Reset}
	}
	i.At = time.Now()
	return i
}

func (h *H1) recv() (Item, error) {
	switch h.state {
	case wantHead:
		fields, err := h.readHead()
		if err != nil {
			return Item{}, err
		}
		if s := Get(fields, ":status"); h.client && len(s) == 3 && s[0] == '1' && s != "101" {
			return Item{Kind: Interim, Fields: fields}, nil
		}
		h.frame(fields)
		return Item{Kind: Head, Fields: fields}, nil
	case wantBody:
		return h.readBody()
	}
	return Item{Kind: End}, nil
}

func (h *H1) readHead() ([]Field, error) {
	first, err := h.line()
	if err != nil {
		return nil, err
	}
	a, rest, _ := strings.Cut(first, " ")
	b, c, _ := strings.Cut(rest, " ")
	fields := []Field{{":status", b}}
	if !h.client {
		h.method = a
		fields = []Field{{":method", a}, {":path", b}, {":version", c}}
	}
	lines, err := h.fields()
	if err != nil {
		return nil, err
	}
	for _, f := range lines {
		if !h.client && strings.EqualFold(f.Name, "host") {
			f.Name = ":authority"
		}
		fields = append(fields, f)
	}
	return fields, nil
}

// fields reads lines up to an empty one, bytes as they are.
func (h *H1) fields() ([]Field, error) {
	var out []Field
	for {
		l, err := h.line()
		if err != nil || l == "" {
			return out, err
		}
		name, value, _ := strings.Cut(l, ":")
		out = append(out, Field{name, textproto.TrimString(value)})
	}
}

func (h *H1) line() (string, error) {
	l, err := h.r.ReadString('\n')
	return strings.TrimRight(l, "\r\n"), err
}

// frame finds how the body ends.
func (h *H1) frame(fields []Field) {
	h.state, h.framing, h.left = wantBody, none, 0
	status := Get(fields, ":status")
	switch {
	case h.client && (status == "101" || h.method == "CONNECT" && status == "200") || !h.client && (h.method == "CONNECT" || Get(fields, "upgrade") != ""):
		h.framing, h.tunnel = untilClose, true
	case h.client && (h.method == "HEAD" || status == "204" || status == "304"):
	case strings.EqualFold(Get(fields, "transfer-encoding"), "chunked"):
		h.framing, h.left = chunks, -1
	case Get(fields, "content-length") != "":
		h.framing = length
		h.left, _ = strconv.ParseInt(Get(fields, "content-length"), 10, 64)
	case h.client:
		h.framing = untilClose
	}
	if h.framing == none || h.framing == length && h.left == 0 {
		h.state = wantEnd
	}
}

func (h *H1) readBody() (Item, error) {
	if h.framing == chunks && h.left < 0 {
		l, err := h.line()
		if err != nil {
			return Item{}, err
		}
		if h.left, err = strconv.ParseInt(l, 16, 64); err != nil {
			return Item{}, fmt.Errorf("chunk length: %w", err)
		}
		if h.left == 0 {
			h.state = wantEnd
			trailers, err := h.fields()
			if err != nil || trailers == nil {
				return Item{Kind: End}, err
			}
			return Item{Kind: Trailers, Fields: trailers}, nil
		}
	}
	most := int64(64 << 10)
	if h.framing != untilClose {
		most = min(most, h.left)
	}
	b := make([]byte, most)
	n, err := h.r.Read(b)
	if h.framing == untilClose && err == io.EOF {
		return Item{Kind: End}, nil
	}
	if n == 0 && err != nil {
		return Item{}, err
	}
	if h.left -= int64(n); h.left == 0 {
		switch h.framing {
		case length:
			h.state = wantEnd
		case chunks:
			if _, err := h.line(); err != nil {
				return Item{}, err
			}
			h.left = -1
		}
	}
	return Item{Kind: Data, Data: b[:n]}, nil
}
