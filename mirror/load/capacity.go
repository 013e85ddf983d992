package load

import (
	"math"
	"time"
)

// Target is the delay at which a node is well used and not late.
const Target = 5 * time.Millisecond

const (
	capacitySpan = 300 * time.Millisecond // e-folding time of the estimate
	memoryFall   = time.Second            // of what is remembered, while saturation contradicts it
	memoryFade   = 10 * time.Minute       // of the same, unused
	leastUse     = 0.2                    // below this utilization, exchanges by CPU time are mostly noise
	goodUse      = 0.5                    // above it, good enough to be remembered
	maxRate      = 1e7                    // exchanges a second; more is garbage
	maxUse       = 1.5
)

// Capacity estimates how many exchanges a second a node can analyse, from what it
// did in successive intervals. The zero value knows nothing.
//
// While a node is late, what it does is what it can do. Otherwise that is what it
// did by the part of its CPU time that it used. Two memories correct readings of
// CPU time that are wrong: how much the node seemed to use when it was late, which
// is all that it has; and what it once could do, as long as it is not late.
type Capacity struct {
	rate  float64
	best  float64       // remembered
	full  float64       // utilization read when late; 0: never late so far
	delay time.Duration // at the end of the last interval
}

// Interval is what a node did in some time.
type Interval struct {
	Length      time.Duration
	Analysed    uint64
	Discarded   uint64 // by the guard
	Utilization float64
	Delay       time.Duration // at its end
}

// Add takes the next interval. It tells whether it made sense.
func (c *Capacity) Add(i Interval) bool {
	span := i.Length.Seconds()
	y := float64(i.Analysed) / span
	if span <= 0 || y > maxRate || float64(i.Discarded)/span > maxRate || !(i.Utilization >= 0) || math.IsInf(i.Utilization, 0) || i.Delay < 0 {
		return false
	}
	late := min(c.delay, i.Delay) > 2*Target
	c.delay = i.Delay
	u := min(i.Utilization, maxUse)
	// Discarding takes time as well: an interval full of it says less of analysis.
	weight := 1.0
	if i.Discarded > 0 {
		weight = float64(i.Analysed) / float64(i.Analysed+i.Discarded)
	}
	gain := weight * Gain(i.Length, capacitySpan)
	if late {
		if c.full == 0 {
			c.full = max(0.1, u)
		}
		c.full = max(0.1, c.full+gain*(u-c.full))
		c.toward(y, gain)
		c.best = max(c.rate, c.best+weight*Gain(i.Length, memoryFall)*(c.rate-c.best))
		return true
	}
	if c.full > 0 {
		u /= c.full
	}
	c.best *= math.Exp(-span / memoryFade.Seconds())
	switch {
	case u > leastUse:
		c.toward(max(y/u, c.best), gain)
		if u > goodUse {
			c.best = max(c.best, c.rate)
		}
	case y > 0 && c.rate > 0:
		// A node that has so much left can do this much at least. Without this, one
		// that stood still for a while would be believed unable for ever.
		c.toward(max(c.rate, c.best, y/leastUse), Gain(i.Length, memoryFall))
	case c.rate > 0:
		c.toward(max(c.rate, c.best), Gain(i.Length, memoryFall))
	}
	return true
}

func (c *Capacity) toward(rate, gain float64) {
	if c.rate == 0 {
		c.rate = rate
		return
	}
	c.rate += gain * (rate - c.rate)
}

// Rate is the estimate, in exchanges a second; 0: none yet.
func (c *Capacity) Rate() float64 { return c.rate }

// Gain is the weight of a value that stood for an interval, in an exponentially
// weighted mean of this e-folding time.
func Gain(interval, span time.Duration) float64 {
	return -math.Expm1(-interval.Seconds() / span.Seconds())
}
