package main

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/mirror/share"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/mcp"
	"github.com/periscope-mesh/periscope/xds/orca"
)

// istiodPushGap is the time between two pushes of shares to istiods, unless nodes
// are late: each is a push to all of their gateways' proxies that are concerned.
const istiodPushGap = time.Second

// sharing turns nodes' load into the shares of gateways:
//
//	nodes ─► loads ─► [1] share.Controller ─► [2] shares of each gateway ─► xDS server
//
// Every control plane does it for itself, from the same reports.
type sharing struct {
	control *control
	wake    chan struct{}
	metrics shareMetrics

	mu         sync.Mutex
	controller *share.Controller
	effects    *effects
	faults     map[share.Fault]uint64 // as the metric has them
	wanted     bool                   // some node has been late, or gateways go by shares already: before that, nobody knows what nodes can do

	due      map[string]*mirror.Shares // of istiods' gateways, not pushed yet; of run alone
	istiodAt time.Time
}

type shareMetrics struct {
	pushes, faults                  *prometheus.CounterVec
	demand, budget, capacity, delay prometheus.Gauge
}

func newSharing(c *control) *sharing {
	s := &sharing{
		control: c, wake: make(chan struct{}, 1), controller: share.New(share.Config{}),
		effects: newEffects(), faults: map[share.Fault]uint64{}, due: map[string]*mirror.Shares{},
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "periscope_share_" + name, Help: help})
	}
	s.metrics = shareMetrics{
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "periscope_share_pushes_total",
			Help: "Shares of a gateway handed on, by carrier: ads (gateways that we serve), istiod."}, []string{"carrier"}),
		faults: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "periscope_share_faults_total",
			Help: "What is wrong with load reports: full (more than load control has room for: the rest keeps its share), name, policy (not known here), epoch (a node restarted, or two have one name), uptime, clock, counter, demand (a gateway sends more than it counts)."}, []string{"fault"}),
		demand:   gauge("demand_exchanges", "Routine exchanges a second that policies want, at all gateways."),
		budget:   gauge("budget_exchanges", "Routine exchanges a second that gateways may mirror."),
		capacity: gauge("capacity_exchanges", "Exchanges a second that nodes can analyse; 0: not known yet."),
		delay:    gauge("delay_seconds", "Delay of the node that is latest."),
	}
	for _, carrier := range []string{"ads", "istiod"} {
		s.metrics.pushes.WithLabelValues(carrier)
	}
	for _, fault := range share.Faults() {
		s.metrics.faults.WithLabelValues(string(fault))
	}
	c.registry.MustRegister(s.metrics.pushes, s.metrics.faults, s.metrics.demand, s.metrics.budget, s.metrics.capacity, s.metrics.delay)
	return s
}

// configure follows the plan. Under c.publishing.
func (s *sharing) configure(plan mirror.Plan) {
	if s == nil {
		return
	}
	var config share.Config
	policies := map[string]bool{}
	for _, g := range plan.Gateways {
		for _, p := range g.Policies() {
			if !policies[p.PolicyID] {
				policies[p.PolicyID] = true
				config.Policies = append(config.Policies, share.Policy{ID: p.PolicyID, Tenant: tenantOf(plan, p.PolicyID), Ceiling: p.SharePPM, Floor: p.MinPPM})
			}
		}
		for _, pod := range g.Gateway.Pods {
			config.Gateways = append(config.Gateways, share.Gateway{Pod: g.Gateway.Namespace + "/" + pod, Workload: g.Gateway.ID()})
		}
		// Who doesn't know its pod goes by the gateway's name.
		config.Gateways = append(config.Gateways, share.Gateway{Pod: g.Gateway.ID(), Workload: g.Gateway.ID()})
	}
	workloads := map[string]string{}
	for _, g := range config.Gateways {
		workloads[g.Pod] = g.Workload
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.controller.Configure(config)
	s.effects.configure(workloads)
	s.hurry() // what has changed may want other shares
}

func tenantOf(plan mirror.Plan, id string) string {
	i, ok := slices.BinarySearchFunc(plan.Nodes, id, func(n mirror.NodePolicy, id string) int { return strings.Compare(n.ID, id) })
	if !ok {
		return ""
	}
	return plan.Nodes[i].Tenant
}

// take takes a node's report.
func (s *sharing) take(u orca.Update) {
	s.control.history.observe(u.Report)
	s.mu.Lock()
	urgent := s.controller.Observe(*u.Report, u.Received)
	s.effects.take(u, s.controller.Effect)
	s.wanted = s.wanted || slices.ContainsFunc(u.Report.Demands, func(d load.Demand) bool { return d.Share != 0 })
	s.mu.Unlock()
	if urgent {
		s.hurry()
	}
}

// hurry has run decide now. It never waits.
func (s *sharing) hurry() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run decides, tick by tick, until the context ends.
func (s *sharing) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
		}
		now := time.Now()
		s.mu.Lock()
		d := s.controller.Decide(now)
		s.wanted = s.wanted || d.Ready && d.Totals.Delay > urgentDelay
		wanted := s.wanted
		s.countFaults()
		s.mu.Unlock()
		s.show(d)
		s.push(d, wanted, now)
		timer.Reset(time.Until(d.NextTick))
	}
}

