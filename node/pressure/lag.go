package pressure

import (
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
	gateways map[string]map[string]*worker // by gateway and VM
	workers  int                           // of all
	lags     []time.Duration               // for Lag, of one gateway
	medians  []time.Duration               // likewise, of each
	pruned   time.Duration
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
	w := l.gateways[gateway][vm]
	if w == nil {
		full := func() bool { return l.workers >= maxWorkers || len(l.gateways[gateway]) >= maxVoices }
		if full() && read-l.pruned > time.Second {
			l.prune(read)
		}
		if full() {
			return
		}
		if l.gateways == nil {
			l.gateways = map[string]map[string]*worker{}
		}
		of := l.gateways[gateway]
		if of == nil { // names outlive the batch
			of = map[string]*worker{}
			l.gateways[strings.Clone(gateway)] = of
		}
		w = &worker{}
		of[strings.Clone(vm)] = w
		l.workers++
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
	l.medians = l.medians[:0]
	for _, of := range l.gateways {
		l.lags = l.lags[:0]
		for _, w := range of {
			if age := now - w.read; age >= 0 && age <= lagFresh {
				l.lags = append(l.lags, w.lag)
			}
		}
		if len(l.lags) > 0 {
			l.medians = append(l.medians, median(l.lags))
		}
	}
	if len(l.medians) == 0 {
		return 0
	}
	return min(MaxDelay, median(l.medians))
}

// median of some lags, the lower of two; it sorts them.
func median(lags []time.Duration) time.Duration {
	slices.Sort(lags)
	return lags[(len(lags)-1)/2]
}

// prune forgets workers that have been silent for two windows.
func (l *Lags) prune(now time.Duration) {
	l.pruned = now
	for gateway, of := range l.gateways {
		for vm, w := range of {
			if age := now - w.read; age < 0 || age > 2*lagWindow {
				delete(of, vm)
				l.workers--
			}
		}
		if len(of) == 0 {
			delete(l.gateways, gateway)
		}
	}
}
