// Package source reads the policies of a file or a directory and watches them:
// each change gives a new Set. What was accepted once goes on being served
// when its file becomes faulty, unreadable or half-written, over restarts too,
// for it is kept in a state file.
//
// It never judges a policy itself, never fails because of one, and never
// writes to what it watches.
//
// cmd/periscope may import it; it imports policy and atomicfile.
package source

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/policy"
)

const (
	// quiet is the time between two readings that must agree before a change
	// is taken: a save may be under way.
	quiet = 30 * time.Millisecond
	// maxHold is the longest that a file which keeps changing is waited for.
	maxHold = 120 * time.Millisecond
	// reread is how often everything is read whether or not the kernel told
	// of a change: it does not for network file systems, and when its queue
	// is full.
	reread = 2 * time.Second
)

// Bounds of what is taken from a path. Beyond them nothing new is.
const (
	maxFiles    = 1000
	maxPolicies = 10000
)

// maxLoggedFaults bounds the log lines of one change.
const maxLoggedFaults = 100

// Config is what New needs.
type Config struct {
	Path      string           // a YAML file, or a directory of *.yaml and *.yml
	StateFile string           // keeps the accepted policies over restarts; empty: nothing does
	Logger    *slog.Logger     // gets what is accepted, removed and refused, each fault once
	Now       func() time.Time // nil: time.Now
}

// Set is the policies of a source at one moment. It is never changed.
type Set struct {
	Policies []policy.MirrorPolicy // those to serve, by precedence: the oldest first, then by id
	Statuses []Status              // of each document and unreadable file, by file, then of the policies kept that are in none
}

// State says whether a policy is as its file has it.
type State string

const (
	Accepted State = "Accepted"
	Refused  State = "Refused"
)

// Status says what became of a policy.
type Status struct {
	ID      string         `json:"id,omitempty"` // empty: a document or file that does not tell
	File    string         `json:"file"`
	Line    int            `json:"line,omitempty"`
	State   State          `json:"state"`
	Serving bool           `json:"serving"`        // the version of the file, or the last accepted
	Hash    string         `json:"hash,omitempty"` // of the version served
	Faults  []policy.Fault `json:"faults,omitempty"`
	// Warnings tell what an accepted policy does less than it seems to.
	Warnings []policy.Fault `json:"warnings,omitempty"`
	Since    time.Time      `json:"since"`
}

// Warnings gives those of all policies accepted.
func (s Set) Warnings() []policy.Fault {
	var out []policy.Fault
	for _, status := range s.Statuses {
		out = append(out, status.Warnings...)
	}
	return out
}

// Refused gives every fault of the set, each once.
func (s Set) Refused() []policy.Fault {
	var out []policy.Fault
	seen := map[policy.Fault]bool{}
	for _, status := range s.Statuses {
		for _, f := range status.Faults {
			if !seen[f] {
				seen[f] = true
				out = append(out, f)
			}
		}
	}
	return out
}

// Source watches one path. Its methods are not for concurrent use.
type Source struct {
	path  string
	state stateFile
	log   *slog.Logger
	now   func() time.Time

	last       *reading // that the set follows from; nil before Load
	accepted   map[string]entry
	set        Set
	complaints map[string]string // what went wrong lately, by what was tried

	newWatch func() (*watch, error) // tests do without the kernel's help
	reread   time.Duration          // tests do not wait for it
}

// New makes a Source, which reads nothing yet.
func New(c Config) (*Source, error) {
	if c.Path == "" {
		return nil, errors.New("policy source: no path")
	}
	if c.Logger == nil {
		return nil, errors.New("policy source: no logger")
	}
	absolute, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, fmt.Errorf("policy source: %w", err)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return &Source{
		path:       filepath.Clean(c.Path),
		state:      stateFile{name: c.StateFile, source: absolute},
		log:        c.Logger.With("component", "policy_source"),
		now:        c.Now,
		complaints: map[string]string{},
		newWatch:   newWatch,
		reread:     reread,
	}, nil
}

// Load reads the path and the state file. What is faulty or missing is refused
// on its own and told by the set, never by the error: a caller that wants no
// faults looks at Set.Refused. The error is for a source that has no set to
// give, which a path on disk always has.
func (s *Source) Load() (Set, error) {
	accepted, err := s.state.load()
	s.complain("read policy state", err)
	s.accepted = accepted
	s.apply(read(s.path, nil))
	return s.set, nil
}

// Run watches until the context ends, and then returns nil. It calls changed
// with each new set, from one goroutine, and first with the one it loads,
// unless Load was called before. While changed runs, nothing is read: changes
// gather on disk, and the next set holds them all.
func (s *Source) Run(ctx context.Context, changed func(Set)) error {
	w, err := s.newWatch()
	s.complain("watch policies", err)
	defer w.close()
	if s.last == nil {
		set, err := s.Load()
		if err != nil {
			return err
		}
		changed(set)
	}
	s.complain("watch policies", errors.Join(err, w.follow(s.last.dirs)))
	tick := time.NewTicker(s.reread)
	defer tick.Stop()
	settle := time.NewTimer(0) // something may have changed since it was loaded
	defer settle.Stop()
	var held hold
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-w.events():
			if s.last.concerns(event.Name) && held.begin() {
				settle.Reset(quiet)
			}
		case <-w.errors(): // some events are lost
			if held.begin() {
				settle.Reset(quiet)
			}
		case <-tick.C:
			if held.begin() {
				settle.Reset(0)
			}
		case <-settle.C:
			now := read(s.path, s.last)
			s.complain("watch policies", errors.Join(err, w.follow(now.dirs)))
			switch held.judge(now, s.last) {
			case wait:
				settle.Reset(quiet)
			case take:
				if s.apply(now) {
					changed(s.set)
				}
			case nothing:
				s.save()
			}
		}
	}
}

