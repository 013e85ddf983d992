package cgroup

import (
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
)

// DefaultWeight is what a group has that nobody gave a weight.
const DefaultWeight = 100

// maxBeside bounds the groups that are looked at in one directory.
const maxBeside = 1000

// CPU is what control groups leave a process of the CPUs.
type CPU struct {
	Version int    // of the groups that bound CPU time, 1 or 2
	Group   string // directory of the process's own
	Root    bool   // the process is in no group below the root that has a weight
	Weight  float64
	// Modest: where CPUs are short, another group that can be seen has more of them
	// than the process's, or where none can be seen (in a container), its weight is
	// less than the usual one.
	Modest bool
	Quota  float64 // CPUs at most, the least of all groups around the process; 0: all
}

// Fault says why others may be slowed down by the process; empty: nothing is
// known against it.
func (c CPU) Fault() string {
	switch {
	case c.Root:
		return "it is in no control group of its own that has a CPU weight"
	case !c.Modest:
		return fmt.Sprintf("its control group has the CPU weight %g, and none beside it more", c.Weight)
	}
	return ""
}

// files are those of a version's groups. Weights are in version 2's measure.
type files struct {
	version      int
	weight       string
	perWeight    float64
	quota        func(h Host, dir string) (cpus float64)
	rootsOwnFile string // only the root of all has it, with a weight that means nothing
}

// find gives the process's group that bounds its CPU time, and where that hierarchy is
// mounted.
func (h Host) find() (of files, dir, mount string, err error) {
	if dir, mount, err = h.dir("cpu"); err == nil {
		return files{1, "cpu.shares", 1024. / DefaultWeight, quota1, "release_agent"}, dir, mount, nil
	}
	dir, mount, err = h.dir("")
	return files{2, "cpu.weight", 1, quota2, ""}, dir, mount, err
}

// CPU reads what there is now.
func (h Host) CPU() (CPU, error) {
	of, dir, mount, err := h.find()
	if err != nil {
		return CPU{}, err
	}
	out := CPU{Version: of.version, Group: dir, Root: true, Quota: h.quota(of, dir, mount)}
	for top := false; !top; dir = path.Dir(dir) {
		top = dir == mount || dir == "/"
		weight, ok := h.weight(of, dir)
		if !ok {
			continue // the group's parent bounds it, or it is the root
		}
		if out.Root {
			out.Root, out.Weight = false, weight
		}
		if top {
			out.Modest = out.Modest || weight < DefaultWeight
		} else {
			out.Modest = out.Modest || h.greatestBeside(of, dir) > weight
		}
	}
	return out, nil
}

// Quota finds the groups around the process. The function that it gives reads how
// many CPUs they leave it at most; 0: all, or it is not known.
func (h Host) Quota() func() float64 {
	of, dir, mount, err := h.find()
	if err != nil {
		return func() float64 { return 0 }
	}
	return func() float64 { return h.quota(of, dir, mount) }
}

// quota is the least of a group's and of those around it.
func (h Host) quota(of files, dir, mount string) (least float64) {
	for top := false; !top; dir = path.Dir(dir) {
		top = dir == mount || dir == "/"
		if q := of.quota(h, dir); q > 0 && (least == 0 || q < least) {
			least = q
		}
	}
	return least
}

// weight is a group's; false: it has none, or is the root of all.
func (h Host) weight(of files, dir string) (float64, bool) {
	if of.rootsOwnFile != "" {
		if _, err := os.Stat(h.path(path.Join(dir, of.rootsOwnFile))); err == nil {
			return 0, false
		}
	}
	text, err := h.read(path.Join(dir, of.weight))
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
	return n / of.perWeight, err == nil
}

// greatestBeside is the greatest weight of the groups beside one.
func (h Host) greatestBeside(of files, dir string) (greatest float64) {
	parent, err := os.Open(h.path(path.Dir(dir)))
	if err != nil {
		return 0
	}
	defer parent.Close()
	entries, _ := parent.ReadDir(maxBeside)
	for _, e := range entries {
		if beside := path.Join(path.Dir(dir), e.Name()); e.IsDir() && beside != dir {
			if w, ok := h.weight(of, beside); ok {
				greatest = max(greatest, w)
			}
		}
	}
	return greatest
}

// quota2 reads "max 100000" or "50000 100000", both in µs.
func quota2(h Host, dir string) float64 {
	text, err := h.read(path.Join(dir, "cpu.max"))
	if err != nil {
		return 0
	}
	f := strings.Fields(text)
	if len(f) != 2 {
		return 0
	}
	return ratio(f[0], f[1])
}

func quota1(h Host, dir string) float64 {
	quota, err := h.read(path.Join(dir, "cpu.cfs_quota_us"))
	if err != nil {
		return 0
	}
	period, err := h.read(path.Join(dir, "cpu.cfs_period_us"))
	if err != nil {
		return 0
	}
	return ratio(strings.TrimSpace(quota), strings.TrimSpace(period))
}

// ratio is 0 for what is no number, and for -1, which is no quota.
func ratio(quota, period string) float64 {
	q, err := strconv.ParseFloat(quota, 64)
	if err != nil || q < 0 {
		return 0
	}
	p, err := strconv.ParseFloat(period, 64)
	if err != nil || p <= 0 {
		return 0
	}
	return q / p
}
