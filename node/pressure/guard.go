package pressure

import (
	"sync/atomic"
	"time"
)

// The guard discards nothing up to guardFrom of delay, and every routine exchange
// from guardFrom+guardSpan on.
const (
	guardFrom = 20 * time.Millisecond
	guardSpan = 20 * time.Millisecond
)

const whole = 1 << 32 // 1, in the guard's fixed point

// Guard decides which routine exchanges a late node discards unread, for the time
// until gateways mirror less. It never discards those of a priority class. Its
// decisions are deterministic: of n exchanges at the same delay it discards p·n, to
// within one. The zero value discards nothing. It may be used by many goroutines.
type Guard struct {
	part atomic.Uint64 // p, fixed point
	debt atomic.Uint64 // sum of p over exchanges, fixed point
}

// Set sets what is discarded by the node's delay.
func (g *Guard) Set(delay time.Duration) {
	p := min(1, max(0, float64(delay-guardFrom)/float64(guardSpan)))
	g.part.Store(uint64(p * whole))
}

// Discard decides about the next exchange. What it lets pass stands for weight
// exchanges: 1/(1−p).
func (g *Guard) Discard(priority bool) (discard bool, weight float64) {
	if priority {
		return false, 1
	}
	p := g.part.Load()
	switch p {
	case 0:
		return false, 1
	case whole:
		return true, 0
	}
	debt := g.debt.Add(p)
	if debt/whole != (debt-p)/whole {
		return true, 0
	}
	return false, whole / float64(whole-p)
}

// Part is p: the part of routine exchanges that is being discarded, 0 to 1.
func (g *Guard) Part() float64 { return float64(g.part.Load()) / whole }
