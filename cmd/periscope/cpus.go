package main

import (
	"math"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// cpusOf is how many CPUs the process may use at a time. Go counts the quotas of its
// control groups in, but as whole CPUs, and never less than two.
func cpusOf() float64 { return min(float64(runtime.GOMAXPROCS(0)), cpuQuota("/")) }

// cpuQuota is what the control groups that this process is in, of either version,
// leave it of CPUs; infinite: all. root is that of /proc and /sys.
func cpuQuota(root string) float64 {
	read := func(file string) []string {
		raw, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			return nil // no such group, controller or system: no quota
		}
		return strings.Fields(string(raw))
	}
	groups, err1 := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	mounts, err2 := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	least := math.Inf(1)
	if err1 != nil || err2 != nil {
		return least
	}
	for mount := range strings.Lines(string(mounts)) {
		top, dir, v2 := cpuGroup(mount, string(groups))
		for ; dir != ""; dir = path.Dir(dir) {
			var limit []string // quota and period, in µs
			if v2 {
				limit = read(path.Join(dir, "cpu.max"))
			} else {
				limit = append(read(path.Join(dir, "cpu.cfs_quota_us")), read(path.Join(dir, "cpu.cfs_period_us"))...)
			}
			least = min(least, quotaOf(limit))
			if dir == top {
				break
			}
		}
	}
	return least
}

// cpuGroup gives the directory of this process's group, and the uppermost, if a line
// of mountinfo is of a hierarchy that may bound CPU time.
func cpuGroup(mount, groups string) (top, dir string, v2 bool) {
	place, super, _ := strings.Cut(mount, " - ")
	f, s := strings.Fields(place), strings.Fields(super)
	if len(f) < 5 || len(s) < 3 {
		return "", "", false
	}
	v2 = s[0] == "cgroup2"
	if !v2 && !(s[0] == "cgroup" && strings.Contains(","+s[2]+",", ",cpu,")) {
		return "", "", false
	}
	for line := range strings.Lines(groups) {
		g := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(g) < 3 || v2 && g[1] != "" || !v2 && !strings.Contains(","+g[1]+",", ",cpu,") {
			continue
		}
		rest, below := strings.CutPrefix(g[2]+"/", strings.TrimSuffix(f[3], "/")+"/")
		if !below || strings.HasPrefix(rest, "..") {
			rest = "" // not to be seen from here: what is mounted is the nearest to it
		}
		return path.Clean(f[4]), path.Join(f[4], rest), v2
	}
	return "", "", false
}

// quotaOf reads "QUOTA PERIOD"; no quota, as "max" or -1, is infinite.
func quotaOf(limit []string) float64 {
	if len(limit) != 2 {
		return math.Inf(1)
	}
	quota, err1 := strconv.ParseFloat(limit[0], 64)
	period, err2 := strconv.ParseFloat(limit[1], 64)
	if err1 != nil || err2 != nil || !(quota > 0) || !(period > 0) {
		return math.Inf(1)
	}
	return quota / period
}
