package conformance

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What we let the other side send.
const (
	h2Window      = 1 << 24
	h2MaxHeader   = 64 << 20
	h2FrameBytes  = 16384 // the least that everybody has to take
	h2FirstWindow = 65535
)

// H2 is one HTTP/2 connection, at either end.
type H2 struct {
	conn   net.Conn
	client bool
	accept func(*H2Stream) // of a server: called in a goroutine of its own

	mu       sync.Mutex // wmu is before it where both are held
	changed  *sync.Cond
	streams  map[uint32]*H2Stream
	next     uint32
	window   int64 // that we may send on the connection
	initial  int64 // and on a new stream
	ended    bool
	settings bool // the other side's have arrived

	wmu    sync.Mutex
	framer *http2.Framer
	block  bytes.Buffer
	encode *hpack.Encoder
}

// H2Stream is one stream of an H2.
type H2Stream struct {
	c      *H2
	ID     uint32
	PadTo  uint8 // padding of each frame that is sent
	window int64
	queue  []Item
	over   bool // the other side sent its last
	reset  bool
	head   bool // its header has arrived
}

// NewH2Client speaks HTTP/2 on a connection, with prior knowledge.
func NewH2Client(c net.Conn) (*H2, error) {
	h := newH2(c, true)
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return nil, err
	}
	return h, h.start(c)
}

// NewH2Server serves HTTP/2 on a connection, whose bytes r reads, its preface
// among them.
func NewH2Server(c net.Conn, r io.Reader, accept func(*H2Stream)) (*H2, error) {
	h := newH2(c, false)
	h.accept = accept
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(r, preface); err != nil {
		return nil, err
	}
	return h, h.start(r)
}

func newH2(c net.Conn, client bool) *H2 {
	h := &H2{conn: c, client: client, streams: map[uint32]*H2Stream{}, next: 1, window: h2FirstWindow, initial: h2FirstWindow}
	h.changed = sync.NewCond(&h.mu)
	h.encode = hpack.NewEncoder(&h.block)
	return h
}

func (h *H2) start(r io.Reader) error {
	h.framer = http2.NewFramer(h.conn, r)
	h.framer.AllowIllegalWrites = true
	h.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	h.framer.MaxHeaderListSize = h2MaxHeader
	h.wmu.Lock()
	defer h.wmu.Unlock()
	settings := []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: h2Window}, {ID: http2.SettingMaxHeaderListSize, Val: h2MaxHeader}}
	if h.client {
		settings = append(settings, http2.Setting{ID: http2.SettingEnablePush})
	}
	if err := h.framer.WriteSettings(settings...); err != nil {
		return fmt.Errorf("send settings: %w", err)
	}
	if err := h.framer.WriteWindowUpdate(0, 1<<30); err != nil {
		return fmt.Errorf("send window: %w", err)
	}
	go h.read()
	return nil
}

// Open makes a client's stream. It has its number once its header is sent.
func (h *H2) Open() *H2Stream {
	h.mu.Lock()
	defer h.mu.Unlock()
	for !h.settings && !h.ended {
		h.changed.Wait()
	}
	return &H2Stream{c: h}
}

// number gives a client's stream the next number.
func (s *H2Stream) number() {
	h := s.c
	h.mu.Lock()
	defer h.mu.Unlock()
	s.ID, s.window = h.next, h.initial
	h.streams[s.ID] = s
	h.next += 2
}

// Close ends the connection.
func (h *H2) Close() { _ = h.conn.Close() }

// Ended tells whether the connection has.
func (h *H2) Ended() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ended
}

func (h *H2) read() {
	for {
		f, err := h.framer.ReadFrame()
		if fault, ok := err.(http2.StreamError); ok { //nolint:errorlint // the framer's own
			h.deliver(fault.StreamID, true, Item{Kind: Reset})
			continue
		}
		if err != nil {
			break
		}
		h.take(f)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	for _, s := range h.streams {
		s.end()
	}
	h.changed.Broadcast()
}

// take handles a frame.
func (h *H2) take(f http2.Frame) {
	id := f.Header().StreamID
	switch f := f.(type) {
	case *http2.MetaHeadersFrame:
		h.headers(f)
	case *http2.DataFrame:
		n := f.Length
		if len(f.Data()) > 0 {
			h.deliver(id, false, Item{Kind: Data, Data: bytes.Clone(f.Data())})
		}
		if f.StreamEnded() {
			h.deliver(id, true, Item{Kind: End})
		}
		if n > 0 {
			h.wmu.Lock()
			_ = h.framer.WriteWindowUpdate(0, n)
			if !f.StreamEnded() {
				_ = h.framer.WriteWindowUpdate(id, n)
			}
			h.wmu.Unlock()
		}
	case *http2.RSTStreamFrame:
		h.mu.Lock()
		if s := h.streams[id]; s != nil {
			s.end()
		}
		h.changed.Broadcast()
		h.mu.Unlock()
	case *http2.SettingsFrame:
		h.set(f)
	case *http2.WindowUpdateFrame:
		h.mu.Lock()
		if id == 0 {
			h.window += int64(f.Increment)
		} else if s := h.streams[id]; s != nil {
			s.window += int64(f.Increment)
		}
		h.changed.Broadcast()
		h.mu.Unlock()
	case *http2.PingFrame:
		if !f.IsAck() {
			h.wmu.Lock()
			_ = h.framer.WritePing(true, f.Data)
			h.wmu.Unlock()
		}
	}
}

func (h *H2) set(f *http2.SettingsFrame) {
	if f.IsAck() {
		return
	}
	h.mu.Lock()
	if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
		for _, s := range h.streams {
			s.window += int64(v) - h.initial
		}
		h.initial = int64(v)
	}
	h.settings = true
	h.changed.Broadcast()
	h.mu.Unlock()
	h.wmu.Lock()
	_ = h.framer.WriteSettingsAck()
	h.wmu.Unlock()
}

