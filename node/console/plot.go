package console

import (
	"fmt"
	"math"
	"strconv"
	"time"
)

// Sizes of drawings, in their own units; pages stretch them.
const (
	plotWidth   = 600
	plotHeight  = 160
	sparkWidth  = 200
	sparkHeight = 32
	sparkPoints = 100
)

// plot is a drawing of lines over the last minutes, with the same facts beside it.
type plot struct {
	ID, Title     string
	Width, Height int
	Lines         []plotLine
	Top, Middle   string // of the scale, whose bottom is 0
	From, To      string
	Note          string
	Summary       string
}

// plotLine is a series that is drawn. Styles differ in dashes and width, not in
// colour alone.
type plotLine struct {
	Style, Name, Help string
	Path              string // of the line
	Area              string // below it; empty: none
	Now, Most         string
}

// line is what a plot is made of.
type line struct {
	style, name, help string
	values            Series
	filled            bool
}

// newPlot draws lines to one scale that begins at 0 and goes to least or beyond.
func newPlot(id, title string, step float64, least float64, show func(float64) string, lines ...line) plot {
	p := plot{ID: id, Title: title, Width: plotWidth, Height: plotHeight}
	top, longest := least, 0
	for _, l := range lines {
		if most := l.values.most(); most > top {
			top = most
		}
		longest = max(longest, len(l.values))
	}
	top = roundUp(top)
	p.Top, p.Middle, p.From, p.To = show(top), show(top/2), before(step*float64(longest)), "now"
	for _, l := range lines {
		d := drawing{plotWidth, plotHeight, top}
		pl := plotLine{Style: l.style, Name: l.name, Help: l.help, Path: d.line(l.values), Now: known(l.values.now(), show), Most: known(l.values.most(), show)}
		if l.filled {
			pl.Area = d.area(l.values)
		}
		p.Lines = append(p.Lines, pl)
		if p.Summary != "" {
			p.Summary += "; "
		}
		p.Summary += l.name + " " + pl.Now + ", at most " + pl.Most
	}
	return p
}

// spark is a small drawing of one series.
type spark struct {
	Width, Height int
	Line, Area    string
	Summary       string
}

// newSpark draws values to a scale from 0 to top; each point is what join makes of
// some of them.
func newSpark(values Series, top float64, join func(Series) float64, summary string) spark {
	per := (len(values) + sparkPoints - 1) / sparkPoints
	var points Series
	for i := 0; per > 0 && i < len(values); i += per {
		points = append(points, join(values[i:min(i+per, len(values))]))
	}
	d := drawing{sparkWidth, sparkHeight, top}
	return spark{Width: sparkWidth, Height: sparkHeight, Line: d.line(points), Area: d.area(points), Summary: summary}
}

// average is the mean of the values that are known.
func average(s Series) float64 {
	sum, n := 0.0, 0.0
	for _, v := range s {
		if !math.IsNaN(v) {
			sum, n = sum+v, n+1
		}
	}
	return sum / n
}

// drawing maps values to places.
type drawing struct {
	width, height int
	top           float64
}

// runs calls segment for each run of values that are known.
func (d drawing) runs(values Series, segment func(from, to int)) {
	for i := 0; i < len(values); i++ {
		from := i
		for i < len(values) && !math.IsNaN(values[i]) {
			i++
		}
		if i > from {
			segment(from, i)
		}
	}
}

func (d drawing) x(i, n int) string {
	return short(float64(i) * float64(d.width) / float64(max(n-1, 1)))
}

func (d drawing) y(v float64) string {
	h := float64(d.height)
	part := min(max(v/d.top, 0), 1)
	return short(h - part*(h-2) - 1) // half a stroke stays clear at either end
}

func short(v float64) string { return strconv.FormatFloat(math.Round(v*10)/10, 'f', -1, 64) }

// line is the path of values; where one is not known there is none.
func (d drawing) line(values Series) string {
	var b []byte
	d.runs(values, func(from, to int) {
		for i := from; i < to; i++ {
			b = append(b, " L"[min(i-from, 1)])
			if i == from {
				b[len(b)-1] = 'M'
			}
			b = append(append(append(b, d.x(i, len(values))...), ' '), d.y(values[i])...)
		}
		if to-from == 1 {
			b = append(b, "h1"...)
		}
	})
	return string(b)
}

// area is what lies between the line and 0.
func (d drawing) area(values Series) string {
	var b []byte
	floor := strconv.Itoa(d.height)
	d.runs(values, func(from, to int) {
		b = append(append(append(append(b, 'M'), d.x(from, len(values))...), ' '), floor...)
		for i := from; i < to; i++ {
			b = append(append(append(append(b, 'L'), d.x(i, len(values))...), ' '), d.y(values[i])...)
		}
		b = append(append(append(append(append(b, 'L'), d.x(to-1, len(values))...), ' '), floor...), 'Z')
	})
	return string(b)
}

// roundUp is the next of 1, 2, 3, 4, 6, 8, 10, 20, … .
func roundUp(v float64) float64 {
	if !(v > 0) || math.IsInf(v, 1) {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(v)))
	for _, f := range []float64{1, 2, 3, 4, 6, 8} {
		if v <= f*unit*1.0001 {
			return f * unit
		}
	}
	return 10 * unit
}

// known writes a value that may not be known.
func known(v float64, show func(float64) string) string {
	if math.IsNaN(v) {
		return "not known"
	}
	return show(v)
}

// rate writes exchanges a second.
func rate(v float64) string {
	if v >= 0.05 && v < 9.95 {
		return strconv.FormatFloat(v, 'f', 1, 64) + "/s"
	}
	return count(v) + "/s"
}

func count(v float64) string { return number(int64(min(math.Round(v), 1<<62))) }

// delay writes seconds.
func delay(v float64) string {
	switch {
	case v >= 9.95:
		return count(v) + " s"
	case v >= 0.9995:
		return strconv.FormatFloat(v, 'f', 1, 64) + " s"
	case v >= 0.00995 || v <= 0:
		return strconv.FormatFloat(v*1000, 'f', 0, 64) + " ms"
	}
	return strconv.FormatFloat(v*1000, 'f', 1, 64) + " ms"
}

// percent writes a share: three digits at most.
func percent(v float64) string {
	switch {
	case v >= 99.95 || v <= 0:
		return strconv.FormatFloat(v, 'f', 0, 64) + " %"
	case v >= 9.95:
		return strconv.FormatFloat(v, 'f', 1, 64) + " %"
	}
	return strconv.FormatFloat(v, 'f', 2, 64) + " %"
}

// before is how long ago something was.
func before(seconds float64) string {
	d := time.Duration(min(seconds, 1e9) * float64(time.Second)).Round(time.Second)
	if d >= time.Minute && d%time.Minute < time.Minute/10 {
		return fmt.Sprintf("%d min ago", d/time.Minute)
	}
	if d >= time.Minute {
		return fmt.Sprintf("%d min %d s ago", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%d s ago", d/time.Second)
}
