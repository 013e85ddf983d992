package sockstat

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/test/netnstest"
)

var (
	first  = netip.MustParseAddr(netnstest.Address)
	second = netip.MustParseAddr(netnstest.Second)
	node   = netip.AddrPortFrom(first, 5050) // free: the namespace is the test's own
)

// rig is a listener with one sampler for each back end, in this process.
type rig struct {
	*testing.T
	cgroup   string
	pin      string
	conns    *Conns
	listener net.Listener
	samplers []*Sampler
}

// newRig loads the programs, opens the listener, and then the samplers of the
// other back ends.
func newRig(t *testing.T, listen func(addr string) (net.Listener, error)) *rig {
	t.Helper()
	realKernel(t)
	r := &rig{T: t, cgroup: enterCgroup(t), pin: mountBPF(t), conns: &Conns{}}
	r.load(Programs{Cgroup: r.cgroup, Version: "test"})
	r.open(EBPF)
	l, err := listen(node.String())
	if err != nil {
		t.Fatal(err)
	}
	r.listener = r.conns.Listener(l)
	t.Cleanup(func() { l.Close() })
	r.open(Pinned, InetDiag, InProcess)
	return r
}

// load pins programs for the listener's port. Kernels before 5.12 warn that they
// do not see what is open by then.
func (r *rig) load(p Programs) {
	r.Helper()
	p.Pin = r.pin
	if p.Ports == nil {
		p.Ports = []uint16{node.Port()}
	}
	warnings, err := Load(p)
	if err != nil {
		r.Fatal(err)
	}
	if late := len(warnings) == 1 && strings.Contains(warnings[0], "5.12 and later can"); late == since(r, 5, 12) || len(warnings) > 1 {
		r.Fatalf("warnings %q", warnings)
	}
}

func (r *rig) open(backends ...string) {
	r.Helper()
	for _, name := range backends {
		s, err := Open(Config{Listen: node, Cgroup: r.cgroup, Pin: r.pin, Conns: r.conns, Backends: []string{name}})
		if err != nil {
			r.Fatal(err)
		}
		r.Cleanup(func() { s.Close() })
		if s.Backend() != name {
			r.Fatalf("%s: %v", name, s.Refusals())
		}
		r.samplers = append(r.samplers, s)
	}
}

// sample takes one by each back end.
func (r *rig) sample() []Snapshot {
	r.Helper()
	all := make([]Snapshot, len(r.samplers))
	for i, s := range r.samplers {
		var err error
		if all[i], err = s.Sample(); err != nil {
			r.Fatal(err)
		}
	}
	return all
}

