package source

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/policy"
)

// entry is an accepted version of a policy.
type entry struct {
	Policy policy.MirrorPolicy `json:"policy"`
	File   string              `json:"file"`
	Hash   string              `json:"hash"`
	Since  time.Time           `json:"since"`
}

// judge says what is served after a reading, and why. It is pure. before holds
// the last accepted version of each policy, by id.
//
// A policy goes on being served in its last accepted version while its
// document is faulty, and while its file (or the whole path) is such that
// nobody can tell whether the policy is still in it.
func judge(before map[string]entry, r *reading, now time.Time) (map[string]entry, []Status) {
	after := map[string]entry{}
	claims := map[string]string{}          // policy id to the place that has it
	unclear := map[string][]policy.Fault{} // by the file's base name: the path may be spelt in several ways
	var statuses []Status
	if r.fault != nil {
		statuses = append(statuses, Status{File: r.fault.File, State: Refused, Faults: []policy.Fault{*r.fault}, Since: now})
	}
	for _, f := range r.files {
		for _, doc := range f.docs {
			status := Status{ID: doc.ID, File: f.name, Line: doc.Line, State: Refused, Faults: doc.Faults, Since: now}
			place, taken := claims[doc.ID]
			switch {
			case doc.ID == "":
				unclear[filepath.Base(f.name)] = append(unclear[filepath.Base(f.name)], doc.Faults...)
			case taken:
				status.Faults = append(slices.Clone(doc.Faults), twice(f.name, doc, place))
			default:
				claims[doc.ID] = fmt.Sprintf("%s:%d", f.name, doc.Line)
				serve(&status, doc, before, after)
			}
			statuses = append(statuses, status)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(before)) {
		e := before[id]
		if _, ok := claims[id]; ok || len(after) >= maxPolicies {
			continue
		}
		faults := unclear[filepath.Base(e.File)]
		if r.fault != nil {
			faults = []policy.Fault{*r.fault}
		}
		if len(faults) > 0 {
			after[id] = e
			statuses = append(statuses, Status{ID: id, File: e.File, State: Refused, Serving: true, Hash: e.Hash, Faults: faults, Since: now})
		}
	}
	return after, statuses
}

// serve takes a document's policy, or its last accepted version.
func serve(status *Status, doc policy.Document, before, after map[string]entry) {
	last, had := before[doc.ID]
	if doc.Policy == nil {
		if had {
			after[doc.ID] = last
			status.Serving, status.Hash = true, last.Hash
		}
		return
	}
	e := entry{Policy: *doc.Policy, File: status.File, Hash: hash(doc.Policy), Since: status.Since}
	if had && last.Hash == e.Hash {
		e.Since = last.Since
	}
	after[doc.ID] = e
	status.State, status.Serving, status.Hash, status.Since = Accepted, true, e.Hash, e.Since
	status.Warnings = doc.Warnings
}

func twice(file string, doc policy.Document, place string) policy.Fault {
	return policy.Fault{File: file, Line: doc.Line, Path: "metadata.name",
		Problem: fmt.Sprintf("%s is the name of two policies, this one and that of %s", doc.ID, place),
		Remedy:  "rename or remove one of the two"}
}

// hash is 12 hex digits of the SHA-256 of a policy's content.
func hash(p *policy.MirrorPolicy) string {
	data, err := json.Marshal(p)
	if err != nil { // a policy without faults has nothing that JSON cannot hold
		return "unknown"
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:6])
}
