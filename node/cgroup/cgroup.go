// Package cgroup tells which control groups the process is in, and what they
// leave it of the CPUs.
//
// It never changes a group. Package node/sockstat and the commands may import it;
// it imports none of ours.
package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Host is where the process looks.
type Host struct {
	Root string // of /proc and /sys; empty: the real ones
}

func (h Host) path(p string) string { return filepath.Join("/", h.Root, p) }

func (h Host) read(p string) (string, error) {
	raw, err := os.ReadFile(h.path(p))
	return string(raw), err
}

// Dir is the directory of the process's control group of version 2.
func (h Host) Dir() (string, error) {
	dir, _, err := h.dir("")
	return dir, err
}

// dir is the directory of the process's control group in the hierarchy that has
// a controller of version 1, or in that of version 2 (empty), and the directory
// in which that hierarchy is mounted.
func (h Host) dir(controller string) (dir, mount string, err error) {
	own, err := h.own(controller)
	if err != nil {
		return "", "", fmt.Errorf("find own cgroup: %w", err)
	}
	mounts, err := h.read("/proc/self/mountinfo")
	if err != nil {
		return "", "", fmt.Errorf("find own cgroup: %w", err)
	}
	mounted := false
	for line := range strings.Lines(mounts) {
		point, super, _ := strings.Cut(line, " - ")
		f, s := strings.Fields(point), strings.Fields(super)
		if len(f) < 5 || len(s) < 3 || !has(s, controller) {
			continue
		}
		mounted = true
		rest, below := strings.CutPrefix(own+"/", strings.TrimSuffix(f[3], "/")+"/")
		if dir := path.Join(f[4], rest); below && !strings.HasPrefix(rest, "..") {
			if _, err := os.Stat(h.path(dir)); err == nil {
				return dir, f[4], nil
			}
		}
	}
	switch {
	case mounted:
		return "", "", fmt.Errorf("own cgroup %s is not below any mounted one", own)
	case controller == "":
		return "", "", errors.New("no cgroup of version 2 is mounted (mount -t cgroup2 none /sys/fs/cgroup/unified)")
	}
	return "", "", fmt.Errorf("no cgroup of the controller %s is mounted", controller)
}

// has tells whether a mount, given by its type, source and options, is of the
// controller.
func has(super []string, controller string) bool {
	if controller == "" {
		return super[0] == "cgroup2"
	}
	return super[0] == "cgroup" && slices.Contains(strings.Split(super[2], ","), controller)
}

// own is the path of the process's control group within a hierarchy.
func (h Host) own(controller string) (string, error) {
	groups, err := h.read("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(groups) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && (controller == "" && f[0] == "0" && f[1] == "" || controller != "" && slices.Contains(strings.Split(f[1], ","), controller)) {
			return f[2], nil
		}
	}
	if controller == "" {
		return "", errors.New("this process is in no cgroup of version 2")
	}
	return "", fmt.Errorf("this process is in no cgroup of the controller %s", controller)
}
