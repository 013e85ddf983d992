package share

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	maxWorkerRate = 1e6 // exchanges a second of one worker; more is garbage
	minStep       = 10 * time.Millisecond
	fastSpan      = 100 * time.Millisecond // smoothing of demand
	slowSpan      = 2 * time.Second        // the same, of single workers
	slowestSpan   = 4 * time.Second        // the same at most, where there is little
	slowCount     = 30                     // exchanges that an estimate is made of, if that takes no longer
	surgeChance   = 9                      // three standard deviations of demand are half followed, see flow.surge
	takenSpan     = 300 * time.Millisecond
	maxFirst      = 5000 // exchanges of a worker at first sight
	silentAfter   = 500 * time.Millisecond
	silentCount   = 3 // expected, and not come: there is less demand than was thought
	forgetAfter   = time.Minute
)

// leaf is a gateway's part of a policy.
type leaf struct {
	key     leafKey
	policy  *policy
	group   *group
	weight  float64
	place   int // among the gateways of all tenants
	workers []*worker

	routine, priority float64 // demand, exchanges a second
	taken             float64 // exchanges that nodes got since the last tick
	takenRate         float64
	floor             float64       // exchanges a second that its floor really brings
	spare             float64       // what its priority classes may have
	untold            time.Duration // when there was no room for what a node got of it
	even              float64       // part that is spread evenly over nodes, as far as is known
	whole             claim         // for all its exchanges
	bound             bound         // the one that counts
	bounds            []bound       // of this round
	by                *pool         // whose budget binds it; nil: none
	lies              bool          // sends more than it counts

	share    output
	prio     output
	peak     [2]float64 // highest share in force, in this window and the one before
	peakFrom time.Duration
	spared   float64 // the same of priority classes
}

// worker is a series of counters.
type worker struct {
	vm    string
	heard bool
	count counts
	at    time.Duration // when it had counted so, on our time line
	by    *node
	taken []intake // by node

	next    counts // the newest since the last tick
	nextAt  time.Duration
	nextBy  *node
	pending bool

	step         time.Duration // counted since the last tick; 0: nothing
	rate         float64
	priorityRate float64

	known      bool
	fast, slow float64 // demand of both classes, exchanges a second
	priority   float64
}

type counts struct{ eligible, priority uint64 }

// hear takes what a node heard of a worker.
func (c *Controller) hear(n *node, r *load.Report, d *load.Demand) {
	if d.Gateway == "" || d.VM == "" || max(len(d.Gateway), len(d.VM)) > maxName {
		c.faults[FaultName]++
		return
	}
	at := d.Heard
	if at <= 0 || at > r.Uptime {
		at = r.Uptime
	}
	w, l := c.worker(d, r.Uptime-at > forgetAfter)
	if w == nil {
		return
	}
	c.take(n, w, l, d, r.Uptime)
	k := counts{d.Eligible, d.Priority}
	if k.priority > k.eligible || d.Mirrored > d.Eligible {
		c.faults[FaultCounter]++
		k.priority = min(k.priority, k.eligible)
	}
	if w.heard && k.eligible <= w.count.eligible {
		return
	}
	if !w.pending || newer(k, n.name, n.offset+at, w) {
		w.next, w.nextAt, w.nextBy, w.pending = k, n.offset+at, n, true
	}
}

// intake is how many exchanges of a worker a node got by some time of its own.
type intake struct {
	id     int // of the node
	node   *node
	epoch  uint64
	count  uint64
	at     time.Duration
	recent float64 // exchanges; see distribute
}

// take counts what a node itself got of a worker. What it got before we listened
// does not count, nor, of the rate, does more than a moment's part of what it got
// over a while. A new worker that is new to a node long known, or just restarted, began
// with nothing.
func (c *Controller) take(n *node, w *worker, l *leaf, d *load.Demand, at time.Duration) {
	got := d.Received
	if got == 0 {
		return
	}
	i, ok := slices.BinarySearchFunc(w.taken, n.id, func(k intake, id int) int { return cmp.Compare(k.id, id) })
	if !ok {
		if c.taken >= maxTaken {
			l.untold = n.at
			c.faults[FaultFull]++
			return
		}
		c.taken++
		w.taken = slices.Insert(w.taken, i, intake{id: n.id, node: n})
	}
	k := &w.taken[i]
	first := !ok || k.epoch != n.report.Epoch
	if !first && got <= k.count {
		return
	}
	more := 0.0
	switch {
	case !first:
		more = float64(got - k.count)
	case d.Mirrored > maxFirst: // it has been at work for a while: forgotten, or come from another node
	case n.restarted || n.at-n.since > forgetAfter:
		more = float64(min(got, maxFirst))
	}
	span := max(at-k.at, time.Millisecond).Seconds()
	k.recent += min(more, maxWorkerRate*span)
	if !first {
		more *= min(1, takenSpan.Seconds()/span)
	}
	l.taken += more
	k.epoch, k.count, k.at = n.report.Epoch, got, at
}

