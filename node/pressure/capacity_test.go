package pressure_test

import (
	"math"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/node/pressure"
)

const tick = 50 * time.Millisecond

// worker is a node that can do capacity exchanges a second and reads factor times the
// CPU time that it uses, at most clip.
type worker struct {
	capacity, factor, clip float64
	c                      pressure.Capacity
}

// run offers so many exchanges a second for a time.
func (n *worker) run(rate float64, d time.Duration) {
	delay := time.Millisecond
	if rate > n.capacity {
		delay = 30 * time.Millisecond
	}
	for ; d > 0; d -= tick {
		done := min(rate, n.capacity)
		n.c.Add(pressure.Interval{
			Length: tick, Analysed: uint64(done * tick.Seconds()), Delay: delay,
			Utilization: min(n.clip, n.factor*done/n.capacity),
		})
	}
}

func near(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	if math.Abs(got-want) > tolerance*want {
		t.Errorf("%s: estimate %.0f, want %.0f ± %.0f %%", what, got, want, 100*tolerance)
	}
}

func TestCapacity(t *testing.T) {
	for name, n := range map[string]*worker{
		"read right":         {capacity: 10_000, factor: 1, clip: 9},
		"read 30 % low":      {capacity: 10_000, factor: 0.7, clip: 9},
		"read 40 % high":     {capacity: 10_000, factor: 1.4, clip: 9},
		"read high, clipped": {capacity: 10_000, factor: 1.4, clip: 1},
	} {
		t.Run(name, func(t *testing.T) {
			n.run(500, time.Second)
			if got := n.c.Rate(); got != 0 {
				t.Errorf("estimate %.0f of a node that hardly works", got)
			}
			n.run(5000, 2*time.Second)
			near(t, "half load, never late", n.c.Rate(), n.capacity/n.factor, 0.05)
			n.run(20_000, 3*time.Second)
			near(t, "overload", n.c.Rate(), n.capacity, 0.05)
			n.run(5000, 2*time.Second)
			near(t, "half load, once late", n.c.Rate(), n.capacity, 0.1)
			n.run(100, 10*time.Second)
			near(t, "idle", n.c.Rate(), n.capacity, 0.1)

			n.capacity = 2000
			n.run(5000, 2*time.Second)
			near(t, "a fifth of the CPU time", n.c.Rate(), 2000, 0.1)
			n.capacity = 10_000
			n.run(1800, 500*time.Millisecond)
			n.run(2500, 2*time.Second)
			if n.factor == 1 {
				near(t, "all of it again", n.c.Rate(), 10_000, 0.1)
			}
			n.run(20_000, 3*time.Second)
			near(t, "overload again", n.c.Rate(), 10_000, 0.05)
		})
	}
}

// An exchange takes less CPU time the busier a node is: what it can do is known
// soon after it was late for the first time, and is not forgotten.
func TestCapacityOfBusyNode(t *testing.T) {
	const can = 200.0
	var c pressure.Capacity
	left := 0.0
	run := func(rate float64, d time.Duration) {
		const tick = 20 * time.Millisecond
		for ; d > 0; d -= tick {
			left += rate * tick.Seconds()
			done := math.Floor(left)
			left -= done
			delay := time.Millisecond
			if rate >= can {
				delay = 15 * time.Millisecond
			}
			c.Add(pressure.Interval{Length: tick, Analysed: uint64(done), Delay: delay, Utilization: 0.4 + 0.6*rate/can, Workers: 0.4 + 0.6*rate/can})
		}
	}
	run(100, 5*time.Second)
	near(t, "half load", c.Rate(), 140, 0.1)
	run(can, 600*time.Millisecond)
	run(160, 500*time.Millisecond)
	near(t, "once late", c.Rate(), can, 0.1)
	run(100, time.Minute)
	near(t, "half load, a minute later", c.Rate(), can, 0.15)
}

// A node that stood still is not believed unable for ever, though little is sent to it.
func TestCapacityAfterStandstill(t *testing.T) {
	n := &worker{capacity: 10_000, factor: 1, clip: 1}
	n.run(8000, 2*time.Second)
	for range 60 {
		n.c.Add(pressure.Interval{Length: tick, Utilization: 1, Delay: time.Second})
	}
	if got := n.c.Rate(); got > 1000 {
		t.Fatalf("estimate %.0f of a node that stands still", got)
	}
	share := 20.0
	for range 100 {
		n.run(share, tick)
		share = min(10*share, 0.9*n.c.Rate())
	}
	if got := n.c.Rate(); got < 8000 {
		t.Errorf("estimate %.0f, 5 s after a standstill", got)
	}
}

