package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/node/pressure"
	"github.com/periscope-mesh/periscope/node/sockstat"
)

const (
	// sampleEvery is the time between samples, as in cmd/periscope.
	sampleEvery = 10 * time.Millisecond
	// analysers take exchanges off the ring.
	analysers = 2
)

// listenAddress is the node's, in the run's own network namespace.
var listenAddress = netip.MustParseAddrPort("127.0.0.1:5050")

// nodeConfig tells a node process what to be.
type nodeConfig struct {
	Hold bool   // accept connections, and leave them alone
	Pin  string // directory of pinned programs
}

// Requests to a node.
const (
	opCount  = "count"  // tell what it has done so far
	opSample = "sample" // begin to sample by the back end every 10 ms, or, without one, end it
	opWork   = "work"   // set what exchanges take
	opWatch  = "watch"  // begin to keep readings
	opTake   = "take"   // tell the readings since the last time
	opCost   = "cost"   // take samples by the back end, and tell their CPU time
)

type nodeRequest struct {
	Op      string `json:"op"`
	Backend string `json:"backend,omitempty"`
	Work    work   `json:"work,omitzero"`
	Conns   int    `json:"conns,omitempty"` // that a sample must show, half of them waiting
}

// work is what an exchange takes.
type work struct {
	Reading  time.Duration `json:"reading,omitempty"`  // CPU time, before the batch is answered
	Analysis time.Duration `json:"analysis,omitempty"` // CPU time, after the ring
	Waiting  time.Duration `json:"waiting,omitempty"`  // for something else, after the ring
}

type nodeAnswer struct {
	CPU      int64    `json:"cpu,omitempty"` // ns
	Received uint64   `json:"received,omitempty"`
	Analysed uint64   `json:"analysed,omitempty"`
	Samples  uint64   `json:"samples,omitempty"`
	Readings readings `json:"readings,omitempty"`
	Micros   float64  `json:"micros,omitempty"` // of one sample
}

// node is a node's path from its listener to the end of analysis, without
// detection: work stands in for that.
type node struct {
	cfg      nodeConfig
	conns    sockstat.Conns
	ring     *ingest.Ring
	started  time.Time
	spinning float64 // rounds of spin in a second

	work               atomic.Pointer[work]
	spun               atomic.Uint64
	received, analysed atomic.Uint64
	samples            atomic.Uint64

	mu   sync.Mutex
	lags pressure.Lags

	ctx      context.Context
	tasks    sync.WaitGroup
	sampling func() // ends it
	costly   map[string]*sockstat.Sampler
	kept     recorder
}

// nodeMain is the whole life of a node process.
func nodeMain(in io.Reader, out io.Writer) (err error) {
	lines := json.NewDecoder(in)
	n := &node{ring: ingest.NewRing(4096, 64<<20), started: time.Now(), costly: map[string]*sockstat.Sampler{}}
	if err := lines.Decode(&n.cfg); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	n.work.Store(&work{})
	n.calibrate()
	var cancel context.CancelFunc
	n.ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	l, err := n.listen()
	if err != nil {
		return err
	}
	serve, err := n.serve(l)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	err = converse(lines, out, n.do)
	cancel()
	if n.sampling != nil {
		n.sampling()
	}
	for _, s := range n.costly {
		err = errors.Join(err, s.Close())
	}
	err = errors.Join(err, serve())
	n.tasks.Wait()
	return err
}

func (n *node) listen() (net.Listener, error) {
	if !n.cfg.Hold {
		return ingest.Listen(n.ctx, listenAddress.String(), false, n.conns.Listener)
	}
	// That one takes a thousand connections at most.
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(n.ctx, "tcp", listenAddress.String())
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return n.conns.Listener(l), nil
}

// serve takes connections until stop is called.
func (n *node) serve(l net.Listener) (stop func() error, err error) {
	done := make(chan error, 1)
	if n.cfg.Hold {
		go func() {
			var held []net.Conn
			for {
				c, err := l.Accept()
				if err != nil {
					break
				}
				held = append(held, c)
			}
			for _, c := range held {
				c.Close()
			}
			done <- nil
		}()
		return func() error { return errors.Join(l.Close(), <-done) }, nil
	}
	handler, err := ingest.New(ingest.Config{Ring: n.ring, Joiner: n, Heard: n.heard, Authenticator: ingest.Trusting{}})
	if err != nil {
		return nil, err
	}
	server := ingest.Server(handler, slog.New(slog.DiscardHandler))
	go func() { done <- server.Serve(l) }()
	for range analysers {
		n.tasks.Go(n.analyse)
	}
	return func() error {
		err := server.Close()
		<-done // says only that it was closed
		return err
	}, nil
}

// Join is called with each batch while it is read, see ingest.Joiner.
func (n *node) Join(_ string, b *event.Batch) {
	n.received.Add(uint64(len(b.Events)))
	if w := n.work.Load(); w.Reading > 0 {
		n.spin(w.Reading * time.Duration(len(b.Events)))
	}
}

func (n *node) heard(gateway, vm string, sentUS uint64, received time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lags.Heard(gateway, vm, time.Duration(sentUS)*time.Microsecond, received.Sub(n.started))
}

// analyse has a thread of its own, of low priority, as in cmd/periscope.
func (n *node) analyse() {
	runtime.LockOSThread()                         // which ends with it
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10) // always allowed
	for {
		x, ok := n.ring.Pop(n.ctx)
		if !ok {
			return
		}
		w := n.work.Load()
		if w.Analysis > 0 {
			n.spin(w.Analysis)
		}
		if w.Waiting > 0 {
			time.Sleep(w.Waiting)
		}
		x.Done()
		n.analysed.Add(1)
	}
}

