// Package sink is what stands behind a gateway under test: a backend, and
// receivers of mirrored traffic, which count what arrives.
//
// It is no server for anything else: it trusts its peer, checks nothing that
// does not serve the count, and listens on loopback only. Benchmarks under
// test/bench may import it; of ours it imports mirror/event.
package sink

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
)

// Backend answers every HTTP/1.1 request with the same bytes, or with as many
// as its target ends in asking for: "…bytes=1024". It is far cheaper than
// net/http, so that it leaves the CPU to the load generator.
type Backend struct {
	ln      net.Listener
	answers [][]byte
	lengths []int // of the answers' bodies
	served  atomic.Uint64
	open    atomic.Int64
}

// ListenBackend makes a backend on a free port. Its answers carry a JSON
// document of one of these lengths: the first, unless a request asks for another.
func ListenBackend(bodyBytes ...int) (*Backend, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the backend: %w", err)
	}
	b := &Backend{ln: ln, lengths: bodyBytes}
	for _, n := range bodyBytes {
		b.answers = append(b.answers, answer(n))
	}
	return b, nil
}

// answerTo is the answer to a request with this header.
func (b *Backend) answerTo(head []byte) []byte {
	if len(b.answers) > 1 {
		line, _, _ := bytes.Cut(head, []byte("\r\n"))
		_, asked, _ := bytes.Cut(line, []byte("bytes="))
		asked, _, _ = bytes.Cut(asked, []byte(" "))
		if n, err := strconv.Atoi(string(asked)); err == nil {
			if i := slices.Index(b.lengths, n); i >= 0 {
				return b.answers[i]
			}
		}
	}
	return b.answers[0]
}

func answer(bodyBytes int) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 200 OK\r\ncontent-type: application/json; charset=utf-8\r\ncontent-length: %d\r\n"+
		"cache-control: private, max-age=0\r\netag: \"5f2b-18c0a7d2e40\"\r\nvary: accept-encoding\r\n"+
		"x-content-type-options: nosniff\r\nset-cookie: visit=9b1c7e; Path=/; HttpOnly\r\n\r\n", bodyBytes)
	b.Write(JSON(bodyBytes))
	return b.Bytes()
}

// JSON is a document of exactly n bytes, for n of 16 at least; a shorter one
// is only spaces.
func JSON(n int) []byte {
	doc := bytes.Repeat([]byte(" "), n)
	const item = `{"id":1234,"name":"notebook, squared","price":4.90},`
	head, tail := []byte(`{"items":[`), []byte(`0]}`)
	if n < len(head)+len(tail) {
		return doc
	}
	at := copy(doc, head)
	for at+len(item)+len(tail) <= n {
		at += copy(doc[at:], item)
	}
	copy(doc[n-len(tail):], tail)
	return doc
}

// Port is where it listens.
func (b *Backend) Port() int { return b.ln.Addr().(*net.TCPAddr).Port }

// Copies is the number of requests answered.
func (b *Backend) Copies() uint64 { return b.served.Load() }

// Expected tells nothing of its own: every request is meant for it.
func (b *Backend) Expected() (uint64, bool) { return 0, false }

// Open is the number of requests that have begun and are not answered.
func (b *Backend) Open() int64 { return b.open.Load() }

// Run serves until ctx ends, then closes every connection and waits.
func (b *Backend) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { b.ln.Close() })
	defer stop()
	for {
		c, err := b.ln.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		wg.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			// A connection that ends is the gateway's affair: a request that
			// was lost with it shows as an error of the user's.
			_ = b.serve(c)
		})
	}
}

var errHeader = errors.New("header too long")

func (b *Backend) serve(c net.Conn) error {
	buf := make([]byte, 32<<10)
	n := 0
	for {
		head := bytes.Index(buf[:n], []byte("\r\n\r\n"))
		if head < 0 {
			if n == len(buf) {
				return errHeader
			}
			m, err := c.Read(buf[n:])
			if err != nil {
				return err
			}
			n += m
			continue
		}
		head += 4
		b.open.Add(1)
		answer := b.answerTo(buf[:head])
		left, err := contentLength(buf[:head])
		if err == nil {
			n, err = b.skip(c, buf, head, n, left)
		}
		if err == nil {
			_, err = c.Write(answer)
		}
		b.open.Add(-1)
		if err != nil {
			return err
		}
		b.served.Add(1)
	}
}

// skip reads the request's body away and moves what follows it to the front.
func (b *Backend) skip(c net.Conn, buf []byte, head, n, left int) (int, error) {
	if have := n - head; have >= left {
		return copy(buf, buf[head+left:n]), nil
	}
	left -= n - head
	for left > 0 {
		m, err := c.Read(buf[:min(left, len(buf))])
		if err != nil {
			return 0, err
		}
		left -= m
	}
	return 0, nil
}

// contentLength of a request as Envoy writes it, names in lower case, or Go.
// Other framing is refused: nothing here sends it.
func contentLength(head []byte) (int, error) {
	if bytes.Contains(head, []byte("\r\ntransfer-encoding:")) || bytes.Contains(head, []byte("\r\nTransfer-Encoding:")) {
		return 0, io.ErrUnexpectedEOF
	}
	const name = "\r\ncontent-length:"
	i := bytes.Index(head, []byte(name))
	if i < 0 {
		i = bytes.Index(head, []byte("\r\nContent-Length:"))
	}
	if i < 0 {
		return 0, nil
	}
	value, _, _ := bytes.Cut(head[i+len(name):], []byte("\r\n"))
	return strconv.Atoi(string(bytes.TrimSpace(value)))
}
