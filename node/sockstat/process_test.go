package sockstat

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/test/netnstest"
)

// watch starts a server, and before it one sampler for each back end that sees
// another process's sockets.
func watch(t *testing.T, rounds int) (*rig, *server) {
	t.Helper()
	realKernel(t)
	r := &rig{T: t, cgroup: makeCgroup(t), pin: mountBPF(t)}
	r.load(Programs{Cgroup: r.cgroup})
	r.open(EBPF, Pinned, InetDiag)
	return r, startServer(t, r.cgroup, node.String(), rounds)
}

// A process that is stopped is seen to be late while it is, by a process that is
// not, and to have caught up once it has gone on.
func TestStopped(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r, s := watch(t, 0)
	c := dial(t, first)
	write(t, c, 100)
	read(t, c, 100)
	r.sample()
	s.signal(t, unix.SIGSTOP)
	var status unix.WaitStatus // once every thread has stopped
	if _, err := unix.Wait4(s.cmd.Process.Pid, &status, unix.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatal(status, err)
	}
	r.sample()
	write(t, c, 100)
	stopped := time.Now()
	r.until("10 ms", func(s Snapshot) bool { return s.Total.Age >= 10*time.Millisecond && s.Total.Bytes == 100 })
	t.Logf("seen after %v by the last of three", time.Since(stopped))
	r.until("300 ms", func(s Snapshot) bool { return s.Total.Age >= 300*time.Millisecond && s.Total.Bytes == 100 })
	s.signal(t, unix.SIGCONT)
	read(t, c, 100)
	for _, s := range r.sample() {
		if s.Total.Age != 0 || s.Total.Bytes != 0 || s.Total.Received != 100 {
			t.Errorf("%s, once it goes on: %+v", s.Backend, s.Total)
		}
	}
}

// quota gives processes a share of a core, in thousandths; 0: no limit.
type quota struct{ file, procs, format string }

// newQuota makes a group for the CPU time of a process: of version 2 where that
// has the controller, else of version 1.
func newQuota(t *testing.T, s *server) quota {
	t.Helper()
	q := quota{filepath.Join(s.cgroup, "cpu.max"), filepath.Join(s.cgroup, "cgroup.procs"), "%d 100000"}
	_ = os.WriteFile(filepath.Join(filepath.Dir(s.cgroup), "cgroup.subtree_control"), []byte("+cpu"), 0)
	if _, err := os.Stat(q.file); err == nil {
		return q
	}
	dir, err := os.MkdirTemp("/sys/fs/cgroup/cpu", "periscope-test-")
	if err != nil {
		if os.Getenv("REQUIRE_REAL") != "" {
			t.Fatalf("no control group for CPU time: %v", err)
		}
		t.Skipf("no control group for CPU time: %v", err)
	}
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		for range 100 {
			if err = os.Remove(dir); err == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Error(err)
	})
	q = quota{filepath.Join(dir, "cpu.cfs_quota_us"), filepath.Join(dir, "cgroup.procs"), "%d"}
	if err := os.WriteFile(q.procs, fmt.Append(nil, s.cmd.Process.Pid), 0); err != nil {
		t.Fatal(err)
	}
	return q
}

func (q quota) set(t *testing.T, thousandths int) {
	t.Helper()
	if err := os.WriteFile(q.file, fmt.Appendf(nil, q.format, 100*thousandths), 0); err != nil {
		t.Fatal(err)
	}
}

// A node whose CPU time is cut is seen to fall behind by a process outside its
// quota.
func TestQuotaCut(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r, s := watch(t, 100)
	q := newQuota(t, s)
	stop := make(chan struct{})
	defer close(stop)
	for range 8 {
		c := dial(t, first)
		go func() {
			b := make([]byte, 100)
			for {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
				if _, err := c.Write(b); err != nil {
					return
				}
				if _, err := c.Read(b); err != nil {
					return
				}
			}
		}()
	}
	r.until("eight connections", func(s Snapshot) bool { return s.Total.Connections == 8 })
	var seen []time.Duration
	for range 3 {
		r.until("none late", func(s Snapshot) bool { return s.Total.Age < 5*time.Millisecond })
		q.set(t, 30)
		cut := time.Now()
		r.until("late", func(s Snapshot) bool { return s.Total.Age >= 10*time.Millisecond })
		seen = append(seen, time.Since(cut))
		q.set(t, 4000)
	}
	slices.Sort(seen)
	t.Logf("CPU time cut to 3 %%: seen after %v by the last of three", seen)
	if emulated := os.Getenv("SOCKSTAT_TEST_VM") != ""; seen[1] > time.Second && !emulated {
		t.Errorf("median %v", seen[1])
	}
}

// unprivileged is a user without any capability but those named.
func unprivileged(capabilities ...uintptr) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: capabilities}
}

