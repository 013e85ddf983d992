package accesslog

import (
	"math/rand/v2"
	"testing"
	"time"
)

// Against a plain list: nothing is lost, found twice, or kept too long.
func TestWindow(t *testing.T) {
	type item struct{ key, value uint64 }
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 0))
		w := window[uint64]{max: 20, age: 10}
		var list []item // and what was taken, as value 0: it holds its place
		gone := 0
		forget := func(v uint64) {
			for list[0].value == 0 {
				list = list[1:]
			}
			if list[0].value != v {
				t.Fatalf("seed %d: %d left before %d", seed, v, list[0].value)
			}
			list = list[1:]
			gone++
		}
		now, put, taken := time.Unix(0, 1), 0, 0
		for step := range uint64(2000) {
			now = now.Add(time.Duration(r.IntN(2)))
			key := r.Uint64N(5)
			switch r.IntN(3) {
			case 0, 1:
				w.put(key, step+1, now, forget)
				list = append(list, item{key, step + 1})
				put++
			case 2:
				w.expire(now, forget)
				odd := func(v uint64) (uint64, bool) { return v % 7, v%2 == 1 }
				best := -1
				for i, it := range list {
					if it.value%2 == 1 && it.key == key && (best < 0 || it.value%7 < list[best].value%7) {
						best = i
					}
				}
				v, ok := w.take(key, odd)
				if ok != (best >= 0) || ok && v != list[best].value {
					t.Fatalf("seed %d, step %d: took %d, %v of %v", seed, step, v, ok, list)
				}
				if ok {
					list[best].value = 0
					taken++
				}
			}
			if w.live != put-taken-gone || len(w.slots) > 20 || len(w.last) > 20 {
				t.Fatalf("%d are live, of %d put, %d taken, %d gone; %d slots, %d keys", w.live, put, taken, gone, len(w.slots), len(w.last))
			}
		}
		w.expire(now.Add(time.Hour), nil)
		if w.live != 0 || len(w.last) != 0 {
			t.Fatalf("%d are left, %d keys", w.live, len(w.last))
		}
	}
}