// until samples every 10 ms until each back end's last sample is as wanted.
func (r *rig) until(what string, want func(Snapshot) bool) {
	r.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		all, bad := r.sample(), -1
		for i, s := range all {
			if !want(s) {
				bad = i
			}
		}
		if bad < 0 {
			return
		}
		if time.Now().After(deadline) {
			r.Fatalf("%s: %s never saw it: %+v", what, all[bad].Backend, all[bad])
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// dial connects from an address of this host's.
func dial(t *testing.T, from netip.Addr) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: 10 * time.Second}
	c, err := d.Dial("tcp", node.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (r *rig) accept() net.Conn {
	r.Helper()
	c, err := r.listener.Accept()
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { c.Close() })
	return c
}

func write(t *testing.T, c net.Conn, n int) {
	t.Helper()
	if _, err := c.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, c net.Conn, n int) {
	t.Helper()
	if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

// A reader that stalls: bytes, peers and ages as they are, by every back end
// alike, the age less than one interval too low and never too high.
func TestStalledReader(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	a, b := dial(t, first), dial(t, second)
	atA, atB := r.accept(), r.accept()
	r.until("two connections", func(s Snapshot) bool { return s.Total.Connections == 2 })

	r.sample()
	before := time.Now()
	write(t, a, 1000)
	after := time.Now()
	write(t, b, 500)
	seen := make([]time.Duration, len(r.samplers)) // the interval in which they came
	for time.Since(before) < 300*time.Millisecond {
		for i, sampler := range r.samplers {
			earliest := time.Since(after)
			s, err := sampler.Sample()
			latest := time.Since(before)
			if err != nil {
				t.Fatal(err)
			}
			if seen[i] == 0 {
				seen[i] = s.Interval
			}
			if s.Total.Bytes != 1500 || s.Total.Waiting != 2 || s.Total.Age > latest || s.Total.Age < earliest-seen[i] {
				t.Errorf("%s: after %v to %v, first seen after at most %v: %+v", s.Backend, earliest, latest, seen[i], s.Total)
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	all := r.sample()
	for _, s := range all {
		if len(s.Peers) != 2 || s.Peers[0].Address != first || s.Peers[0].Bytes != 1000 || s.Peers[1].Address != second || s.Peers[1].Bytes != 500 {
			t.Errorf("%s: peers %+v", s.Backend, s.Peers)
		}
		if s.Known != knows(t, s.Backend) || s.Listener.Sockets != 1 || s.Listener.BacklogMax < 128 {
			t.Errorf("%s: knows %v; %+v", s.Backend, s.Known, s.Listener)
		}
		if d := cmp.Diff(all[0], s, cmpopts.EquateComparable(netip.Addr{}), cmpopts.IgnoreFields(Snapshot{}, "Backend", "Time", "Interval", "Known"), cmpopts.IgnoreFields(Counters{}, "Age")); d != "" {
			t.Errorf("%s differs from %s:\n%s", s.Backend, all[0].Backend, d)
		}
	}
	read(t, atA, 1000)
	read(t, atB, 500)
	for _, s := range r.sample() {
		if s.Total.Bytes != 0 || s.Total.Age != 0 || s.Total.Waiting != 0 || s.Total.Received != 1500 {
			t.Errorf("%s: once all is read: %+v", s.Backend, s.Total)
		}
	}
}

// Slow senders: a reader that keeps pace is never late, one that does not is late
// from the first byte on.
func TestTrickle(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	a, b := dial(t, first), dial(t, second)
	r.accept()
	prompt := r.accept()
	r.sample()
	for i := range 4 {
		write(t, a, 1)
		write(t, b, 1)
		read(t, prompt, 1)
		for _, s := range r.sample() {
			if s.Peers[1].Age != 0 || s.Peers[1].Bytes != 0 || s.Peers[1].Received != uint64(i+1) {
				t.Errorf("%s: byte %d, read at once: %+v", s.Backend, i, s.Peers[1])
			}
			if s.Peers[0].Age < time.Duration(i)*100*time.Millisecond || s.Peers[0].Bytes != int64(i+1) {
				t.Errorf("%s: byte %d, none read: %+v", s.Backend, i, s.Peers[0])
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// A listener on every address is of both families, whichever of them was meant.
func TestDualStack(t *testing.T) {
	if netnstest.Isolate(t) {
		testEveryAddress(t, "[::]:5050", "tcp", netip.IPv6Loopback(), first)
	}
}

func TestDualStackOfIPv4(t *testing.T) {
	if netnstest.Isolate(t) {
		testEveryAddress(t, "0.0.0.0:5050", "tcp", netip.IPv6Loopback(), first)
	}
}

// On a host without IPv6 it is IPv4's.
func TestWithoutIPv6(t *testing.T) {
	if netnstest.Isolate(t) {
		testEveryAddress(t, "[::]:5050", "tcp4", second, first)
	}
}

// testEveryAddress has every back end look at connections from two addresses, to a
// listener of every address.
func testEveryAddress(t *testing.T, listen, network string, from ...netip.Addr) {
	t.Helper()
	realKernel(t)
	any := netip.MustParseAddrPort(listen)
	conns := &Conns{}
	cfg := Config{Listen: any, Pin: mountBPF(t), Conns: conns}
	if _, err := Load(Programs{Pin: cfg.Pin, Ports: []uint16{5050}}); err != nil {
		t.Fatal(err)
	}
	var samplers []*Sampler
	for _, name := range []string{EBPF, Pinned, InetDiag, InProcess} {
		cfg.Backends = []string{name}
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		samplers = append(samplers, s)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), network, ":5050")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l = conns.Listener(l)
	for i, a := range from {
		to := netip.AddrPortFrom(first, 5050)
		if a.Is6() {
			to = netip.AddrPortFrom(a, 5050)
		}
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 0)), Timeout: 10 * time.Second}
		c, err := d.Dial("tcp", to.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		at, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer at.Close()
		write(t, c, 10*(i+1))
	}
	for _, sampler := range samplers {
		s, err := sampler.Sample()
		if err != nil || s.Listener.Sockets != 1 || len(s.Peers) != len(from) {
			t.Errorf("%s: %+v %v", sampler.Backend(), s, err)
			continue
		}
		for _, p := range s.Peers {
			if i := slices.Index(from, p.Address); i < 0 || p.Bytes != int64(10*(i+1)) {
				t.Errorf("%s: %+v", sampler.Backend(), p)
			}
		}
	}
}

// A peer that closes leaves its bytes, and no FIN among them.
func TestClosedPeer(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	c := dial(t, first)
	at := r.accept()
	r.sample()
	write(t, c, 10)
	c.Close()
	r.until("ten bytes", func(s Snapshot) bool { return s.Total.Connections == 1 && s.Total.Bytes == 10 })
	read(t, at, 10)
	r.until("none", func(s Snapshot) bool { return s.Total.Connections == 1 && s.Total.Bytes == 0 && s.Total.Age == 0 })
	if n, err := at.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal(n, err)
	}
	r.until("none after the end", func(s Snapshot) bool { return s.Total.Connections == 1 && s.Total.Bytes == 0 && s.Total.Age == 0 })
	at.Close()
	r.until("no connection", func(s Snapshot) bool { return s.Total.Connections == 0 && s.Total.Received == 10 })
}

// Connections that nobody accepts, up to the limit and beyond.
func TestBacklog(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, func(addr string) (net.Listener, error) {
		l, err := listenTCP(addr)
		if err != nil {
			return nil, err
		}
		raw, err := l.(syscall.Conn).SyscallConn()
		if err != nil {
			return nil, err
		}
		if e := raw.Control(func(fd uintptr) { err = unix.Listen(int(fd), 1) }); e != nil {
			return nil, e
		}
		return l, err
	})
	dial(t, first)
	dial(t, first)
	r.until("a full backlog", func(s Snapshot) bool { return s.Listener.Backlog == 2 && s.Listener.BacklogMax == 1 })
	d := net.Dialer{Timeout: 100 * time.Millisecond}
	if c, err := d.Dial("tcp", node.String()); err == nil {
		c.Close()
		t.Error("a third connection came through")
	}
	r.until("a drop", func(s Snapshot) bool { return s.Listener.Drops > 0 })
	r.accept()
	r.accept()
	r.until("none", func(s Snapshot) bool { return s.Listener.Backlog == 0 && s.Total.Connections == 2 })
}

// A socket that fills up stops its peer, once each time.
func TestZeroWindow(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	c := dial(t, first)
	at := r.accept()
	r.sample()
	payload := make([]byte, 16<<20)
	sent := make(chan int)
	for round := range uint64(2) {
		go func() {
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			n, _ := c.Write(payload)
			sent <- n
		}()
		r.until("a closed window", func(s Snapshot) bool { return s.Total.ZeroWindows == round+1 || !s.Known.Has(Windows) })
		n := <-sent
		for _, s := range r.sample() {
			if s.Total.Bytes < 64<<10 || s.Total.Bytes > int64(n) || s.Known.Has(Windows) != (s.Total.ZeroWindows == round+1) {
				t.Errorf("%s: of %d bytes sent: %+v", s.Backend, n, s.Total)
			}
		}
		read(t, at, n)
		r.until("an open one", func(s Snapshot) bool { return s.Total.Bytes == 0 })
	}
}

// Sockets that were there before the programs are found too, or the programs are
// refused, where the kernel cannot tag these.
func TestOpenedBefore(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	realKernel(t)
	l, err := listenTCP(node.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r := &rig{T: t, cgroup: enterCgroup(t), pin: mountBPF(t), conns: &Conns{}}
	r.listener = r.conns.Listener(l)
	c := dial(t, first)
	r.accept()
	write(t, c, 7)
	r.load(Programs{Cgroup: r.cgroup})
	if since(t, 5, 12) {
		r.open(EBPF, Pinned)
	} else {
		s, err := Open(Config{Listen: node, Cgroup: r.cgroup, Pin: r.pin})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		got := s.Refusals()
		if s.Backend() != InetDiag || len(got) != 2 || !strings.Contains(got[0].Error(), "2 sockets of the listener's are not tagged") || !strings.Contains(got[0].Error(), "5.12 and later can") {
			t.Errorf("%s: %v", s.Backend(), got)
		}
	}
	r.open(InetDiag, InProcess)
	for _, s := range r.sample() {
		if s.Total.Connections != 1 || s.Total.Bytes != 7 || s.Total.Received != 0 || s.Listener.Sockets != 1 || s.Peers[0].Address != first {
			t.Errorf("%s: %+v %+v %+v", s.Backend, s.Listener, s.Total, s.Peers)
		}
	}
}

// Programs of another cgroup see nothing of this listener: they are refused
// rather than believed, and a better back end is taken once there is one.
func TestOtherCgroup(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	realKernel(t)
	r := &rig{T: t, pin: mountBPF(t)}
	r.load(Programs{Cgroup: makeCgroup(t)})
	l, err := listenTCP(node.String())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := Open(Config{Listen: node, Pin: r.pin, Backends: []string{Pinned, InetDiag}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := s.Refusals(); s.Backend() != InetDiag || len(got) != 1 || !strings.Contains(got[0].Error(), "1 sockets of the listener's are not tagged") {
		t.Errorf("%s: %v", s.Backend(), got)
	}
	l.Close()
	r.load(Programs{})
	if l, err = listenTCP(node.String()); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.tried = s.tried.Add(-retryEvery)
	if got, err := s.Sample(); err != nil || got.Backend != Pinned || got.Listener.Sockets != 1 {
		t.Errorf("%+v %v", got, err)
	}
}

// What stops seeing sockets is replaced, and ages go on.
func TestReplaced(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	c := dial(t, first)
	r.accept()
	s, err := Open(Config{Listen: node, Pin: r.pin, Backends: []string{Pinned, InetDiag}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	write(t, c, 9)
	if got, err := s.Sample(); err != nil || got.Backend != Pinned || got.Total.Bytes != 9 {
		t.Fatalf("%+v %v", got, err)
	}
	time.Sleep(50 * time.Millisecond)
	if err := Unload(r.pin); err != nil {
		t.Fatal(err)
	}
	got, err := s.Sample()
	if err == nil || !strings.Contains(err.Error(), "inet_diag takes its place") || got.Backend != InetDiag {
		t.Errorf("%+v %v", got, err)
	}
	if got.Total.Bytes != 9 || got.Total.Age < 50*time.Millisecond {
		t.Errorf("%+v", got.Total)
	}
	if got := s.Refusals(); len(got) != 1 || !strings.Contains(got[0].Error(), "nothing is loaded in "+r.pin) {
		t.Error(got)
	}
}

// Connections by Multipath TCP are counted as what they are: not seen.
func TestMultipath(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, func(addr string) (net.Listener, error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(true)
		return lc.Listen(t.Context(), "tcp", addr)
	})
	if v, err := os.ReadFile("/proc/sys/net/mptcp/enabled"); err != nil || strings.TrimSpace(string(v)) != "1" {
		if os.Getenv("REQUIRE_REAL") != "" && since(t, 6, 1) {
			t.Fatalf("Multipath TCP is off: %q %v", v, err)
		}
		t.Skip("this kernel has no Multipath TCP")
	}
	plain := dial(t, second)
	r.accept()
	write(t, plain, 5)
	var d net.Dialer
	d.SetMultipathTCP(true)
	multi, err := d.Dial("tcp", node.String())
	if err != nil {
		t.Fatal(err)
	}
	defer multi.Close()
	r.accept()
	write(t, multi, 50)
	for _, s := range r.samplers {
		s.checked = time.Time{}
	}
	for _, s := range r.sample() {
		hidden, bytes := 1, int64(5)
		if s.Backend == InProcess {
			hidden = 0
			if since(t, 5, 16) { // before, nobody can ask these
				bytes = 55
			}
		}
		if s.Multipath != hidden || s.Total.Bytes != bytes {
			t.Errorf("%s: %d by Multipath TCP, %+v", s.Backend, s.Multipath, s.Total)
		}
	}
}

// What is loaded says by whom and for what; loading again replaces it in one
// step, and sockets stay in sight.
func TestLoad(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	dial(t, first)
	s, err := ReadStatus(r.pin)
	if err != nil || s.Version != "test" || s.Cgroup != r.cgroup || !slices.Equal(s.Ports, []uint16{5050}) || s.Listeners != 1 || s.Sockets != 1 || time.Since(s.Loaded) > time.Minute {
		t.Errorf("%+v %v", s, err)
	}
	r.load(Programs{Cgroup: r.cgroup, Ports: []uint16{1, 5050}, Version: strings.Repeat("v", 100)})
	sockets := 0
	if since(t, 5, 12) {
		sockets = 1
	}
	s, err = ReadStatus(r.pin)
	if err != nil || s.Version != strings.Repeat("v", 39) || !slices.Equal(s.Ports, []uint16{1, 5050}) || s.Listeners != sockets || s.Sockets != sockets {
		t.Errorf("loaded again: %+v %v", s, err)
	}
	dial(t, second)
	if s, err = ReadStatus(r.pin); err != nil || s.Sockets != sockets+1 {
		t.Errorf("with one more: %+v %v", s, err)
	}

	parent := filepath.Dir(r.pin)
	if err := os.Chmod(parent, 0o700); err != nil {
		t.Fatal(err)
	}
	warnings, err := Load(Programs{Cgroup: r.cgroup, Pin: r.pin, Ports: []uint16{5050}})
	if err != nil || len(warnings) != 2-sockets || !strings.Contains(warnings[1-sockets], parent+" is closed to them") {
		t.Error(warnings, err)
	}
	for _, c := range []struct {
		Programs
		want string
	}{
		{Programs{Cgroup: r.cgroup, Pin: r.pin}, "0 ports"},
		{Programs{Cgroup: r.cgroup, Pin: r.pin, Ports: make([]uint16, 9)}, "9 ports"},
		{Programs{Cgroup: "/tmp", Pin: r.pin, Ports: []uint16{1}}, "/tmp is no cgroup of version 2"},
		{Programs{Cgroup: r.cgroup + "/none", Pin: r.pin, Ports: []uint16{1}}, "no such file"},
		{Programs{Cgroup: r.cgroup, Pin: "/tmp/none", Ports: []uint16{1}}, "/tmp/none is in no BPF file system (mount -t bpf"},
	} {
		if _, err := Load(c.Programs); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.Programs, err, c.want)
		}
	}
	lock, err := makePin(r.pin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Load(Programs{Cgroup: r.cgroup, Pin: r.pin, Ports: []uint16{1}}); err == nil || !strings.Contains(err.Error(), "somebody else is loading") {
		t.Error(err)
	}
	lock.Close()
	if err := Unload(r.pin); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(r.pin); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := Unload(r.pin); err == nil || !strings.Contains(err.Error(), "nothing is loaded") {
		t.Error(err)
	}
}
