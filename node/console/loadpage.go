package console

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// loadPage is what the Load page shows.
type loadPage struct {
	Known    bool // something has ever come
	Stale    bool
	Got      time.Time
	Now      string // what the newest values are called
	Fault    string
	Unwired  bool // there is no control plane to ask
	Headline []string
	Notes    []string
	Rates    plot
	Delays   plot
	Shares   []shareRow
	More     string // what is left out of shares
	Losses   []lossRow
	Nodes    []nodeRow
	MoreNode string
}

// shareRow is a policy's share, or that of one of its gateways.
type shareRow struct {
	Policy, Gateway string // the second is empty for all gateways together
	Now             string
	Range           string // of gateways; empty where they are alike
	Ceiling, Demand string
	Lowered         bool   // by load control
	Classes         string // the lowest share of classes; empty: all
	Spark           spark
}

type lossRow struct {
	Reason, Help string
	Now, Total   string
	Some         bool // there were some in these minutes
	Spark        spark
}

type nodeRow struct {
	Name, Address, State, Fault string
	ReceivedAt                  time.Time
	Delay, Where                string
	Utilization, Capacity, Rate string
	Late                        bool
}

// lateDelay is the delay from which on a node's guard discards exchanges.
const lateDelay = 0.02

// losses says what reasons mean, in the order in which they are shown.
var losses = []struct{ reason, name, help string }{
	{"sampled_out", "Sampled out", "By the mirrored share above."},
	{"guard", "Discarded by the guard", "Unread, by a node that is late, until the share has followed."},
	{"lost", "Lost on the way", "Between gateway and node: circuit breakers, time-outs, connections, or batches that a node refused. Envoy's cluster.periscope_mirror statistics tell which."},
	{"ring_overflow", "Queue full", "Found no room in a node's queue."},
	{"inspection", "Not inspected in full", "Analysis ended with an error."},
	{"rejected", "Not readable", "Came to a node and could not be decoded."},
	{"limited", "Refused before the plugin", "By Envoy, and more than are analysed of those."},
	{"stream", "Streams without an exchange", "By ext_proc: refused, cut off, or of a gateway whose settings are not known."},
	{"plugin_error", "Errors of the plugin", "In gateways; users' exchanges were not touched."},
	{"excluded", "Excluded by policy", "The policy does not match them, or excludes them."},
	{"off", "Off", "No policy wants them, or its mode is Off."},
}

func (c *console) loadPage(s loadState) loadPage {
	p := loadPage{Known: s.Load != nil, Stale: s.Stale, Got: s.Got, Now: "Now", Unwired: errors.Is(s.Fault, errNoControl)}
	if s.Fault != nil {
		p.Fault = plain(s.Fault.Error(), 300)
	}
	if s.Load == nil {
		return p
	}
	l := s.Load
	for _, n := range l.Notes {
		p.Notes = append(p.Notes, plain(n, 400))
	}
	step := l.StepSeconds
	p.Rates = newPlot("rates", "Exchanges a second", step, 10, rate,
		line{"solid", "wanted", "By policies, before sampling.", l.Demand, false},
		line{"dashed", "capacity", "What nodes can analyse, by their reports.", l.Capacity, false},
		line{"filled", "analysed", "What nodes do analyse.", l.Analysed, true})
	p.Delays = newPlot("delays", "Delay of the latest node", step, lateDelay, delay,
		line{"solid", "in sockets", "Age of the oldest bytes that a node has not read.", l.Kernel, false},
		line{"dashed", "in the queue", "Between reading and analysis.", l.Queue, false},
		line{"dotted", "on the way", "From a batch's sending to its reading, beyond the least of late.", l.Lag, false})
	p.Delays.Note = "The highest of each second. From " + delay(lateDelay) + " on, a node discards some of what comes, unread; from twice that on, all but the policies' classes."
	if s.Stale {
		p.Now, p.Rates.To, p.Delays.To = "Then", "then", "then"
	}
	for i := range l.Shares {
		p.Shares = append(p.Shares, newShareRow(&l.Shares[i]))
	}
	if l.MoreShares > 0 {
		p.More = plural(int64(l.MoreShares), "more is", "more are") + " not shown: those that want least."
	}
	p.Losses = lossRows(l.NotAnalysed)
	for i := range l.Nodes {
		p.Nodes = append(p.Nodes, newNodeRow(&l.Nodes[i]))
	}
	if l.MoreNodes > 0 {
		p.MoreNode = plural(int64(l.MoreNodes), "more node is", "more nodes are") + " not shown: those that are least late."
	}
	p.Headline = headline(l)
	return p
}

