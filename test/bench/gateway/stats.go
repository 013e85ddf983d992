package main

import (
	"math"
	"slices"
	"time"
)

// spread is a median over rounds, with the extremes.
type spread struct{ mid, low, high float64 }

// over gives the spread of values. None give NaN.
func over(values []float64) spread {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	if n == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	return spread{(s[(n-1)/2] + s[n/2]) / 2, s[0], s[n-1]}
}

// paired combines the values that two variants had in the same rounds: what
// disturbs a round disturbs both, and falls out. Rounds that one of them lacks
// are left out.
func paired(a, b []float64, f func(a, b float64) float64) spread {
	n := min(len(a), len(b))
	out := make([]float64, n)
	for i := range n {
		out[i] = f(a[i], b[i])
	}
	return over(out)
}

func ratio(a, b float64) float64 { return a / b }
func delta(a, b float64) float64 { return a - b }

// quantile is the smallest latency that at least q of all do not exceed, in
// milliseconds. It sorts its argument.
func quantile(latencies []time.Duration, q float64) float64 {
	if len(latencies) == 0 {
		return math.NaN()
	}
	slices.Sort(latencies)
	i := int(math.Ceil(q*float64(len(latencies)))) - 1
	return float64(latencies[max(i, 0)]) / float64(time.Millisecond)
}
