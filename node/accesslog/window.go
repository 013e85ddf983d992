package accesslog

import "time"

// maxOfKey bounds how many values of a key are looked at, the latest.
const maxOfKey = 64

// window keeps values by key, so many and so long; the oldest leave first.
type window[V any] struct {
	max         int
	age         time.Duration
	slots       []slot[V]         // a ring, which grows to max: value n, from 1 on, is at (n-1) % max
	puts, drops uint64            // values that came, and those of them that left
	last        map[uint64]uint64 // the key's latest value
	live        int
}

type slot[V any] struct {
	key, before uint64 // before: the key's value before this one, if that is still there
	at          int64  // ns
	taken       bool
	value       V
}

func (w *window[V]) slot(n uint64) *slot[V] { return &w.slots[(n-1)%uint64(w.max)] }

// put adds a value; gone, unless nil, is told of the one that leaves for it.
func (w *window[V]) put(key uint64, v V, now time.Time, gone func(V)) {
	if w.last == nil {
		w.last = map[uint64]uint64{}
	}
	if w.puts-w.drops == uint64(w.max) {
		w.drop(gone)
	}
	s := slot[V]{key: key, before: w.last[key], at: now.UnixNano(), value: v}
	w.puts++
	if len(w.slots) < w.max {
		w.slots = append(w.slots, s)
	} else {
		*w.slot(w.puts) = s
	}
	w.last[key] = w.puts
	w.live++
}

// take removes the key's value of the lowest rank, of those that have one; of
// equal ones the oldest.
func (w *window[V]) take(key uint64, rank func(V) (uint64, bool)) (v V, ok bool) {
	var best, lowest, behind uint64 // behind: the key's value after the best one
	after := uint64(0)
	n := w.last[key]
	for i := 0; i < maxOfKey && n > w.drops; i++ {
		s := w.slot(n)
		if r, has := rank(s.value); has && (best == 0 || r <= lowest) {
			best, lowest, behind = n, r, after
		}
		after, n = n, s.before
	}
	if best == 0 {
		return v, false
	}
	s := w.slot(best)
	switch {
	case behind > 0:
		w.slot(behind).before = s.before
	case s.before > w.drops:
		w.last[key] = s.before
	default:
		delete(w.last, key)
	}
	v = s.value
	*s = slot[V]{at: s.at, taken: true}
	w.live--
	return v, true
}

// expire removes what is older than the window's age.
func (w *window[V]) expire(now time.Time, gone func(V)) {
	for w.drops < w.puts && w.slot(w.drops+1).at < now.Add(-w.age).UnixNano() {
		w.drop(gone)
	}
}

// drop removes the oldest.
func (w *window[V]) drop(gone func(V)) {
	w.drops++
	s := w.slot(w.drops)
	if !s.taken {
		if w.last[s.key] == w.drops {
			delete(w.last, s.key)
		}
		w.live--
		if gone != nil {
			gone(s.value)
		}
	}
	*s = slot[V]{}
}
