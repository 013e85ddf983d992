package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

// section is the name of the marked section that the report goes to.
const section = "bench-xds"

// report is everything that the tables need.
type report struct {
	machine result.Machine
	peer    string // version
	date    time.Time
	wanted  int // rounds
	stages  []measured
}

func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; go-control-plane %s; %s. %d rounds", r.machine, r.peer, r.date.Format(time.DateOnly), r.wanted)
	if r.machine.Load != "" {
		fmt.Fprintf(&b, "; load average before the run: %s", r.machine.Load)
	}
	b.WriteString(".\n")
	var gateways, istiods []measured
	for _, m := range r.stages {
		if m.mesh {
			istiods = append(istiods, m)
		} else {
			gateways = append(gateways, m)
		}
	}
	if len(gateways) > 0 {
		gatewayTables(&b, gateways)
	}
	if len(istiods) > 0 {
		istiodTable(&b, istiods)
	}
	r.explain(&b)
	return b.String()
}

func gatewayTables(b *strings.Builder, stages []measured) {
	b.WriteString("\n**Gateways: from edit to last acknowledgement**\n\n" +
		"| gateways | server | one edited: ms | CPU µs | bytes | all edited: ms | CPU µs/gateway | bytes/gateway | all set, one edited: CPU µs/unchanged gateway |\n" +
		"|---|---|---|---|---|---|---|---|---|\n")
	for _, m := range stages {
		n := float64(m.clients)
		for _, name := range m.servers() {
			var base map[string]*push
			if name == ours {
				base = m.figures[peer].edits
			}
			of := m.figures[name].edits
			cells := []string{
				fmt.Sprint(m.clients), title(name),
				cell(of, base, editOne, inMillis, 1, "%.2f"), cell(of, base, editOne, inCPU, 1, "%.0f"), cell(of, base, editOne, inBytes, 1, "%.0f"),
				cell(of, base, editAll, inMillis, 1, "%.1f"), cell(of, base, editAll, inCPU, n, "%.0f"), cell(of, base, editAll, inBytes, n, "%.0f"),
				cell(of, base, editRest, inCPU, n, "%.0f"),
			}
			fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
		}
	}
	b.WriteString("\n**Gateways: the server's memory**\n\n" +
		"| gateways | server | KB/snapshot | KB/connection | peak MB |\n|---|---|---|---|---|\n")
	for _, m := range stages {
		for _, name := range m.servers() {
			f := m.figures[name]
			fmt.Fprintf(b, "| %d | %s | %s | %s | %d |\n", m.clients, title(name),
				grown(f.before, f.snapshots, m.clients), grown(f.snapshots, f.connected, m.clients), f.peak/1e6)
		}
	}
}

func istiodTable(b *strings.Builder, stages []measured) {
	fmt.Fprintf(b, "\n**istiods: a mesh of %d gateways, one of them edited**\n\n", meshGateways)
	b.WriteString("| istiods | ms until the last acknowledgement | CPU ms | CPU ms/istiod | KB sent/istiod | KB of memory/connection | peak MB |\n" +
		"|---|---|---|---|---|---|---|\n")
	for _, m := range stages {
		f := m.figures[ours]
		n := float64(m.clients)
		fmt.Fprintf(b, "| %d | %s | %s | %s | %s | %s | %d |\n", m.clients,
			cell(f.edits, nil, editOne, inMillis, 1, "%.1f"), cell(f.edits, nil, editOne, inCPU, 1e3, "%.1f"),
			cell(f.edits, nil, editOne, inCPU, 1e3*n, "%.1f"), cell(f.edits, nil, editOne, inBytes, 1e3*n, "%.0f"),
			grown(f.snapshots, f.connected, m.clients), f.peak/1e6)
	}
}

func (r *report) explain(b *strings.Builder) {
	fmt.Fprintf(b, "\nMethod: the clients, in a process of their own, are connected to both servers at once; edits take turns, in alternating order. "+
		"Figures are medians over rounds; ratios are medians of each round's own comparison with go-control-plane, with their intervals of 95 %% confidence (with less than six rounds, the lowest and highest). "+
		"Time runs from before the snapshots are made until the server has read the last acknowledgement; clients and servers share the CPUs, so much of the time of an edit of all is the clients'. "+
		"CPU is the server process's, user and system, for the same span, %d edits in a row where one gateway is edited; garbage is collected before, not within, unless there is much of it. "+
		"Bytes are those written to TCP. Memory is resident memory after garbage collection, against that before; peak is VmHWM. "+
		"Each gateway has its own snapshot, made from the same messages at both servers, and up to %d TCP connections are used: with more clients, they share them.\n",
		timesOne, maxConnections)
	for _, m := range r.stages {
		if m.rounds < r.wanted {
			fmt.Fprintf(b, "\nNote: %v: time allowed for %d rounds.\n", m.stage, m.rounds)
		}
	}
}

func title(server string) string {
	if server == ours {
		return "**Periscope**"
	}
	return server
}

func inMillis(p *push) []float64 { return p.millis }
func inCPU(p *push) []float64    { return p.cpu }
func inBytes(p *push) []float64  { return p.bytes }

// cell is the median of one figure of one kind of edit, by as many, and its
// ratio to that of base.
func cell(of, base map[string]*push, edit string, figure func(*push) []float64, by float64, format string) string {
	p := of[edit]
	if p == nil {
		return "–"
	}
	out := fmt.Sprintf(format, result.Over(figure(p)).Mid/by)
	if q := base[edit]; q != nil {
		out += " (" + result.Paired(figure(p), figure(q), result.Ratio).Times() + ")"
	}
	return out
}

// grown is the growth of memory by client. What is little is lost in the noise
// of the runtime's own.
func grown(before, after int64, clients int) string {
	if clients < 100 {
		return "–"
	}
	return fmt.Sprintf("%.1f", float64(after-before)/1e3/float64(clients))
}
