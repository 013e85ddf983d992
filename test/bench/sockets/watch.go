package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/cgroup"
	"github.com/periscope-mesh/periscope/node/pressure"
	"github.com/periscope-mesh/periscope/node/sockstat"
)

// Series of readings besides those of back ends: the last four a node has of itself.
const (
	seriesWatch  = "watch" // what periscope node watch believes, without a word from the node
	seriesLevel  = "level" // the worst of the next three
	seriesKernel = "kernel"
	seriesQueue  = "queue"
	seriesLag    = "lag"
)

// reading is what was known at a time.
type reading struct {
	At    int64         `json:"at"` // by the machine's monotonic clock, ns
	Delay time.Duration `json:"delay"`
}

// readings are series, by name.
type readings map[string][]reading

// recorder keeps readings until they are taken.
type recorder struct {
	mu   sync.Mutex
	kept readings
	err  error // the first
}

func (r *recorder) add(delays map[string]time.Duration) {
	at := now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.kept == nil {
		r.kept = readings{}
	}
	for name, d := range delays {
		r.kept[name] = append(r.kept[name], reading{at, d})
	}
}

func (r *recorder) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
	}
}

// sample keeps how long the oldest bytes have waited.
func (r *recorder) sample(name string, s *sockstat.Sampler) time.Duration {
	got, err := s.Sample()
	if err != nil {
		r.fail(err)
	}
	r.add(map[string]time.Duration{name: got.Total.Age})
	return got.Total.Age
}

// believe keeps how much of an age is believed from outside of the node.
func (r *recorder) believe(outside *pressure.Outside, age time.Duration) {
	told := outside.Kernel(time.Duration(now()), age, &load.Report{}, func() time.Duration {
		idle, err := cgroup.Host{}.Idle()
		if err != nil {
			r.fail(err)
		}
		return idle
	})
	r.add(map[string]time.Duration{seriesWatch: told})
}

func (r *recorder) take() (readings, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.kept
	r.kept = nil
	return out, r.err
}

// watcherConfig tells a watcher process what to be.
type watcherConfig struct {
	Cgroup   string
	Pin      string
	Backends []string // one sampler for each
}

// watcherMain is the whole life of a watcher process: it samples the node's sockets
// by several back ends at a time.
func watcherMain(in io.Reader, out io.Writer) (err error) {
	lines := json.NewDecoder(in)
	var cfg watcherConfig
	if err := lines.Decode(&cfg); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var kept recorder
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer cancel()
	for _, name := range cfg.Backends {
		s, err := openSampler(sockstat.Config{Listen: listenAddress, Cgroup: cfg.Cgroup, Pin: cfg.Pin, Backends: []string{name}})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		var outside pressure.Outside
		tasks.Go(func() {
			each(ctx, func() {
				if age := kept.sample(name, s); name == sockstat.EBPF {
					kept.believe(&outside, age)
				}
			})
		})
	}
	return converse(lines, out, func(r nodeRequest) (any, error) {
		if r.Op != opTake {
			return nil, fmt.Errorf("unknown request %q", r.Op)
		}
		got, err := kept.take()
		return nodeAnswer{Readings: got}, err
	})
}
