package sockstat

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also the processes that tests watch, and watch with.
const (
	role   = "SOCKSTAT_TEST_ROLE"
	hidden = "SOCKSTAT_TEST_HIDDEN" // directories
)

func TestMain(m *testing.M) {
	switch r := os.Getenv(role); r {
	case "":
		os.Exit(m.Run())
	case "server":
		fail(serve())
	case "sampler":
		fail(sampleOnDemand())
	default:
		fail(fmt.Errorf("no role %q", r))
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve listens and prints its address; each connection's bytes are read, with
// as many rounds of work for each as the argument says, and echoed.
func serve() error {
	l, err := listenTCP(os.Args[1])
	if err != nil {
		return err
	}
	rounds, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // until the parent is gone
		os.Exit(0)
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			b := make([]byte, 4096)
			for {
				n, err := c.Read(b)
				if err != nil {
					return
				}
				for range rounds {
					work(b[:n])
				}
				if _, err := c.Write(b[:n]); err != nil {
					return
				}
			}
		}()
	}
}

// work takes some microseconds.
func work(b []byte) {
	for i := range 10000 {
		b[i%len(b)] = b[i%len(b)] * 31
	}
}

// answer is what the sampler prints for each line that it reads.
type answer struct {
	Snapshot Snapshot
	Refusals []string
	Error    string
}

func sampleOnDemand() error {
	if err := hide(); err != nil {
		return err
	}
	var cfg Config
	if err := json.Unmarshal([]byte(os.Args[1]), &cfg); err != nil {
		return err
	}
	s, err := Open(cfg)
	if err != nil {
		return err
	}
	defer s.Close()
	out := json.NewEncoder(os.Stdout)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var a answer
		if a.Snapshot, err = s.Sample(); err != nil {
			a.Error = err.Error()
		}
		for _, r := range s.Refusals() {
			a.Refusals = append(a.Refusals, r.Error())
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
	return nil
}

func listenTCP(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp", addr)
}

func addrPortOf(l net.Listener) netip.AddrPort { return l.Addr().(*net.TCPAddr).AddrPort() }

// hide covers directories of this process's own mount namespace.
func hide() error {
	for dir := range strings.FieldsSeq(os.Getenv(hidden)) {
		if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("hide %s: %w", dir, err)
		}
	}
	return nil
}

// since tells whether the kernel is of this version or later.
func since(tb testing.TB, major, minor int) bool {
	tb.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		tb.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		tb.Fatal(err)
	}
	return a > major || a == major && b >= minor
}

// knows is what a back end can see on this kernel.
func knows(tb testing.TB, backend string) Fields {
	tb.Helper()
	if (backend == InetDiag || backend == InProcess) && !since(tb, 6, 2) {
		return Listening | Connected
	}
	return Listening | Connected | Windows
}

// realKernel skips where eBPF cannot run, unless REQUIRE_REAL is set.
func realKernel(tb testing.TB) {
	tb.Helper()
	reason := host{}.refuse()
	if reason == nil {
		_, reason = host{}.ownCgroup()
	}
	switch {
	case reason == nil:
	case os.Getenv("REQUIRE_REAL") != "":
		tb.Fatalf("needs root and a kernel with BTF and cgroup v2: %v", reason)
	default:
		tb.Skipf("needs root and a kernel with BTF and cgroup v2: %v", reason)
	}
}

// makeCgroup makes a control group of version 2 below this process's own.
func makeCgroup(tb testing.TB) string {
	tb.Helper()
	parent, err := host{}.ownCgroup()
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := os.MkdirTemp(parent, "periscope-test-")
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		for range 100 { // processes leave it a moment after their end
			if err = os.Remove(dir); err == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		tb.Errorf("remove the cgroup: %v", err)
	})
	return dir
}

// enterCgroup moves this process into a control group of its own.
func enterCgroup(tb testing.TB) string {
	tb.Helper()
	dir := makeCgroup(tb)
	join := func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			tb.Fatal(err)
		}
	}
	join(dir)
	tb.Cleanup(func() { join(filepath.Dir(dir)) })
	return dir
}

// mountBPF mounts a BPF file system that every user may enter, and returns a
// directory in it that does not exist yet.
func mountBPF(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		tb.Fatal(err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0755"); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			tb.Error(err)
		}
	})
	return filepath.Join(dir, "periscope")
}

// server is a process that reads and echoes, in a control group.
type server struct {
	cmd    *exec.Cmd
	cgroup string
}

func startServer(t *testing.T, cgroup, addr string, rounds int) *server {
	t.Helper()
	s := &server{cgroup: cgroup}
	dir, err := os.Open(s.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	s.cmd = exec.Command(os.Args[0], addr, strconv.Itoa(rounds))
	s.cmd.Env = append(os.Environ(), role+"=server", "GOMAXPROCS=1")
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	if _, err := s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("the server did not start: %v", err)
	}
	return s
}

func (s *server) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// sampler is a process that samples, with the rights that attr leaves it.
type sampler struct {
	t   *testing.T
	in  io.Writer
	out *json.Decoder
}

func startSampler(t *testing.T, cfg Config, attr *syscall.SysProcAttr, env ...string) *sampler {
	t.Helper()
	arg, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	self := filepath.Join(t.TempDir(), "sampler") // where another user may run it
	if err := os.Chmod(filepath.Dir(filepath.Dir(self)), 0o755); err != nil {
		t.Fatal(err)
	}
	if raw, err := os.ReadFile(os.Args[0]); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(self, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, string(arg))
	cmd.Dir = "/"
	cmd.Env = append(append(os.Environ(), role+"=sampler"), env...)
	cmd.Stderr = os.Stderr
	attr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("sampler: %v", err)
		}
	})
	return &sampler{t, in, json.NewDecoder(out)}
}

func (s *sampler) sample() answer {
	s.t.Helper()
	var a answer
	if _, err := s.in.Write([]byte("\n")); err != nil {
		s.t.Fatal(err)
	}
	if err := s.out.Decode(&a); err != nil {
		s.t.Fatal(err)
	}
	return a
}
