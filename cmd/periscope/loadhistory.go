package main

import (
	"cmp"
	"context"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
	"github.com/periscope-mesh/periscope/node/console"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds/orca"
)

const (
	historyStep    = time.Second
	historySamples = 300 // five minutes
	// What is shown of: policies, gateways of a policy, gateways in all, nodes.
	historyPolicies       = 20
	historyPolicyGateways = 8
	historyGateways       = 40
	historyNodes          = 50
)

// loadHistory is what the console's Load page shows, sampled once a second for all
// who look, and forgotten after five minutes:
//
//	nodes' load, shares, ledger ─► sample, each second ─► ring ─► /debug/loadz, console
type loadHistory struct {
	control *control

	mu      sync.Mutex
	peak    delays // highest since the last sample
	losses  *lossMeter
	samples []loadSample // oldest first, a step apart
}

// delays of the node that is latest, in seconds; NaN: nobody reports.
type delays struct{ kernel, queue, lag float64 }

func (d *delays) take(r *load.Report) {
	higher := func(to *float64, v time.Duration) {
		if s := v.Seconds(); !(s <= *to) {
			*to = s
		}
	}
	higher(&d.kernel, r.Kernel)
	higher(&d.queue, r.Queue)
	higher(&d.lag, r.Lag)
}

var noDelays = delays{math.NaN(), math.NaN(), math.NaN()}

// loadSample is a second. What nobody knows is NaN.
type loadSample struct {
	at                         time.Time
	demand, capacity, analysed float64
	delays
	shares []shareLevel
	rates  map[lossReason]float64
}

func newLoadHistory(c *control) *loadHistory {
	return &loadHistory{control: c, peak: noDelays, losses: newLossMeter()}
}

// observe takes a report of a node between two samples.
func (h *loadHistory) observe(r *load.Report) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.peak.take(r)
}

// run samples until the context ends.
func (h *loadHistory) run(ctx context.Context) error {
	tick := time.NewTicker(historyStep)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			h.sample(now)
		}
	}
}

// sample looks at everything.
func (h *loadHistory) sample(now time.Time) {
	c := h.control
	s := loadSample{at: now, demand: math.NaN(), capacity: math.NaN(), analysed: math.NaN(), delays: noDelays}
	var reports []*load.Report
	for _, n := range c.loadNodes() {
		if n.Report == nil {
			continue
		}
		reports = append(reports, n.Report)
		if n.State == orca.StateReporting {
			s.delays.take(n.Report)
		}
	}
	totals, ready, leaves := c.sharing.loads(now)
	switch {
	case ready && totals.Frozen: // all are silent that had something to tell
		s.delays = noDelays
	case ready:
		s.demand = totals.Demand + totals.Priority
		if totals.Capacity > 0 {
			s.capacity = totals.Capacity
		}
	}
	s.shares = shareLevels(c.current().plan, leaves)
	reporters := c.reports.Reporters()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.losses.ledger(now, reporters)
	h.losses.demand(now, reports)
	s.rates = h.losses.rates()
	if len(reporters) > 0 {
		s.analysed = h.losses.analysed()
	}
	if d := h.peak; !math.IsNaN(s.kernel) { // else what was told before is no news
		s.delays = delays{max(s.kernel, orZero(d.kernel)), max(s.queue, orZero(d.queue)), max(s.lag, orZero(d.lag))}
	}
	h.peak = noDelays
	h.add(s)
}

func orZero(v float64) float64 {
	if math.IsNaN(v) {
		return 0
	}
	return v
}

// add appends a sample; where seconds are missing before it, they are empty.
func (h *loadHistory) add(s loadSample) {
	if n := len(h.samples); n > 0 {
		missing := int(s.at.Sub(h.samples[n-1].at).Round(historyStep)/historyStep) - 1
		for i := range min(missing, historySamples) {
			h.samples = append(h.samples, loadSample{at: s.at.Add(time.Duration(i-missing) * historyStep),
				demand: math.NaN(), capacity: math.NaN(), analysed: math.NaN(), delays: noDelays})
		}
	}
	h.samples = append(h.samples, s)
	h.samples = slices.Delete(h.samples, 0, max(0, len(h.samples)-historySamples))
}

// newest is the last sample; without any, nothing is known.
func (h *loadHistory) newest() loadSample {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.samples) == 0 {
		return loadSample{demand: math.NaN(), capacity: math.NaN(), analysed: math.NaN(), delays: noDelays}
	}
	return h.samples[len(h.samples)-1]
}

// lost is how many exchanges were lost between gateways and nodes, so far.
func (h *loadHistory) lost() float64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.losses.total[lossLost]
}