// newer orders what several nodes heard of a worker in one tick.
func newer(k counts, node string, at time.Duration, w *worker) bool {
	if k.eligible != w.next.eligible {
		return k.eligible > w.next.eligible
	}
	if k.priority != w.next.priority {
		return k.priority > w.next.priority
	}
	if by := strings.Compare(node, w.nextBy.name); by != 0 {
		return by < 0
	}
	return at < w.nextAt
}

// worker finds a series, or makes it, unless that has long been silent: nodes tell of
// one for longer than it counts here.
func (c *Controller) worker(d *load.Demand, silent bool) (*worker, *leaf) {
	l, i := c.leaves[leafKey{d.Gateway, d.Policy}], 0
	if l != nil {
		var ok bool
		if i, ok = slices.BinarySearchFunc(l.workers, d.VM, func(w *worker, vm string) int { return strings.Compare(w.vm, vm) }); ok {
			return l.workers[i], l
		}
	}
	if silent {
		return nil, nil
	}
	if l == nil {
		if c.policies[d.Policy] == nil {
			c.faults[FaultPolicy]++
			return nil, nil
		}
		_, known := c.gateways[d.Gateway]
		if !known && len(c.gateways) >= maxGateways || len(c.leaves) >= maxLeaves || c.workers >= maxWorkers {
			c.faults[FaultFull]++
			return nil, nil
		}
		// The strings may be parts of a whole report.
		l = &leaf{key: leafKey{strings.Clone(d.Gateway), strings.Clone(d.Policy)}}
		c.leaves[l.key] = l
		c.gateways[l.key.gateway]++
		c.place(l)
	}
	if len(l.workers) >= maxLeafWorkers || c.workers >= maxWorkers {
		c.faults[FaultFull]++
		return nil, nil
	}
	c.workers++
	w := &worker{vm: strings.Clone(d.VM)}
	l.workers = slices.Insert(l.workers, i, w)
	return w, l
}

// oldest gives room for workers that come, where they come and go quickly.
func (l *leaf) oldest(now time.Duration) *worker {
	if len(l.workers) < maxLeafWorkers/2 {
		return nil
	}
	old := slices.MinFunc(l.workers, func(a, b *worker) int { return cmp.Compare(a.at, b.at) })
	if !old.heard || now-old.at < silentAfter {
		return nil
	}
	return old
}

// advance takes the newest count of the tick.
func (w *worker) advance(now time.Duration, faults map[Fault]uint64) {
	if !w.pending {
		return
	}
	at := min(w.nextAt, now)
	if !w.heard {
		w.heard, w.count, w.at, w.by, w.pending = true, w.next, at, w.nextBy, false
		return
	}
	step := at - w.at
	if step < minStep {
		return // heard by another node at about the same time: with the next one
	}
	w.pending = false
	n := float64(w.next.eligible - w.count.eligible)
	rate := n / step.Seconds()
	if rate > maxWorkerRate || w.next.priority < w.count.priority {
		faults[FaultCounter]++
		return
	}
	w.step, w.rate = step, rate
	w.priorityRate = min(rate, float64(w.next.priority-w.count.priority)/step.Seconds())
	w.count, w.at, w.by = w.next, at, w.nextBy
}

// follow lets the estimates follow what was counted since the last tick; at once
// where the tenant's demand jumped, or this worker's.
func (w *worker) follow(jumped bool, late time.Duration) {
	if w.step == 0 {
		return
	}
	fast, slow := load.Gain(w.step, fastSpan), load.Gain(w.step, w.span())
	if jumped {
		fast = 1
	}
	if !w.known || jump(w.rate*w.step.Seconds(), w.slow*w.step.Seconds(), w.slow*late.Seconds()) {
		fast, slow = 1, 1
	}
	if w.known && jump(w.priorityRate*w.step.Seconds(), w.priority*w.step.Seconds(), w.priority*late.Seconds()) {
		w.priority = w.priorityRate
	}
	w.known = true
	w.fast += fast * (w.rate - w.fast)
	w.slow += slow * (w.rate - w.slow)
	w.priority = min(w.slow, w.priority+slow*(w.priorityRate-w.priority))
	w.step = 0
}

// jump tells whether n exchanges instead of those expected are beyond chance and
// the usual bursts. What was late may come all at once.
func jump(n, expected, late float64) bool {
	noise := 4 * math.Sqrt(expected)
	return n > 2*(expected+late)+noise+8 || n < expected/2-noise-8
}

// span is the smoothing time of slow: long enough for some exchanges.
func (w *worker) span() time.Duration { return countSpan(w.slow, slowSpan) }

// countSpan is the time in which slowCount exchanges come at a rate: least at least, and
// slowestSpan at most.
func countSpan(rate float64, least time.Duration) time.Duration {
	if rate*slowestSpan.Seconds() <= slowCount {
		return slowestSpan
	}
	return max(least, time.Duration(slowCount/rate*float64(time.Second)))
}

