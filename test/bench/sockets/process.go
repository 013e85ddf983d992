package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// answerTimeout is far above what any answer needs.
const answerTimeout = time.Minute

// process is this program, started again in another role. It reads its
// configuration and then requests, a line of JSON each, answers each by a line,
// and ends with its input.
type process struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan line
}

type line struct {
	raw json.RawMessage
	err error
}

// failure is an answer that is none.
type failure struct {
	Error string `json:"error,omitempty"`
}

// startProcess starts it on these CPUs and in this control group, nil: this process's
// own, and waits until it is ready.
func startProcess(ctx context.Context, role string, config any, cpus cpuSet, in *group, stderr io.Writer) (*process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	if in != nil {
		err = in.start(cmd, cpus)
	} else {
		err = startOn(cmd, cpus)
	}
	if cmd.Process == nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	p := &process{cmd: cmd, in: stdin, lines: make(chan line)}
	go p.read(out) // ends with the process, see stop
	if err == nil {
		err = p.ask(ctx, config, nil)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", role, err), p.stop())
	}
	return p, nil
}

func (p *process) read(out io.Reader) {
	defer close(p.lines)
	d := json.NewDecoder(out)
	for {
		var l line
		if l.err = d.Decode(&l.raw); l.err == io.EOF {
			return
		}
		p.lines <- l
		if l.err != nil {
			return
		}
	}
}

// ask sends a request and waits for the answer; nil: it tells nothing.
func (p *process) ask(ctx context.Context, request, answer any) error {
	if err := json.NewEncoder(p.in).Encode(request); err != nil {
		return fmt.Errorf("ask: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	select {
	case <-ctx.Done():
		return fmt.Errorf("wait for an answer: %w", ctx.Err())
	case l, ok := <-p.lines:
		if !ok {
			return errors.New("the process is gone")
		}
		if l.err != nil {
			return fmt.Errorf("read answer: %w", l.err)
		}
		var f failure
		if err := json.Unmarshal(l.raw, &f); err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		if f.Error != "" {
			return errors.New(f.Error)
		}
		if answer == nil {
			return nil
		}
		if err := json.Unmarshal(l.raw, answer); err != nil {
			return fmt.Errorf("read answer: %w", err)
		}
		return nil
	}
}

func (p *process) signal(s syscall.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil {
		return fmt.Errorf("send %v: %w", s, err)
	}
	return nil
}

// stop ends the process and reaps it.
func (p *process) stop() error {
	// It may be gone already: Wait tells.
	_ = p.in.Close()
	kill := time.AfterFunc(10*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	for range p.lines { // nobody waits for them
	}
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("process: %w", err)
	}
	return nil
}

// converse is the other end: it answers requests until there are no more.
func converse[R any](in *json.Decoder, out io.Writer, do func(R) (any, error)) error {
	answers := json.NewEncoder(out)
	var answer any = struct{}{} // ready
	for {
		if err := answers.Encode(answer); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
		var r R
		err := in.Decode(&r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		if answer, err = do(r); err != nil {
			answer = failure{err.Error()}
		}
	}
}

// cpuSet is where a process may run; nil: where it likes.
type cpuSet []int

// allowed are the CPUs that this process may use.
func allowed() (cpuSet, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read CPU affinity: %w", err)
	}
	return listed(&set), nil
}

func listed(set *unix.CPUSet) cpuSet {
	var out cpuSet
	for cpu := range len(set) * 64 {
		if set.IsSet(cpu) {
			out = append(out, cpu)
		}
	}
	return out
}

// node's CPU is the first, the sender's the second: with one alone there is nothing
// to choose.
func (s cpuSet) node() cpuSet {
	if len(s) < 2 {
		return nil
	}
	return s[:1]
}

func (s cpuSet) sender() cpuSet {
	if len(s) < 2 {
		return nil
	}
	return s[1:2]
}

// startOn starts a process on these CPUs: it inherits the calling thread's.
func startOn(cmd *exec.Cmd, cpus cpuSet) error {
	if cpus == nil {
		return cmd.Start()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("read CPU affinity: %w", err)
	}
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("bind to CPUs %v: %w", cpus, err)
	}
	err := cmd.Start()
	if back := unix.SchedSetaffinity(0, &before); back != nil {
		err = errors.Join(err, fmt.Errorf("restore CPU affinity: %w", back))
	}
	return err
}

// Clocks, in nanoseconds.
func clock(id int32) int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(id, &ts) // these two can't fail
	return ts.Nano()
}

// now is the machine's monotonic clock, which all processes share.
func now() int64 { return clock(unix.CLOCK_MONOTONIC) }

// cpuTime is what this process has used, in user and kernel mode.
func cpuTime() int64 { return clock(unix.CLOCK_PROCESS_CPUTIME_ID) }
