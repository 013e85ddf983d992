// Package pressure turns samples of an analysis node's sockets, queue and CPU time
// into its level of load, and decides what the node discards while the mirrored
// share at gateways is too high for it (Guard).
//
// It is pure: it reads no clock and starts nothing, and the same samples give the
// same level. Times are those of one monotonic clock of the node's. It never judges
// by bytes: a full socket is no trouble as long as nothing in it is old.
//
// The node's packages and the commands may import it; it imports mirror/load.
package pressure

import (
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	// MaxDelay is the longest delay that is told; longer ones are as bad.
	MaxDelay = 10 * time.Second
	// maxGap is the longest time between samples of which rates are made. After a
	// longer one, the node was stopped or its clock jumped, and what it did
	// meanwhile says nothing of what it can do. A node that is throttled by its
	// CPU quota stands still for less than a period of 100 ms.
	maxGap = 250 * time.Millisecond
	// minGap is the time over which rates are made at least.
	minGap  = 20 * time.Millisecond
	useSpan = 100 * time.Millisecond // smoothing of utilization and rate

	busyUse = 0.7 // above it, a delay may be the node's own doing
	// maxSchedule is the longest that a process that has little to do waits for a CPU.
	maxSchedule = 100 * time.Millisecond

	maxDelayGarbage = time.Hour
	maxCPUs         = 4096
)

// Sample is what is read of a node at one time.
type Sample struct {
	At     time.Duration // by a monotonic clock
	Kernel time.Duration // age of the oldest bytes in a socket
	Queue  time.Duration // age of the oldest exchange between reading and analysis
	Queued int           // exchanges there: their number tells sooner than their age
	Lag    time.Duration // see Lags

	CPU  time.Duration // CPU time used so far, by all that shares CPUs
	CPUs float64       // CPUs that it may use: its quota, or its part by weight, or all there are

	Worked  time.Duration // time that its workers were at work so far, summed up
	Workers int           // 0: not known

	Analysed  uint64 // exchanges so far
	Discarded uint64 // exchanges so far, by the guard
}

// Level is a node's load.
type Level struct {
	Kernel      time.Duration // as sampled, as far as it is believed
	Queue       time.Duration // as sampled, or how long what is queued will take, if that is longer
	Lag         time.Duration // as far as it is believed
	Delay       time.Duration // the worst of them
	Utilization float64       // of the CPU time that the node may use; above 1: CPUs was too low
	Rate        float64       // exchanges analysed a second
	Capacity    float64       // exchanges a second that it could analyse; 0: not known yet
}

// fewQueued exchanges are no backlog, whatever the capacity is believed to be: it
// is least sure where there is little to do.
const fewQueued = 8

// Wait is how long so many exchanges between reading and analysis will take: what
// the guard goes by between samples, as much can come in 10 ms. 0: not known.
func (l Level) Wait(queued int) time.Duration {
	queued -= fewQueued
	if l.Capacity <= 0 || queued <= 0 {
		return 0
	}
	return time.Duration(min(float64(queued)/l.Capacity, MaxDelay.Seconds()) * float64(time.Second))
}

// Fault is something wrong with a sample: a closed set.
type Fault string

const (
	FaultNone    Fault = ""
	FaultGap     Fault = "gap"     // too long after the last one: stopped, or a clock that jumped
	FaultClock   Fault = "clock"   // before the last one
	FaultCounter Fault = "counter" // a counter went back or jumped
	FaultValue   Fault = "value"   // negative or absurd; taken as far as it can be
)

// Meter makes levels of successive samples. The zero value is ready.
type Meter struct {
	last     Sample
	started  bool
	level    Level
	capacity Capacity
	cpus     float64 // of the last sample that told
	use      float64 // as Level.Utilization, between the last two samples
}

// Add takes the next sample. A faulty one still gives a level: delays are those of
// the sample, bounded; what cannot be told from it stays as it was.
func (m *Meter) Add(s Sample) (Level, Fault) {
	fault := FaultNone
	var bad bool
	for _, d := range []*time.Duration{&s.Kernel, &s.Queue, &s.Lag} {
		bad = bad || *d < 0 || *d > maxDelayGarbage
		*d = min(max(*d, 0), MaxDelay)
	}
	if !(s.CPUs > 0) || s.CPUs > maxCPUs {
		bad, s.CPUs = true, 0
	}
	if bad {
		fault = FaultValue
	}
	m.scale(s.CPUs)
	s.Queue = max(s.Queue, m.level.Wait(s.Queued))
	m.level.Queue = s.Queue
	if f := m.rates(s); f != FaultNone {
		fault = f
	}
	m.level.Kernel, m.level.Lag = m.believed(s)
	m.level.Delay = max(m.level.Kernel, m.level.Queue, m.level.Lag)
	return m.level, fault
}

// scale takes how many CPUs the node may use; 0: not known.
func (m *Meter) scale(cpus float64) {
	if cpus == 0 || cpus == m.cpus {
		return
	}
	if m.cpus > 0 {
		m.capacity.Scale(cpus / m.cpus)
		m.level.Utilization *= m.cpus / cpus
		m.level.Capacity = m.capacity.Rate()
	}
	m.cpus = cpus
}

// rates updates what is made of differences of samples.
func (m *Meter) rates(s Sample) Fault {
	last, gap := m.last, s.At-m.last.At
	switch {
	case !m.started:
		m.last, m.started = s, true
		return FaultNone
	case gap < 0:
		m.last = s
		return FaultClock
	case gap > maxGap:
		m.last = s
		return FaultGap
	case s.Analysed < last.Analysed, s.Discarded < last.Discarded, s.CPU < last.CPU, s.Worked < last.Worked:
		m.last = s
		return FaultCounter
	case gap < minGap:
		return FaultNone
	}
	m.last = s
	use := m.level.Utilization
	if s.CPUs > 0 {
		use = (s.CPU - last.CPU).Seconds() / gap.Seconds() / s.CPUs
	}
	workers := 0.0
	if s.Workers > 0 {
		workers = (s.Worked - last.Worked).Seconds() / gap.Seconds() / float64(s.Workers)
	}
	if use > maxCPUs {
		return FaultCounter
	}
	if !m.capacity.Add(Interval{
		Length: gap, Analysed: s.Analysed - last.Analysed, Discarded: s.Discarded - last.Discarded,
		Utilization: use, Workers: workers, Delay: max(m.level.Kernel, s.Queue),
	}) {
		return FaultCounter
	}
	m.use = use
	gain := load.Gain(gap, useSpan)
	m.level.Utilization += gain * (use - m.level.Utilization)
	m.level.Rate += gain * (float64(s.Analysed-last.Analysed)/gap.Seconds() - m.level.Rate)
	m.level.Capacity = m.capacity.Rate()
	return FaultNone
}

// believed are the age of what is in sockets and the lag, as far as anything of the
// node's own shows that its load may be the cause. An age alone is that of a node
// that waits for a CPU which others use: with less traffic it would wait as long.
// A lag alone is the network's, the gateway's, or its clock's.
func (m *Meter) believed(s Sample) (kernel, lag time.Duration) {
	busy := max(m.use, m.level.Utilization) > busyUse || s.Queue > load.Target
	if busy || s.Kernel > maxSchedule {
		kernel = s.Kernel
	}
	if busy || kernel > load.Target {
		lag = s.Lag
	}
	return kernel, lag
}
