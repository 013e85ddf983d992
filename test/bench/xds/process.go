package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// memory of a process, in bytes.
type memory struct {
	Resident int64 `json:"resident"`
	Peak     int64 `json:"peak"`
}

// processMemory reads /proc; pid may be "self".
func processMemory(pid string) (memory, error) {
	b, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return memory{}, fmt.Errorf("read memory: %w", err)
	}
	return parseStatus(string(b))
}

func parseStatus(s string) (memory, error) {
	var m memory
	for line := range strings.Lines(s) {
		name, v, _ := strings.Cut(line, ":")
		var to *int64
		switch name {
		case "VmRSS":
			to = &m.Resident
		case "VmHWM":
			to = &m.Peak
		default:
			continue
		}
		kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
		if err != nil {
			return memory{}, fmt.Errorf("read memory: %w", err)
		}
		*to = kb << 10
	}
	if m.Resident == 0 || m.Peak == 0 {
		return memory{}, errors.New("read memory: no VmRSS or no VmHWM")
	}
	return m, nil
}

// ownCPU is the time that this process has had so far, in user and kernel mode.
func ownCPU() (time.Duration, error) {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}
