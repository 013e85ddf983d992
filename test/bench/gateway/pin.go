package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// pinning says which CPU the gateways have, and which everything else.
type pinning struct {
	on      bool // with one CPU there is nothing to choose
	gateway int
	rest    int
}

// pinnedEnv tells the program that it has been started again on its own CPU,
// and names the CPU of the gateways.
const pinnedEnv = "PERISCOPE_BENCH_GATEWAY_CPU"

// pin moves this process to the second CPU that it may use, and leaves the
// first one to the gateways. Every thread must be there, those of the Go
// runtime as well, so the program starts itself again: affinity outlives exec.
func pin() (pinning, error) {
	var allowed unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return pinning{}, fmt.Errorf("read CPU affinity: %w", err)
	}
	cpus := listed(&allowed)
	if v := os.Getenv(pinnedEnv); v != "" {
		first, err := strconv.Atoi(v)
		if err != nil || len(cpus) != 1 {
			return pinning{}, fmt.Errorf("%s is set by this program only", pinnedEnv)
		}
		return pinning{on: true, gateway: first, rest: cpus[0]}, nil
	}
	if len(cpus) < 2 {
		return pinning{}, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return pinning{}, fmt.Errorf("find own executable: %w", err)
	}
	// The caller has locked this goroutine to its thread, and exec keeps the
	// calling thread's affinity.
	if err := setAffinity(cpus[1]); err != nil {
		return pinning{}, err
	}
	env := append(os.Environ(), pinnedEnv+"="+strconv.Itoa(cpus[0]))
	return pinning{}, fmt.Errorf("start again on CPU %d: %w", cpus[1], syscall.Exec(exe, os.Args, env))
}

// start has a process start on the gateways' CPU. The calling goroutine must be
// locked to its thread.
func (p pinning) start(start func() error) error {
	if !p.on {
		return start()
	}
	if err := setAffinity(p.gateway); err != nil {
		return err
	}
	return errors.Join(start(), setAffinity(p.rest))
}

func listed(set *unix.CPUSet) []int {
	var out []int
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			out = append(out, cpu)
		}
	}
	return out
}

// setAffinity binds the calling thread.
func setAffinity(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to CPU %d: %w", cpu, err)
	}
	return nil
}
