package console

import (
	"fmt"
	"time"
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
	Peak          int64
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
	counts := make([]int64, count)
	var total, peak int64
	var peakAt time.Time
	for _, m := range minutes {
		i := int(m.Start.Sub(from) / step)
		if i < 0 || i >= count {
			continue // out of order, which no store gives
		}
		counts[i] += m.Hits
		total += m.Hits
		if counts[i] > peak {
			peak, peakAt = counts[i], from.Add(time.Duration(i)*step)
		}
	}
	c := &chart{
		Width: count * barStride, Height: barHeight, From: from, To: from.Add(time.Duration(count) * step),
		Step: stepWords(step), Peak: peak,
	}
	for i, n := range counts {
		if n == 0 {
			continue
		}
		h := max(int(n*barHeight/peak), 3) // one hit among thousands must still be seen
		at := from.Add(time.Duration(i) * step)
		c.Bars = append(c.Bars, bar{X: i*barStride + 1, Y: barHeight - h, Width: barStride - 2, Height: h,
			Title: fmt.Sprintf("%s UTC: %s", at.Format("2006-01-02 15:04"), plural(n, "hit", "hits"))})
	}
	c.Summary = fmt.Sprintf("%s between %s and %s UTC; most per %s: %s at %s", plural(total, "hit", "hits"),
		first.Format("2006-01-02 15:04"), last.Add(time.Minute).Format("2006-01-02 15:04"), c.Step, number(peak), peakAt.Format("15:04"))
	return c
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
