package sockstat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of linux/inet_diag.h and linux/sock_diag.h.
const (
	diagInfo     = 2 // attributes
	diagMemory   = 7
	diagProtocol = 3 // of a request

	diagMessageBytes = 72
	memoryDrops      = 4 * unix.SK_MEMINFO_DROPS
	diagWanted       = 1<<(diagInfo-1) | 1<<(diagMemory-1) // of a connection
)

// windowEnd is how long a TCPInfo is that tells the window: since Linux 6.2.
const windowEnd = int(unsafe.Offsetof(unix.TCPInfo{}.Rcv_wnd) + unsafe.Sizeof(unix.TCPInfo{}.Rcv_wnd))

// diag reads sockets by netlink's inet_diag, which takes no privilege. It sees
// the network namespace that it was opened in.
type diag struct {
	fd      int
	family  uint8 // of the sockets: those that an IPv6 listener accepts by IPv4 are IPv6's
	either  bool  // a listener of all addresses, "0.0.0.0" too, is IPv6's, or IPv4's where the host has no IPv6
	port    uint16
	netns   uint32
	seq     uint32
	buf     []byte
	records []record
	known   Fields
}

func openDiag(listen netip.AddrPort, netns uint32) (*diag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	// The kernel answers within the call; this is for one that does not.
	timeout := unix.Timeval{Sec: 1}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	d := &diag{fd: fd, family: unix.AF_INET6, either: listen.Addr().IsUnspecified(), port: listen.Port(), netns: netns, buf: make([]byte, 64<<10)}
	if listen.Addr().Is4() && !d.either {
		d.family = unix.AF_INET
	}
	if _, _, err := d.read(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return d, nil
}

func (d *diag) name() string { return InetDiag }
func (d *diag) close() error { return unix.Close(d.fd) }

func (d *diag) read() ([]record, Fields, error) {
	d.known = Listening | Connected | Windows
	err := d.dump(unix.IPPROTO_TCP, diagWanted)
	if d.either && (err != nil || !slices.ContainsFunc(d.records, func(r record) bool { return r.State == listening })) {
		d.family = unix.AF_INET + unix.AF_INET6 - d.family
		err = d.dump(unix.IPPROTO_TCP, diagWanted)
	}
	if err != nil {
		return nil, 0, err
	}
	return d.records, d.known, nil
}

// multipath counts connections by Multipath TCP; a kernel that has none has no
// answer either.
func (d *diag) multipath() int {
	if err := d.dump(unix.IPPROTO_MPTCP, 0); err != nil {
		return 0
	}
	n := 0
	for i := range d.records {
		if d.records[i].State != listening {
			n++
		}
	}
	return n
}

// dump asks for sockets with the local port, and reads the answer into records.
func (d *diag) dump(protocol uint32, attributes uint8) error {
	d.seq++
	var q [80]byte
	e := binary.NativeEndian
	e.PutUint32(q[0:], uint32(len(q)))
	e.PutUint16(q[4:], unix.SOCK_DIAG_BY_FAMILY)
	e.PutUint16(q[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	e.PutUint32(q[8:], d.seq)
	q[16], q[17], q[18] = d.family, uint8(protocol), attributes
	e.PutUint32(q[20:], 1<<established|1<<closeWait|1<<listening)
	binary.BigEndian.PutUint16(q[24:], d.port)
	e.PutUint16(q[72:], 8) // the protocol once more, as not every one fits a byte
	e.PutUint16(q[74:], diagProtocol)
	e.PutUint32(q[76:], protocol)
	if err := unix.Sendto(d.fd, q[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask inet_diag: %w", err)
	}
	d.records = d.records[:0]
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read inet_diag's answer: %w", err)
		}
		if done, err := d.parse(d.buf[:n]); done || err != nil {
			return err
		}
	}
}

// parse takes one datagram of netlink messages; done: it was the last.
func (d *diag) parse(b []byte) (done bool, _ error) {
	e := binary.NativeEndian
	for len(b) >= unix.SizeofNlMsghdr {
		size, kind, seq := int(e.Uint32(b)), e.Uint16(b[4:]), e.Uint32(b[8:])
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return false, errors.New("read inet_diag's answer: cut short")
		}
		body := b[unix.SizeofNlMsghdr:size]
		b = b[min(align(size), len(b)):]
		if seq != d.seq {
			continue // of a dump that was given up
		}
		switch kind {
		case unix.NLMSG_DONE:
			return true, nil
		case unix.NLMSG_ERROR:
			if len(body) >= 4 {
				return false, fmt.Errorf("inet_diag refuses: %w", unix.Errno(-int32(e.Uint32(body))))
			}
			return false, errors.New("inet_diag refuses")
		case unix.SOCK_DIAG_BY_FAMILY:
			if len(body) < diagMessageBytes {
				return false, errors.New("read inet_diag's answer: cut short")
			}
			d.socket(body)
		}
	}
	return false, nil
}

// socket adds what one message tells.
func (d *diag) socket(b []byte) {
	e := binary.NativeEndian
	r := record{State: uint32(b[1]), LocalPort: binary.BigEndian.Uint16(b[4:]), PeerPort: e.Uint16(b[6:]), Netns: d.netns,
		Cookie: uint64(e.Uint32(b[44:])) | uint64(e.Uint32(b[48:]))<<32,
		Queue:  e.Uint32(b[56:])}
	local, peer := (*[16]byte)(b[8:]), (*[16]byte)(b[24:])
	if b[0] == unix.AF_INET {
		r.Local, r.Peer = words(netip.AddrFrom4([4]byte(local[:4]))), words(netip.AddrFrom4([4]byte(peer[:4])))
	} else {
		r.Local, r.Peer = words(netip.AddrFrom16(*local)), words(netip.AddrFrom16(*peer))
	}
	if r.State == listening {
		r.Limit = e.Uint32(b[60:])
	}
	for b = b[diagMessageBytes:]; len(b) >= unix.SizeofRtAttr; {
		size, kind := int(e.Uint16(b)), e.Uint16(b[2:])
		if size < unix.SizeofRtAttr || size > len(b) {
			break
		}
		value := b[unix.SizeofRtAttr:size]
		b = b[min(align(size), len(b)):]
		switch {
		case kind == diagMemory && len(value) >= memoryDrops+4:
			r.Drops = e.Uint32(value[memoryDrops:])
		case kind == diagInfo && r.State != listening:
			var info unix.TCPInfo
			copy(unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info)), value)
			if !r.fill(&info, len(value)) {
				d.known &^= Windows
			}
		}
	}
	d.records = append(d.records, r)
}

// fill takes what TCP_INFO tells of a connection, of which the kernel gave size
// bytes. It tells whether the window is among it.
func (r *record) fill(info *unix.TCPInfo, size int) bool {
	r.Received = info.Bytes_received
	r.SrttUs = info.Rtt << 3
	r.Retransmits = info.Total_retrans
	r.Window = info.Rcv_wnd
	if size < windowEnd {
		r.Window = ^uint32(0)
		return false
	}
	return true
}

func align(n int) int { return (n + 3) &^ 3 }
