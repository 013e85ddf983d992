// Package netnstest runs a test in a network namespace of its own, where it
// may have addresses other than loopback's and talk to nobody else.
//
// It never touches the host's network. Only tests may import it.
package netnstest

import (
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The namespace's addresses that are not loopback's (RFC 5737).
const (
	Address = "198.51.100.10"
	Second  = "198.51.100.11"
)

const marker = "PERISCOPE_NETNS"

// Isolate runs the calling test again, in a process in a new network namespace
// that has loopback, Address and Second. There it returns true, and the test goes on;
// in the caller's process it returns false once that is done, and the test
// should return.
func Isolate(t *testing.T) bool {
	t.Helper()
	if os.Getenv(marker) == t.Name() {
		if err := configure(); err != nil {
			t.Fatalf("configure the network namespace: %v", err)
		}
		return true
	}
	args := []string{"-test.run", "^" + t.Name() + "$", "-test.v"}
	for _, a := range os.Args[1:] {
		if a == "-update" {
			args = append(args, a)
		}
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), marker+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() != 0 { // a user namespace gives the right to make the other
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in a network namespace (needs root, or user namespaces): %v\n%s", err, out)
	} else {
		t.Logf("in a network namespace:\n%s", out)
	}
	return false
}

// configure brings up loopback and gives it further addresses.
func configure() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	up, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	up.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOOPBACK)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, up); err != nil {
		return err
	}
	for alias, address := range map[string]string{"lo:1": Address, "lo:2": Second} {
		further, err := unix.NewIfreq(alias)
		if err != nil {
			return err
		}
		if err := further.SetInet4Addr(netip.MustParseAddr(address).AsSlice()); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFADDR, further); err != nil {
			return err
		}
	}
	return nil
}
