package main

import (
	"fmt"
	"strings"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

// goal is what a figure should be, beside what it is.
type goal struct {
	what   string
	got    result.Spread
	limit  float64
	least  bool // the limit is the least, not the most
	format string
}

func atMost(what string, got result.Spread, limit float64, unit string) goal {
	return goal{what: what, got: got, limit: limit, format: "%.1f " + unit}
}

// atLeast is for ratios.
func atLeast(what string, got result.Spread, limit float64) goal {
	return goal{what: what, got: got, limit: limit, least: true, format: "×%.2f"}
}

// memoryGoal is for a gateway's peak above that of one without a filter.
func memoryGoal(where string, f, base figures) goal {
	above := float64(f.peakRSS-base.peakRSS) / 1e6
	return atMost(where+": peak of memory", result.Over([]float64{above}), 10, "MB")
}

// verdict is by the median. A limit within the interval is missed or kept by
// less than this run can tell.
func (g goal) verdict() string {
	over := g.got.Mid - g.limit
	if g.least {
		over = -over
	}
	out := "met"
	if !(over <= 0) { // NaN meets nothing
		out = "**not met**, by " + fmt.Sprintf(g.format, over)
	}
	if g.got.Low < g.limit && g.limit < g.got.High {
		out += "; within the interval"
	}
	return out
}

func writeGoals(b *strings.Builder, goals []goal) {
	if len(goals) == 0 {
		return
	}
	b.WriteString("| Periscope | measured | goal | |\n|---|---|---|---|\n")
	for _, g := range goals {
		sign := "≤"
		if g.least {
			sign = "≥"
		}
		measured := fmt.Sprintf(g.format, g.got.Mid)
		if g.got.Low != g.got.High {
			measured += fmt.Sprintf(", "+strings.Fields(g.format)[0]+" to "+strings.Fields(g.format)[0], g.got.Low, g.got.High)
		}
		fmt.Fprintf(b, "| %s | %s | %s "+g.format+" | %s |\n", g.what, measured, sign, g.limit, g.verdict())
	}
}
