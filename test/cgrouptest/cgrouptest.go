// Package cgrouptest bounds the CPU time of processes that tests and benchmarks
// start, by control groups: of version 2 where that has the controller, else of
// version 1. It needs root.
package cgrouptest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

// Period is that of quotas: short, so that a process is stopped for less than a
// period at a time.
const Period = 10 * time.Millisecond

// Group is a control group.
type Group struct {
	dir string
	v2  bool
}

// New makes a group without bounds. Remove it once its processes have ended.
func New() (*Group, error) {
	// Version 2 hands a controller on to groups below those that have no processes
	// of their own: to those below the root.
	const root = "/sys/fs/cgroup"
	_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+cpu"), 0)
	dir, err := os.MkdirTemp(root, "periscope-test-")
	if err == nil {
		if _, err = os.Stat(filepath.Join(dir, "cpu.max")); err == nil {
			return &Group{dir, true}, nil
		}
		_ = os.Remove(dir)
	}
	dir, err = os.MkdirTemp(filepath.Join(root, "cpu"), "periscope-test-")
	if err != nil {
		return nil, fmt.Errorf("no control group for CPU time: %w", err)
	}
	return &Group{dir, false}, nil
}

// Command is a command that runs in the group from its beginning.
func (g *Group) Command(program string, args ...string) *exec.Cmd {
	return exec.Command("/bin/sh", append([]string{"-c", `echo $$ > "$0" && exec "$@"`, filepath.Join(g.dir, "cgroup.procs"), program}, args...)...)
}

// Add moves a process into the group.
func (g *Group) Add(pid int) error { return g.write("cgroup.procs", strconv.Itoa(pid)) }

// Version is that of the group, 1 or 2.
func (g *Group) Version() int {
	if g.v2 {
		return 2
	}
	return 1
}

// Quota lets the group's processes use so many CPUs at most, 0.1 at least; 0: all.
func (g *Group) Quota(cpus float64) error {
	quota, period := "-1", strconv.FormatInt(Period.Microseconds(), 10)
	if cpus > 0 {
		quota = strconv.Itoa(int(cpus * float64(Period.Microseconds())))
	}
	if g.v2 {
		if cpus <= 0 {
			quota = "max"
		}
		return g.write("cpu.max", quota+" "+period)
	}
	return errors.Join(g.write("cpu.cfs_period_us", period), g.write("cpu.cfs_quota_us", quota))
}

// Weight is what the group's processes have of the CPUs where others want them too,
// from 1 to 10,000; others have 100.
func (g *Group) Weight(weight int) error {
	if g.v2 {
		return g.write("cpu.weight", strconv.Itoa(weight))
	}
	return g.write("cpu.shares", strconv.Itoa(max(2, weight*1024/100)))
}

func (g *Group) write(file, text string) error {
	return os.WriteFile(filepath.Join(g.dir, file), []byte(text), 0)
}

// Remove removes the group; its processes leave it a moment after their end.
func (g *Group) Remove() (err error) {
	for range 100 {
		if err = os.Remove(g.dir); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
