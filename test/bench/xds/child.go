package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"
)

// serverEnv makes this program a server process, and holds its configuration.
const serverEnv = "PERISCOPE_BENCH_XDS_SERVER"

// child is a server process: this program, started again. It ends when its
// input is closed, so it doesn't outlive us.
type child struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	lines   chan line
	address string
}

type line struct {
	reply reply
	err   error
}

func startChild(ctx context.Context, c serverConfig, stderr io.Writer) (*child, error) {
	config, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), serverEnv+"="+string(config))
	cmd.Stderr = stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start server: %w", err)
	}
	h := &child{cmd: cmd, in: in, lines: make(chan line)}
	go h.read(out) // ends with the process, see stop
	first, err := h.next(ctx)
	if err != nil {
		return nil, errors.Join(err, h.stop())
	}
	h.address = first.Address
	return h, nil
}

func (h *child) read(out io.Reader) {
	defer close(h.lines)
	d := json.NewDecoder(out)
	for {
		var l line
		if l.err = d.Decode(&l.reply); l.err == io.EOF {
			return
		}
		h.lines <- l
		if l.err != nil {
			return
		}
	}
}

func (h *child) next(ctx context.Context) (reply, error) {
	select {
	case <-ctx.Done():
		return reply{}, ctx.Err()
	case l, ok := <-h.lines:
		switch {
		case !ok:
			return reply{}, errors.New("the server process is gone")
		case l.err != nil:
			return reply{}, fmt.Errorf("read the server's answer: %w", l.err)
		case l.reply.Error != "":
			return reply{}, errors.New(l.reply.Error)
		}
		return l.reply, nil
	}
}

func (h *child) ask(ctx context.Context, r request) (reply, error) {
	if err := json.NewEncoder(h.in).Encode(r); err != nil {
		return reply{}, fmt.Errorf("ask the server: %w", err)
	}
	return h.next(ctx)
}

// acknowledged waits until the server has n acknowledgements.
func (h *child) acknowledged(ctx context.Context, n int64) error {
	ctx, cancel := context.WithTimeout(ctx, ackTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		r, err := h.ask(ctx, request{Op: opCount})
		if err != nil {
			return err
		}
		if r.Acks == n {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server has %d acknowledgements, want %d: %w", r.Acks, n, ctx.Err())
		case <-tick.C:
		}
	}
}

// memory reads what the process has now, without collecting garbage.
func (h *child) memory() (memory, error) {
	return processMemory(strconv.Itoa(h.cmd.Process.Pid))
}

// stop ends the process and reaps it.
func (h *child) stop() error {
	// It may be gone already: Wait tells.
	_ = h.in.Close()
	kill := time.AfterFunc(10*time.Second, func() { _ = h.cmd.Process.Kill() })
	defer kill.Stop()
	for range h.lines { // nobody waits for them
	}
	if err := h.cmd.Wait(); err != nil {
		return fmt.Errorf("server process: %w", err)
	}
	return nil
}