// headline says how things stand, in words.
func headline(l *Load) []string {
	var out []string
	p, nodes := l.Policies, len(l.Nodes)+l.MoreNodes
	switch {
	case p.Total == 0:
		out = append(out, "No policy mirrors anything.")
	case p.Lowered == 0:
		out = append(out, "Gateways mirror all that policies ask for.")
	case p.Total == 1:
		out = append(out, "Load control has lowered the policy's share.")
	default:
		out = append(out, fmt.Sprintf("Load control has lowered the share of %d of %d policies.", p.Lowered, p.Total))
	}
	if p.Classes > 0 {
		out = append(out, "Even exchanges of classes that sampling spares are left out in part: they are too many.")
	}
	worst := Series{l.Kernel.now(), l.Queue.now(), l.Lag.now()}.most()
	switch {
	case nodes == 0:
		out = append(out, "No node is known.")
	case l.Reporting == 0:
		out = append(out, "No node reports.")
	case worst >= lateDelay:
		out = append(out, "Analysis is "+delay(worst)+" late.")
	case math.IsNaN(worst):
		out = append(out, "How late analysis is, no node has told of late.")
	default:
		out = append(out, "Analysis is on time.")
	}
	if missing := nodes - l.Reporting; missing > 0 && l.Reporting > 0 {
		out = append(out, plural(int64(missing), "node does", "nodes do")+" not report.")
	}
	return out
}

// Lowered tells whether a gateway mirrors less than the policy asks for.
func (s *LoadShare) Lowered() bool { return s.Least < s.Ceiling*0.999 }

func newShareRow(s *LoadShare) shareRow {
	row := shareRow{Policy: plain(s.Policy, 160), Gateway: plain(s.Gateway, 160), Now: known(s.Percent.now(), percent),
		Ceiling: percent(s.Ceiling), Demand: rate(s.Demand), Lowered: s.Lowered()}
	least, most := percent(s.Least), percent(s.Most)
	if least != most {
		row.Range = least + " to " + most
	}
	if s.LeftOut > 0 {
		row.Classes = percent(100 - s.LeftOut)
	}
	row.Spark = newSpark(s.Percent, 100, average, fmt.Sprintf("Share: now %s, in these minutes between %s and %s", row.Now, known(leastOf(s.Percent), percent), known(s.Percent.most(), percent)))
	return row
}

func leastOf(s Series) float64 {
	least := math.NaN()
	for _, v := range s {
		if !(v >= least) && !math.IsNaN(v) {
			least = v
		}
	}
	return least
}

// lossRows are in our order, unknown reasons behind the known ones.
func lossRows(list []LoadLoss) []lossRow {
	var rows []lossRow
	add := func(l *LoadLoss, name, help string) {
		now, most := known(l.Rate.now(), rate), l.Rate.most()
		total := count(l.Total)
		if l.Total == 0 && math.IsNaN(most) {
			total = now // not known either
		}
		rows = append(rows, lossRow{Reason: name, Help: help, Now: now, Total: total, Some: most > 0,
			Spark: newSpark(l.Rate, roundUp(most), Series.most, "Now "+now+", at most "+known(most, rate))})
	}
	named := map[string]bool{}
	for _, k := range losses {
		named[k.reason] = true
		for i := range list {
			if list[i].Reason == k.reason {
				add(&list[i], k.name, k.help)
			}
		}
	}
	for i := range list {
		if !named[list[i].Reason] {
			add(&list[i], plain(list[i].Reason, 80), "")
		}
	}
	return rows
}

func newNodeRow(n *LoadNode) nodeRow {
	row := nodeRow{Name: plain(n.Node, 120), Address: plain(n.Address, 120), State: plain(n.State, 40), Fault: plain(n.Fault, 200), ReceivedAt: n.ReceivedAt}
	if n.State != "reporting" {
		return row // what it said is old
	}
	worst := max(n.Kernel, n.Queue, n.Lag)
	row.Delay, row.Late = delay(worst), worst >= lateDelay
	switch {
	case worst <= 0:
	case worst == n.Kernel:
		row.Where = "in sockets"
	case worst == n.Queue:
		row.Where = "in the queue"
	default:
		row.Where = "on the way"
	}
	row.Utilization, row.Rate, row.Capacity = percent(100*n.Utilization), rate(n.Rate), "not known yet"
	if n.Capacity > 0 {
		row.Capacity = rate(n.Capacity)
	}
	return row
}
