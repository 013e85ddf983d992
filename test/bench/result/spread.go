package result

import (
	"fmt"
	"math"
	"slices"
)

// Spread is a median over rounds, with the extremes.
type Spread struct{ Mid, Low, High float64 }

// Over gives the spread of values. None give NaN.
func Over(values []float64) Spread {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	if n == 0 {
		return Spread{math.NaN(), math.NaN(), math.NaN()}
	}
	return Spread{(s[(n-1)/2] + s[n/2]) / 2, s[0], s[n-1]}
}

// Paired combines the values that two variants had in the same rounds: what
// disturbs a round disturbs both, and falls out. Rounds that one of them lacks
// are left out.
func Paired(a, b []float64, f func(a, b float64) float64) Spread {
	n := min(len(a), len(b))
	out := make([]float64, n)
	for i := range n {
		out[i] = f(a[i], b[i])
	}
	return Over(out)
}

// Ratio is for Paired.
func Ratio(a, b float64) float64 { return a / b }

// Delta is for Paired.
func Delta(a, b float64) float64 { return a - b }

// Times writes a spread of ratios.
func (s Spread) Times() string { return fmt.Sprintf("×%.2f, %.2f–%.2f", s.Mid, s.Low, s.High) }

// Signed writes a spread of differences.
func (s Spread) Signed() string { return fmt.Sprintf("%+.1f, %.1f to %.1f", s.Mid, s.Low, s.High) }
