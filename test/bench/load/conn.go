package load

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"
)

// conn is one kept-alive connection. Only one goroutine at a time uses it.
type conn struct {
	addr     string
	from     *net.TCPAddr // nil: any
	nc       net.Conn     // nil after a fault, until the next exchange
	buf      []byte
	deadline time.Time // of the burst under way
}

func (c *conn) dial() error {
	d := net.Dialer{Timeout: 2 * time.Second}
	if c.from != nil {
		d.LocalAddr = c.from
	}
	nc, err := d.Dial("tcp", c.addr)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	c.nc = nc
	c.arm()
	return nil
}

// arm sets the burst's deadline once; a deadline per request would cost more
// than the rest of the exchange.
func (c *conn) arm() {
	if c.nc != nil {
		// Of an open TCP connection this cannot fail; a closed one shows at once.
		_ = c.nc.SetDeadline(c.deadline)
	}
}

func (c *conn) close() {
	if c.nc != nil {
		c.nc.Close()
		c.nc = nil
	}
}

// exchange sends r and reads the answer to its last byte.
func (c *conn) exchange(r Request) error {
	if c.nc == nil {
		if err := c.dial(); err != nil {
			return err
		}
	}
	err := c.try(r)
	if err != nil || r.Once {
		c.close()
	}
	return err
}

func (c *conn) try(r Request) error {
	if _, err := c.nc.Write(r.Raw); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	head, n, err := c.readHead()
	if err != nil {
		return err
	}
	if err := checkHead(c.buf[:head], cmp.Or(r.Status, 200), r.BodyBytes); err != nil {
		return err
	}
	for left := r.BodyBytes - (n - head); left != 0; {
		if left < 0 {
			return fmt.Errorf("answer is %d bytes longer than it says", -left)
		}
		n, err := c.nc.Read(c.buf)
		if err != nil {
			return fmt.Errorf("read body, %d bytes missing: %w", left, err)
		}
		left -= n
	}
	return nil
}

// readHead reads until the header's end is there. It gives the header's length
// and the number of bytes read, which may include some or all of the body.
func (c *conn) readHead() (head, n int, err error) {
	for {
		m, err := c.nc.Read(c.buf[n:])
		if err != nil {
			return 0, n, fmt.Errorf("read header after %d bytes: %w", n, err)
		}
		// The end may lie across two reads.
		from := max(0, n-3)
		n += m
		if i := bytes.Index(c.buf[from:n], []byte("\r\n\r\n")); i >= 0 {
			return from + i + 4, n, nil
		}
		if n == len(c.buf) {
			return 0, n, errors.New("the answer's header is too long")
		}
	}
}

// checkHead wants this status and a body of this length.
func checkHead(head []byte, status, bodyBytes int) error {
	line, fields, _ := bytes.Cut(head, []byte("\r\n"))
	rest, ok := bytes.CutPrefix(line, []byte("HTTP/1.1 "))
	if n, err := strconv.Atoi(string(rest[:min(3, len(rest))])); !ok || err != nil || n != status {
		return fmt.Errorf("status line %q", line)
	}
	for len(fields) > 0 {
		line, fields, _ = bytes.Cut(fields, []byte("\r\n"))
		name, value, _ := bytes.Cut(line, []byte(":"))
		if len(name) != len("content-length") || !bytes.EqualFold(name, []byte("content-length")) {
			continue
		}
		if n, err := strconv.Atoi(string(bytes.TrimSpace(value))); err != nil || n != bodyBytes {
			return fmt.Errorf("content-length %q, want %d", value, bodyBytes)
		}
		return nil
	}
	return errors.New("no content-length")
}
