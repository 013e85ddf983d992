package pressure

import (
	"slices"
	"strings"
	"time"
)

const (
	maxWorkers  = 2048
	lagWindow   = 15 * time.Second // the least difference is of one or two of them
	lagFresh    = 250 * time.Millisecond
	maxBackstep = time.Second // of a worker's clock; batches overtake each other by less
)

// Lags tells how much longer than at best batches take from their sending to their
// reading. The two ends' clocks may disagree by any constant: only differences to
// the least of late count. A gateway whose clock is set anew, or who lies, moves
// the result by no more than one voice of many: it is the median over workers.
//
// It remembers 2,048 workers; more are not listened to. The zero value is ready.
type Lags struct {
	workers map[string]*worker
	lags    []time.Duration // for Lag
	pruned  time.Duration
}

type worker struct {
	least, before time.Duration // of this window and of the one before
	since         time.Duration
	sent, read    time.Duration // of the latest batch
	lag           time.Duration
}

// Heard takes a batch: sent by the worker's clock, read by the node's.
func (l *Lags) Heard(vm string, sent, read time.Duration) {
	w := l.workers[vm]
	if w == nil {
		if len(l.workers) >= maxWorkers && read-l.pruned > time.Second {
			l.prune(read)
		}
		if len(l.workers) >= maxWorkers {
			return
		}
		if l.workers == nil {
			l.workers = map[string]*worker{}
		}
		w = &worker{}
		l.workers[strings.Clone(vm)] = w // it outlives the batch
		w.restart(sent, read)
		return
	}
	if sent < w.sent-maxBackstep || read < w.read {
		w.restart(sent, read)
		return
	}
	if read-w.since > lagWindow {
		w.before, w.least, w.since = w.least, read-sent, read
	}
	w.least = min(w.least, read-sent)
	w.lag = max(0, read-sent-min(w.least, w.before))
	w.sent, w.read = max(sent, w.sent), read
}

func (w *worker) restart(sent, read time.Duration) {
	*w = worker{least: read - sent, before: read - sent, since: read, sent: sent, read: read}
}

// Lag is the median of the workers' that were heard within the last 250 ms; 0 if
// there are none.
func (l *Lags) Lag(now time.Duration) time.Duration {
	l.lags = l.lags[:0]
	for _, w := range l.workers {
		if age := now - w.read; age >= 0 && age <= lagFresh {
			l.lags = append(l.lags, w.lag)
		}
	}
	if len(l.lags) == 0 {
		return 0
	}
	slices.Sort(l.lags)
	return min(MaxDelay, l.lags[(len(l.lags)-1)/2])
}

// prune forgets workers that have been silent for two windows.
func (l *Lags) prune(now time.Duration) {
	l.pruned = now
	for vm, w := range l.workers {
		if age := now - w.read; age < 0 || age > 2*lagWindow {
			delete(l.workers, vm)
		}
	}
}
