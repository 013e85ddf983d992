package xds

import (
	"maps"
	"slices"

	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
)

const (
	wildcard = "*"

	// What a client knows is kept as a map of resource names to versions,
	// which the stream handler carries from one watch to the next. Two entries
	// in it are ours. answered, which is no possible name, tells that a
	// wildcard subscription had its first answer: it is due even if empty.
	answered = ""
	// absent, which is no possible version, stands for a resource that the
	// client asked for by name and was told not to exist.
	absent = "-"
)

// difference is what a client lacks, and what it knows once it was sent that.
type difference struct {
	due     bool
	changed []Resource
	removed []string // delta only: state of the world removes by absence
	more    bool     // a further response follows when this one is acknowledged
	known   map[string]string
}

// alone tells the types of which a response carries one changed resource. A
// client refuses a response as a whole and doesn't say what of it it applied:
// were code and settings together in one, then bad code would hold back good
// settings, and nobody would know.
func alone(typeURL string) bool { return typeURL == resource.ExtensionConfigType }

// full tells the types of which the state of the world is always sent whole:
// by the protocol, what is absent from such a response doesn't exist any more.
func full(typeURL string, sub cache.Subscription) bool {
	return sub.IsWildcard() || typeURL == resource.ListenerType || typeURL == resource.ClusterType
}

// wanted lists the names that sub covers, sorted, whether they exist or not.
func wanted(t *typeSet, sub cache.Subscription) []string {
	if !sub.IsWildcard() {
		return slices.Sorted(maps.Keys(sub.SubscribedResources()))
	}
	names := slices.Clone(t.names)
	for name := range sub.SubscribedResources() {
		if _, ok := t.byName[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// sotwDifference is for the state-of-the-world protocol: all resources if any
// of them changed, for types that are sent whole; else those that changed.
func sotwDifference(typeURL string, t *typeSet, sub cache.Subscription) difference {
	before := sub.ReturnedResources()
	d := difference{known: map[string]string{}}
	var all []Resource
	for _, name := range wanted(t, sub) {
		r, ok := t.byName[name]
		if !ok {
			continue
		}
		all = append(all, r)
		v, had := before[name]
		switch {
		case v == r.Version:
			d.known[name] = v
		case alone(typeURL) && len(d.changed) > 0 && !full(typeURL, sub):
			d.more = true
			if had {
				d.known[name] = v
			}
		default:
			d.changed = append(d.changed, r)
			d.known[name] = r.Version
		}
	}
	d.due = len(d.changed) > 0
	if full(typeURL, sub) {
		for name := range before {
			if _, ok := d.known[name]; !ok && name != answered {
				d.due = true // one was removed
			}
		}
		d.changed = all
	}
	if sub.IsWildcard() {
		if _, ok := before[answered]; !ok {
			d.due = true
		}
		d.known[answered] = t.version
	}
	return d
}

// deltaDifference is for the incremental protocol.
func deltaDifference(typeURL string, t *typeSet, sub cache.Subscription) difference {
	before, byName := sub.ReturnedResources(), sub.SubscribedResources()
	_, again := before[answered]
	d := difference{known: map[string]string{answered: t.version}}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		v := before[name]
		_, exists := t.byName[name]
		_, named := byName[name]
		switch {
		case name == answered || !named && !sub.IsWildcard():
			// An unsubscribed name is the client's to forget.
		case exists:
			d.known[name] = v
		default:
			if v != absent {
				d.removed = append(d.removed, name)
			}
			if named {
				d.known[name] = absent
			}
		}
	}
	for _, name := range wanted(t, sub) {
		v, told := d.known[name]
		r, exists := t.byName[name]
		switch {
		case !exists && !told:
			d.removed = append(d.removed, name)
			d.known[name] = absent
		case !exists || v == r.Version:
		case alone(typeURL) && len(d.changed) > 0:
			d.more = true
		default:
			d.changed = append(d.changed, r)
			d.known[name] = r.Version
		}
	}
	d.due = len(d.changed)+len(d.removed) > 0 || !again && sub.IsWildcard()
	return d
}
