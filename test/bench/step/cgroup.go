package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cgroup holds the node to a part of a CPU: a control group of version 2 where that
// has the controller, else of version 1. Within its part the node goes first: what
// else the machine does is not to be taken for a lack of capacity.
type cgroup struct {
	dir   string
	v2    bool
	group string // of version 2, of its own too where the controller is of version 1; empty: none
}

const cgroupPrefix = "periscope-bench-"

// makeCgroup makes the group; it needs root, or a group that was delegated.
func makeCgroup() (*cgroup, error) {
	unified, cpu, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	g := &cgroup{}
	if unified != "" {
		if g.group, err = os.MkdirTemp(unified, cgroupPrefix); err != nil {
			return nil, fmt.Errorf("make control group: %w: run as root", err)
		}
		_ = os.WriteFile(filepath.Join(unified, "cgroup.subtree_control"), []byte("+cpu"), 0) // if it can't, there is no cpu.max
		if _, err := os.Stat(filepath.Join(g.group, "cpu.max")); err == nil {
			g.dir, g.v2 = g.group, true
			return g, g.write("cpu.weight", "1000")
		}
	}
	if cpu == "" {
		return nil, errors.Join(errors.New("make control group: no controller for CPU time"), g.remove())
	}
	if g.dir, err = os.MkdirTemp(cpu, cgroupPrefix); err != nil {
		return nil, errors.Join(fmt.Errorf("make control group: %w: run as root", err), g.remove())
	}
	return g, g.write("cpu.shares", "10240")
}

// cgroupMounts finds this process's own groups: the one of version 2, and the one
// of the controller of CPU time of version 1, or nothing.
func cgroupMounts() (unified, cpu string, err error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", "", fmt.Errorf("find control groups: %w", err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", "", fmt.Errorf("find control groups: %w", err)
	}
	paths := map[string]string{} // by controller
	for line := range strings.Lines(string(own)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			for c := range strings.SplitSeq(f[1], ",") {
				paths[c] = f[2]
			}
		}
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		switch {
		case len(f) < 4:
		case f[2] == "cgroup2":
			unified = filepath.Join(f[1], paths[""])
		case f[2] == "cgroup" && strings.Contains(","+f[3]+",", ",cpu,"):
			cpu = filepath.Join(f[1], paths["cpu"])
		}
	}
	return unified, cpu, nil
}

// take puts a process into the group.
func (g *cgroup) take(pid int) error {
	err := g.write("cgroup.procs", strconv.Itoa(pid))
	if !g.v2 && g.group != "" {
		err = errors.Join(err, os.WriteFile(filepath.Join(g.group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
	}
	return err
}

// hold gives the group so much CPU time in each period; 0: no limit.
func (g *cgroup) hold(cpus float64, period time.Duration) error {
	quota := strconv.Itoa(int(cpus * float64(period.Microseconds())))
	p := strconv.FormatInt(period.Microseconds(), 10)
	switch {
	case g.v2 && cpus == 0:
		return g.write("cpu.max", "max")
	case g.v2:
		return g.write("cpu.max", quota+" "+p)
	case cpus == 0:
		return g.write("cpu.cfs_quota_us", "-1")
	}
	return errors.Join(g.write("cpu.cfs_quota_us", "-1"), g.write("cpu.cfs_period_us", p), g.write("cpu.cfs_quota_us", quota))
}

func (g *cgroup) write(name, value string) error {
	if err := os.WriteFile(filepath.Join(g.dir, name), []byte(value), 0); err != nil {
		return fmt.Errorf("control group: %w", err)
	}
	return nil
}

// remove removes the group, once its processes are gone.
func (g *cgroup) remove() (err error) {
	for _, dir := range []string{g.dir, g.group} {
		if dir == "" {
			continue
		}
		for range 100 { // processes leave it a moment after their end
			if err = os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
				err = nil
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("remove control group: %w", err)
		}
	}
	return nil
}
