package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// cpuTimes of the machine since its start, in ticks.
type cpuTimes struct{ all, idle float64 }

func readCPU() (cpuTimes, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuTimes{}, fmt.Errorf("read CPU time: %w", err)
	}
	return parseCPU(string(b))
}

// parseCPU reads "cpu USER NICE SYSTEM IDLE IOWAIT …".
func parseCPU(stat string) (cpuTimes, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 6 || fields[0] != "cpu" {
		return cpuTimes{}, errors.New("read CPU time: no line of it")
	}
	var t cpuTimes
	for i, f := range fields[1:min(len(fields), 9)] { // what follows is counted twice
		n, err := strconv.ParseFloat(f, 64)
		if err != nil {
			return cpuTimes{}, fmt.Errorf("read CPU time: %w", err)
		}
		t.all += n
		if i == 3 || i == 4 {
			t.idle += n
		}
	}
	return t, nil
}

// idleSince is the part of the time that nobody used.
func (t cpuTimes) idleSince(u cpuTimes) float64 { return (t.idle - u.idle) / max(1, t.all-u.all) }
