package store

import "hash/maphash"

// recentSet remembers the last n ids, by a hash of 64 bits under a secret
// seed: nobody can make two ids collide, and by chance it takes some 10^14
// hits.
type recentSet struct {
	seed  maphash.Seed
	seen  map[uint64]struct{}
	order []uint64 // ring of the ids in seen
	next  int
}

func newRecentSet(n int) *recentSet {
	return &recentSet{seed: maphash.MakeSeed(), seen: make(map[uint64]struct{}), order: make([]uint64, 0, n)}
}

func (r *recentSet) has(id string) bool {
	_, ok := r.seen[maphash.String(r.seed, id)]
	return ok
}

// add remembers id, and forgets the oldest one if there are n.
func (r *recentSet) add(id string) {
	sum := maphash.String(r.seed, id)
	if _, ok := r.seen[sum]; ok {
		return
	}
	if len(r.order) < cap(r.order) {
		r.order = append(r.order, sum)
	} else {
		delete(r.seen, r.order[r.next])
		r.order[r.next] = sum
		r.next = (r.next + 1) % len(r.order)
	}
	r.seen[sum] = struct{}{}
}