// hold waits for a change to be complete.
type hold struct {
	since time.Time // zero: there is none
	seen  *reading  // the last reading
}

type verdict int

const (
	nothing verdict = iota // all is as it was
	wait                   // read again
	take
)

// begin says whether a change begins, rather than goes on. One that goes on
// is being read already.
func (h *hold) begin() bool {
	begins := h.since.IsZero()
	if begins {
		h.since = time.Now()
	}
	return begins
}

// judge compares a reading with that in force and the one before it.
func (h *hold) judge(now, inForce *reading) verdict {
	if now.equal(inForce) {
		*h = hold{}
		return nothing
	}
	h.begin()
	if h.seen == nil || !now.equal(h.seen) && time.Since(h.since) < maxHold {
		h.seen = now
		return wait
	}
	*h = hold{}
	return take
}

// apply makes the set of a reading and says whether it is another one.
func (s *Source) apply(r *reading) bool {
	now := s.now().UTC().Round(0)
	accepted, statuses := judge(s.accepted, r, now)
	keepSince(statuses, s.set.Statuses)
	s.logChanges(s.accepted, accepted, statuses)
	s.last, s.accepted = r, accepted
	s.state.stale = true
	s.save()
	if reflect.DeepEqual(statuses, s.set.Statuses) {
		return false
	}
	policies := make([]policy.MirrorPolicy, 0, len(accepted))
	for _, e := range accepted {
		policies = append(policies, e.Policy)
	}
	slices.SortFunc(policies, precedence)
	s.set = Set{Policies: policies, Statuses: statuses}
	return true
}

// precedence puts the older policy first, as Gateway API does, and those that
// do not tell their age last.
func precedence(a, b policy.MirrorPolicy) int {
	at, bt := a.Metadata.CreationTimestamp, b.Metadata.CreationTimestamp
	switch {
	case at.IsZero() && !bt.IsZero():
		return 1
	case bt.IsZero() && !at.IsZero():
		return -1
	}
	return cmp.Or(at.Compare(bt), cmp.Compare(a.ID(), b.ID()))
}

// keepSince gives statuses that were there before the time they began.
func keepSince(statuses, before []Status) {
	key := func(s Status) string {
		k := fmt.Sprintf("%q %q %s %s", s.ID, s.File, s.State, s.Hash)
		for _, f := range s.Faults {
			k += "\n" + f.Error()
		}
		return k
	}
	since := make(map[string]time.Time, len(before))
	for _, s := range before {
		since[key(s)] = s.Since
	}
	for i, s := range statuses {
		if t, ok := since[key(s)]; ok {
			statuses[i].Since = t
		}
	}
}

// logChanges tells what is new, so that a fault is logged once and not at
// every reading.
func (s *Source) logChanges(before, after map[string]entry, statuses []Status) {
	known, serving := map[policy.Fault]bool{}, map[policy.Fault]bool{}
	for _, f := range s.set.Refused() {
		known[f] = true
	}
	for _, status := range statuses {
		for _, f := range status.Faults {
			serving[f] = serving[f] || status.Serving
		}
	}
	logged := 0
	for _, status := range statuses {
		if e := after[status.ID]; status.State == Accepted && before[status.ID].Hash != e.Hash {
			s.log.Info("policy accepted", "policy", status.ID, "file", status.File, "hash", e.Hash)
			for _, f := range status.Warnings {
				s.log.Warn("policy does less than it seems to", "policy", status.ID, "file", f.File, "line", f.Line,
					"field", f.Path, "problem", f.Problem, "remedy", f.Remedy)
			}
		}
		for _, f := range status.Faults {
			if known[f] {
				continue
			}
			known[f] = true
			if logged++; logged <= maxLoggedFaults {
				s.log.Warn("policy refused", "policy", status.ID, "file", f.File, "line", f.Line,
					"field", f.Path, "problem", f.Problem, "remedy", f.Remedy, "serving_last_accepted", serving[f])
			}
		}
	}
	if logged > maxLoggedFaults {
		s.log.Warn("more policy faults not logged", "faults", logged-maxLoggedFaults)
	}
	for id := range before {
		if _, ok := after[id]; !ok {
			s.log.Info("policy removed", "policy", id)
		}
	}
}

// save keeps what is accepted, and tries again when it could not.
func (s *Source) save() {
	s.complain("write policy state", s.state.save(s.accepted))
}

// complain logs an error unless it did so at the last try.
func (s *Source) complain(doing string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != s.complaints[doing] {
		s.log.Warn("policy source impaired", "doing", doing, "error", err)
	}
	s.complaints[doing] = text
}
