package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine says where a run was made. What cannot be read is empty: the run is
// worth as much without it.
type machine struct {
	cpu    string
	cores  int
	kernel string
	load   string // average of the last minute, before the run
}

func thisMachine() machine {
	var m machine
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			name, v, _ := strings.Cut(line, ":")
			switch strings.TrimSpace(name) {
			case "processor":
				m.cores++
			case "model name":
				m.cpu = strings.TrimSpace(v)
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		m.kernel = unix.ByteSliceToString(u.Release[:])
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.load, _, _ = strings.Cut(string(b), " ")
	}
	return m
}

// cpuBusy is the time that a CPU has spent on anything but idling, since the
// machine started, by /proc/stat. Includes time stolen by a hypervisor.
func cpuBusy(cpu int) (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, fmt.Errorf("read CPU times: %w", err)
	}
	prefix := fmt.Sprintf("cpu%d ", cpu)
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		v, ok := strings.CutPrefix(sc.Text(), prefix)
		if !ok {
			continue
		}
		// user nice system idle iowait irq softirq steal, in ticks of 10 ms
		var ticks int64
		for i, f := range strings.Fields(v) {
			if i == 3 || i == 4 || i > 7 {
				continue
			}
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read CPU times: %w", err)
			}
			ticks += n
		}
		return time.Duration(ticks) * 10 * time.Millisecond, nil
	}
	return 0, fmt.Errorf("read CPU times: no CPU %d", cpu)
}