// Without any capability: the pinned iterator, and inet_diag where that is closed;
// each says why.
func TestUnprivileged(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	c := dial(t, first)
	write(t, c, 11)
	cfg := Config{Listen: node, Cgroup: r.cgroup, Pin: r.pin}
	check := func(name string, reasons ...string) {
		t.Helper()
		s := startSampler(t, cfg, unprivileged())
		s.sample()
		time.Sleep(20 * time.Millisecond)
		a := s.sample()
		if a.Error != "" || a.Snapshot.Backend != name || a.Snapshot.Total.Bytes != 11 || a.Snapshot.Total.Age < 20*time.Millisecond || a.Snapshot.Listener.Backlog != 1 {
			t.Errorf("%+v", a)
		}
		if len(a.Refusals) != len(reasons) {
			t.Fatalf("refusals: %q", a.Refusals)
		}
		for i, want := range reasons {
			if !strings.Contains(a.Refusals[i], want) {
				t.Errorf("refusal: %q, want %q", a.Refusals[i], want)
			}
		}
	}
	lacks := "ebpf: this process lacks CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"
	check(Pinned, lacks)
	if err := os.Chmod(filepath.Join(r.pin, pinnedSockets), 0o600); err != nil {
		t.Fatal(err)
	}
	check(InetDiag, lacks, "uid 65534 needs the right to read this file")
	cfg.Pin = filepath.Join(r.pin, "none")
	check(InetDiag, lacks, "ebpf-pinned: nothing is loaded in")
	cfg.Pin, cfg.Listen = r.pin, netip.AddrPortFrom(node.Addr(), 5051)
	if err := os.Chmod(filepath.Join(r.pin, pinnedSockets), 0o444); err != nil {
		t.Fatal(err)
	}
	a := startSampler(t, cfg, unprivileged()).sample()
	if a.Snapshot.Backend != InetDiag || !strings.Contains(a.Refusals[1], "is for port 5050, not 5051") {
		t.Errorf("%+v", a)
	}
}

// Three capabilities are enough, and each is needed.
func TestCapabilities(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	dial(t, first)
	cfg := Config{Listen: node, Cgroup: r.cgroup, Pin: r.pin}
	all := []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN}
	a := startSampler(t, cfg, unprivileged(all...)).sample()
	if !since(t, 5, 12) { // it loads, and does not see what is open
		if a.Snapshot.Backend != Pinned || !strings.Contains(a.Refusals[0], "not tagged") {
			t.Errorf("%+v", a)
		}
	} else if a.Snapshot.Backend != EBPF || a.Refusals != nil || a.Snapshot.Total.Connections != 1 {
		t.Errorf("%+v", a)
	}
	for i, name := range []string{"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"} {
		a := startSampler(t, cfg, unprivileged(slices.Delete(slices.Clone(all), i, i+1)...)).sample()
		if a.Snapshot.Backend != Pinned || len(a.Refusals) != 1 || a.Refusals[0] != "ebpf: this process lacks "+name {
			t.Errorf("without %s: %+v", name, a)
		}
	}
}

// What a kernel or a container may lack, as far as one can hide it here.
func TestHidden(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	r := newRig(t, listenTCP)
	dial(t, first)
	for dirs, want := range map[string]string{
		"/sys/kernel/btf":                       "ebpf: the kernel has no BTF",
		"/sys/fs/cgroup":                        "ebpf: own cgroup ",
		filepath.Dir(r.pin) + " /sys/fs/cgroup": "ebpf: own cgroup ",
	} {
		s := startSampler(t, Config{Listen: node, Pin: r.pin}, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Unshareflags: syscall.CLONE_NEWNS}, hidden+"="+dirs)
		a := s.sample()
		name := Pinned
		if strings.HasPrefix(dirs, filepath.Dir(r.pin)) {
			name = InetDiag
		}
		if a.Snapshot.Backend != name || a.Snapshot.Total.Connections != 1 || !strings.Contains(a.Refusals[0], want) {
			t.Errorf("without %s: %+v", dirs, a)
		}
	}
}

// Nothing at all is no reason to fail, and is not taken for silence.
func TestNone(t *testing.T) {
	s, err := Open(Config{Listen: node, Pin: t.TempDir(), Backends: []string{Pinned, InProcess}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, err := s.Sample()
	if err != nil || got.Backend != None || got.Known != 0 || s.Backend() != None || len(s.Refusals()) != 2 {
		t.Errorf("%+v %v %v", got, err, s.Refusals())
	}
	if _, err := Open(Config{}); err == nil {
		t.Error("opened without a listener's address")
	}
}

// Connections are forgotten once closed, also while nobody samples them.
func TestConnsForget(t *testing.T) {
	l, err := listenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conns := &Conns{}
	l = conns.Listener(l)
	for range 300 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		at, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		at.Close()
		c.Close()
	}
	if n := len(conns.conns); n > 64 {
		t.Errorf("%d of 300 closed connections are kept", n)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	conns.Track(a) // no socket
	p, err := openInProcess(conns, 0)
	if err != nil {
		t.Fatal(err)
	}
	if records, known, err := p.read(); err != nil || len(records) != 1 || known != Listening|Connected|Windows { // there is no connection that tells no window
		t.Errorf("%v %v %v", records, known, err)
	}
}