// Load makes it a console.LoadSource.
func (h *loadHistory) Load(context.Context) (console.Load, error) { return h.load(), nil }

// load is what is known. It is /debug/loadz, too.
func (h *loadHistory) load() console.Load {
	out := console.Load{StepSeconds: historyStep.Seconds(), Notes: []string{}, Shares: []console.LoadShare{}, NotAnalysed: []console.LoadLoss{}, Nodes: []console.LoadNode{}}
	h.nodes(&out)
	h.mu.Lock()
	defer h.mu.Unlock()
	of := func(value func(*loadSample) float64) console.Series {
		list := make(console.Series, len(h.samples))
		for i := range h.samples {
			list[i] = value(&h.samples[i])
		}
		return list
	}
	out.Demand = of(func(s *loadSample) float64 { return s.demand })
	out.Capacity = of(func(s *loadSample) float64 { return s.capacity })
	out.Analysed = of(func(s *loadSample) float64 { return s.analysed })
	out.Kernel = of(func(s *loadSample) float64 { return s.kernel })
	out.Queue = of(func(s *loadSample) float64 { return s.queue })
	out.Lag = of(func(s *loadSample) float64 { return s.lag })
	for _, reason := range lossReasons() {
		out.NotAnalysed = append(out.NotAnalysed, console.LoadLoss{Reason: string(reason), Total: h.losses.total[reason], Rate: of(func(s *loadSample) float64 {
			if v, ok := s.rates[reason]; ok {
				return v
			}
			return math.NaN()
		})})
	}
	if h.losses.shared() {
		out.Notes = append(out.Notes, "Several nodes report, and each tells what a gateway has counted in all: what gateways leave out without counting it for a policy (off, excluded, errors of the plugin) can't be added up.")
	}
	if n := len(h.samples); n > 0 {
		out.At = h.samples[n-1].at.UTC()
		h.shares(&out)
	}
	return out
}

// shares puts in those of the newest sample, with their past.
func (h *loadHistory) shares(out *console.Load) {
	type key struct{ policy, gateway string }
	newest := h.samples[len(h.samples)-1].shares
	for _, l := range newest {
		if l.gateway == "" {
			out.Policies.Add(l.show())
		}
	}
	shown, more := chooseLevels(newest)
	out.MoreShares = more
	series := map[key]console.Series{}
	for _, l := range shown {
		past := make(console.Series, len(h.samples))
		for i := range past {
			past[i] = math.NaN()
		}
		series[key{l.policy, l.gateway}] = past
		share := l.show()
		share.Percent = past
		out.Shares = append(out.Shares, share)
	}
	for i := range h.samples {
		for _, l := range h.samples[i].shares {
			if past := series[key{l.policy, l.gateway}]; past != nil {
				past[i] = l.percent
			}
		}
	}
}

// nodes puts in the nodes that are watched, the latest first.
func (h *loadHistory) nodes(out *console.Load) {
	c := h.control
	if c.loads == nil {
		out.Notes = append(out.Notes, "Load control is off: this control plane asks no node for its load (--orca-port 0).")
		return
	}
	silent := 0
	for _, n := range c.loadNodes() {
		node := console.LoadNode{Address: n.Address, State: n.State, Fault: n.Fault, ReceivedAt: n.ReceivedAt.UTC()}
		if r := n.Report; r != nil {
			node.Node, node.Kernel, node.Queue, node.Lag = r.Node, r.Kernel.Seconds(), r.Queue.Seconds(), r.Lag.Seconds()
			node.Utilization, node.Capacity, node.Rate = r.Utilization, r.Capacity, r.Rate
		}
		switch n.State {
		case orca.StateStale:
			silent++
		case orca.StateReporting:
			out.Reporting++
		}
		out.Nodes = append(out.Nodes, node)
	}
	if silent > 0 && silent < len(out.Nodes) {
		out.Notes = append(out.Notes, "Of a node nothing is heard: what gateways send to it counts as lost on the way.")
	}
	worst := func(n console.LoadNode) float64 { return max(n.Kernel, n.Queue, n.Lag) }
	slices.SortStableFunc(out.Nodes, func(a, b console.LoadNode) int { return cmp.Compare(worst(b), worst(a)) })
	out.MoreNodes = max(0, len(out.Nodes)-historyNodes)
	out.Nodes = out.Nodes[:len(out.Nodes)-out.MoreNodes]
}

// loadNodes are the nodes that are watched.
func (c *control) loadNodes() []orca.Node {
	if c.loads == nil {
		return nil
	}
	nodes, _ := c.loads.watcher.Nodes()
	return nodes
}

