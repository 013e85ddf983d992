package cgroup

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// tree makes the files of a host.
func tree(t *testing.T, files map[string]string) Host {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Host{root}
}

// The own group of version 2, in the ways that hosts and containers mount it.
func TestDir(t *testing.T) {
	for name, c := range map[string]struct{ groups, mounts, dir, want string }{
		"version 2":       {"0::/system.slice/node\n", "25 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "sys/fs/cgroup/system.slice/node", "/sys/fs/cgroup/system.slice/node"},
		"hybrid":          {"9:cpu:/a\n1:name=systemd:/\n0::/node\n", "30 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n31 1 0:3 / /sys/fs/cgroup/unified rw shared:3 - cgroup2 none rw\n", "sys/fs/cgroup/unified/node", "/sys/fs/cgroup/unified/node"},
		"root":            {"0::/\n", "25 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "sys/fs/cgroup", "/sys/fs/cgroup"},
		"own namespace":   {"0::/\n", "25 1 0:1 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "sys/fs/cgroup", "/sys/fs/cgroup"},
		"bind mount":      {"0::/pods/a/node\n", "25 1 0:1 /pods/a /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "sys/fs/cgroup/node", "/sys/fs/cgroup/node"},
		"version 1":       {"9:cpu:/\n", "30 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "", "in no cgroup of version 2"},
		"not mounted":     {"9:cpu:/\n0::/\n", "30 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "", "no cgroup of version 2 is mounted"},
		"another subtree": {"0::/pods/b\n", "25 1 0:1 /pods/a /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "sys/fs/cgroup", "not below any mounted one"},
		"outside":         {"0::/../b\n", "25 1 0:1 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "sys/fs/cgroup", "not below any mounted one"},
	} {
		t.Run(name, func(t *testing.T) {
			h := tree(t, map[string]string{"proc/self/cgroup": c.groups, "proc/self/mountinfo": c.mounts})
			if err := os.MkdirAll(h.path(c.dir), 0o755); err != nil {
				t.Fatal(err)
			}
			got, err := h.Dir()
			if err != nil {
				got = err.Error()
			}
			if got != c.want && (err == nil || !strings.Contains(got, c.want)) {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

const (
	v2Mount     = "25 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
	hybridMount = "30 1 0:2 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n31 1 0:3 / /sys/fs/cgroup/unified rw shared:3 - cgroup2 none rw\n"
)

func TestCPU(t *testing.T) {
	for name, c := range map[string]struct {
		groups, mounts string
		files          map[string]string // below /sys/fs/cgroup
		want           CPU
	}{
		"a service of systemd's": {"0::/system.slice/node.service\n", v2Mount, map[string]string{
			"cgroup.procs": "", "system.slice/cpu.weight": "100\n", "system.slice/cpu.max": "max 100000\n",
			"system.slice/node.service/cpu.weight": "20\n", "system.slice/node.service/cpu.max": "max 100000\n", "system.slice/envoy.service/cpu.weight": "100\n",
		}, CPU{Version: 2, Group: "/sys/fs/cgroup/system.slice/node.service", Weight: 20, Modest: true}},
		"one like all others": {"0::/system.slice/node.service\n", v2Mount, map[string]string{
			"system.slice/cpu.weight": "100\n", "user.slice/cpu.weight": "100\n",
			"system.slice/node.service/cpu.weight": "100\n", "system.slice/envoy.service/cpu.weight": "100\n", "system.slice/backup.service/cpu.weight": "10\n",
		}, CPU{Version: 2, Group: "/sys/fs/cgroup/system.slice/node.service", Weight: 100}},
		"like others, in a slice that is less": {"0::/periscope.slice/node.service\n", v2Mount, map[string]string{
			"periscope.slice/cpu.weight": "20\n", "system.slice/cpu.weight": "100\n", "periscope.slice/node.service/cpu.weight": "100\n",
		}, CPU{Version: 2, Group: "/sys/fs/cgroup/periscope.slice/node.service", Weight: 100, Modest: true}},
		"all have little": {"0::/node\n", v2Mount, map[string]string{"node/cpu.weight": "20\n", "envoy/cpu.weight": "20\n"},
			CPU{Version: 2, Group: "/sys/fs/cgroup/node", Weight: 20}},
		"the parent's, where its own has none": {"0::/node/workers\n", v2Mount, map[string]string{"node/cpu.weight": "20\n", "node/workers/cgroup.procs": "", "envoy/cpu.weight": "100\n"},
			CPU{Version: 2, Group: "/sys/fs/cgroup/node/workers", Weight: 20, Modest: true}},
		"idle": {"0::/node\n", v2Mount, map[string]string{"node/cpu.weight": "0\n", "node/cpu.idle": "1\n", "envoy/cpu.weight": "100\n"},
			CPU{Version: 2, Group: "/sys/fs/cgroup/node", Modest: true}},
		"a container of Kubernetes'": {"0::/\n", v2Mount, map[string]string{"cpu.weight": "8\n", "cpu.max": "max 100000\n"},
			CPU{Version: 2, Group: "/sys/fs/cgroup", Weight: 8, Modest: true}},
		"a container with what is usual": {"0::/\n", v2Mount, map[string]string{"cpu.weight": "100\n", "cpu.max": "150000 100000\n"},
			CPU{Version: 2, Group: "/sys/fs/cgroup", Weight: 100, Quota: 1.5}},
		"the root":                   {"0::/\n", v2Mount, map[string]string{"cgroup.procs": ""}, CPU{Version: 2, Group: "/sys/fs/cgroup", Root: true}},
		"a group without controller": {"0::/node\n", v2Mount, map[string]string{"node/cgroup.procs": ""}, CPU{Version: 2, Group: "/sys/fs/cgroup/node", Root: true}},
		"the least quota of several": {"0::/a/b\n", v2Mount, map[string]string{"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "300000 100000\n", "a/cpu.weight": "100\n", "a/b/cpu.weight": "100\n"},
			CPU{Version: 2, Group: "/sys/fs/cgroup/a/b", Weight: 100, Quota: 2}},
		"version 1": {"9:cpuacct,cpu:/node\n0::/\n", hybridMount, map[string]string{
			"cpu/release_agent": "", "cpu/cpu.shares": "1024\n", "cpu/envoy/cpu.shares": "1024\n", "unified/cgroup.procs": "",
			"cpu/node/cpu.shares": "256\n", "cpu/node/cpu.cfs_quota_us": "50000\n", "cpu/node/cpu.cfs_period_us": "100000\n",
		}, CPU{Version: 1, Group: "/sys/fs/cgroup/cpu/node", Weight: 25, Modest: true, Quota: 0.5}},
		"version 1, the root": {"9:cpu:/\n0::/\n", hybridMount, map[string]string{"cpu/release_agent": "", "cpu/cpu.shares": "1024\n", "cpu/cpu.cfs_quota_us": "-1\n", "unified/cgroup.procs": ""},
			CPU{Version: 1, Group: "/sys/fs/cgroup/cpu", Root: true}},
		"version 1, a container": {"9:cpu:/docker/a\n", "30 1 0:2 /docker/a /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n", map[string]string{"cpu/cpu.shares": "1024\n", "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
			CPU{Version: 1, Group: "/sys/fs/cgroup/cpu", Weight: 100}},
		"garbage": {"0::/node\n", v2Mount, map[string]string{"node/cpu.weight": "many\n", "node/cpu.max": "max\n"}, CPU{Version: 2, Group: "/sys/fs/cgroup/node", Root: true}},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{"proc/self/cgroup": c.groups, "proc/self/mountinfo": c.mounts}
			for f, content := range c.files {
				files["sys/fs/cgroup/"+f] = content
			}
			got, err := tree(t, files).CPU()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if fault := got.Fault(); (fault == "") != (got.Modest && !got.Root) {
				t.Errorf("fault %q", fault)
			}
		})
	}
}

func TestCPUUnknown(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"no /proc":    {"x": ""},
		"no mounts":   {"proc/self/cgroup": "0::/\n"},
		"not mounted": {"proc/self/cgroup": "9:cpu:/\n0::/\n", "proc/self/mountinfo": "1 0 0:1 / / rw - ext4 /dev/a rw\n"},
	} {
		if c, err := tree(t, files).CPU(); err == nil {
			t.Errorf("%s: %+v", name, c)
		}
	}
	if _, err := (Host{}).CPU(); err != nil {
		t.Errorf("of this host: %v", err)
	}
}

// The mean over the CPUs that the process may use; and what may be missing.
func TestIdle(t *testing.T) {
	stat := "cpu  1 2 3 4000 5\ncpu0 1 0 3 1000 5 0\ncpu1 1 2 3 3000 5 0\ncpu999 1 2 3 77777 5\nintr 1 2 3\ncpu2 1 2 3 9\n"
	got, err := tree(t, map[string]string{"proc/stat": stat}).Idle()
	if err != nil || got != 20*time.Second && got != 10*time.Second { // of a machine with one CPU
		t.Errorf("%v %v", got, err)
	}
	for _, text := range []string{"", "intr 1\n", "cpu  1 2 3 4\ncpu999 1 2 3 4\n", "cpu0 1 2 3\ncpu0 1 2 3 x\ncpu0 1 2 3 -4\n"} {
		if got, err := tree(t, map[string]string{"proc/stat": text}).Idle(); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
	before, err := Host{}.Idle()
	if err != nil || before <= 0 {
		t.Fatal(before, err)
	}
}
