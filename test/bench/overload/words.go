package overload

import (
	"fmt"
	"math"
)

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
