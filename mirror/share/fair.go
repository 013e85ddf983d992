package share

// claim is what somebody would have of a budget.
type claim struct {
	weight   float64
	min, max float64
	full     float64 // of the budget
	got      float64 // of the same, less what is left free to work off what is late
	of       int     // parts, if it is a gateway's
}

// content is the part of the level up to which claims count as modest.
const content = 0.75

// fill shares a budget out with weighted max-min fairness: everybody gets the same
// by weight, but no more than the claim. Where others have more in any case, their
// minimum, or where less than the budget may be used for a while, those pay for it
// who would have most, not those who are content with less.
func fill(claims []claim, budget, less float64) {
	for i := range claims {
		claims[i].full, claims[i].min = claims[i].min, 0
	}
	level := fillLevel(claims, budget)
	for i := range claims {
		c := &claims[i]
		c.min = c.full
		if c.max <= content*level*c.weight {
			c.min = c.max
		}
	}
	fillLevel(claims, budget)
	for i := range claims {
		claims[i].full = claims[i].got
	}
	if less < budget {
		fillLevel(claims, less)
	}
}

// fillLevel gives everybody the same by weight, but no more than the claim, and no
// less than its minimum. It returns what that is for weight 1, or the largest claim.
func fillLevel(claims []claim, budget float64) float64 {
	var least, most, weights, low, high float64
	for i := range claims {
		least += claims[i].min
		most += claims[i].max
		weights += claims[i].weight
		high = max(high, claims[i].max/claims[i].weight)
	}
	switch {
	case budget >= most:
		for i := range claims {
			claims[i].got = claims[i].max
		}
		return high
	case budget <= least:
		for i := range claims {
			claims[i].got = claims[i].min
		}
		return 0
	}
	// The sum grows piecewise linearly with the level: Newton's steps, within a bracket.
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
			break
		}
		next := (low + high) / 2
		if slope > 0 {
			if step := level + miss/slope; step > low && step < high {
				next = step
			}
		}
		if next == level {
			break
		}
		level = next
	}
	return level
}
