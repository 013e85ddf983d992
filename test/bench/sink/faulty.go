package sink

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Fault is what is wrong with a node.
type Fault string

const (
	Slow        Fault = "slow"    // answers after slowness
	Stalled     Fault = "stalled" // takes connections, and never reads
	Dead        Fault = "dead"    // refuses connections
	Unavailable Fault = "503"     // answers everything with this status, at once
)

const slowness = 5 * time.Second

// Faulty stands where a node should be. It counts nothing.
type Faulty struct {
	ln   net.Listener // nil: it only keeps a port to itself
	held *os.File
	port int
	serv http.Handler // nil: never reads
}

// ListenFaulty makes one on a free port.
func ListenFaulty(f Fault) (*Faulty, error) {
	if f == Dead {
		return holdPort()
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for a faulty node: %w", err)
	}
	out := &Faulty{ln: ln, port: ln.Addr().(*net.TCPAddr).Port}
	switch f {
	case Slow:
		out.serv = answerAfter(slowness, http.StatusOK)
	case Unavailable:
		out.serv = answerAfter(0, http.StatusServiceUnavailable)
	case Stalled:
	default:
		ln.Close()
		return nil, fmt.Errorf("a node can't be %q", f)
	}
	return out, nil
}

func answerAfter(d time.Duration, status int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A sender that gives up in between is its own affair.
		_, _ = io.Copy(io.Discard, r.Body)
		if d > 0 {
			wait := time.NewTimer(d)
			defer wait.Stop()
			select {
			case <-wait.C:
			case <-r.Context().Done():
			}
		}
		w.WriteHeader(status)
	})
}

// holdPort binds a port and does not listen: connections are refused, and
// nobody else gets the port meanwhile.
func holdPort() (*Faulty, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("hold a port: %w", err)
	}
	held := os.NewFile(uintptr(fd), "held port")
	err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	if err == nil {
		var addr unix.Sockaddr
		if addr, err = unix.Getsockname(fd); err == nil {
			return &Faulty{held: held, port: addr.(*unix.SockaddrInet4).Port}, nil
		}
	}
	held.Close()
	return nil, fmt.Errorf("hold a port: %w", err)
}

// Port is where it should listen.
func (f *Faulty) Port() int { return f.port }

// Copies is none.
func (f *Faulty) Copies() uint64 { return 0 }

// Expected tells nothing.
func (f *Faulty) Expected() (uint64, bool) { return 0, false }

// Open is none that anybody should wait for.
func (f *Faulty) Open() int64 { return 0 }

// Run is faulty until ctx ends.
func (f *Faulty) Run(ctx context.Context) error {
	switch {
	case f.ln == nil:
		defer f.held.Close()
		<-ctx.Done()
		return nil
	case f.serv == nil:
		// The kernel takes connections up to its backlog, and what fits into
		// their buffers.
		defer f.ln.Close()
		<-ctx.Done()
		return nil
	}
	return serveHTTP2(ctx, f.ln, f.serv)
}