// countFaults puts new ones into the metric. Under s.mu.
func (s *sharing) countFaults() {
	for _, fault := range share.Faults() {
		n := s.controller.Faults(fault)
		s.metrics.faults.WithLabelValues(string(fault)).Add(float64(n - s.faults[fault]))
		s.faults[fault] = n
	}
}

func (s *sharing) show(d share.Decision) {
	s.metrics.demand.Set(d.Totals.Demand)
	s.metrics.budget.Set(d.Totals.Budget)
	s.metrics.capacity.Set(d.Totals.Capacity)
	s.metrics.delay.Set(d.Totals.Delay.Seconds())
}

// push hands on the shares that have changed: to gateways that we serve at once,
// to istiods not more than once a second unless nodes are late. Nothing, while none are
// wanted.
func (s *sharing) push(d share.Decision, wanted bool, now time.Time) {
	if wanted && d.Ready && (d.Changed > 0 || len(s.control.current().shares) == 0) {
		direct, due := s.changed(d)
		maps.Copy(s.due, due)
		s.hand(direct, "ads")
	}
	if len(s.due) > 0 && (d.Urgent || now.Sub(s.istiodAt) >= istiodPushGap) {
		s.istiodAt = now
		if s.hand(s.due, "istiod") {
			clear(s.due)
		}
	}
}

// hand tells whether they were handed on.
func (s *sharing) hand(shares map[string]*mirror.Shares, carrier string) bool {
	if len(shares) == 0 {
		return true
	}
	s.mu.Lock()
	now := time.Now()
	for workload, shares := range shares {
		s.effects.pushed(workload, shares.Revision, now)
	}
	s.mu.Unlock()
	if err := s.control.publishShares(shares); err != nil {
		s.control.cfg.logger.Error("shares not handed on", "error", err)
		return false
	}
	s.metrics.pushes.WithLabelValues(carrier).Add(float64(len(shares)))
	return true
}

// changed gives the shares of gateways for which a decision makes a difference:
// those that we serve, and istiods'.
func (s *sharing) changed(d share.Decision) (direct, due map[string]*mirror.Shares) {
	type key struct{ workload, policy string }
	defaults, pods := map[key]mirror.Share{}, map[string]map[string]map[string]mirror.Share{} // by workload, pod, policy
	for _, f := range d.Defaults {
		defaults[key{f.Workload, f.Policy}] = mirror.Share{PPM: f.PPM, Priority: mirror.Everything}
	}
	for _, f := range d.Shares {
		if pods[f.Workload] == nil {
			pods[f.Workload] = map[string]map[string]mirror.Share{}
		}
		_, pod, _ := strings.Cut(f.Gateway, "/")
		if pods[f.Workload][pod] == nil {
			pods[f.Workload][pod] = map[string]mirror.Share{}
		}
		pods[f.Workload][pod][f.Policy] = mirror.Share{PPM: f.PPM, Priority: f.PriorityPPM}
	}
	direct, due = map[string]*mirror.Shares{}, map[string]*mirror.Shares{}
	current := s.control.current()
	for _, g := range current.plan.Gateways {
		id := g.Gateway.ID()
		shares := &mirror.Shares{Pods: map[string][]mirror.Share{}}
		own := pods[id][g.Gateway.Name] // of one that we serve
		for _, p := range g.Policies() {
			f, ok := defaults[key{id, p.PolicyID}]
			if !ok {
				f, ok = defaults[key{"", p.PolicyID}]
			}
			if !ok {
				f = mirror.Share{PPM: p.SharePPM, Priority: mirror.Everything}
			}
			if mine, ok := own[p.PolicyID]; ok && g.Gateway.Selector == nil {
				f = mine
			}
			shares.Default, shares.Policies = append(shares.Default, f), append(shares.Policies, p.PolicyID)
		}
		if g.Gateway.Selector != nil {
			for pod, by := range pods[id] {
				list := slices.Clone(shares.Default)
				for i, p := range g.Policies() {
					if f, ok := by[p.PolicyID]; ok {
						list[i] = f
					}
				}
				if !slices.Equal(list, shares.Default) {
					shares.Pods[pod] = list
				}
			}
		}
		shares.Seal()
		if was := cmp.Or(s.due[id], current.shares[id]); was == nil || was.Revision != shares.Revision {
			if g.Gateway.Selector != nil {
				due[id] = shares
			} else {
				direct[id] = shares
			}
		}
	}
	return direct, due
}

// decided names decisions.
type decided struct{ workload, policy string }

