package sockstat

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Programs says what to load for others to read.
type Programs struct {
	Cgroup  string // the node's control group of version 2, a directory; default: this process's
	Pin     string // directory in a BPF file system; default: DefaultPin
	Ports   []uint16
	Version string // of this binary
}

// Load attaches the programs and pins them, so that they stay; those loaded
// before are replaced. It needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, and a
// directory to write to. Warnings tell what readers will not see.
//
// Sockets opened before are found in this process's network namespace.
func Load(c Programs) (warnings []string, err error) {
	if c.Pin == "" {
		c.Pin = DefaultPin
	}
	if c.Cgroup == "" {
		if c.Cgroup, err = (host{}).ownCgroup(); err != nil {
			return nil, err
		}
	}
	if c.Pin, err = filepath.Abs(c.Pin); err != nil {
		return nil, err
	}
	p, err := attach(host{}, c.Cgroup, c.Ports, c.Version)
	if err != nil {
		return nil, err
	}
	defer p.close() // pinned, they stay
	dir, err := makePin(c.Pin)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := pinAs(c.Pin, pinnedOpened, 0o600, p.opened.Pin); err != nil {
		return nil, err
	}
	if err := pinAs(c.Pin, pinnedSockets, 0o444, p.sockets.Pin); err != nil {
		return nil, err
	}
	if p.existing != nil {
		warnings = append(warnings, "sockets that are open now will not be seen: "+p.existing.Error())
	}
	for d := c.Pin; d != "/"; d = filepath.Dir(d) {
		if s, err := os.Stat(d); err == nil && s.Mode()&1 == 0 {
			warnings = append(warnings, fmt.Sprintf("other users cannot read the counters: %s is closed to them (mode %v); chmod it, or mount a BPF file system elsewhere", d, s.Mode().Perm()))
		}
	}
	return warnings, nil
}

// makePin makes the directory, and locks it until closed.
func makePin(dir string) (*os.File, error) {
	parent := filepath.Dir(filepath.Clean(dir))
	var s unix.Statfs_t
	if err := unix.Statfs(parent, &s); err != nil {
		return nil, fmt.Errorf("%s: %w", parent, err)
	}
	if uint32(s.Type) != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("%s is in no BPF file system (mount -t bpf bpf %s)", dir, parent)
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the directory of pins: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the directory of pins: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("somebody else is loading into %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// pinAs replaces a pin in one step.
func pinAs(dir, name string, mode fs.FileMode, pin func(string) error) error {
	file := filepath.Join(dir, name)
	fresh := file + "_new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pin %s: %w", file, err)
	}
	if err := pin(fresh); err != nil {
		return fmt.Errorf("pin %s: %w", file, err)
	}
	if err := os.Chmod(fresh, mode); err != nil {
		return fmt.Errorf("pin %s: %w", file, err)
	}
	if err := os.Rename(fresh, file); err != nil {
		return fmt.Errorf("pin %s: %w", file, err)
	}
	return nil
}

// Unload removes what Load has pinned, and its directory.
func Unload(pin string) error {
	if _, err := os.Stat(pin); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("nothing is loaded in %s", pin)
	}
	var failed error
	for _, name := range []string{pinnedSockets, pinnedOpened, pinnedSockets + "_new", pinnedOpened + "_new", ""} {
		if err := os.Remove(filepath.Join(pin, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	return failed
}

// Status is what is pinned.
type Status struct {
	Version   string // of the binary that loaded it
	Loaded    time.Time
	Cgroup    string
	Ports     []uint16
	Listeners int
	Sockets   int // accepted
}

// ReadStatus reads the pinned iterator, as any user may who can read its file.
func ReadStatus(pin string) (Status, error) {
	records, f, err := pinned(pin).readAll()
	if err != nil {
		return Status{}, explain(pin, err)
	}
	s := Status{Version: text(f.Version[:]), Loaded: time.Unix(0, int64(f.LoadedNs)), Cgroup: text(f.Cgroup[:]), Ports: f.ports()}
	for i := range records {
		if records[i].State == listening {
			s.Listeners++
		} else {
			s.Sockets++
		}
	}
	return s, nil
}