// A node that a quota has held back, and does not any more: the CPU time that it
// uses is what it knows as all of it, but its workers wait for work.
func TestCapacityAfterQuota(t *testing.T) {
	const cpus = 2 // that it believes to have
	var c pressure.Capacity
	run := func(rate, quota float64, d time.Duration) {
		for ; d > 0; d -= tick {
			done := min(rate, 500*quota) // 2 ms of CPU time each
			delay := time.Millisecond
			if rate > done {
				delay = 30 * time.Millisecond
			}
			workers := done / 500 / cpus
			if rate > done {
				workers = 1
			}
			c.Add(pressure.Interval{Length: tick, Analysed: uint64(done * tick.Seconds()), Delay: delay, Utilization: done / 500 / cpus, Workers: workers})
		}
	}
	run(400, 0.2, 5*time.Second)
	near(t, "a fifth of a core", c.Rate(), 100, 0.1)
	share := 0.0
	for range 30 { // 1.5 s
		share = min(400, max(80, 0.9*c.Rate()))
		run(share, 1, tick)
	}
	if share < 380 {
		t.Errorf("%.0f exchanges a second are sent to a node that can take 500", share)
	}
}

func TestCapacityGarbage(t *testing.T) {
	n := &worker{capacity: 10_000, factor: 1, clip: 1}
	n.run(5000, time.Second)
	before := n.c
	for name, i := range map[string]pressure.Interval{
		"no time":      {Analysed: 1},
		"back in time": {Length: -time.Second, Analysed: 1},
		"too many":     {Length: time.Second, Analysed: math.MaxUint64},
		"discards":     {Length: time.Second, Discarded: math.MaxUint64},
		"NaN":          {Length: time.Second, Utilization: math.NaN()},
		"infinite":     {Length: time.Second, Utilization: math.Inf(1)},
		"negative":     {Length: time.Second, Utilization: -1},
		"delay":        {Length: time.Second, Delay: -1},
	} {
		if n.c.Add(i) || n.c != before {
			t.Errorf("%s: taken", name)
		}
	}
}

// What is known of a node changes with its CPU time: at once, in either direction.
func TestCapacityScale(t *testing.T) {
	n := &worker{capacity: 10_000, factor: 1, clip: 9}
	n.run(20_000, 2*time.Second)
	n.capacity = 1000
	n.c.Scale(0.1)
	near(t, "a tenth", n.c.Rate(), 1000, 0.05)
	n.run(900, 3*time.Second)
	near(t, "a tenth, after a while", n.c.Rate(), 1000, 0.1)
	n.capacity = 5000
	n.c.Scale(5)
	near(t, "half", n.c.Rate(), 5000, 0.1)
	n.run(900, time.Second)
	near(t, "half, with little to do", n.c.Rate(), 5000, 0.1)
	n.run(8000, time.Second)
	near(t, "half, overloaded", n.c.Rate(), 5000, 0.05)
}

// Something else than analysis that takes the CPU for a while, such as compiling
// rules, says nothing of what analysis can do. Nor does what a node did once stay true
// for long while it is contradicted.
func TestCapacityContradicted(t *testing.T) {
	var c pressure.Capacity
	run := func(rate, u, w float64, delay, d time.Duration) {
		for ; d > 0; d -= tick {
			c.Add(pressure.Interval{Length: tick, Analysed: uint64(rate * tick.Seconds()), Utilization: u, Workers: w, Delay: delay})
		}
	}
	run(200, 1, 1, 30*time.Millisecond, 2*time.Second)
	run(100, 0.5, 0.5, 0, 2*time.Second)
	near(t, "half of it", c.Rate(), 200, 0.05)
	run(20, 1, 0.1, 0, 2*time.Second)
	run(100, 0.5, 0.5, 0, time.Second)
	near(t, "after others have used the CPU", c.Rate(), 200, 0.1)

	run(40, 1, 1, 0, 30*time.Second)
	near(t, "at its limit for long, and perhaps a quarter more", c.Rate(), 45, 0.12)
	run(1, 0.01, 0.01, 0, time.Minute)
	if got := c.Rate(); got > 70 {
		t.Errorf("when idle then, it is believed able to do %.0f a second, not 40", got)
	}
}
