package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/load"
)

// priorityOf is the part of demand that is of a priority class.
const priorityOf = 0.05

const (
	quietPart   = 0.05 // of the capacity, at each quiet gateway, and at the hot one before and after
	hotGateways = 10
)

// scenario is a step of demand, in parts of the capacity.
type scenario struct {
	gateways int
	multiple float64 // during the step; half before and after
	hot      bool    // the step is the first gateway's alone
}

func (s scenario) String() string {
	if s.hot {
		return "one hot, nine quiet"
	}
	return fmt.Sprintf("×%g, %d gateway%s", s.multiple, s.gateways, map[bool]string{true: "s"}[s.gateways > 1])
}

func scenarios() []scenario {
	return []scenario{{1, 2, false}, {1, 10, false}, {4, 2, false}, {4, 10, false}, {hotGateways, 10, true}}
}

// phases of a run: before, step, after.
const (
	phaseBefore = iota
	phaseStep
	phaseAfter
	phases
)

// rates of a gateway in the phases, by the capacity. Gateways are of unlike size.
func (s scenario) rates(gateway int) [phases]float64 {
	if s.hot {
		r := [phases]float64{quietPart, quietPart, quietPart}
		if gateway == 0 {
			r[phaseStep] = s.multiple - quietPart*float64(s.gateways-1)
		}
		return r
	}
	sum := 0.0
	for i := range s.gateways {
		sum += 1 / math.Sqrt(float64(i+1))
	}
	part := 1 / math.Sqrt(float64(gateway+1)) / sum
	return [phases]float64{0.5 * part, s.multiple * part, 0.5 * part}
}

// lengths of the phases.
type lengths [phases]time.Duration

func (l lengths) from() time.Duration { return l[phaseBefore] }
func (l lengths) to() time.Duration   { return l[phaseBefore] + l[phaseStep] }
func (l lengths) end() time.Duration  { return l.to() + l[phaseAfter] }

// demand is when requests to one gateway are due, by phase, since the start.
type demand struct{ routine, priority [phases][]time.Duration }

// demands draws those of all gateways: the same for the same round.
func (s scenario) demands(l lengths, capacity float64, round int) []demand {
	rng := rand.New(rand.NewPCG(uint64(round), 7))
	out := make([]demand, s.gateways)
	for i := range out {
		start := time.Duration(0)
		for phase, rate := range s.rates(i) {
			at := func(part float64) []time.Duration {
				due := load.Poisson(rng.Uint64(), part*rate*capacity, l[phase])
				for j := range due {
					due[j] += start
				}
				return due
			}
			out[i].priority[phase], out[i].routine[phase] = at(priorityOf), at(1-priorityOf)
			start += l[phase]
		}
	}
	return out
}

// all are the times of all requests to the gateway, sorted.
func (d demand) all() []time.Duration {
	var out []time.Duration
	for phase := range phases {
		out = append(out, d.routine[phase]...)
		out = append(out, d.priority[phase]...)
	}
	slices.Sort(out)
	return out
}
