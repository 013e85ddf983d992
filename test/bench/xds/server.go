package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"time"

	"google.golang.org/grpc"

	"github.com/periscope-mesh/periscope/xds"
)

// Edits that a server is told to make.
const (
	editOne  = "one"  // one gateway's settings; its snapshot alone is made and set
	editAll  = "all"  // every gateway's settings
	editRest = "rest" // one gateway's, but every gateway's snapshot is made and set
)

const (
	opFill   = "fill"   // make and set the first snapshots
	opEdit   = "edit"   // edit, and wait for the last acknowledgement
	opCount  = "count"  // tell what was acknowledged so far
	opMemory = "memory" // tell the memory that is left after garbage collection
)

// ackTimeout is far above what any push needs.
const ackTimeout = time.Minute

// request is a line on the server process's input, answered by one line.
type request struct {
	Op    string `json:"op"`
	Edit  string `json:"edit,omitempty"`
	Times int    `json:"times,omitempty"`
}

type reply struct {
	Error   string    `json:"error,omitempty"`
	Address string    `json:"address,omitempty"` // in the first line only
	Acks    int64     `json:"acks,omitempty"`
	Memory  memory    `json:"memory,omitzero"`
	Millis  []float64 `json:"millis,omitempty"` // each edit's, until the last acknowledgement
	CPU     float64   `json:"cpu,omitempty"`    // seconds, of all edits
	Bytes   int64     `json:"bytes,omitempty"`  // sent, of all edits
}

// serverConfig tells a server process what to be.
type serverConfig struct {
	Name    string `json:"name"`
	Clients int    `json:"clients"`
	Mesh    bool   `json:"mesh,omitempty"` // clients are istiods, not gateways
	Profile string `json:"profile,omitempty"`
}

// served is a server process: one server under test, and what its clients are
// served.
type served struct {
	config    serverConfig
	backend   backend
	tally     *tally
	revisions []int // of each gateway's settings
	turn      int
}

// serve is the whole life of a server process: it ends when its input does.
func serve(config string, in io.Reader, out io.Writer) (err error) {
	var c serverConfig
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	s := &served{config: c, tally: newTally(), revisions: make([]int, c.Clients)}
	if c.Mesh {
		s.revisions = make([]int, meshGateways)
	}
	material, err := newMaterial()
	if err != nil {
		return err
	}
	if s.backend, err = newBackend(c.Name, c.Clients, material.fixed); err != nil {
		return err
	}
	if c.Profile != "" {
		stop, err := profile(c.Profile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	g := xds.NewGRPCServer(grpc.StreamInterceptor(s.tally.intercept))
	s.backend.register(g)
	stopped := make(chan error, 1)
	go func() { stopped <- g.Serve(s.tally.listen(l)) }()
	err = s.converse(l.Addr().String(), in, out)
	g.Stop()
	return errors.Join(err, <-stopped)
}

func profile(file string) (stop func() error, err error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(fmt.Errorf("profile: %w", err), f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		return f.Close()
	}, nil
}

func (s *served) converse(address string, in io.Reader, out io.Writer) error {
	lines, answers := json.NewDecoder(in), json.NewEncoder(out)
	answer := reply{Address: address}
	for {
		if err := answers.Encode(answer); err != nil {
			return fmt.Errorf("answer: %w", err)
		}
		var r request
		if err := lines.Decode(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		var err error
		if answer, err = s.do(r); err != nil {
			answer = reply{Error: err.Error()}
		}
	}
}

func (s *served) do(r request) (reply, error) {
	if n := s.tally.nacks.Load(); n > 0 {
		return reply{}, fmt.Errorf("%d responses were refused", n)
	}
	switch r.Op {
	case opFill:
		return reply{}, s.publish()
	case opEdit:
		return s.edits(r.Edit, r.Times)
	case opCount:
		return reply{Acks: s.tally.acks.Load()}, nil
	case opMemory:
		runtime.GC()         // what pools hold goes with the second collection
		debug.FreeOSMemory() // collects garbage first
		m, err := processMemory("self")
		return reply{Memory: m}, err
	default:
		return reply{}, fmt.Errorf("unknown request %q", r.Op)
	}
}

// publish makes and sets all snapshots.
func (s *served) publish() error {
	if s.config.Mesh {
		return s.backend.setMesh(s.revisions)
	}
	for i := range s.revisions {
		if err := s.set(i); err != nil {
			return err
		}
	}
	return nil
}

func (s *served) set(i int) error {
	settings, err := settingsMessage(i, s.revisions[i])
	if err != nil {
		return err
	}
	return s.backend.setGateway(i, settings)
}

// edits makes edits one after the other.
func (s *served) edits(kind string, times int) (reply, error) {
	var r reply
	runtime.GC() // not on account of the edits
	cpu0, err := ownCPU()
	if err != nil {
		return r, err
	}
	acks0, bytes0 := s.tally.acks.Load(), s.tally.sent.Load()
	expected := 0
	for range times {
		n, took, err := s.edit(kind)
		if err != nil {
			return r, fmt.Errorf("edit %s: %w", kind, err)
		}
		expected += n
		r.Millis = append(r.Millis, took.Seconds()*1e3)
	}
	cpu1, err := ownCPU()
	if err != nil {
		return r, err
	}
	if got := s.tally.acks.Load() - acks0; got != int64(expected) {
		return r, fmt.Errorf("edit %s: %d acknowledgements, want %d", kind, got, expected)
	}
	r.CPU, r.Bytes, r.Acks = (cpu1 - cpu0).Seconds(), s.tally.sent.Load()-bytes0, s.tally.acks.Load()
	return r, nil
}

// edit makes one, and waits for the last acknowledgement: of how many, and how
// long after the edit it came.
func (s *served) edit(kind string) (acks int, took time.Duration, err error) {
	s.turn++
	one := s.turn * 7919 % len(s.revisions) // a prime: gateways of all connections
	acks = 1
	switch {
	case s.config.Mesh:
		acks = s.config.Clients // each istiod is served the whole mesh
	case kind == editAll:
		acks = len(s.revisions)
	}
	s.tally.expect(acks)
	start := time.Now()
	switch {
	case kind == editAll:
		for i := range s.revisions {
			s.revisions[i]++
		}
		err = s.publish()
	case kind == editOne && !s.config.Mesh:
		s.revisions[one]++
		err = s.set(one)
	case kind == editOne, kind == editRest:
		s.revisions[one]++
		err = s.publish()
	default:
		err = fmt.Errorf("unknown edit %q", kind)
	}
	if err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), ackTimeout)
	defer cancel()
	select {
	case end := <-s.tally.done:
		return acks, end.Sub(start), nil
	case <-ctx.Done():
		return 0, 0, fmt.Errorf("%d acknowledgements are missing after %v", s.tally.target.Load()-s.tally.acks.Load(), ackTimeout)
	}
}
