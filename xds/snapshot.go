// Package xds serves configuration over xDS: snapshots of resources, an
// aggregated discovery service in its state-of-the-world and delta forms, the
// identity of the clients, and what each of them acknowledged or refused.
//
// It never knows what a resource means: packages xds/gateway, xds/node and
// xds/mcp make snapshots from a plan. It never waits for a client: what is new
// while one is slow is sent as one difference once it has caught up. It never
// guesses a state: a client whose snapshot isn't set yet gets no answer, rather
// than an empty one that would wipe what it has.
//
// Packages below xds, and the commands, may import it; it needs nothing of ours.
package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// maxTypeBytes is what the resources of one type may have. Clients of the
// state-of-the-world protocol are sent all of them in one message, which neither
// side's gRPC lets pass beyond 2 GiB.
const maxTypeBytes = 1 << 30

// Message is a named resource before it is marshalled.
type Message struct {
	Name    string
	Message proto.Message
}

// Resource is a resource as it travels. Version is a hash of its content: the
// same content has the same version in every process, so that a client which
// reconnects is only sent what really changed.
type Resource struct {
	Name    string
	Version string
	Any     *anypb.Any
}

// Snapshot is everything that a client may be sent: a pure value, never
// changed once made.
type Snapshot struct {
	types map[string]*typeSet
	empty *typeSet // stands for every type that it lacks
}

// typeSet is a snapshot's resources of one type.
type typeSet struct {
	version string
	names   []string // sorted
	byName  map[string]Resource
}

// NewSnapshot marshals resources by type URL. A type that it lacks is served
// as empty, with a version all the same: some clients wait for an answer to
// each type they asked for, and one without a version gets none.
func NewSnapshot(resources map[string][]Message) (*Snapshot, error) {
	marshalled := make(map[string][]Resource, len(resources))
	for _, typeURL := range slices.Sorted(maps.Keys(resources)) {
		list, err := marshal(resources[typeURL])
		if err != nil {
			return nil, fmt.Errorf("make snapshot: %s: %w", typeURL, err)
		}
		marshalled[typeURL] = list
	}
	return Assemble(marshalled)
}

// Assemble makes a snapshot, as NewSnapshot does, of resources that were
// marshalled before. It shares them with whoever else has them.
func Assemble(resources map[string][]Resource) (*Snapshot, error) {
	s := &Snapshot{types: make(map[string]*typeSet, len(resources)), empty: &typeSet{version: hash()}}
	for _, typeURL := range slices.Sorted(maps.Keys(resources)) {
		if typeURL == "" {
			return nil, fmt.Errorf("make snapshot: a type URL is empty")
		}
		t, err := newTypeSet(resources[typeURL])
		if err != nil {
			return nil, fmt.Errorf("make snapshot: %s: %w", typeURL, err)
		}
		s.types[typeURL] = t
	}
	return s, nil
}

// With gives the snapshot that holds these messages too, in place of resources
// of their names. All else is shared: to derive many snapshots from one costs
// what they differ in.
func (s *Snapshot) With(typeURL string, messages ...Message) (*Snapshot, error) {
	if typeURL == "" {
		return nil, fmt.Errorf("derive snapshot: the type URL is empty")
	}
	changed, err := marshal(messages)
	if err != nil {
		return nil, fmt.Errorf("derive snapshot: %s: %w", typeURL, err)
	}
	replaced := make(map[string]bool, len(changed))
	for _, r := range changed {
		replaced[r.Name] = true
	}
	for _, r := range s.Resources(typeURL) {
		if !replaced[r.Name] {
			changed = append(changed, r)
		}
	}
	t, err := newTypeSet(changed)
	if err != nil {
		return nil, fmt.Errorf("derive snapshot: %s: %w", typeURL, err)
	}
	out := &Snapshot{types: maps.Clone(s.types), empty: s.empty}
	out.types[typeURL] = t
	return out, nil
}

// Marshal makes the resource that a message travels as.
func Marshal(m Message) (Resource, error) {
	if m.Message == nil {
		return Resource{}, fmt.Errorf("resource %q is nil", m.Name)
	}
	content := new(anypb.Any)
	if err := anypb.MarshalFrom(content, m.Message, proto.MarshalOptions{Deterministic: true}); err != nil {
		return Resource{}, fmt.Errorf("marshal %q: %w", m.Name, err)
	}
	return Resource{Name: m.Name, Version: hash([]byte(content.GetTypeUrl()), content.GetValue()), Any: content}, nil
}

func marshal(messages []Message) ([]Resource, error) {
	out := make([]Resource, 0, len(messages))
	for _, m := range messages {
		r, err := Marshal(m)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// newTypeSet refuses what no client could be sent.
func newTypeSet(resources []Resource) (*typeSet, error) {
	t := &typeSet{byName: make(map[string]Resource, len(resources)), names: make([]string, 0, len(resources))}
	bytes := 0
	for i, r := range resources {
		if r.Name == "" || r.Name == wildcard {
			return nil, fmt.Errorf("resource %d: %q can't be a name", i, r.Name)
		}
		if _, ok := t.byName[r.Name]; ok {
			return nil, fmt.Errorf("two resources are named %q", r.Name)
		}
		if bytes += len(r.Any.GetValue()); bytes > maxTypeBytes {
			return nil, fmt.Errorf("more than %d MiB in %d resources", maxTypeBytes>>20, len(resources))
		}
		t.byName[r.Name] = r
		t.names = append(t.names, r.Name)
	}
	slices.Sort(t.names)
	parts := make([][]byte, 0, 2*len(t.names))
	for _, name := range t.names {
		parts = append(parts, []byte(name), []byte(t.byName[name].Version))
	}
	t.version = hash(parts...)
	return t, nil
}

// hash gives 16 hex digits of the SHA-256 of parts, each marked by its length.
func hash(parts ...[]byte) string {
	h := sha256.New()
	var length []byte
	for _, p := range parts {
		length = append(strconv.AppendInt(length[:0], int64(len(p)), 10), ':')
		h.Write(length)
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// set gives the resources of a type; never nil.
func (s *Snapshot) set(typeURL string) *typeSet {
	if t := s.types[typeURL]; t != nil {
		return t
	}
	return s.empty
}

// Types lists the type URLs that the snapshot holds, sorted.
func (s *Snapshot) Types() []string { return slices.Sorted(maps.Keys(s.types)) }

// Version gives the version of a type: a hash of its resources, never empty.
func (s *Snapshot) Version(typeURL string) string { return s.set(typeURL).version }

// Resources lists the resources of a type by name. They are shared: don't
// change them.
func (s *Snapshot) Resources(typeURL string) []Resource {
	t := s.set(typeURL)
	out := make([]Resource, 0, len(t.names))
	for _, name := range t.names {
		out = append(out, t.byName[name])
	}
	return out
}
