package ingest

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	maxVMs    = 4096            // gateway workers whose counters are followed; of more, batches count without theirs
	maxBuilds = 4096            // builds of the plugin, each at each gateway
	maxDemand = load.MaxDemands // policies, each at each worker
	// demandFor is how long the demand at a worker that is silent is told: it has
	// no requests then, or is gone.
	demandFor = 5 * time.Minute
	// vmSilence is how long a worker is silent for that makes room for another: one
	// that has requests sends a batch each ten seconds at least.
	vmSilence   = 15 * time.Second
	buildMemory = 30 * time.Minute // then a silent build is forgotten, if there is need
	// shareSilence is the longest time between two batches of a worker of which the
	// second tells when new shares took effect.
	shareSilence = 250 * time.Millisecond
	maxLate      = 10 * time.Second // of a batch; more is a clock that was set
	maxGrowth    = 1 << 40          // of a counter from one batch to the next: no sum of them overflows
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
	untold    prometheus.Counter

	mu     sync.Mutex
	vms    map[vmKey]*vmState
	builds map[buildKey]*GatewayCount
	demand []*demand // sorted
	purged time.Time // when room was last made in demand
	swept  time.Time // and in vms
}

// demand is one policy's at one worker.
type demand struct {
	load.Demand
	vm         *vmState
	heard      time.Time
	shareSince time.Time
	seq        uint64 // of the newest batch
}

type (
	vmKey    struct{ gateway, vm string }
	buildKey struct{ gateway, plugin string }
)

// GatewayCount is what a gateway's batches told of one build of the plugin.
type GatewayCount struct {
	Gateway string    // as authenticated
	Plugin  string    // "version+digest", in its own words
	Seen    uint64    // exchanges that the plugin has seen
	Errors  uint64    // of the plugin
	Last    time.Time // of the newest batch
}

type vmState struct {
	seq      uint64
	counters map[string]uint64
	last     time.Time
	apart    time.Duration // this node's clock less the gateway's, and the shortest way: the least of late
	timed    bool          // apart is known
}

// when is the time at which a batch would have come had it not waited on its way,
// in sockets above all: counters are of the time at which it was sent.
func (v *vmState) when(sentUS uint64, now time.Time) time.Time {
	if sentUS == 0 || sentUS > 1<<53 {
		return now
	}
	apart := now.Sub(time.UnixMicro(int64(sentUS)))
	v.apart += now.Sub(v.last) / 1000 // clocks drift
	if late := apart - v.apart; !v.timed || late < 0 || late > maxLate {
		v.apart, v.timed = apart, true
	}
	return now.Add(v.apart - apart)
}

func newLedger(reg prometheus.Registerer) *ledger {
	l := &ledger{
		vms: map[vmKey]*vmState{}, builds: map[buildKey]*GatewayCount{},
		exchanges: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_gateway_exchanges_total", Help: "Exchanges at the gateways' plugins by outcome, as their batches report: seen is all of them."}, []string{"outcome"}),
		cut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_cut_bytes_total", Help: "Body bytes beyond the policies' limits, as batches report."}),
		sent: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_batches_total", Help: "Batches that gateways sent here, by their numbers: more than were received means loss on the way."}),
		untracked: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_untracked_batches_total", Help: "Batches of gateway workers whose counters are not followed, for want of room: 4,096 others are at work."}),
		untold: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_gateway_untold_demand_batches_total", Help: "Batches whose policy's demand load reports leave out, for want of room."}),
	}
	if reg != nil {
		reg.MustRegister(l.exchanges, l.cut, l.sent, l.untracked, l.untold)
	}
	for _, o := range exchangeOutcomes {
		l.exchanges.WithLabelValues(o)
	}
	return l
}

