package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// group is a control group: one of version 2, by which sockets are known, and one
// that rules CPU time, which is the same where version 2 has that controller.
type group struct {
	dir string
	cpu string // of version 1; empty: dir
}

const cpuPeriod = 100 * time.Millisecond

// newGroup makes one with ten times the weight of others: what else the machine does
// should disturb little. Niceness would count within a session only.
func newGroup() (_ *group, err error) {
	g := &group{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a control group: %w", err), g.close())
		}
	}()
	root, err := mounted("cgroup2", "")
	if err != nil {
		return nil, err
	}
	if g.dir, err = os.MkdirTemp(root, "periscope-bench-sockets-"); err != nil {
		return nil, err
	}
	// It may not be allowed, or be version 1's: the file tells.
	_ = os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+cpu"), 0)
	if weight := filepath.Join(g.dir, "cpu.weight"); exists(weight) {
		return g, write(weight, "1000")
	}
	if root, err = mounted("cgroup", "cpu"); err != nil {
		return nil, err
	}
	if g.cpu, err = os.MkdirTemp(root, "periscope-bench-sockets-"); err != nil {
		return nil, err
	}
	return g, write(filepath.Join(g.cpu, "cpu.shares"), "10240")
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// mounted is where a file system with this option is mounted.
func mounted(kind, option string) (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("find control groups: %w", err)
	}
	for l := range strings.Lines(string(mounts)) {
		f := strings.Fields(l)
		if len(f) > 3 && f[2] == kind && (option == "" || strings.Contains(","+f[3]+",", ","+option+",")) {
			return f[1], nil
		}
	}
	return "", fmt.Errorf("no %s %s is mounted", kind, option)
}

// start starts a process in it, on these CPUs.
func (g *group) start(cmd *exec.Cmd, cpus cpuSet) error {
	dir, err := os.Open(g.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	if err := startOn(cmd, cpus); err != nil || g.cpu == "" {
		return err
	}
	return write(filepath.Join(g.cpu, "cgroup.procs"), fmt.Sprint(cmd.Process.Pid))
}

// limit bounds its CPU time, in CPUs; 0: no bound.
func (g *group) limit(cpus float64) error {
	quota := fmt.Sprint(int64(cpus * float64(cpuPeriod.Microseconds())))
	switch {
	case g.cpu == "" && cpus == 0:
		return write(filepath.Join(g.dir, "cpu.max"), "max")
	case g.cpu == "":
		return write(filepath.Join(g.dir, "cpu.max"), fmt.Sprint(quota, " ", cpuPeriod.Microseconds()))
	case cpus == 0:
		quota = "-1"
	}
	return write(filepath.Join(g.cpu, "cpu.cfs_quota_us"), quota)
}

func write(file, content string) error {
	if err := os.WriteFile(file, []byte(content), 0); err != nil {
		return fmt.Errorf("set cgroup: %w", err)
	}
	return nil
}

// close removes it; its processes must have ended.
func (g *group) close() error {
	var failed error
	for _, dir := range []string{g.cpu, g.dir} {
		if dir == "" {
			continue
		}
		var err error
		for range 200 { // processes leave it a moment after their end
			if err = os.Remove(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
				err = nil
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		failed = errors.Join(failed, err)
	}
	return failed
}
