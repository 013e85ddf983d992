package ingest

import (
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror/event"
)

const (
	maxVMs   = 4096             // gateway workers whose counters are followed
	vmMemory = 30 * time.Minute // then a silent one is forgotten, if there is need
)

// exchangeOutcomes are the plugin counters that are shown: a closed set, whatever a
// gateway sends.
var exchangeOutcomes = []string{
	event.CounterSeen, event.CounterMirrored, event.CounterOff, event.CounterExcluded, event.CounterSampled,
	event.CounterEvicted, event.CounterUnfinished, event.CounterErrors, event.CounterLostEvents,
}

// ledger turns the cumulative counters that batches carry, per Lua VM, into
// metrics of this node. What is seen and not mirrored has its outcome; batches
// sent and not received were lost on the way.
//
// A VM whose first batch here is not its first (the node is new) starts from
// what it says: only what follows counts. Counters that go back are ignored.
type ledger struct {
	exchanges *prometheus.CounterVec
	cut       prometheus.Counter
	sent      prometheus.Counter
	untracked prometheus.Counter

	mu  sync.Mutex
	vms map[vmKey]*vmState
}

type vmKey struct{ gateway, vm string }

type vmState struct {
	seq      uint64
	counters map[string]uint64
	last     time.Time
}

func newLedger(reg prometheus.Registerer) *ledger {
	l := &ledger{
		vms: map[vmKey]*vmState{},
		exchanges: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_gateway_exchanges_total", Help: "Exchanges at the gateways' plugins by outcome, as their batches report: seen is all of them."}, []string{"outcome"}),
		cut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_cut_bytes_total", Help: "Body bytes beyond the policies' limits, as batches report."}),
		sent: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_batches_total", Help: "Batches that gateways sent here, by their numbers: more than were received means loss on the way."}),
		untracked: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_untracked_batches_total", Help: "Batches whose counters were not followed, for want of room."}),
	}
	if reg != nil {
		reg.MustRegister(l.exchanges, l.cut, l.sent, l.untracked)
	}
	for _, o := range exchangeOutcomes {
		l.exchanges.WithLabelValues(o)
	}
	return l
}

// observe takes a batch's header.
func (l *ledger) observe(gateway string, h *event.Header, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// The key outlives the batch's buffer, which the header's strings alias.
	key := vmKey{gateway, h.VM}
	vm := l.vms[key]
	if vm == nil {
		if len(l.vms) >= maxVMs {
			l.forget(now)
		}
		if len(l.vms) >= maxVMs {
			l.untracked.Inc()
			return
		}
		vm = &vmState{counters: map[string]uint64{}}
		if h.Seq > 1 {
			vm.seq = h.Seq - 1
			for _, name := range exchangeOutcomes {
				vm.counters[name] = h.Counters[name]
			}
			vm.counters[event.CounterCutBytes] = h.Counters[event.CounterCutBytes]
		}
		l.vms[vmKey{strings.Clone(gateway), strings.Clone(h.VM)}] = vm
	}
	vm.last = now
	if h.Seq <= vm.seq {
		return // overtaken by a later one, which has told more
	}
	l.sent.Add(float64(h.Seq - vm.seq))
	vm.seq = h.Seq
	for _, name := range exchangeOutcomes {
		l.exchanges.WithLabelValues(name).Add(vm.advance(name, h.Counters))
	}
	l.cut.Add(vm.advance(event.CounterCutBytes, h.Counters))
}

// advance gives by how much a counter has grown.
func (v *vmState) advance(name string, counters map[string]uint64) float64 {
	now, before := counters[name], v.counters[name]
	if now <= before {
		return 0
	}
	v.counters[name] = now
	return float64(now - before)
}

func (l *ledger) forget(now time.Time) {
	for k, v := range l.vms {
		if now.Sub(v.last) > vmMemory {
			delete(l.vms, k)
		}
	}
}
