package accesslog

import "time"

// window keeps values by key, so many and so long; the oldest leave first.
type window[V any] struct {
	max   int
	age   time.Duration
	items map[uint64]item[V]
	order []stamp // a ring, which grows to max
	head  int     // the oldest stamp
	used  int     // stamps in the ring; those of items that are gone stay until they are the oldest
}

type item[V any] struct {
	value V
	at    int64 // ns
}

// stamp is of an item, unless that was taken or replaced since.
type stamp struct {
	key uint64
	at  int64
}

func (w *window[V]) len() int { return len(w.items) }

// put adds a value; gone, unless nil, is told of each that leaves for it.
func (w *window[V]) put(key uint64, v V, now time.Time, gone func(V)) {
	if w.items == nil {
		w.items = map[uint64]item[V]{}
	}
	if w.used == w.max {
		w.drop(gone)
	}
	if old, ok := w.items[key]; ok && gone != nil {
		gone(old.value)
	}
	s := stamp{key, now.UnixNano()}
	if len(w.order) < w.max {
		w.order = append(w.order, s)
	} else {
		w.order[(w.head+w.used)%w.max] = s
	}
	w.used++
	w.items[key] = item[V]{v, s.at}
}

// take removes a value.
func (w *window[V]) take(key uint64) (V, bool) {
	i, ok := w.items[key]
	delete(w.items, key)
	return i.value, ok
}

// expire removes what is older than the window's age.
func (w *window[V]) expire(now time.Time, gone func(V)) {
	for w.used > 0 && w.order[w.head].at < now.Add(-w.age).UnixNano() {
		w.drop(gone)
	}
}

// drop removes the oldest.
func (w *window[V]) drop(gone func(V)) {
	s := w.order[w.head]
	w.head = (w.head + 1) % w.max
	w.used--
	if i, ok := w.items[s.key]; ok && i.at == s.at {
		delete(w.items, s.key)
		if gone != nil {
			gone(i.value)
		}
	}
}
