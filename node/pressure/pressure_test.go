package pressure_test

import (
	"math"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/node/pressure"
)

const period = 10 * time.Millisecond

// node is one in virtual time: a queue that is served at capacity.
type node struct {
	t         *testing.T
	m         pressure.Meter
	s         pressure.Sample
	capacity  float64 // exchanges a second
	queue     float64
	analysed  float64
	lastLevel pressure.Level
	faults    map[pressure.Fault]int
}

func newNode(t *testing.T) *node {
	return &node{t: t, capacity: 10_000, s: pressure.Sample{CPUs: 2}, faults: map[pressure.Fault]int{}}
}

func (n *node) run(rate float64, d time.Duration) {
	for ; d > 0; d -= period {
		n.queue += rate * period.Seconds()
		done := min(n.queue, n.capacity*period.Seconds())
		n.queue -= done
		n.analysed += done
		n.s.At += period
		n.s.Analysed = uint64(n.analysed)
		n.s.CPU += time.Duration(done / n.capacity * n.s.CPUs * float64(time.Second))
		n.s.Kernel = time.Duration(n.queue / n.capacity * float64(time.Second))
		n.sample()
	}
}

func (n *node) sample() {
	level, fault := n.m.Add(n.s)
	n.lastLevel = level
	n.faults[fault]++
	for _, x := range []float64{level.Utilization, level.Rate, level.Capacity} {
		if math.IsNaN(x) || math.IsInf(x, 0) || x < 0 {
			n.t.Fatalf("level %+v", level)
		}
	}
	if level.Delay < 0 || level.Delay > pressure.MaxDelay || level.Delay != max(level.Kernel, level.Queue, level.Lag) {
		n.t.Fatalf("level %+v", level)
	}
}

func (n *node) near(what string, got, want, tolerance float64) {
	n.t.Helper()
	if math.Abs(got-want) > tolerance*want {
		n.t.Errorf("%s is %.3g, want %.3g", what, got, want)
	}
}

func TestMeter(t *testing.T) {
	n := newNode(t)
	n.run(5000, time.Second)
	n.near("utilization", n.lastLevel.Utilization, 0.5, 0.05)
	n.near("rate", n.lastLevel.Rate, 5000, 0.05)
	n.near("capacity", n.lastLevel.Capacity, 10_000, 0.05)
	n.run(20_000, 100*time.Millisecond)
	n.near("delay after 100 ms of twice the capacity", n.lastLevel.Delay.Seconds(), 0.1, 0.06)
	n.run(5000, time.Second)
	if n.lastLevel.Delay > time.Millisecond {
		t.Errorf("delay %v after a second of half load", n.lastLevel.Delay)
	}
	n.s.Queue = 70 * time.Millisecond
	n.sample()
	if n.lastLevel.Delay != 70*time.Millisecond {
		t.Errorf("delay %v, want the queue's", n.lastLevel.Delay)
	}
	if len(n.faults) != 1 {
		t.Errorf("faults: %v", n.faults)
	}
}

// A node that was stopped knows as much of what it can do as before.
func TestMeterStopped(t *testing.T) {
	n := newNode(t)
	n.run(5000, time.Second)
	before := n.lastLevel.Capacity
	n.s.At += 3 * time.Second
	n.queue += 15_000
	n.s.Kernel = 3 * time.Second
	n.sample()
	if n.faults[pressure.FaultGap] != 1 {
		t.Errorf("faults: %v", n.faults)
	}
	if n.lastLevel.Delay != 3*time.Second || n.lastLevel.Capacity != before {
		t.Errorf("on resumption: %+v, capacity before %.0f", n.lastLevel, before)
	}
	n.run(5000, 4*time.Second)
	n.near("capacity after it", n.lastLevel.Capacity, 10_000, 0.05)
	if n.lastLevel.Delay > time.Millisecond {
		t.Errorf("delay %v after it", n.lastLevel.Delay)
	}
}