// decisions are those that were made last, with what they were made of.
func (s *sharing) decisions() map[decided][]share.ShareState {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	state := s.controller.State(time.Now())
	s.mu.Unlock()
	out := map[decided][]share.ShareState{}
	for _, d := range state.Shares {
		key := decided{d.Workload, d.Policy}
		out[key] = append(out[key], d)
	}
	return out
}

// totals are what the shares were made of, on the whole and by node.
func (s *sharing) totals() (*shareTotals, map[string]*nodeBudget) {
	if s == nil {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.controller.Summary(time.Now())
	nodes := map[string]*nodeBudget{}
	for _, n := range state.Nodes {
		nodes[n.Name] = &nodeBudget{Counts: n.Counts, Capacity: n.Capacity, Demand: n.Demand, Priority: n.Priority, Drain: n.Drain, Budget: n.Budget, Bound: n.Bound}
	}
	t := state.Totals
	return &shareTotals{Ready: state.Ready, Capacity: t.Capacity, Demand: t.Demand, Priority: t.Priority, Drain: t.Drain, Budget: t.Budget,
		Delay: t.Delay.Seconds(), Effect: t.Effect.Seconds(), Fresh: t.Fresh, Stale: t.Stale, Frozen: t.Frozen, Workers: state.Workers, Faults: state.Faults}, nodes
}

// nodeBudget is what shares are made of at a node. Rates are exchanges a second.
type nodeBudget struct {
	Counts   float64 `json:"counts"` // how much of the node counts: 1 all, 0 nothing
	Capacity float64 `json:"capacity"`
	Demand   float64 `json:"demand"`   // routine exchanges that policies want, at gateways that send there
	Priority float64 `json:"priority"` // those of a class that sampling spares
	Drain    float64 `json:"drain"`    // left free to work off what is late
	Budget   float64 `json:"budget"`   // for routine exchanges
	Bound    int     `json:"bound"`    // shares that are bound by it
}

// shareTotals are the part of /debug/pressurez about all nodes and gateways. Rates
// are exchanges a second.
type shareTotals struct {
	Ready    bool                   `json:"ready"` // nodes have been heard for long enough
	Capacity float64                `json:"capacity"`
	Demand   float64                `json:"demand"`   // routine exchanges that policies want
	Priority float64                `json:"priority"` // those of a class that sampling spares
	Drain    float64                `json:"drain"`    // left free to work off what is late
	Budget   float64                `json:"budget"`   // for routine exchanges
	Delay    float64                `json:"delaySeconds"`
	Effect   float64                `json:"effectSeconds"` // from a decision to its effect
	Fresh    int                    `json:"freshNodes"`
	Stale    int                    `json:"staleNodes"`
	Frozen   bool                   `json:"frozen"` // no node is fresh
	Workers  int                    `json:"workers"`
	Faults   map[share.Fault]uint64 `json:"faults,omitempty"`
}

// publishShares hands on the shares of some gateways, and nothing else.
func (c *control) publishShares(shares map[string]*mirror.Shares) error {
	c.publishing.Lock()
	defer c.publishing.Unlock()
	last := c.state.Load()
	if last == nil {
		return nil
	}
	next := *last
	next.shares = maps.Clone(last.shares)
	if next.shares == nil {
		next.shares = map[string]*mirror.Shares{}
	}
	maps.Copy(next.shares, shares)
	c.next.shares = next.shares
	next.plan = withShares(last.plan, next.shares)
	supplied := mirror.Plan{Revision: next.plan.Revision}
	toIstiod := false
	for _, g := range next.plan.Gateways {
		id := g.Gateway.ID()
		_, changes := shares[id]
		if g.Gateway.Selector != nil {
			supplied.Gateways = append(supplied.Gateways, g)
			toIstiod = toIstiod || changes
			continue
		}
		if !changes {
			continue
		}
		config := c.gateway
		config.Plugin = c.plugins.build(id).Code
		snapshot, err := c.gateways.Snapshot(config, g)
		if err != nil {
			return err
		}
		c.server.SetSnapshot(xds.GatewayKey(id), snapshot)
	}
	if toIstiod && c.cluster != nil {
		snapshot, err := c.supply(supplied, last)
		if err != nil {
			return err
		}
		c.server.SetSnapshot(mcp.Key(""), snapshot)
	}
	c.state.Store(&next)
	return nil
}

// withShares is the plan with load control's shares.
func withShares(plan mirror.Plan, shares map[string]*mirror.Shares) mirror.Plan {
	if len(shares) == 0 {
		return plan
	}
	plan.Gateways = slices.Clone(plan.Gateways)
	for i := range plan.Gateways {
		g := &plan.Gateways[i]
		if s := shares[g.Gateway.ID()]; s != nil {
			var ids []string
			for _, p := range g.Policies() {
				ids = append(ids, p.PolicyID)
			}
			g.Settings.Shares = s.For(ids)
		}
	}
	return plan
}
