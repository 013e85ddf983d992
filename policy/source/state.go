package source

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/periscope-mesh/periscope/atomicfile"
	"github.com/periscope-mesh/periscope/policy"
)

const (
	stateVersion = 1
	// maxStateBytes is far above what 10,000 policies of usual size take.
	maxStateBytes = 64 << 20
)

// stateFile keeps the accepted policies on disk. Without a name it keeps none.
type stateFile struct {
	name   string
	source string            // the path whose policies these are
	saved  [sha256.Size]byte // of what the file holds
	stale  bool              // whether that may be out of date
}

type state struct {
	Version  int     `json:"version"`
	Source   string  `json:"source"`
	Policies []entry `json:"policies"` // by id
}

// load reads the accepted policies. On an error it gives those which can be
// used none the less.
func (s *stateFile) load() (map[string]entry, error) {
	out := map[string]entry{}
	if s.name == "" {
		return out, nil
	}
	data, err := readRegular(s.name, maxStateBytes)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return out, nil
	case err != nil:
		return out, fmt.Errorf("read state: %w", err)
	case len(data) > maxStateBytes:
		return out, fmt.Errorf("read state: %s is larger than %d bytes", s.name, maxStateBytes)
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil {
		return out, fmt.Errorf("read state: %s: %w", s.name, err)
	}
	switch {
	case st.Version != stateVersion:
		return out, fmt.Errorf("read state: %s has version %d, not %d", s.name, st.Version, stateVersion)
	case st.Source != s.source:
		return out, fmt.Errorf("read state: %s is of the policies in %q, not %q", s.name, st.Source, s.source)
	case len(st.Policies) > maxPolicies:
		return out, fmt.Errorf("read state: %s has more than %d policies", s.name, maxPolicies)
	}
	s.saved = sha256.Sum256(data)
	var errs []error
	for _, e := range st.Policies {
		// A version that knew no other wrote none.
		e.Policy.Spec.Transport = cmp.Or(e.Policy.Spec.Transport, policy.TransportLua)
		if faults := e.Policy.Validate(); len(faults) > 0 {
			errs = append(errs, fmt.Errorf("read state: %s: policy %q: %w", s.name, e.Policy.ID(), faults[0]))
			continue
		}
		e.Hash = hash(&e.Policy)
		out[e.Policy.ID()] = e
	}
	return out, errors.Join(errs...)
}

// save writes the policies if the file is stale and does not hold just them.
func (s *stateFile) save(accepted map[string]entry) error {
	if s.name == "" || !s.stale {
		return nil
	}
	st := state{Version: stateVersion, Source: s.source, Policies: []entry{}}
	for _, id := range slices.Sorted(maps.Keys(accepted)) {
		st.Policies = append(st.Policies, accepted[id])
	}
	data, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	sum := sha256.Sum256(data)
	if sum == s.saved {
		s.stale = false
		return nil
	}
	if len(data) > maxStateBytes {
		return fmt.Errorf("write state: the policies take more than %d bytes", maxStateBytes)
	}
	if err := os.MkdirAll(filepath.Dir(s.name), 0o700); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	if err := atomicfile.Replace(s.name, data); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	s.saved, s.stale = sum, false
	return nil
}
