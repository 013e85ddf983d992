package overload_test

import (
	"math"
	"slices"
	"testing"

	"github.com/periscope-mesh/periscope/test/bench/overload"
)

func TestSettled(t *testing.T) {
	for name, c := range map[string]struct {
		delays []float64
		want   float64
	}{
		"never late":        {slices.Repeat([]float64{19}, 600), 0},
		"none":              {nil, 0},
		"late, then well":   {slices.Concat(slices.Repeat([]float64{19}, 50), slices.Repeat([]float64{100}, 100), slices.Repeat([]float64{10}, 600)), 0.150},
		"late once more":    {slices.Concat(slices.Repeat([]float64{100}, 100), slices.Repeat([]float64{10}, 400), slices.Repeat([]float64{50}, 50), slices.Repeat([]float64{10}, 600)), 0.100},
		"late for long":     {slices.Concat(slices.Repeat([]float64{100}, 100), slices.Repeat([]float64{10}, 400), slices.Repeat([]float64{200}, 50), slices.Repeat([]float64{10}, 600)), 0.550},
		"for too short":     {slices.Concat(slices.Repeat([]float64{100}, 100), slices.Repeat([]float64{10}, 499)), math.NaN()},
		"a standing delay":  {slices.Repeat([]float64{30}, 2000), math.NaN()},
		"one ms, then well": {append([]float64{20}, make([]float64, 500)...), 0.001},
	} {
		if got := overload.Settled(c.delays); got != c.want && !(math.IsNaN(got) && math.IsNaN(c.want)) {
			t.Errorf("%s: %g, want %g", name, got, c.want)
		}
	}
}
