package sockstat

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/node/cgroup"
)

// host is what this process may know of its kernel and of itself.
type host struct {
	root string // of /proc and /sys; empty: the real ones
}

func (h host) path(p string) string { return filepath.Join("/", h.root, p) }

func (h host) read(p string) (string, error) {
	raw, err := os.ReadFile(h.path(p))
	return string(raw), err
}

// needed are the capabilities to load and attach; CAP_SYS_ADMIN includes two.
var needed = []struct {
	name string
	bits uint64 // one of them is enough
}{
	{"CAP_BPF", 1<<unix.CAP_BPF | 1<<unix.CAP_SYS_ADMIN},
	{"CAP_PERFMON", 1<<unix.CAP_PERFMON | 1<<unix.CAP_SYS_ADMIN},
	{"CAP_NET_ADMIN", 1 << unix.CAP_NET_ADMIN},
}

// refuse tells why programs cannot be loaded here; nil: no reason is known.
func (h host) refuse() error {
	if _, err := os.Stat(h.path("/sys/kernel/btf/vmlinux")); errors.Is(err, fs.ErrNotExist) {
		return errors.New("the kernel has no BTF (/sys/kernel/btf/vmlinux; CONFIG_DEBUG_INFO_BTF)")
	}
	missing, err := h.missingCapabilities()
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("this process lacks %s", strings.Join(missing, ", "))
	}
	if ids, err := h.read("/proc/self/uid_map"); err == nil && strings.Join(strings.Fields(ids), " ") != "0 0 4294967295" {
		return errors.New("capabilities of a user namespace do not count")
	}
	return nil
}

// hint adds to an error of the kernel's what may be behind it. Lockdown as
// Linux has it takes our programs, which call no helper to read memory.
func (h host) hint(err error) error {
	state, _ := h.read("/sys/kernel/security/lockdown")
	_, after, _ := strings.Cut(state, "[")
	mode, _, locked := strings.Cut(after, "]")
	if errors.Is(err, unix.EPERM) && locked && mode != "none" {
		return fmt.Errorf("%w; the kernel is locked down (%s)", err, mode)
	}
	return err
}

func (h host) missingCapabilities() ([]string, error) {
	status, err := h.read("/proc/self/status")
	if err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	_, after, _ := strings.Cut(status, "\nCapEff:")
	value, _, _ := strings.Cut(after, "\n")
	have, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
	if err != nil {
		return nil, fmt.Errorf("read own capabilities: %w", err)
	}
	var missing []string
	for _, c := range needed {
		if have&c.bits == 0 {
			missing = append(missing, c.name)
		}
	}
	return missing, nil
}

// ownCgroup is the directory of this process's control group of version 2.
func (h host) ownCgroup() (string, error) { return cgroup.Host{Root: h.root}.Dir() }

// checkCgroup2 tells whether dir is a control group of version 2.
func checkCgroup2(dir string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("cgroup %s: %w", dir, err)
	}
	if uint32(s.Type) != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is no cgroup of version 2", dir)
	}
	return nil
}

// ownNetns is the number of this process's network namespace.
func ownNetns() (uint32, error) {
	var s unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &s); err != nil {
		return 0, fmt.Errorf("find own network namespace: %w", err)
	}
	return uint32(s.Ino), nil
}
