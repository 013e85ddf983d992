package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// node is a periscope node, a child process in the control group.
type node struct {
	cmd   *exec.Cmd
	dir   string
	log   string
	ended chan struct{}
}

// addresses of a node.
type addresses struct{ listen, admin, orca string }

// startNode starts one that has all the CPU time there is, and waits until it
// serves. The calling goroutine must be locked to its thread.
func (w *world) startNode(ctx context.Context, guard bool) (*node, error) {
	dir, err := os.MkdirTemp(w.dir, "node-")
	if err != nil {
		return nil, fmt.Errorf("create folder for the node: %w", err)
	}
	n := &node{dir: dir, log: filepath.Join(dir, "log"), ended: make(chan struct{})}
	out, err := os.Create(n.log)
	if err != nil {
		return nil, fmt.Errorf("create log of the node: %w", err)
	}
	defer out.Close()
	n.cmd = w.group.Command(w.periscope, "node", "--node-listen", w.node.listen, "--node-admin", w.node.admin, "--node-orca", w.node.orca,
		"--control", w.ln.Addr().String(), "--data", dir, "--name", "bench", "--node-trace", n.trace(), "--node-unguarded="+strconv.FormatBool(!guard))
	n.cmd.Stdout, n.cmd.Stderr = out, out
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = w.group.Quota(0)
	if err == nil {
		err = n.cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start the node: %w", err)
	}
	go func() {
		_ = n.cmd.Wait()
		close(n.ended)
	}()
	if err := n.wait(ctx); err != nil {
		n.stop()
		return nil, err
	}
	return n, nil
}

func (n *node) trace() string { return filepath.Join(n.dir, "trace") }

func (n *node) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		b, err := os.ReadFile(n.log)
		if err != nil {
			return fmt.Errorf("read log of the node: %w", err)
		}
		if bytes.Contains(b, []byte("node started")) {
			return nil
		}
		select {
		case <-n.ended:
			return fmt.Errorf("the node has ended:\n%s", b)
		case <-ctx.Done():
			return fmt.Errorf("the node does not start: %w\n%s", ctx.Err(), b)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends the process; its trace is whole then.
func (n *node) stop() {
	_ = n.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	kill := time.AfterFunc(20*time.Second, func() { _ = n.cmd.Process.Kill() })
	defer kill.Stop()
	<-n.ended
}

// fate is what became of an exchange at the node.
type fate struct {
	at       time.Time
	age      time.Duration // since its batch was sent; of one that was analysed
	priority bool          // of a priority class
	analysed bool          // else discarded by the guard
}

func (f fate) sent() time.Time { return f.at.Add(-f.age) }

// fates reads a trace, in the order of time.
func fates(file string) ([]fate, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read the node's trace: %w", err)
	}
	defer f.Close()
	var out []fate
	s := bufio.NewScanner(f)
	for s.Scan() {
		one, err := parseFate(s.Text())
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	slices.SortStableFunc(out, func(a, b fate) int { return cmp.Compare(a.at.UnixMicro(), b.at.UnixMicro()) })
	return out, s.Err()
}

// parseFate reads a line, see the node's trace.
func parseFate(line string) (fate, error) {
	fields := strings.Fields(line)
	if len(fields) < 3 {
		return fate{}, fmt.Errorf("read the node's trace: %q is no line of it", line)
	}
	at, err := strconv.ParseInt(fields[1], 10, 64)
	f := fate{at: time.UnixMicro(at), priority: fields[len(fields)-1] != "-"}
	switch {
	case fields[0] == "a" && len(fields) == 5:
		age, err2 := strconv.ParseInt(fields[2], 10, 64)
		f.analysed, f.age = true, time.Duration(age)*time.Microsecond
		err = errors.Join(err, err2)
	case fields[0] != "d" || len(fields) != 3:
		err = errors.Join(err, errors.New("no line of it"))
	}
	if err != nil {
		return fate{}, fmt.Errorf("read the node's trace: %q: %w", line, err)
	}
	return f, nil
}
