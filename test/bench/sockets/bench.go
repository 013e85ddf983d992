package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/node/sockstat"
)

// bench is what a run has made for itself.
type bench struct {
	progress io.Writer
	cpus     cpuSet // that there are
	nodeCPUs cpuSet
	pin      string // directory for pinned programs, in a BPF file system
}

// newBench brings up loopback and mounts a BPF file system, in this process's own
// namespaces.
func newBench(ctx context.Context, progress io.Writer) (_ *bench, err error) {
	b := &bench{progress: progress}
	if b.cpus, err = everyCPU(); err != nil {
		return nil, err
	}
	b.nodeCPUs = b.cpus.node()
	if err := loopback(); err != nil {
		return nil, fmt.Errorf("bring up loopback: %w", err)
	}
	dir, err := os.MkdirTemp("", "periscope-bench-sockets-")
	if err != nil {
		return nil, fmt.Errorf("mount a BPF file system: %w", err)
	}
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0755"); err != nil {
		return nil, errors.Join(fmt.Errorf("mount a BPF file system: %w", err), os.Remove(dir))
	}
	b.pin = filepath.Join(dir, "periscope")
	return b, nil
}

func (b *bench) close() error {
	dir := filepath.Dir(b.pin)
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	return os.Remove(dir)
}

// everyCPU are those that the first process had, before it gave this one its own.
func everyCPU() (cpuSet, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(os.Getppid(), &set); err != nil {
		return nil, fmt.Errorf("read CPU affinity: %w", err)
	}
	return listed(&set), nil
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING | unix.IFF_LOOPBACK)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}

// all measures what is wanted. New connections come last: the kernel remembers each
// for a minute, and inet_diag walks through what it remembers.
func (b *bench) all(ctx context.Context, o options, r *report) error {
	start := time.Now()
	for _, n := range o.sizes {
		got, err := b.costs(ctx, n)
		if err != nil {
			return fmt.Errorf("samples of %d connections: %w", n, err)
		}
		r.costs = append(r.costs, got)
	}
	overhead := func(way string, blocks int, until time.Time) error {
		if blocks == 0 {
			return nil
		}
		got, err := b.overhead(ctx, way, blocks, o.window, until)
		if err != nil {
			return fmt.Errorf("overhead, %s: %w", way, err)
		}
		r.overheads = append(r.overheads, got)
		return nil
	}
	if err := overhead(kept, o.blocks, start.Add(o.limit*4/10)); err != nil {
		return err
	}
	steps := slices.DeleteFunc(scenarios(), func(s scenario) bool { return !o.only.MatchString(s.name) })
	if o.rounds > 0 {
		var err error
		if r.steps, err = b.detect(ctx, steps, o.rounds, start.Add(o.limit*9/10)); err != nil {
			return err
		}
	}
	return overhead(once, (o.blocks+2)/3, start.Add(o.limit)) // there is no goal
}

// rig is a node in its control group, and what is loaded into that.
type rig struct {
	group *group
	node  *process
}

// startNode starts a node; load pins programs for it.
func (b *bench) startNode(ctx context.Context, cfg nodeConfig, load bool) (_ *rig, err error) {
	r := &rig{}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close(b))
		}
	}()
	if r.group, err = newGroup(); err != nil {
		return nil, err
	}
	if load {
		cfg.Pin = b.pin
		if _, err := sockstat.Load(sockstat.Programs{Cgroup: r.group.dir, Pin: b.pin, Ports: []uint16{listenAddress.Port()}, Version: "bench"}); err != nil {
			return nil, err
		}
	}
	if r.node, err = startProcess(ctx, roleNode, cfg, b.nodeCPUs, r.group, b.progress); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *rig) close(b *bench) error {
	var err error
	if r.node != nil {
		err = r.node.stop()
	}
	if _, gone := os.Stat(b.pin); gone == nil {
		err = errors.Join(err, sockstat.Unload(b.pin))
	}
	if r.group != nil {
		err = errors.Join(err, r.group.close())
	}
	return err
}

func (r *rig) ask(ctx context.Context, request nodeRequest) (nodeAnswer, error) {
	var a nodeAnswer
	err := r.node.ask(ctx, request, &a)
	return a, err
}
