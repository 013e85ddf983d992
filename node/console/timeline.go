package console

import (
	"fmt"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

const (
	minBars   = 30 // a short attack is shown within half an hour
	maxBars   = 96
	barStride = 10 // in the drawing's units
	barHeight = 64
)

// chart is a timeline as bars, with the same facts in words.
type chart struct {
	Width, Height int
	Bars          []bar
	From, To      time.Time
	Step          string
	Peak          string // hits of the highest bar
	Summary       string
}

type bar struct {
	X, Y, Width, Height int
	Title               string
}

// newChart draws minutes, oldest first; it is nil without any.
func newChart(minutes []Minute) *chart {
	if len(minutes) == 0 {
		return nil
	}
	first, last := minutes[0].Start, minutes[len(minutes)-1].Start
	step := time.Minute
	for _, s := range []time.Duration{2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440} {
		if last.Sub(first)/step < maxBars {
			break
		}
		step = s * time.Minute
	}
	from := first.Truncate(step)
	count := int(last.Sub(from)/step) + 1
	if count < minBars {
		from = from.Add(-time.Duration(minBars-count) * step)
		count = minBars
	}
	counts := make([]attack.Count, count)
	var total, peak attack.Count
	var peakAt time.Time
	for _, m := range minutes {
		i := int(m.Start.Sub(from) / step)
		if i < 0 || i >= count {
			continue // out of order, which no store gives
		}
		counts[i] = sum(counts[i], m.Count)
		total = sum(total, m.Count)
		if counts[i].Estimated > peak.Estimated {
			peak, peakAt = counts[i], from.Add(time.Duration(i)*step)
		}
	}
	c := &chart{
		Width: count * barStride, Height: barHeight, From: from, To: from.Add(time.Duration(count) * step),
		Step: stepWords(step), Peak: about(peak),
	}
	for i, n := range counts {
		if n.Hits == 0 {
			continue
		}
		h := max(int(n.Estimated*barHeight/peak.Estimated), 3) // one hit among thousands must still be seen
		at := from.Add(time.Duration(i) * step)
		c.Bars = append(c.Bars, bar{X: i*barStride + 1, Y: barHeight - h, Width: barStride - 2, Height: h,
			Title: fmt.Sprintf("%s UTC: %s", at.Format("2006-01-02 15:04"), hits(n))})
	}
	c.Summary = fmt.Sprintf("%s between %s and %s UTC; most per %s: %s at %s", hits(total),
		first.Format("2006-01-02 15:04"), last.Add(time.Minute).Format("2006-01-02 15:04"), c.Step, c.Peak, peakAt.Format("15:04"))
	return c
}

func sum(a, b attack.Count) attack.Count {
	return attack.Count{Hits: a.Hits + b.Hits, Estimated: a.Estimated + b.Estimated, Variance: a.Variance + b.Variance}
}

// hits is a count in words.
func hits(c attack.Count) string {
	if c.Sampled() {
		return about(c) + " hits"
	}
	return plural(c.Hits, "hit", "hits")
}

func stepWords(d time.Duration) string {
	switch {
	case d == time.Minute:
		return "minute"
	case d < time.Hour:
		return fmt.Sprintf("%d minutes", d/time.Minute)
	case d == time.Hour:
		return "hour"
	}
	return fmt.Sprintf("%d hours", d/time.Hour)
}
