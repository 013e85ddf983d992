package share

// claim is what somebody would have of a budget.
type claim struct {
	weight   float64
	min, max float64 // min is had in any case
	got      float64
	floor    float64 // of fill
}

// fill shares a budget out with weighted max-min fairness: everybody gets the same
// by weight, but no more than the claim. Where a minimum is more than that, those
// pay for it who would have more than they get, not those who are content.
func fill(claims []claim, budget float64) {
	for i := range claims {
		claims[i].floor, claims[i].min = claims[i].min, 0
	}
	fillLevel(claims, budget)
	short := false
	for i := range claims {
		c := &claims[i]
		short = short || c.got < c.floor
		c.min = c.floor
		if c.got >= c.max {
			c.min = c.max
		}
	}
	if short {
		fillLevel(claims, budget)
	}
}

// fillLevel gives everybody the same by weight, but no more than the claim, and no
// less than its minimum.
func fillLevel(claims []claim, budget float64) {
	var least, most, weights float64
	for i := range claims {
		least += claims[i].min
		most += claims[i].max
		weights += claims[i].weight
	}
	switch {
	case budget >= most:
		for i := range claims {
			claims[i].got = claims[i].max
		}
		return
	case budget <= least:
		for i := range claims {
			claims[i].got = claims[i].min
		}
		return
	}
	// The sum grows piecewise linearly with the level: Newton's steps, within a bracket.
	var low, high float64
	for i := range claims {
		high = max(high, claims[i].max/claims[i].weight)
	}
	level := budget / weights
	for range 100 {
		sum, slope := 0.0, 0.0
		for i := range claims {
			c := &claims[i]
			switch want := level * c.weight; {
			case want <= c.min:
				c.got = c.min
			case want >= c.max:
				c.got = c.max
			default:
				c.got = want
				slope += c.weight
			}
			sum += c.got
		}
		miss := budget - sum
		if miss > 0 {
			low = level
		} else {
			high = level
		}
		if miss*miss <= 1e-18*budget*budget {
			return
		}
		next := (low + high) / 2
		if slope > 0 {
			if step := level + miss/slope; step > low && step < high {
				next = step
			}
		}
		if next == level {
			return
		}
		level = next
	}
}
