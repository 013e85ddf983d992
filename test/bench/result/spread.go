package result

import (
	"fmt"
	"math"
	"slices"
)

// Spread is a median over rounds, with its interval of 95 % confidence.
//
// The interval is between order statistics, and supposes nothing but that rounds
// are independent: the median lies beyond the kth smallest of n values with the
// probability that a fair coin shows heads less than k times in n. Fewer than six
// values can't give 95 %: theirs is from the lowest to the highest, 94 % for five,
// 75 % for three.
type Spread struct{ Mid, Low, High float64 }

// Over gives the spread of values. None give NaN.
func Over(values []float64) Spread {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	if n == 0 {
		return Spread{math.NaN(), math.NaN(), math.NaN()}
	}
	k := cut(n)
	return Spread{(s[(n-1)/2] + s[n/2]) / 2, s[k], s[n-1-k]}
}

// cut is how many of n sorted values may be left out at either end so that the
// rest still spans the median with 95 % confidence.
func cut(n int) int {
	if n > 500 { // the normal distribution is as good, and 0.5ⁿ would vanish
		return int((float64(n) - 1.96*math.Sqrt(float64(n))) / 2)
	}
	outside := math.Pow(0.5, float64(n)) // P(fewer than k+1 heads), here k = 0
	term := outside
	for k := 0; ; k++ {
		term *= float64(n-k) / float64(k+1)
		if outside += term; outside > 0.025 {
			return k
		}
	}
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

// Slope is how much y grows for each unit of x: the median of the slopes between
// all pairs of points, after Theil and Sen, so that single steps and outliers
// count little. Its interval of 95 % confidence is Kendall's, for points that are
// independent of each other. x must have no value twice.
func Slope(x, y []float64) Spread {
	n := len(x)
	slopes := make([]float64, 0, n*n/2)
	for i := range x {
		for j := range i {
			slopes = append(slopes, (y[i]-y[j])/(x[i]-x[j]))
		}
	}
	s := Over(slopes)
	if len(slopes) == 0 {
		return s
	}
	slices.Sort(slopes)
	inside := 1.96 * math.Sqrt(float64(n)*float64(n-1)*float64(2*n+5)/18)
	k := max(0, int((float64(len(slopes))-inside)/2))
	s.Low, s.High = slopes[k], slopes[len(slopes)-1-k]
	return s
}
