package main

import (
	"math"
	"os"
	"path/filepath"
	"testing"
)

func TestCPUQuota(t *testing.T) {
	const v2 = "25 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
	for name, c := range map[string]struct {
		groups, mounts string
		files          map[string]string
		want           float64
	}{
		"none":              {"0::/a\n", v2, map[string]string{"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, math.Inf(1)},
		"version 2":         {"0::/a\n", v2, map[string]string{"sys/fs/cgroup/a/cpu.max": "60000 100000\n"}, 0.6},
		"of a parent's":     {"0::/a/b\n", v2, map[string]string{"sys/fs/cgroup/a/cpu.max": "5000 10000\n", "sys/fs/cgroup/a/b/cpu.max": "90000 100000\n"}, 0.5},
		"container, no own": {"0::/\n", v2, map[string]string{"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5},
		"bind mount":        {"0::/pods/a\n", "25 1 0:1 /pods/a /sys/fs/cgroup ro - cgroup2 cgroup rw\n", map[string]string{"sys/fs/cgroup/cpu.max": "70000 100000\n"}, 0.7},
		"above the mount":   {"0::/../x\n", v2, map[string]string{"sys/fs/cgroup/cpu.max": "70000 100000\n"}, 0.7},
		"version 1": {"9:name=systemd:/\n3:cpu,cpuacct:/a\n0::/\n", "31 1 0:3 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n32 1 0:4 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n",
			map[string]string{"sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "40000\n", "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 0.4},
		"garbage": {"0::/a\n\n:\nx", v2 + "\nx - cgroup2\n", map[string]string{"sys/fs/cgroup/a/cpu.max": "0 0\n", "sys/fs/cgroup/cpu.max": "x y z\n"}, math.Inf(1)},
	} {
		root := t.TempDir()
		files := map[string]string{"proc/self/cgroup": c.groups, "proc/self/mountinfo": c.mounts}
		for f, text := range c.files {
			files[f] = text
		}
		for f, text := range files {
			file := filepath.Join(root, f)
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Fatal(err)
			}
			mustWriteFile(t, file, text)
		}
		if got := cpuQuota(root); got != c.want {
			t.Errorf("%s: %g CPUs, want %g", name, got, c.want)
		}
	}
	if got := cpuQuota(t.TempDir()); !math.IsInf(got, 1) {
		t.Errorf("without /proc: %g", got)
	}
	if got := cpusOf(); !(got > 0) || math.IsInf(got, 1) {
		t.Errorf("this process may use %g CPUs", got)
	}
}

func mustWriteFile(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
