package main

import (
	"math"
	"slices"
	"time"
)

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
