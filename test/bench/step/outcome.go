package main

import (
	"math"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/overload"
)

const (
	goodWithin = 100 * time.Millisecond // from sending to analysis
	binMS      = 50
	// followed is the time over which demand is counted when the share's variation is
	// compared with it: twice the e-folding time with which the controller follows.
	followedMS = 200
)

// outcome of a run, of the step unless it says otherwise.
type outcome struct {
	goodput  float64 // analysed within 100 ms of being sent, by what the node can do
	priority float64 // exchanges of a priority class analysed so, of those that were to be mirrored
	waste    float64 // mirrored, and not analysed, of what was mirrored
	p99      float64 // ms of delay, over time
	longest  float64 // ms
	settled  float64 // s, see overload.Settled
	recovery float64 // s from the end of the step until the share is 0.95; NaN: never
	varies   float64 // variation of the share beyond that of demand, second half
	changes  float64 // of shares, a second
	spoilt   int     // exchanges of a priority class that the guard discarded, all phases
	quiet    float64 // share that all gateways but the first had, from a second on
	effect   float64 // ms from a decision to the first batch made under it, median

	analysed float64 // exchanges a second, from the first second on
	errors   int     // of users, all phases
	users    float64 // p99 of users' requests, ms
	dropped  int64   // batches that Envoys dropped or that failed
	broken   int64   // errors of the plugin
	idle     float64 // part of the machine's CPU time

	points []overload.Point
}

// outcome works out a run of a node that can analyse so many exchanges a second.
func (r *record) outcome(s scenario, capacity float64) outcome {
	from, to := r.lengths.from(), r.lengths.to()
	o := outcome{recovery: math.NaN(), quiet: math.NaN(), effect: math.NaN(), idle: r.idle}
	var good, goodPriority, analysed, late float64
	for _, f := range r.fates {
		if !f.analysed {
			if f.priority {
				o.spoilt++
			}
			continue
		}
		sent, done := f.sent().Sub(r.start), f.at.Sub(r.start)
		if sent >= from && sent < to {
			analysed++
			if f.age <= goodWithin {
				good++
				if f.priority {
					goodPriority++
				}
			}
		}
		if done >= from+time.Second && done < to {
			late++
		}
	}
	step := (to - from).Seconds()
	o.analysed = late / (step - 1)
	o.goodput = good / (capacity * step)
	mirrored := r.counters[1].mirrored - r.counters[0].mirrored
	o.waste = max(0, 1-analysed/max(1, float64(mirrored)))
	o.dropped = r.counters[1].overflow - r.counters[0].overflow + r.counters[1].failed - r.counters[0].failed
	o.broken = r.counters[1].errors - r.counters[0].errors
	r.ofUsers(&o)
	r.ofShares(&o, s, goodPriority)
	r.ofDelay(&o, capacity)
	return o
}

func (r *record) ofUsers(o *outcome) {
	for _, u := range r.users {
		o.errors += u.Errors
	}
	o.users = quantile(r.users[phaseStep].Latencies, 0.99)
	o.effect = quantile(r.effects, 0.5)
}

// quantile of durations, in ms.
func quantile(of []time.Duration, q float64) float64 {
	if len(of) == 0 {
		return math.NaN()
	}
	slices.Sort(of)
	return of[int(q*float64(len(of)-1))].Seconds() * 1000
}

// shares is a walk through what was pushed.
type shares struct {
	pushes []pushed
	now    []overload.Shares
}

func (r *record) walk() *shares {
	w := &shares{pushes: r.pushes, now: make([]overload.Shares, len(r.demands))}
	for i := range w.now {
		w.now[i] = overload.Shares{Routine: 1, Priority: 1}
	}
	return w
}

// at are the shares at a time, which must not go back.
func (w *shares) at(t time.Duration) []overload.Shares {
	for len(w.pushes) > 0 && w.pushes[0].At <= t {
		if s := w.pushes[0].Shares; s != nil {
			w.now = s
		}
		w.pushes = w.pushes[1:]
	}
	return w.now
}

