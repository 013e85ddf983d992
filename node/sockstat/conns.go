package sockstat

import (
	"errors"
	"math/bits"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Conns are the sockets of this process's server, for the back end that asks
// each of them: where the kernel lets nobody look at sockets but their owner. It
// costs little while another back end is in use.
type Conns struct {
	mu        sync.Mutex
	listeners []*owned
	conns     []*owned
	sweep     int    // at so many, those that were closed are looked for
	multipath uint64 // tracked so far
}

// owned is a socket of this process.
type owned struct {
	raw       syscall.RawConn
	multipath bool
	record    record        // as last asked
	window    bool          // it told its window
	err       error         // of asking
	ask       func(uintptr) // measure
}

// Listener keeps track of l and of what it accepts. It must be given the
// listener that net.Listen made: wrappers hide the socket.
func (c *Conns) Listener(l net.Listener) net.Listener {
	if o, ok := own(l); ok {
		c.mu.Lock()
		c.listeners = append(c.listeners, o)
		c.mu.Unlock()
	}
	return listener{l, c}
}

type listener struct {
	net.Listener
	conns *Conns
}

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.conns.Track(c)
	}
	return c, err
}

// Track adds one connection, as http.Server's ConnState tells of it. One that
// does not show its socket is left out. Its end need not be told.
func (c *Conns) Track(conn net.Conn) {
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok { // TLS
		conn = t.NetConn()
	}
	o, ok := own(conn)
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.conns) >= c.sweep {
		c.conns = slices.DeleteFunc(c.conns, func(o *owned) bool { return o.raw.Control(func(uintptr) {}) != nil })
		c.sweep = max(64, 2*len(c.conns))
	}
	if o.multipath { // the kernel gives all of these their listener's cookie
		c.multipath++
		o.record.Cookie = 1<<63 | c.multipath
	}
	c.conns = append(c.conns, o)
}

// own takes the socket from a connection or a listener.
func own(v any) (*owned, bool) {
	s, ok := v.(syscall.Conn)
	if !ok {
		return nil, false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return nil, false
	}
	o := &owned{raw: raw}
	o.ask = o.measure
	err = raw.Control(func(fd uintptr) { o.err = o.identify(int(fd)) })
	return o, err == nil && o.err == nil
}

// identify fills in what never changes of a socket.
func (o *owned) identify(fd int) error {
	r := &o.record
	if _, err := sockopt(fd, unix.SOL_SOCKET, unix.SO_COOKIE, unsafe.Pointer(&r.Cookie), unsafe.Sizeof(r.Cookie)); err != nil {
		return err
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return err
	}
	o.multipath = protocol == unix.IPPROTO_MPTCP
	local, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	a := addrPort(local)
	r.Local, r.LocalPort = words(a.Addr()), a.Port()
	if peer, err := unix.Getpeername(fd); err == nil { // a listener has none
		a = addrPort(peer)
		r.Peer, r.PeerPort = words(a.Addr()), bits.ReverseBytes16(a.Port())
	}
	return nil
}

// inProcess is the back end that asks each socket of Conns.
type inProcess struct {
	conns   *Conns
	netns   uint32
	records []record
}

func openInProcess(c *Conns, netns uint32) (*inProcess, error) {
	if c == nil {
		return nil, errors.New("no server of this process tells of its connections")
	}
	return &inProcess{conns: c, netns: netns}, nil
}

func (p *inProcess) name() string { return InProcess }
func (p *inProcess) close() error { return nil }

func (p *inProcess) read() ([]record, Fields, error) {
	p.conns.mu.Lock()
	defer p.conns.mu.Unlock()
	p.records = p.records[:0]
	known := Connected | Windows
	closed := func(o *owned) bool {
		if o.raw.Control(o.ask) != nil {
			return true
		}
		switch r := &o.record; {
		case o.err != nil:
			return false
		case r.State == listening:
			known |= Listening
		case r.State != established && r.State != closeWait:
			return false
		case !o.window:
			known &^= Windows
		}
		p.records = append(p.records, o.record)
		p.records[len(p.records)-1].Netns = p.netns
		return false
	}
	p.conns.listeners = slices.DeleteFunc(p.conns.listeners, closed)
	p.conns.conns = slices.DeleteFunc(p.conns.conns, closed)
	return p.records, known, nil
}

// measure asks what changes of a socket.
func (o *owned) measure(fd uintptr) { o.window, o.err = o.record.measure(int(fd)) }

func (r *record) measure(fd int) (window bool, _ error) {
	var info unix.TCPInfo
	size, err := sockopt(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&info), unsafe.Sizeof(info))
	if err != nil {
		return false, err
	}
	var memory [unix.SK_MEMINFO_VARS]uint32
	if _, err := sockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, unsafe.Pointer(&memory), unsafe.Sizeof(memory)); err != nil {
		return false, err
	}
	r.State, r.Drops = uint32(info.State), memory[unix.SK_MEMINFO_DROPS]
	if r.State == listening {
		r.Queue, r.Limit = info.Unacked, info.Sacked
		return true, nil
	}
	queue, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	if err != nil {
		return false, err
	}
	r.Queue = uint32(queue)
	if r.State == closeWait {
		r.Queue++ // the peer's FIN, which this call alone leaves out
	}
	return r.fill(&info, size), nil
}

func addrPort(s unix.Sockaddr) netip.AddrPort {
	switch s := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr), uint16(s.Port))
	}
	return netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
}

// sockopt reads a socket option, and returns how many bytes the kernel gave.
func sockopt(fd, level, option int, to unsafe.Pointer, size uintptr) (int, error) {
	n := uint32(size)
	if _, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(to), uintptr(unsafe.Pointer(&n)), 0); e != 0 {
		return 0, e
	}
	return int(n), nil
}
