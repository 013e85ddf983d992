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

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

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

func newTypeSet(messages []Message) (*typeSet, error) {
	t := &typeSet{byName: make(map[string]Resource, len(messages))}
	for i, m := range messages {
		if m.Name == "" || m.Name == wildcard {
			return nil, fmt.Errorf("resource %d: %q can't be a name", i, m.Name)
		}
		if _, ok := t.byName[m.Name]; ok {
			return nil, fmt.Errorf("two resources are named %q", m.Name)
		}
		if m.Message == nil {
			return nil, fmt.Errorf("resource %q is nil", m.Name)
		}
		content := new(anypb.Any)
		if err := anypb.MarshalFrom(content, m.Message, proto.MarshalOptions{Deterministic: true}); err != nil {
			return nil, fmt.Errorf("marshal %q: %w", m.Name, err)
		}
		t.byName[m.Name] = Resource{
			Name:    m.Name,
			Version: hash([]byte(content.GetTypeUrl()), content.GetValue()),
			Any:     content,
		}
		t.names = append(t.names, m.Name)
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
	for _, p := range parts {
		fmt.Fprintf(h, "%d:", len(p))
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