// ofShares works out what follows from the shares that were pushed.
func (r *record) ofShares(o *outcome, s scenario, goodPriority float64) {
	from, to, end := r.lengths.from(), r.lengths.to(), r.lengths.end()
	w := r.walk()
	var variations []float64
	var quiet, quietN float64
	for t := time.Duration(0); t < end; t += binMS * time.Millisecond {
		now, phase := w.at(t), phaseBefore
		switch {
		case t >= to:
			phase = phaseAfter
		case t >= from:
			phase = phaseStep
		}
		share := r.mean(s, now, phase)
		if t >= to && math.IsNaN(o.recovery) && share >= 0.95 {
			o.recovery = (t - to).Seconds()
		}
		if t >= (from+to)/2 && t < to {
			variations = append(variations, share)
		}
		if t >= from+time.Second && t < to {
			for _, one := range now[1:] {
				quiet += one.Routine
				quietN++
			}
		}
	}
	if quietN > 0 {
		o.quiet = quiet / quietN
	}
	var demands []float64
	bins := r.bins(followedMS)
	for t := (from + to) / 2; t+followedMS*time.Millisecond <= to; t += followedMS * time.Millisecond {
		demands = append(demands, bins[int(t.Milliseconds()/followedMS)])
	}
	v, d := overload.Variation(variations), overload.Variation(demands)
	o.varies = math.Sqrt(max(0, v*v-d*d))
	wanted := 0.0
	for i := range r.demands {
		w := r.walk()
		for _, t := range r.demands[i].priority[phaseStep] {
			wanted += w.at(t)[i].Priority
		}
	}
	o.priority = goodPriority / max(1, wanted)
	var before []overload.Shares
	for _, p := range r.pushes {
		if p.Shares == nil {
			continue
		}
		for i := range p.Shares {
			if before != nil && p.At >= from && p.At < to && p.Shares[i] != before[i] {
				o.changes++
			}
		}
		before = p.Shares
	}
	o.changes /= (to - from).Seconds()
}

// mean is the share over gateways, by demand.
func (r *record) mean(s scenario, now []overload.Shares, phase int) float64 {
	var sum, all float64
	for i := range now {
		rate := s.rates(i)[phase]
		sum += rate * now[i].Routine
		all += rate
	}
	return sum / all
}

// bins count all requests, by time.
func (r *record) bins(ms int) []float64 {
	out := make([]float64, r.lengths.end().Milliseconds()/int64(ms)+1)
	for _, d := range r.demands {
		for _, t := range d.all() {
			out[t.Milliseconds()/int64(ms)]++
		}
	}
	return out
}

// delays is for each ms how long the oldest exchange has been on its way that the
// node will analyse: in ms.
func (r *record) delays() []float64 {
	sent := make([]fate, 0, len(r.fates))
	for _, f := range r.fates {
		if f.analysed {
			sent = append(sent, f)
		}
	}
	slices.SortFunc(sent, func(a, b fate) int { return a.sent().Compare(b.sent()) })
	// The oldest that is on its way at t is the first in this order that is not
	// done; those that end out of order are passed over when their turn comes.
	out := make([]float64, r.lengths.end().Milliseconds())
	next := 0
	for ms := range out {
		t := r.start.Add(time.Duration(ms) * time.Millisecond)
		for next < len(sent) && !sent[next].at.After(t) {
			next++
		}
		if next < len(sent) {
			out[ms] = max(0, t.Sub(sent[next].sent()).Seconds()*1000)
		}
	}
	return out
}

func (r *record) ofDelay(o *outcome, capacity float64) {
	from, to := int(r.lengths.from().Milliseconds()), int(r.lengths.to().Milliseconds())
	delays := r.delays()
	o.settled = overload.Settled(delays[from:to])
	sorted := slices.Sorted(slices.Values(delays[from:to]))
	o.p99, o.longest = sorted[len(sorted)*99/100], sorted[len(sorted)-1]

	arrived := make([]float64, len(delays)/binMS+1)
	for _, f := range r.fates {
		at := f.at
		if f.analysed {
			at = f.sent()
		}
		if ms := at.Sub(r.start).Milliseconds(); ms >= 0 && ms < int64(len(delays)) {
			arrived[ms/binMS]++
		}
	}
	demand := r.bins(binMS)
	w := r.walk()
	perBin := capacity * binMS / 1000
	for ms := 0; ms+binMS <= len(delays); ms += binMS {
		t := time.Duration(ms) * time.Millisecond
		var share, all float64
		for i, s := range w.at(t) {
			n := float64(len(r.demands[i].routine[phaseStep]))
			share += n * s.Routine
			all += n
		}
		o.points = append(o.points, overload.Point{
			T: t.Seconds(), Share: share / all, Demand: demand[ms/binMS] / perBin, Capacity: 1,
			Arrived: arrived[ms/binMS] / perBin, Delay: slices.Max(delays[ms:ms+binMS]) / 1000,
		})
	}
}
