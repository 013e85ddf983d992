package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

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