// calibrate finds how many rounds of spin a second has, at best.
func (n *node) calibrate() {
	const rounds = 1_000_000
	best := int64(1 << 62)
	for range 20 {
		t := now()
		n.spun.Store(spin(rounds))
		best = min(best, now()-t)
	}
	n.spinning = rounds / time.Duration(best).Seconds()
}

// spin uses CPU time.
func (n *node) spin(d time.Duration) { n.spun.Store(spin(int(d.Seconds() * n.spinning))) }

func spin(rounds int) (x uint64) {
	x = uint64(rounds)
	for range rounds {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	return x
}

func (n *node) do(r nodeRequest) (any, error) {
	switch r.Op {
	case opCount:
		return nodeAnswer{CPU: cpuTime(), Received: n.received.Load(), Analysed: n.analysed.Load(), Samples: n.samples.Load()}, nil
	case opWork:
		n.work.Store(&r.Work)
		return nodeAnswer{}, nil
	case opSample:
		return nodeAnswer{}, n.sample(r.Backend)
	case opWatch:
		return nodeAnswer{}, n.watch()
	case opTake:
		got, err := n.kept.take()
		return nodeAnswer{Readings: got}, err
	case opCost:
		us, err := n.cost(r.Backend, r.Conns)
		return nodeAnswer{Micros: us}, err
	}
	return nil, fmt.Errorf("unknown request %q", r.Op)
}

func (n *node) open(backend string) (*sockstat.Sampler, error) {
	return openSampler(sockstat.Config{Listen: listenAddress, Pin: n.cfg.Pin, Conns: &n.conns, Backends: []string{backend}})
}

// openSampler wants this very back end, and takes a first sample: what is done
// every ten seconds only is done with.
func openSampler(c sockstat.Config) (*sockstat.Sampler, error) {
	s, err := sockstat.Open(c)
	if err != nil {
		return nil, err
	}
	if s.Backend() != c.Backends[0] {
		err = fmt.Errorf("%s does not work here", c.Backends[0])
		for _, r := range s.Refusals() {
			err = fmt.Errorf("%w: %w", err, r)
		}
		return nil, errors.Join(err, s.Close())
	}
	if _, err := s.Sample(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// sample begins or ends sampling. Either way it leaves no garbage.
func (n *node) sample(backend string) error {
	if n.sampling != nil {
		n.sampling()
		n.sampling = nil
	}
	if backend != "" {
		s, err := n.open(backend)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(n.ctx)
		var task sync.WaitGroup
		task.Go(func() {
			each(ctx, func() {
				if _, err := s.Sample(); err == nil {
					n.samples.Add(1)
				}
			})
		})
		n.sampling = func() {
			cancel()
			task.Wait()
			_ = s.Close() // it held nothing that could be lost
		}
	}
	runtime.GC()
	return nil
}

// each calls f at every tick until the context ends.
func each(ctx context.Context, f func()) {
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f()
		}
	}
}

// watch keeps what the process itself can tell: all that its level of load is made
// of, as cmd/periscope makes it, and what it is told by its own sockets.
func (n *node) watch() error {
	best, err := n.open(sockstat.EBPF)
	if err != nil {
		return err
	}
	own, err := n.open(sockstat.InProcess)
	if err != nil {
		return errors.Join(err, best.Close())
	}
	n.tasks.Go(func() {
		defer best.Close()
		defer own.Close()
		var levels pressure.Meter
		// One after the other: of two that wake at the same time, Go makes one wait.
		each(n.ctx, func() {
			n.level(&levels, best)
			n.kept.sample(sockstat.InProcess, own)
		})
	})
	return nil
}

func (n *node) level(levels *pressure.Meter, sampler *sockstat.Sampler) {
	sockets, err := sampler.Sample()
	if err != nil {
		n.kept.fail(err)
	}
	at := time.Now()
	s := pressure.Sample{At: at.Sub(n.started), Kernel: sockets.Total.Age, Queue: n.ring.Age(at), Queued: n.ring.Len(),
		CPU: time.Duration(cpuTime()), CPUs: float64(runtime.GOMAXPROCS(0)), Analysed: n.analysed.Load()}
	n.mu.Lock()
	s.Lag = n.lags.Lag(s.At)
	n.mu.Unlock()
	l, _ := levels.Add(s)
	n.kept.add(map[string]time.Duration{seriesLevel: l.Delay, seriesKernel: l.Kernel, seriesQueue: l.Queue, seriesLag: l.Lag})
}

// costFor is how long samples are taken to tell what one costs.
const costFor = 20 * time.Millisecond

// cost is the CPU time of one sample, in microseconds.
func (n *node) cost(backend string, conns int) (float64, error) {
	s := n.costly[backend]
	if s == nil {
		var err error
		if s, err = n.open(backend); err != nil {
			return 0, err
		}
		n.costly[backend] = s
	}
	got, err := s.Sample()
	for end := time.Now().Add(10 * time.Second); err == nil && got.Total.Connections < conns && time.Now().Before(end); {
		time.Sleep(sampleEvery) // not all are accepted yet
		got, err = s.Sample()
	}
	if err != nil {
		return 0, err
	}
	if got.Total.Connections != conns || got.Total.Waiting != conns/2 {
		return 0, fmt.Errorf("%s shows %d connections, %d of them waiting; want %d and %d", backend, got.Total.Connections, got.Total.Waiting, conns, conns/2)
	}
	from, times := cpuTime(), 0
	for times < 5 || cpuTime()-from < int64(costFor) {
		if _, err := s.Sample(); err != nil {
			return 0, err
		}
		times++
	}
	return float64(cpuTime()-from) / float64(times) / 1e3, nil
}
