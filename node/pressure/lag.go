package pressure

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

const (
	maxWorkers  = 2048
	maxVoices   = 64               // workers of a gateway
	lagWindow   = 15 * time.Second // the least difference is of one or two of them
	lagFresh    = 250 * time.Millisecond
	maxBackstep = time.Second // of a worker's clock; batches overtake each other by less
)

// Lags tells how much longer than at best batches take from their sending to their
// reading. The two ends' clocks may disagree by any constant: only differences to
// the least of late count. A gateway whose clock is set anew, or who lies, moves
// the result by no more than one voice of many: it is the median over gateways of
// each one's median over its workers.
//
// It remembers 2,048 workers, 64 of each gateway; more are not listened to. The zero
// value is ready.
type Lags struct {
	workers map[voice]*worker
	of      map[string]int // workers, by gateway
	lags    []gatewayLag   // for Lag
	medians []time.Duration
	pruned  time.Duration
}

type voice struct{ gateway, vm string }

type gatewayLag struct {
	gateway string
	lag     time.Duration
}

type worker struct {
	least, before time.Duration // of this window and of the one before
	since         time.Duration
	sent, read    time.Duration // of the latest batch
	lag           time.Duration
}

// Heard takes a batch of a gateway's worker: sent by the worker's clock, read by the
// node's.
func (l *Lags) Heard(gateway, vm string, sent, read time.Duration) {
	w := l.workers[voice{gateway, vm}]
	if w == nil {
		full := func() bool { return len(l.workers) >= maxWorkers || l.of[gateway] >= maxVoices }
		if full() && read-l.pruned > time.Second {
			l.prune(read)
		}
		if full() {
			return
		}
		if l.workers == nil {
			l.workers, l.of = map[voice]*worker{}, map[string]int{}
		}
		w = &worker{}
		key := voice{strings.Clone(gateway), strings.Clone(vm)} // it outlives the batch
		l.workers[key] = w
		l.of[key.gateway]++
		w.restart(sent, read)
		return
	}
	if sent < w.sent-maxBackstep {
		w.restart(sent, read)
		return
	}
	if read-w.since > lagWindow {
		w.before, w.least, w.since = w.least, read-sent, read
	}
	w.least = min(w.least, read-sent)
	w.lag = max(0, read-sent-min(w.least, w.before))
	w.sent, w.read = max(sent, w.sent), max(read, w.read) // batches are read at one time
}

func (w *worker) restart(sent, read time.Duration) {
	*w = worker{least: read - sent, before: read - sent, since: read, sent: sent, read: read}
}

// Lag is the median of the gateways' whose workers were heard within the last 250 ms;
// 0 if there are none.
func (l *Lags) Lag(now time.Duration) time.Duration {
	l.lags, l.medians = l.lags[:0], l.medians[:0]
	for v, w := range l.workers {
		if age := now - w.read; age >= 0 && age <= lagFresh {
			l.lags = append(l.lags, gatewayLag{v.gateway, w.lag})
		}
	}
	slices.SortFunc(l.lags, func(a, b gatewayLag) int {
		return cmp.Or(strings.Compare(a.gateway, b.gateway), cmp.Compare(a.lag, b.lag))
	})
	for first, i := 0, 1; i <= len(l.lags); i++ {
		if i == len(l.lags) || l.lags[i].gateway != l.lags[first].gateway {
			l.medians = append(l.medians, l.lags[(first+i-1)/2].lag)
			first = i
		}
	}
	if len(l.medians) == 0 {
		return 0
	}
	slices.Sort(l.medians)
	return min(MaxDelay, l.medians[(len(l.medians)-1)/2])
}

// prune forgets workers that have been silent for two windows.
func (l *Lags) prune(now time.Duration) {
	l.pruned = now
	for v, w := range l.workers {
		if age := now - w.read; age < 0 || age > 2*lagWindow {
			delete(l.workers, v)
			if l.of[v.gateway]--; l.of[v.gateway] == 0 {
				delete(l.of, v.gateway)
			}
		}
	}
}
