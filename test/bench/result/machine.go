// Package result is what benchmarks have in common that write their figures
// into a document: where a run was made, medians over rounds with what they are
// compared with, and the marked section of a Markdown file.
//
// It never measures anything. Benchmarks import it; it imports nothing of ours.
package result

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Machine says where a run was made. What cannot be read is empty: the run is
// worth as much without it.
type Machine struct {
	CPU    string
	Cores  int
	Kernel string
	Load   string // average of the last minute, before the run
}

// ReadMachine reads this machine's.
func ReadMachine() Machine {
	var m Machine
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			name, v, _ := strings.Cut(line, ":")
			switch strings.TrimSpace(name) {
			case "processor":
				m.Cores++
			case "model name":
				m.CPU = strings.TrimSpace(v)
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		// Without what a distribution or a host calls its build.
		m.Kernel, _, _ = strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(b), " ")
	}
	return m
}

// String describes the machine, without its load.
func (m Machine) String() string {
	return fmt.Sprintf("%s, %d CPUs, Linux %s", orUnknown(m.CPU), m.Cores, orUnknown(m.Kernel))
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}
