package pressure

import (
	"math"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	capacitySpan = 300 * time.Millisecond // e-folding time of the estimate
	followSpan   = 50 * time.Millisecond  // the same of what is made of smooth figures
	memorySpan   = time.Second            // of what is remembered
	guessSpan    = 100 * time.Millisecond // being late for so long counts as much as what was guessed before
	memoryFade   = 10 * time.Minute       // of the same, unused
	leastUse     = 0.2                    // below this utilization, exchanges by CPU time are mostly noise
	lateUse      = 0.8                    // below this utilization, a node whose workers are known is not late by its load
	chance       = 0.65                   // of what was remembered: what is less is not by chance
	goodUse      = 0.5                    // above it, good enough to be remembered
	stretch      = 1.25                   // the busier a node is, the less CPU time an exchange takes: down to a part of this much
	leastFull    = 0.02
	mostDiscard  = 0.25 // of what an exchange takes, to discard one
	maxRate      = 1e7  // exchanges a second; more is garbage
	maxUse       = 4    // as much may be read of the CPU time that there is; more is garbage
)

// Capacity estimates how many exchanges a second a node can analyse, from what it
// did in successive intervals. The zero value knows nothing.
//
// While a node is late, what it does is what it can do. Otherwise that is what it
// did by the part of its CPU time that it used, or of its workers' time, whichever is
// scarcer. Two memories correct readings of
// CPU time that are wrong: how much the node seemed to use when it was late, which
// is all that it has, unless its workers show that it has got more since; and what
// it once could do, as long as it is not late.
type Capacity struct {
	rate  float64
	y, u  float64       // exchanges a second and utilization, smooth: the two are rarely read at one moment
	w     float64       // part of the time that workers are at work, smooth
	most  float64       // exchanges a second if it had discarded none, at most, smooth
	used  float64       // the same of the larger of u and w; these two whatever is discarded
	best  float64       // remembered, as long as nothing contradicts it
	top   float64       // the most that was remembered
	seen  float64       // seconds of being late that best is made of, beside guesses
	full  float64       // utilization read when all is used; 0: 1
	delay time.Duration // at the end of the last interval
}

// Interval is what a node did in some time.
type Interval struct {
	Length      time.Duration
	Analysed    uint64
	Discarded   uint64 // by the guard
	Utilization float64
	Workers     float64       // part of the time that its workers were at work; 0: not known
	Delay       time.Duration // at its end
}

// Add takes the next interval. It tells whether it made sense.
func (c *Capacity) Add(i Interval) bool {
	span := i.Length.Seconds()
	y := float64(i.Analysed) / span
	if span <= 0 || y > maxRate || float64(i.Discarded)/span > maxRate || !(i.Utilization >= 0 && i.Utilization <= maxUse) || !(i.Workers >= 0 && i.Workers <= maxUse) || i.Delay < 0 {
		return false
	}
	late := min(c.delay, i.Delay) > 2*load.Target
	c.delay = i.Delay
	u := i.Utilization
	if i.Workers > 0 && max(u/max(c.full, leastFull), i.Workers) < lateUse {
		late = false // an exchange has waited, but not for others
	}
	// Discarding takes time as well: an interval full of it says less of analysis.
	weight := 1.0
	if i.Discarded > 0 {
		weight = float64(i.Analysed) / float64(i.Analysed+i.Discarded)
	}
	gain := load.Gain(i.Length, capacitySpan)
	if c.y == 0 && c.u == 0 {
		gain = 1
	}
	c.y += weight * gain * (y - c.y)
	c.u += weight * gain * (u - c.u)
	c.w += weight * gain * (i.Workers - c.w)
	if c.full == 0 {
		c.full = 1
	}
	c.most += gain * (y + mostDiscard*float64(i.Discarded)/span - c.most)
	c.used += gain * (max(u/c.full, i.Workers) - c.used)
	memory := load.Gain(i.Length, memorySpan)
	c.full = max(c.full, c.u) // nothing uses more than all
	if late {
		c.full = max(leastFull, c.full+memory*(u-c.full))
		if most := y + mostDiscard*float64(i.Discarded)/span; c.rate > most {
			c.toward(most, gain) // whatever it is that discarding takes
		}
		c.toward(y, weight*gain)
		c.seen += weight * span
		if c.rate < chance*c.best {
			c.best = c.rate
		}
		// The first that is seen of it counts for more than what was guessed before.
		c.best += weight * max(memory, span/(c.seen+guessSpan.Seconds())) * (y - c.best)
		return true
	}
	if c.w > 0 { // they wait for work for half of the time that would be left
		c.full = max(c.full, min(1, c.u/(2*c.w)))
	}
	u = max(c.u/c.full, c.w)
	fade := math.Exp(-span / memoryFade.Seconds())
	c.best *= fade
	c.seen *= fade
	c.top = max(c.top*fade, c.best)
	most := math.Inf(1)
	if c.used > lateUse { // what it does is nearly what it can
		most = c.most / c.used
		if most < chance*c.best {
			c.best = most
		}
		most *= stretch
		c.best += memory * min(0, most-c.best)
	}
	switch {
	case u > leastUse:
		c.toward(min(max(c.y/u, c.best), most), weight*load.Gain(i.Length, followSpan))
		if u > goodUse {
			c.best = max(c.best, c.best+memory*(c.rate-c.best))
		}
	case c.rate > 0:
		// Little is known of a node that has most of its time left: what it did once is
		// as good as anything. Otherwise one that stood still for a while, or has got
		// more CPU time, would be believed unable for long.
		c.toward(max(c.rate, c.top, c.y/leastUse), gain)
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