func TestMeterClockJumps(t *testing.T) {
	for _, jump := range []time.Duration{-time.Hour, -4 * period, 251 * time.Millisecond, 1000 * time.Hour} {
		n := newNode(t)
		n.run(5000, time.Second)
		before := n.lastLevel
		n.s.At += jump
		n.run(5000, period)
		if got := n.lastLevel; got != before {
			t.Errorf("jump by %v: %+v, before %+v", jump, got, before)
		}
		if n.faults[pressure.FaultGap]+n.faults[pressure.FaultClock] != 1 {
			t.Errorf("jump by %v: faults %v", jump, n.faults)
		}
		n.run(5000, time.Second)
		n.near("capacity", n.lastLevel.Capacity, 10_000, 0.05)
	}
}

func TestMeterGarbage(t *testing.T) {
	for name, spoil := range map[string]func(*pressure.Sample){
		"counter back":    func(s *pressure.Sample) { s.Analysed = 0 },
		"counter jumps":   func(s *pressure.Sample) { s.Analysed = math.MaxUint64 },
		"discards jump":   func(s *pressure.Sample) { s.Discarded = math.MaxUint64 },
		"CPU time back":   func(s *pressure.Sample) { s.CPU = 0 },
		"CPU time jumps":  func(s *pressure.Sample) { s.CPU = math.MaxInt64 },
		"CPUs NaN":        func(s *pressure.Sample) { s.CPUs = math.NaN() },
		"CPUs 0":          func(s *pressure.Sample) { s.CPUs = 0 },
		"CPUs infinite":   func(s *pressure.Sample) { s.CPUs = math.Inf(1) },
		"negative delay":  func(s *pressure.Sample) { s.Kernel = -1 },
		"delay of a year": func(s *pressure.Sample) { s.Queue = 365 * 24 * time.Hour },
		"least lag":       func(s *pressure.Sample) { s.Lag = math.MinInt64 },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.run(5000, time.Second)
			good := n.s
			n.s.At += 2 * period
			spoil(&n.s)
			n.sample()
			good.At = n.s.At
			n.s = good
			if n.faults[pressure.FaultCounter]+n.faults[pressure.FaultValue] != 1 {
				t.Errorf("faults: %v", n.faults)
			}
			n.run(5000, 2*time.Second)
			n.near("capacity", n.lastLevel.Capacity, 10_000, 0.1)
		})
	}
}

// A quota that is read as half of what it is.
func TestMeterQuotaWrong(t *testing.T) {
	n := newNode(t)
	n.run(20_000, time.Second)
	n.near("capacity", n.lastLevel.Capacity, 10_000, 0.05)
	n.run(0, time.Second)
	used := n.s.CPUs
	n.s.CPUs = used / 2
	n.run(5000, time.Second)
	n.near("capacity by the memory of saturation", n.lastLevel.Capacity, 10_000, 0.05)
}

// A lag counts when the node itself shows that it may be its cause.
func TestMeterLag(t *testing.T) {
	n := newNode(t)
	n.s.Lag = 500 * time.Millisecond
	n.run(3000, time.Second)
	if n.lastLevel.Delay != 0 {
		t.Errorf("delay %v of an idle node", n.lastLevel.Delay)
	}
	n.run(9500, time.Second)
	if n.lastLevel.Delay != 500*time.Millisecond {
		t.Errorf("delay %v of a busy node, want the lag", n.lastLevel.Delay)
	}
}

// A node with little to do that waits for a CPU which others use isn't late, and is
// not believed able to do no more than it does.
func TestMeterWaitsForCPU(t *testing.T) {
	n := newNode(t)
	n.run(20_000, time.Second)
	n.run(0, time.Second)
	age := 50 * time.Millisecond
	for range 200 {
		n.run(500, period)
		n.s.Kernel = age
		n.s.At += period
		n.sample()
	}
	if n.lastLevel.Delay != 0 {
		t.Errorf("delay %v", n.lastLevel.Delay)
	}
	n.near("capacity", n.lastLevel.Capacity, 10_000, 0.1)
	n.s.Kernel, n.s.At = 150*time.Millisecond, n.s.At+period
	if n.sample(); n.lastLevel.Delay != n.s.Kernel {
		t.Errorf("delay %v when bytes wait for %v, whatever the node does", n.lastLevel.Delay, n.s.Kernel)
	}
}
