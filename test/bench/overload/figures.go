package overload

import (
	"math"
	"slices"
)

// Variation is standard deviation by mean.
func Variation(x []float64) float64 {
	var sum, squares float64
	for _, v := range x {
		sum += v
		squares += v * v
	}
	n := float64(len(x))
	mean := sum / n
	return math.Sqrt(max(0, squares/n-mean*mean)) / mean
}

const (
	calmBelow = 20  // ms of delay
	calmFor   = 500 // ms
)

// Settled is how many seconds it takes, of the delays of each ms in ms, from the
// start until a delay that has reached 20 ms is below that again, and is so on average
// for the half second from then on. 0: it never was as long; NaN: never. A mean, as on a
// node that does 200 exchanges a second any five at one time make one late.
func Settled(delays []float64) float64 {
	late := slices.IndexFunc(delays, func(d float64) bool { return d >= calmBelow })
	if late < 0 {
		return 0
	}
	sum := 0.0 // of the calmFor from ms on
	for ms := late; ms < len(delays); ms++ {
		sum += delays[ms]
		first := ms + 1 - calmFor
		if first < late {
			continue
		}
		if delays[first] < calmBelow && sum < calmBelow*calmFor {
			return float64(first) / 1000
		}
		sum -= delays[first]
	}
	return math.NaN()
}