func (h *H2) headers(f *http2.MetaHeadersFrame) {
	var fields []Field
	for _, v := range f.Fields {
		fields = append(fields, Field{v.Name, v.Value})
	}
	h.mu.Lock()
	s := h.streams[f.StreamID]
	fresh := s == nil && !h.client
	if fresh {
		s = &H2Stream{c: h, ID: f.StreamID, window: h.initial}
		h.streams[s.ID] = s
	}
	kind := Head
	if s != nil {
		status := Get(fields, ":status")
		switch {
		case s.head:
			kind = Trailers
		case h.client && len(status) == 3 && status[0] == '1':
			kind = Interim
		default:
			s.head = true
		}
	}
	h.mu.Unlock()
	h.deliver(f.StreamID, false, Item{Kind: kind, Fields: fields})
	if f.StreamEnded() {
		h.deliver(f.StreamID, true, Item{Kind: End})
	}
	if fresh {
		go h.accept(s)
	}
}

func (h *H2) deliver(id uint32, last bool, i Item) {
	i.At = time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.streams[id]
	if s == nil || s.over {
		return
	}
	s.queue = append(s.queue, i)
	if last {
		s.over = true
	}
	h.changed.Broadcast()
}

// end is called with mu held.
func (s *H2Stream) end() {
	if !s.over {
		s.queue = append(s.queue, Item{Kind: Reset, At: time.Now()})
	}
	s.over, s.reset = true, true
}

// Recv implements Stream.
func (s *H2Stream) Recv() Item {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	for len(s.queue) == 0 {
		if s.over || s.c.ended {
			return Item{Kind: Reset, At: time.Now()}
		}
		s.c.changed.Wait()
	}
	i := s.queue[0]
	s.queue = s.queue[1:]
	return i
}

// SendHead implements Stream.
func (s *H2Stream) SendHead(fields []Field, end bool) error {
	c := s.c
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if s.ID == 0 {
		s.number()
	}
	c.block.Reset()
	for _, f := range fields {
		if err := c.encode.WriteField(hpack.HeaderField{Name: f.Name, Value: f.Value}); err != nil {
			return fmt.Errorf("encode header: %w", err)
		}
	}
	b := c.block.Bytes()
	for first := true; first || len(b) > 0; first = false {
		part := b[:min(len(b), h2FrameBytes-256)]
		b = b[len(part):]
		var err error
		if first {
			err = c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: s.ID, BlockFragment: part, EndStream: end, EndHeaders: len(b) == 0, PadLength: s.PadTo})
		} else {
			err = c.framer.WriteContinuation(s.ID, len(b) == 0, part)
		}
		if err != nil {
			return ErrEnded
		}
	}
	return nil
}

// SendInterim implements Stream.
func (s *H2Stream) SendInterim(fields []Field) error { return s.SendHead(fields, false) }

// SendTrailers implements Stream.
func (s *H2Stream) SendTrailers(fields []Field) error { return s.SendHead(fields, true) }

// SendData implements Stream. It waits for the other side's window.
func (s *H2Stream) SendData(p []byte, end bool) error {
	for first := true; first || len(p) > 0; first = false {
		n, err := s.reserve(min(len(p), h2FrameBytes-256))
		if err != nil {
			return err
		}
		part := p[:n]
		p = p[n:]
		s.c.wmu.Lock()
		err = s.c.framer.WriteDataPadded(s.ID, end && len(p) == 0, part, s.padding())
		s.c.wmu.Unlock()
		if err != nil {
			return ErrEnded
		}
	}
	return nil
}

func (s *H2Stream) padding() []byte {
	if s.PadTo == 0 {
		return nil
	}
	return make([]byte, s.PadTo)
}

// reserve waits for room for at least one byte of n, and its padding.
func (s *H2Stream) reserve(n int) (int, error) {
	c, pad := s.c, int64(0)
	if s.PadTo > 0 {
		pad = int64(s.PadTo) + 1
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if s.reset || c.ended {
			return 0, ErrEnded
		}
		room := min(c.window, s.window) - pad
		if n == 0 && pad == 0 || room > 0 {
			n = int(min(int64(n), max(room, 0)))
			c.window -= int64(n) + pad
			s.window -= int64(n) + pad
			return n, nil
		}
		c.changed.Wait()
	}
}

// Abort implements Stream.
func (s *H2Stream) Abort() {
	s.c.wmu.Lock()
	_ = s.c.framer.WriteRSTStream(s.ID, http2.ErrCodeCancel)
	s.c.wmu.Unlock()
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.end()
	s.c.changed.Broadcast()
}

// Close implements Stream: it ends the whole connection.
func (s *H2Stream) Close() { s.c.Close() }

// Wait waits for the connection's end.
func (h *H2) Wait() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for !h.ended {
		h.changed.Wait()
	}
}

// Gone implements Stream.
func (s *H2Stream) Gone() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	for !s.reset {
		s.c.changed.Wait()
	}
}