// loads are what the shares in force were made of.
func (s *sharing) loads(now time.Time) (share.Totals, bool, []shareDemand) {
	if s == nil {
		return share.Totals{}, false, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var leaves []shareDemand
	for l := range s.controller.Shares(now) {
		leaves = append(leaves, shareDemand{l.Gateway, l.Workload, l.Policy, l.Demand, l.Priority})
	}
	t, ready := s.controller.Totals()
	return t, ready, leaves
}

// shareDemand is what a policy wants at a gateway, exchanges a second.
type shareDemand struct {
	gateway, workload, policy string
	routine, priority         float64
}

// shareLevel is the share in force of a policy, in percent: at a gateway, or, with
// gateway "", the mean of all by what is wanted at each, with the lowest and the
// highest.
type shareLevel struct {
	policy, gateway               string
	ceiling, percent, least, most float64
	demand                        float64 // exchanges a second
	classes                       float64 // the share of classes, the lowest
	hidden                        int     // gateways that differ and do not follow
}

// show gives it to the console, without its past.
func (l *shareLevel) show() console.LoadShare {
	return console.LoadShare{Policy: l.policy, Gateway: l.gateway, Ceiling: l.ceiling, Least: l.least, Most: l.most, Demand: l.demand, LeftOut: 100 - l.classes}
}

// shareLevels reads the shares from the plan, where they are as gateways are told,
// by policy; those of single gateways follow their policy where they differ.
func shareLevels(plan mirror.Plan, leaves []shareDemand) []shareLevel {
	type place struct{ workload, policy string }
	type policyLevel struct {
		shareLevel
		routine, weighted, plain, places float64
		gateways                         []shareLevel
	}
	policies := map[string]*policyLevel{}
	at := map[place]func(pod string) (percent, classes float64){}
	for _, g := range plan.Gateways {
		shares := g.Settings.Shares
		for i, s := range g.Policies() {
			if s.Mode != policy.ModeMonitor {
				continue
			}
			of := func(pod string) (percent, classes float64) {
				share := shares.InForce(pod, i, &s)
				return float64(share.PPM) / 1e4, float64(share.Priority) / 1e4
			}
			at[place{g.Gateway.ID(), s.PolicyID}] = of
			v, classes := of("")
			p := policies[s.PolicyID]
			if p == nil {
				p = &policyLevel{shareLevel: shareLevel{policy: s.PolicyID, ceiling: float64(s.SharePPM) / 1e4, least: v, most: v, classes: classes}}
				policies[s.PolicyID] = p
			}
			p.least, p.most, p.classes = min(p.least, v), max(p.most, v), min(p.classes, classes)
			p.plain, p.places = p.plain+v, p.places+1
		}
	}
	for _, l := range leaves {
		of, p := at[place{l.workload, l.policy}], policies[l.policy]
		if of == nil {
			continue
		}
		_, pod, _ := strings.Cut(l.gateway, "/")
		v, classes := of(pod)
		p.least, p.most, p.classes = min(p.least, v), max(p.most, v), min(p.classes, classes)
		p.routine, p.weighted, p.demand = p.routine+l.routine, p.weighted+v*l.routine, p.demand+l.routine+l.priority
		p.gateways = append(p.gateways, shareLevel{l.policy, l.gateway, p.ceiling, v, v, v, l.routine + l.priority, classes, 0})
	}
	var out []shareLevel
	for _, p := range slices.SortedFunc(maps.Values(policies), func(a, b *policyLevel) int {
		return cmp.Or(cmp.Compare(b.demand, a.demand), strings.Compare(a.policy, b.policy))
	}) {
		if p.percent = p.plain / p.places; p.routine > 0 {
			p.percent = p.weighted / p.routine
		}
		if p.least == p.most {
			p.gateways = nil
		}
		slices.SortFunc(p.gateways, func(a, b shareLevel) int {
			return cmp.Or(cmp.Compare(b.demand, a.demand), strings.Compare(a.gateway, b.gateway))
		})
		p.hidden = max(0, len(p.gateways)-historyPolicyGateways)
		out = append(append(out, p.shareLevel), p.gateways[:len(p.gateways)-p.hidden]...)
	}
	return out
}

// chooseLevels leaves some out, where there are many.
func chooseLevels(levels []shareLevel) (shown []shareLevel, more int) {
	policies, gateways := 0, 0
	for _, l := range levels {
		more += l.hidden
		if l.gateway == "" {
			policies++
		} else {
			gateways++
		}
		if policies > historyPolicies || l.gateway != "" && gateways > historyGateways {
			more++
			continue
		}
		shown = append(shown, l)
	}
	return shown, more
}
