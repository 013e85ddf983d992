package cgroup

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of /proc/stat: USER_HZ is 100 on every architecture that Go has.
const tick = 10 * time.Millisecond

// Idle is how long the CPUs that the process may use have stood idle since the
// machine's start, on average: /proc/stat, see proc_stat(5), to 10 ms of each. It
// takes longer the more CPUs and interrupts there are.
func (h Host) Idle() (time.Duration, error) {
	var mine unix.CPUSet
	if err := unix.SchedGetaffinity(0, &mine); err != nil {
		return 0, fmt.Errorf("read idle CPU time: %w", err)
	}
	text, err := h.read("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read idle CPU time: %w", err)
	}
	var idle time.Duration
	cpus := 0
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, "cpu")
		if !ok {
			break // CPUs come first
		}
		f := strings.Fields(rest) // cpuN user nice system idle …
		if len(f) < 5 || strings.HasPrefix(rest, " ") {
			continue // the first line is of all CPUs
		}
		cpu, err := strconv.Atoi(f[0])
		ticks, err2 := strconv.ParseUint(f[4], 10, 48)
		if err != nil || err2 != nil || !mine.IsSet(cpu) {
			continue
		}
		idle += time.Duration(ticks) * tick
		cpus++
	}
	if cpus == 0 {
		return 0, fmt.Errorf("read idle CPU time: %s names no CPU that this process may use", h.path("/proc/stat"))
	}
	return idle / time.Duration(cpus), nil
}
