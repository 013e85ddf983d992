// Package sockstat samples what the kernel counts for the node's TCP sockets:
// bytes that wait to be read and for how long, connections that wait to be
// accepted, and what was lost, for the listener and for each gateway.
//
// It has four back ends with one meaning, and takes the best that works: eBPF
// programs loaded by this process; those that periscope node bpf load has
// pinned, read as a plain file; inet_diag, which needs no privilege either; and
// this process's own sockets, asked one by one. All but the last see the node
// while it is stopped or throttled, if they run in a process that is not. It
// must be in the node's network namespace.
//
// It never fails for lack of a back end, decides nothing, touches no packet and
// starts no goroutine. Anybody may import it.
package sockstat

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Back ends, the best first.
const (
	EBPF      = "ebpf"
	Pinned    = "ebpf-pinned"
	InetDiag  = "inet_diag"
	InProcess = "siocinq"
	None      = "none" // of them works
)

// Backends are all of them, the best first.
func Backends() []string { return []string{EBPF, Pinned, InetDiag, InProcess} }

const (
	verifyEvery = 10 * time.Second // takes a few milliseconds of that sample
	retryEvery  = time.Minute
)

// Config says whose sockets to sample, and how.
type Config struct {
	Listen  netip.AddrPort // the listener's address
	Cgroup  string         // the node's control group of version 2, a directory; default: this process's
	Pin     string         // directory of pinned programs; default: DefaultPin
	Conns   *Conns         // of this process's server; nil: the last back end is not there
	Version string         // of this binary, told to whoever looks at the programs

	Backends []string // that may be used; default: all
}

// Refusal says why a back end is not in use.
type Refusal struct {
	Backend string
	Reason  error
}

func (r Refusal) Error() string { return r.Backend + ": " + r.Reason.Error() }
func (r Refusal) Unwrap() error { return r.Reason }

// backend reads sockets. Records are valid until the next read.
type backend interface {
	name() string
	read() ([]record, Fields, error)
	close() error
}

// Sampler takes samples by the best back end there is. One that fails is
// replaced by the next; a better one is looked for each minute.
type Sampler struct {
	cfg  Config
	host host

	mu        sync.Mutex
	table     *table
	netns     uint32
	backend   backend // nil: none
	refusals  []Refusal
	diag      *diag // tells what eBPF misses; nil: refused
	multipath int
	checked   time.Time
	tried     time.Time
}

// Open takes the best back end. It fails only for an address that is none.
func Open(cfg Config) (*Sampler, error) { return open(cfg, host{}) }

func open(cfg Config, h host) (*Sampler, error) {
	if !cfg.Listen.Addr().IsValid() || cfg.Listen.Port() == 0 {
		return nil, fmt.Errorf("sample sockets: %q is no listener's address", cfg.Listen)
	}
	if cfg.Pin == "" {
		cfg.Pin = DefaultPin
	}
	if cfg.Backends == nil {
		cfg.Backends = Backends()
	}
	cfg.Listen = netip.AddrPortFrom(cfg.Listen.Addr().Unmap(), cfg.Listen.Port())
	netns, err := ownNetns()
	if err != nil {
		return nil, fmt.Errorf("sample sockets: %w", err)
	}
	s := &Sampler{cfg: cfg, host: h, netns: netns, table: newTable(cfg.Listen, netns)}
	s.diag, _ = openDiag(cfg.Listen, netns) // the back end of that name tells why not
	s.choose(time.Now(), "")
	return s, nil
}

// choose takes the best back end of those before the named one, which stays in
// use if there is none.
func (s *Sampler) choose(now time.Time, before string) {
	s.tried = now
	s.refusals = nil
	for _, name := range s.cfg.Backends {
		if name == before {
			return
		}
		b, err := s.open(name)
		if err != nil {
			s.refusals = append(s.refusals, Refusal{name, err})
			continue
		}
		s.drop()
		s.backend, s.checked = b, time.Time{}
		return
	}
}