// silence lowers the estimate of a worker of which the node that heard it last
// hears nothing: it would have sent something.
func (w *worker) silence(now time.Duration, share float64) {
	if !w.known || w.slow == 0 || !w.by.fresh(now) {
		return
	}
	silent := w.by.offset + w.by.report.Uptime - w.at
	if silent < silentAfter {
		return
	}
	mirrored := share + (1-share)*w.priority/w.slow
	if mirrored <= 0 {
		return
	}
	most := silentCount / (mirrored * silent.Seconds())
	w.fast, w.slow, w.priority = min(w.fast, most), min(w.slow, most), min(w.priority, most)
}

// demands advances all leaves and sums up their workers'.
func (c *Controller) demands(now, dt time.Duration) {
	for _, t := range c.tenants {
		*t = tenant{name: t.name, weight: t.weight}
	}
	late := c.shown.Totals.Delay
	for _, n := range c.byName {
		late = max(late, n.delay())
	}
	for _, l := range c.sorted {
		t := l.policy.tenant
		for _, w := range l.workers {
			w.advance(now, c.faults)
			if w.known && w.step > 0 {
				f := &t.flows[l.class()]
				f.counted += w.rate * w.step.Seconds()
				f.expected += w.fast * w.step.Seconds()
				f.late += w.fast * late.Seconds()
			}
		}
	}
	for _, l := range c.sorted {
		f := &l.policy.tenant.flows[l.class()]
		jumped := jump(f.counted, f.expected, f.late)
		oldest := l.oldest(now)
		kept := l.workers[:0]
		for _, w := range l.workers {
			w.follow(jumped, late)
			w.silence(now, l.share.inForce())
			if w.heard && now-w.at > forgetAfter || w == oldest {
				c.forget(w)
				continue
			}
			kept = append(kept, w)
			if w.known {
				f.fast += w.fast
				f.slow += w.slow
			}
		}
		clear(l.workers[len(kept):])
		l.workers = kept
		if len(kept) == 0 {
			c.removeLeaf(l)
		}
	}
	c.sort()
	for _, t := range c.tenants {
		for i := range t.flows {
			t.flows[i].surge()
		}
	}
	// What nodes get now may be by a share of so long ago, and is seen for a while.
	window := 2*(c.tau+tick) + c.shown.Totals.Delay + 4*takenSpan
	for _, l := range c.sorted {
		l.sum(now, dt, window, c.faults)
	}
}

// flow is the demand of those of a tenant's leaves that get what they want, or of
// the others: a surge of the ones must not be taken for one of the others.
type flow struct {
	counted, expected float64 // exchanges since the last tick
	late              float64 // exchanges that may have been held up
	fast, slow        float64 // sums of workers' estimates
	gain              float64
}

// class of a leaf: 1 if it gets less than it wants.
func (l *leaf) class() int {
	if l.share.inForce() < l.ceiling() {
		return 1
	}
	return 0
}

// surge finds out how much the flow is beyond the sum of its workers' slow
// estimates. The whole is known well at once, its parts are not, and need not be:
// what gateways' bursts are among each other makes no difference to nodes, and
// following each of them would change shares all the time. What chance alone would
// do is followed least, what is far beyond it in full.
func (f *flow) surge() {
	f.gain = 1
	if f.fast > 0 && f.slow > 0 {
		n, off := 2*fastSpan.Seconds()*f.slow, f.fast/f.slow-1
		chance := n * off * off // the square of the deviation, by the variance of a count of n
		f.gain = min(max(1+off*chance/(chance+surgeChance), 0.05), 20)
	}
}

// sum makes the leaf's demand of its workers'.
func (l *leaf) sum(now, dt, window time.Duration, faults map[Fault]uint64) {
	var all, priority float64
	known := true
	gain := l.policy.tenant.flows[l.class()].gain
	for _, w := range l.workers {
		all += gain * w.slow
		priority += gain * w.priority
		known = known && w.known
	}
	l.routine, l.priority = all-priority, priority
	if dt > 0 {
		l.takenRate += load.Gain(dt, takenSpan) * (l.taken/dt.Seconds() - l.takenRate)
		l.taken = 0
	}
	if now-l.peakFrom > window {
		l.peak[1], l.peak[0], l.peakFrom = l.peak[0], 0, now
	}
	l.peak[0] = max(l.peak[0], l.share.inForce())
	l.spared = max(l.prio.inForce(), l.spared*math.Exp(-dt.Seconds()/window.Seconds()))
	routine := max(0, l.takenRate-priority*l.spared)
	l.floor = min(routine, float64(l.policy.Floor)/Everything*l.routine)
	// What nodes got is by a share that was in force a moment ago, the highest at most.
	peak := max(l.peak[0], l.peak[1])
	least := routine / max(peak, leastShare)
	l.lies = false
	if n := routine * takenSpan.Seconds(); peak > 0 && n > 20 && least > 2*l.routine+4*math.Sqrt(n)/takenSpan.Seconds()/max(peak, leastShare) {
		l.routine = least
		if known {
			l.lies = true
			faults[FaultDemand]++
		}
	}
}
