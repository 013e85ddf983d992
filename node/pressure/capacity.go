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
	memoryFade   = 10 * time.Minute       // of the same, unused
	topSpan      = 10 * time.Second       // of the most that was remembered, while it is contradicted
	guessSpan    = 100 * time.Millisecond // being late for so long counts as much as what was guessed before
	idleUse      = 0.05
	leastUse     = 0.2  // below this utilization, exchanges by CPU time are mostly noise
	lateUse      = 0.8  // below this utilization, a node whose workers are known is not late by its load
	chance       = 0.65 // of what was remembered: what is less is not by chance
	goodUse      = 0.5  // above it, good enough to be remembered
	stretch      = 1.25 // exchanges by CPU time of a node that is not yet late, times this, are the most that it can do
	leastFull    = 0.02
	mostDiscard  = 0.25 // of what an exchange takes, to discard one
	maxRate      = 1e7  // exchanges a second; more is garbage
	maxUse       = 16   // as much may be read of the CPU time that there is, where a quota of 100 ms is used up in 20; more is garbage
)

// Capacity estimates how many exchanges a second a node can analyse, from what it
// did in successive intervals. The zero value knows nothing.
//
// While a node is late, what it does is what it can do. Otherwise that is what it
// did by the part of its CPU time that it used, or of its workers' time, whichever is
// scarcer. Memories correct readings of CPU time that are wrong, and that a busy node
// takes less of it for an exchange: how much the node seemed to use when it was late,
// which is all that it has, unless its workers show that it has got more since; what
// it did when it was late, as long as nothing contradicts it; and of an idle node the
// most that it ever did.
type Capacity struct {
	rate  float64
	work  pace          // without what the guard's discarding has disturbed
	all   pace          // whatever was discarded; exchanges a second are the most that it could have done otherwise
	best  float64       // remembered, as long as nothing contradicts it
	top   float64       // the most that was remembered
	seen  float64       // seconds of being late that best is made of, beside guesses
	full  float64       // utilization read when all is used; 0: 1
	late  time.Duration // for so long
	delay time.Duration // at the end of the last interval
}

// pace is exchanges a second, utilization, and the part of their time that workers
// are at work, smooth: they are rarely read at one moment.
type pace struct{ y, u, w float64 }

func (p *pace) follow(y, u, w, gain float64) {
	p.y += gain * (y - p.y)
	p.u += gain * (u - p.u)
	p.w += gain * (w - p.w)
}

// use is the part of what there is that was used, of CPU time or of workers' time,
// whichever is scarcer.
func (p *pace) use(full float64) float64 { return max(p.u/full, p.w) }

// scale is by how many times the CPU time there is now: what was done would use more
// or less of it, and can't use more than all.
func (p *pace) scale(times float64) {
	p.u /= times
	if p.u > 1 {
		p.y, p.u = p.y/p.u, 1
	}
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
	most := y + mostDiscard*float64(i.Discarded)/span // whatever it is that discarding takes
	gain := load.Gain(i.Length, capacitySpan)
	if c.work == (pace{}) {
		gain = 1
	}
	c.work.follow(y, u, i.Workers, weight*gain)
	c.all.follow(most, u, i.Workers, gain)
	if c.full == 0 {
		c.full = 1
	}
	c.full = max(c.full, c.work.u) // nothing uses more than all
	if late {
		c.late += i.Length
		c.whileLate(i.Length, y, most, u, weight, gain)
	} else {
		c.late = 0
		c.inTime(i.Length, weight, gain)
	}
	return true
}

// whileLate takes an interval in which the node was late: it did y exchanges a second,
// and would have done most at the most without discarding any.
func (c *Capacity) whileLate(length time.Duration, y, most, u, weight, gain float64) {
	memory := load.Gain(length, memorySpan)
	c.full = max(leastFull, c.full+memory*(u-c.full))
	if c.rate > most {
		c.toward(most, gain)
	}
	c.toward(y, weight*gain)
	if c.rate < chance*c.best {
		c.best = c.rate
	}
	// The first that is seen of it counts for more than what was guessed before,
	// but for a moment's, of which a quota leaves less or more to it than its part.
	if c.late >= guessSpan {
		c.seen += weight * length.Seconds()
		memory = max(memory, length.Seconds()/(c.seen+guessSpan.Seconds()))
	}
	c.best += weight * memory * (y - c.best)
	c.forgetTop(length)
}

// inTime takes an interval in which the node was not late.
func (c *Capacity) inTime(length time.Duration, weight, gain float64) {
	memory := load.Gain(length, memorySpan)
	if c.work.w > 0 { // they wait for work for half of the time that would be left
		c.full = max(c.full, min(1, c.work.u/(2*c.work.w)))
	}
	fade := math.Exp(-length.Seconds() / memoryFade.Seconds())
	c.best *= fade
	c.seen *= fade
	c.top = max(c.top*fade, c.best)
	most := math.Inf(1)
	if used := min(1, c.all.use(c.full)); used > lateUse && (c.all.w == 0 || c.all.w > goodUse) {
		most = c.all.y / used // nearly, of a node that is at its limit by analysis
		if most < chance*c.best {
			c.best = most
		}
		most *= stretch
		c.best += memory * min(0, most-c.best)
		c.forgetTop(length)
	}
	switch u := c.work.use(c.full); {
	case u > leastUse:
		c.toward(min(max(c.work.y/u, c.best), most), weight*load.Gain(length, followSpan))
		if u > goodUse {
			c.best = max(c.best, c.best+memory*(c.rate-c.best))
		}
	case u < idleUse:
		// Little is known of an idle node: what it did once is as good as anything.
		// Otherwise one that stood still for a while would be believed unable for ever.
		c.toward(max(c.rate, c.top), memory)
	case c.rate > 0:
		c.toward(max(c.rate, c.best, c.work.y/leastUse), gain) // it can do this much at least
	}
}

// forgetTop lowers the most that was remembered, as it is contradicted.
func (c *Capacity) forgetTop(length time.Duration) {
	c.top += load.Gain(length, topSpan) * min(0, stretch*c.rate-c.top)
}

// Scale takes that the node has got so many times the CPU time that it had.
func (c *Capacity) Scale(times float64) {
	for _, rate := range []*float64{&c.rate, &c.best, &c.top} {
		*rate *= times
	}
	c.work.scale(times)
	c.all.scale(times)
	c.full = min(c.full, 1)
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
