package attack

import (
	"math"
	"math/rand/v2"
	"testing"
)

// TestCount samples the same hits again and again, each with a probability of its
// own: the estimate is right on average, and its error is what it varies by.
func TestCount(t *testing.T) {
	const hits, rounds = 400, 4000
	random := rand.New(rand.NewPCG(1, 2))
	var sum, squares, variance float64
	for range rounds {
		var c Count
		for i := range hits {
			if p := []float64{1, 0.5, 0.1}[i%3]; random.Float64() < p {
				c.Add(1 / p)
			}
		}
		sum += c.Estimated
		squares += (c.Estimated - hits) * (c.Estimated - hits)
		variance += c.Error() * c.Error()
	}
	if mean := sum / rounds; math.Abs(mean-hits) > 3*math.Sqrt(squares/rounds/rounds) {
		t.Errorf("the mean estimate is %v of %d", mean, hits)
	}
	if is, told := math.Sqrt(squares/rounds), math.Sqrt(variance/rounds); math.Abs(is/told-1) > 0.05 {
		t.Errorf("estimates vary by %v, and the error says %v", is, told)
	}
	var exact Count
	exact.Add(1)
	exact.Add(1)
	if exact.Sampled() || exact.Error() != 0 || exact.Hits != 2 || exact.Estimated != 2 {
		t.Errorf("all were copied: %+v", exact)
	}
}
