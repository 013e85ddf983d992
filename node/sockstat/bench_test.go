package sockstat

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// One sample by each back end, of so many connections: CPU time of the thread,
// also that in the kernel.
func BenchmarkSample(b *testing.B) {
	realKernel(b)
	for _, n := range []int{100, 1000} {
		enterCgroup(b)
		pin := mountBPF(b)
		l, err := listenTCP("127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
		at := addrPortOf(l)
		if _, err := Load(Programs{Pin: pin, Ports: []uint16{at.Port()}}); err != nil {
			b.Fatal(err)
		}
		conns := &Conns{}
		connect(b, conns.Listener(l), n)
		for _, name := range []string{EBPF, Pinned, InetDiag, InProcess} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				s, err := Open(Config{Listen: at, Pin: pin, Conns: conns, Backends: []string{name}})
				if err != nil || s.Backend() != name {
					b.Fatal(err, s.Refusals())
				}
				defer s.Close()
				got, err := s.Sample()
				if err != nil || got.Total.Connections != n || got.Total.Waiting != n/2 {
					b.Fatalf("%+v %v", got, err)
				}
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				b.ReportAllocs()
				before := threadTime(b)
				for b.Loop() {
					if _, err := s.Sample(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(threadTime(b)-before)/float64(b.N)/float64(time.Microsecond), "cpu-µs/op")
			})
		}
	}
}

// connect makes connections from 50 addresses, half of them with bytes to read.
func connect(b *testing.B, l net.Listener, n int) {
	b.Helper()
	for i := range n {
		from := netip.AddrFrom4([4]byte{127, 0, 1, byte(i % 50)})
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		at, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { at.Close() })
		if i%2 == 0 {
			if _, err := c.Write(make([]byte, 100)); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func threadTime(b *testing.B) time.Duration {
	b.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// The pure part alone.
func BenchmarkFold(b *testing.B) {
	records := make([]record, 1000)
	for i := range records {
		records[i] = connection(uint64(i), "192.0.2.1", 100, uint32(i%2))
		records[i].Peer[3] = uint32(i % 50)
	}
	t := newTable(listen, 1)
	b.ReportAllocs()
	for b.Loop() {
		t.fold(time.Now(), records)
	}
}