func (s *Sampler) open(name string) (backend, error) {
	switch name {
	case EBPF:
		i, p, err := openEBPF(s.host, s.cfg)
		if err != nil {
			return nil, err
		}
		if err := s.verify(i); err != nil {
			if p.existing != nil {
				err = fmt.Errorf("%w: %w", err, p.existing)
			}
			return nil, errors.Join(err, i.close())
		}
		return i, nil
	case Pinned:
		i, err := openPinned(s.cfg)
		if err != nil {
			return nil, err
		}
		return i, s.verify(i)
	case InetDiag:
		return openDiag(s.cfg.Listen, s.netns)
	case InProcess:
		return openInProcess(s.cfg.Conns, s.netns)
	}
	return nil, errors.New("no such back end")
}

// verify tells what a back end misses of that which inet_diag shows: it may be
// attached to another cgroup, or too late. What came or went meanwhile does not
// count, nor what an iterator skipped once.
func (s *Sampler) verify(b backend) error {
	var missed map[uint64]bool
	for round := range 3 {
		shown, err := s.shown()
		if err != nil {
			return nil // nobody to ask
		}
		if round == 0 {
			missed = shown
		}
		maps.DeleteFunc(missed, func(cookie uint64, _ bool) bool { return !shown[cookie] })
		records, _, err := b.read()
		if err != nil {
			return err
		}
		for i := range records {
			delete(missed, records[i].Cookie)
		}
		if len(missed) == 0 {
			return nil
		}
	}
	return fmt.Errorf("%d sockets of the listener's are not tagged: they are of another cgroup, or were opened before", len(missed))
}

// shown are the cookies of the sockets that inet_diag shows.
func (s *Sampler) shown() (map[uint64]bool, error) {
	if s.diag == nil {
		return nil, errors.New("no inet_diag")
	}
	records, _, err := s.diag.read()
	shown := map[uint64]bool{}
	for i := range records {
		if s.table.ours(&records[i]) {
			shown[records[i].Cookie] = true
		}
	}
	return shown, err
}

// Sample reads all sockets once. An error says that a back end failed and what
// took its place; the snapshot counts nonetheless.
func (s *Sampler) Sample() (Snapshot, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now := time.Now(); now.Sub(s.tried) >= retryEvery {
		before := ""
		if s.backend != nil {
			before = s.backend.name()
		}
		s.choose(now, before)
	}
	var failures []error
	for range s.cfg.Backends {
		if s.backend == nil {
			break
		}
		err := s.check()
		now := time.Now()
		var records []record
		var known Fields
		if err == nil {
			records, known, err = s.backend.read()
		}
		if err == nil {
			snapshot := s.table.fold(now, records)
			snapshot.Backend, snapshot.Known, snapshot.Multipath = s.backend.name(), known, s.multipath
			return snapshot, replaced(failures, s.backend.name())
		}
		failures = append(failures, Refusal{s.backend.name(), err})
		s.drop()
		s.choose(now, "")
	}
	return s.table.grown(time.Now()), replaced(failures, None)
}

func replaced(failures []error, by string) error {
	if failures == nil {
		return nil
	}
	return fmt.Errorf("sample sockets: %w; %s takes its place", errors.Join(failures...), by)
}

// check looks from time to time for what the back end cannot see.
func (s *Sampler) check() error {
	now := time.Now()
	if now.Sub(s.checked) < verifyEvery {
		return nil
	}
	first := s.checked.IsZero() // then choose has verified it
	s.checked, s.multipath = now, 0
	if s.diag == nil || s.backend.name() == InProcess {
		return nil
	}
	s.multipath = s.diag.multipath()
	if _, ok := s.backend.(*iterator); !ok || first {
		return nil
	}
	return s.verify(s.backend)
}

// Backend is the name of the back end in use; None: there is none.
func (s *Sampler) Backend() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.backend == nil {
		return None
	}
	return s.backend.name()
}

// Refusals say why better back ends are not in use.
func (s *Sampler) Refusals() []Refusal {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.refusals)
}

// Close ends sampling. Programs that this process loaded are gone with it.
func (s *Sampler) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
	if s.diag != nil {
		_ = s.diag.close()
		s.diag = nil
	}
	s.cfg.Backends = nil
	return nil
}

func (s *Sampler) drop() {
	if s.backend != nil {
		_ = s.backend.close() // it held nothing that could be lost
	}
	s.backend = nil
}
