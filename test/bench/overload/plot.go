package overload

import (
	"fmt"
	"strings"
)

const (
	plotWidth  = 250.0
	plotHeight = 110.0
	plotLeft   = 52.0
	plotTop    = 34.0
	plotGap    = 34.0
)

// Point of a trace: T in seconds; rates by the node's capacity; the share of
// routine exchanges, 0 to 1; the delay in seconds.
type Point struct{ T, Share, Demand, Capacity, Arrived, Delay float64 }

// Column of a plot is one control's.
type Column struct {
	Title  string
	Points []Point
}

type curve struct {
	name, color string
	of          func(Point) float64
}

type panel struct {
	title  string
	top    float64 // of the axis
	curves []curve
}

func panels() []panel {
	return []panel{
		{"demand and arrivals, by capacity", 12, []curve{
			{"demand", "#888", func(p Point) float64 { return p.Demand }},
			{"mirrored", "#1f6feb", func(p Point) float64 { return p.Arrived }},
			{"capacity", "#2da44e", func(p Point) float64 { return p.Capacity }},
		}},
		{"share, %", 100, []curve{{"share", "#1f6feb", func(p Point) float64 { return 100 * p.Share }}}},
		{"delay, ms", 300, []curve{{"delay", "#cf222e", func(p Point) float64 { return 1000 * p.Delay }}}},
	}
}

// Draw makes an SVG file, with a column of panels beside the other.
func Draw(columns []Column) string {
	rows := panels()
	width := plotLeft + float64(len(columns))*(plotWidth+plotGap)
	height := plotTop + float64(len(rows))*(plotHeight+plotGap)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="11">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%.0f" height="%.0f" fill="#fff"/>`+"\n", width, height)
	for i, c := range columns {
		x := plotLeft + float64(i)*(plotWidth+plotGap)
		fmt.Fprintf(&b, `<text x="%.0f" y="14" font-weight="bold">%s</text>`+"\n", x, strings.Trim(c.Title, "*"))
		for j, p := range rows {
			p.draw(&b, x, plotTop+float64(j)*(plotHeight+plotGap), c.Points)
		}
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func (p panel) draw(b *strings.Builder, x, y float64, points []Point) {
	fmt.Fprintf(b, `<text x="%.0f" y="%.0f">%s</text><rect x="%.0f" y="%.0f" width="%.0f" height="%.0f" fill="none" stroke="#ccc"/>`+"\n",
		x, y-4, p.title, x, y, plotWidth, plotHeight)
	fmt.Fprintf(b, `<text x="%.0f" y="%.0f" text-anchor="end">%g</text><text x="%.0f" y="%.0f" text-anchor="end">0</text>`+"\n", x-4, y+9, p.top, x-4, y+plotHeight)
	if len(points) == 0 {
		return
	}
	end := points[len(points)-1].T
	every := 2.0
	if end > 12 {
		every = 5
	}
	for t := every; t < end; t += every {
		fmt.Fprintf(b, `<text x="%.1f" y="%.0f" text-anchor="middle" fill="#888">%g s</text>`+"\n", x+t/end*plotWidth, y+plotHeight+12, t)
	}
	for i, c := range p.curves {
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="1.2" points="`, c.color)
		for _, at := range points {
			v := min(max(c.of(at), 0), p.top)
			fmt.Fprintf(b, "%.1f,%.1f ", x+at.T/end*plotWidth, y+plotHeight*(1-v/p.top))
		}
		b.WriteString(`"/>` + "\n")
		if len(p.curves) > 1 {
			fmt.Fprintf(b, `<text x="%.0f" y="%.0f" text-anchor="end" fill="%s">%s</text>`+"\n", x+plotWidth-4, y+13+13*float64(i), c.color, c.name)
		}
	}
}
