package overload

import (
	"fmt"
	"math"
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

// Yes is yes or no.
func Yes(v bool) string {
	if v {
		return "yes"
	}
	return "no"
}

// Percent writes a share.
func Percent(v float64) string { return fmt.Sprintf("%.0f %%", 100*v) }

// Seconds writes a time; NaN is never.
func Seconds(v float64) string {
	if math.IsNaN(v) {
		return "never"
	}
	return fmt.Sprintf("%.2f", v)
}
