package share

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestFillLevel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 2000 {
		claims := make([]claim, 1+rng.IntN(50))
		least, most := 0.0, 0.0
		for i := range claims {
			c := &claims[i]
			c.weight = math.Exp(3 * rng.NormFloat64())
			c.max = math.Exp(5 * rng.NormFloat64())
			if rng.IntN(3) == 0 {
				c.min = c.max * rng.Float64()
			}
			if rng.IntN(10) == 0 {
				c.min, c.max = 0, 0
			}
			least += c.min
			most += c.max
		}
		budget := rng.Float64() * 1.2 * most
		fillLevel(claims, budget)
		sum, level := 0.0, 0.0
		for _, c := range claims {
			if c.got < c.min-1e-9 || c.got > c.max+1e-9 {
				t.Fatalf("%+v", c)
			}
			sum += c.got
			if c.got > c.min {
				level = max(level, c.got/c.weight)
			}
		}
		if want := min(most, max(least, budget)); math.Abs(sum-want) > 1e-6*want {
			t.Fatalf("%g of %g given, from %g to %g", sum, budget, least, most)
		}
		for _, c := range claims { // whoever has less by weight than another wants no more
			if c.got/c.weight < level*(1-1e-6) && c.got < c.max*(1-1e-6) && sum > least*(1+1e-6) {
				t.Fatalf("%+v, others have %g by weight", c, level)
			}
		}
	}
}

func TestQuantise(t *testing.T) {
	for share, want := range map[float64]int{0: 0, 1: 1_000_000, 0.5: 500_000, 0.12345: 125_000, 0.0999: 100_000, 0.98765: 990_000, 0.00212: 2100, 0.00005: 50} {
		if got := quantise(share); got != want {
			t.Errorf("%v is %d, want %d", share, got, want)
		}
	}
}

func TestFillMinimum(t *testing.T) {
	claims := []claim{{weight: 1, min: 50, max: 1000}, {weight: 1, max: 20}, {weight: 1, max: 1000}}
	fill(claims, 90)
	if claims[0].got != 50 || claims[1].got != 20 || math.Abs(claims[2].got-20) > 1e-6 {
		t.Errorf("%+v", claims)
	}
	claims[0].min, claims[1].min, claims[2].min = 90, 0, 0
	fill(claims, 90)
	if claims[0].got != 90 || claims[1].got != 20 || claims[2].got != 0 {
		t.Errorf("%+v", claims)
	}
}