// observe takes a batch.
func (l *ledger) observe(gateway string, b *event.Batch, now time.Time) {
	h := &b.Header
	l.mu.Lock()
	defer l.mu.Unlock()
	// The key outlives the batch's buffer, which the header's strings alias.
	key := vmKey{gateway, h.VM}
	vm := l.vms[key]
	if vm == nil {
		if len(l.vms) >= maxVMs && !l.sweep(now) {
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
	l.want(gateway, b, vm, now, vm.when(h.SentUS, now))
	vm.last = now
	if h.Seq <= vm.seq {
		return // overtaken by a later one, which has told more
	}
	l.sent.Add(float64(min(h.Seq-vm.seq, maxGrowth)))
	vm.seq = h.Seq
	build := l.build(gateway, h.Plugin, now)
	for _, name := range exchangeOutcomes {
		grown := vm.advance(name, h.Counters)
		l.exchanges.WithLabelValues(name).Add(float64(grown))
		switch name {
		case event.CounterSeen:
			build.Seen += grown
		case event.CounterErrors:
			build.Errors += grown
		}
	}
	l.cut.Add(float64(vm.advance(event.CounterCutBytes, h.Counters)))
}

// want takes what a batch tells of its policy's demand. Where the plugin tells
// none, it is what the whole VM has seen and no policy left out. It is of the time
// at.
func (l *ledger) want(gateway string, b *event.Batch, vm *vmState, now, at time.Time) {
	h := &b.Header
	if h.Pod != "" {
		namespace, _, _ := strings.Cut(gateway, "/")
		gateway = namespace + "/" + h.Pod
	}
	d := load.Demand{Gateway: gateway, VM: h.VM, Policy: h.Policy, Eligible: h.Eligible, Priority: h.Priority, Mirrored: h.Mirrored}
	if h.Policy == "" {
		if len(b.Events) == 0 || !utf8.ValidString(b.Events[0].Policy) {
			return // nobody knows whose
		}
		d.Policy, d.Mirrored = b.Events[0].Policy, h.Counters[event.CounterMirrored]
		if left := h.Counters[event.CounterOff] + h.Counters[event.CounterExcluded]; left < h.Counters[event.CounterSeen] {
			d.Eligible = h.Counters[event.CounterSeen] - left
		}
	}
	d.Share = load.ShareNumber(h.ShareRev)
	received := uint64(len(b.Events) + b.Discarded)
	place := func() (int, bool) {
		return slices.BinarySearchFunc(l.demand, d, func(is *demand, d load.Demand) int { return is.Compare(d) })
	}
	i, found := place()
	if !found {
		if len(l.demand) >= maxDemand {
			if !l.purge(now) {
				l.untold.Inc()
				return
			}
			i, _ = place()
		}
		d.Gateway, d.VM, d.Policy = strings.Clone(d.Gateway), strings.Clone(d.VM), strings.Clone(d.Policy)
		d.Received = received
		l.demand = slices.Insert(l.demand, i, &demand{Demand: d, vm: vm, heard: at, seq: h.Seq})
		return
	}
	is := l.demand[i]
	is.Received += received
	if h.Seq > is.seq { // else overtaken
		is.seq = h.Seq
		if d.Share != is.Share {
			is.Share, is.shareSince = d.Share, time.Time{}
			if now.Sub(vm.last) <= shareSilence {
				is.shareSince = at
			}
		}
	}
	if d.Eligible > is.Eligible { // else a later one has overtaken it, or nothing is new
		is.heard = at
	}
	is.Eligible, is.Priority, is.Mirrored = max(is.Eligible, d.Eligible), max(is.Priority, d.Priority), max(is.Mirrored, d.Mirrored)
}

// purge makes room for demands: those of workers that are silent are not told any
// more. It looks at most once a second.
func (l *ledger) purge(now time.Time) (room bool) {
	if now.Sub(l.purged) < time.Second {
		return false
	}
	l.purged = now
	l.demand = slices.DeleteFunc(l.demand, func(d *demand) bool { return now.Sub(d.vm.last) > demandFor })
	return len(l.demand) < maxDemand
}

// demands lists what batches told of demand, sorted.
func (l *ledger) demands(now, start time.Time) []load.Demand {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]load.Demand, 0, len(l.demand))
	for _, d := range l.demand {
		if now.Sub(d.vm.last) <= demandFor {
			told := d.Demand
			told.Heard = max(0, d.heard.Sub(start))
			if !d.shareSince.IsZero() {
				told.ShareSince = max(0, d.shareSince.Sub(start))
			}
			out = append(out, told)
		}
	}
	return out
}

// build gives the count of one build at one gateway; one that is thrown away,
// for want of room.
func (l *ledger) build(gateway, plugin string, now time.Time) *GatewayCount {
	b := l.builds[buildKey{gateway, plugin}]
	if b == nil {
		if len(l.builds) >= maxBuilds {
			maps.DeleteFunc(l.builds, func(_ buildKey, b *GatewayCount) bool { return now.Sub(b.Last) > buildMemory })
		}
		b = &GatewayCount{Gateway: strings.Clone(gateway), Plugin: strings.Clone(plugin)}
		if len(l.builds) < maxBuilds {
			l.builds[buildKey{b.Gateway, b.Plugin}] = b
		}
	}
	b.Last = now
	return b
}

// gateways lists the counts, by gateway and build.
func (l *ledger) gateways() []GatewayCount {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]GatewayCount, 0, len(l.builds))
	for _, b := range l.builds {
		out = append(out, *b)
	}
	slices.SortFunc(out, func(a, b GatewayCount) int {
		return cmp.Or(strings.Compare(a.Gateway, b.Gateway), strings.Compare(a.Plugin, b.Plugin))
	})
	return out
}

// advance gives by how much a counter has grown.
func (v *vmState) advance(name string, counters map[string]uint64) uint64 {
	now, before := counters[name], v.counters[name]
	if now <= before {
		return 0
	}
	v.counters[name] = now
	return min(now-before, maxGrowth)
}

// sweep makes room for workers, as each new build of the plugin has new ones: those
// that are silent are forgotten. It looks at most once a second.
func (l *ledger) sweep(now time.Time) (room bool) {
	if now.Sub(l.swept) < time.Second {
		return false
	}
	l.swept = now
	silent := func(v *vmState) bool { return now.Sub(v.last) > vmSilence }
	maps.DeleteFunc(l.vms, func(_ vmKey, v *vmState) bool { return silent(v) })
	l.demand = slices.DeleteFunc(l.demand, func(d *demand) bool { return silent(d.vm) })
	return len(l.vms) < maxVMs
}
