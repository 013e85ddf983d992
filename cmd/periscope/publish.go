package main

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/mirror/topology"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/mcp"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// controlState is what was published last, and what it follows from. A value
// of it is never changed.
type controlState struct {
	set      source.Set
	placed   bool // the gateways are known; until then there is no plan
	topology mirror.Topology
	problems []topology.Problem
	plan     mirror.Plan
	builds   map[string]string         // of the plugin, by gateway id
	shares   map[string]*mirror.Shares // load control's, by gateway id
}

// planFault is why the newest plan is not in force; the one before is.
type planFault struct {
	Revision string    `json:"revision"` // the newest's
	Error    string    `json:"error"`
	At       time.Time `json:"time"`
}

// publish changes what the plan follows from, compiles it and hands the result
// to the xDS server: all of it or, with an error, nothing. The error stands at
// /debug/policyz until a later change lets the plan through. Until the gateways
// are known, changes only gather.
func (c *control) publish(change func(*controlState)) error {
	c.publishing.Lock()
	defer c.publishing.Unlock()
	change(&c.next)
	return c.publishNext()
}

// publishNext publishes what follows from c.next. Under c.publishing.
func (c *control) publishNext() error {
	next := c.next
	if !next.placed {
		return nil
	}
	next.plan = withShares(mirror.Compile(next.set.Policies, next.topology), next.shares)
	return c.hand(next)
}

// hand hands a compiled plan on, each gateway's part with the build of the
// plugin that it is to run. Under c.publishing.
func (c *control) hand(next controlState) error {
	last := c.state.Load()
	c.stepPlugins(next.plan)
	next.builds = map[string]string{}
	for _, g := range next.plan.Gateways {
		next.builds[g.Gateway.ID()] = c.plugins.build(g.Gateway.ID()).Name()
	}
	snapshots, err := c.snapshots(next, last)
	if err != nil {
		c.fault.Store(&planFault{Revision: next.plan.Revision, Error: err.Error(), At: time.Now()})
		c.faults.Inc()
		return err
	}
	c.fault.Store(nil)
	// Nodes first: they are to know what gateways that stream go by.
	c.server.SetSnapshot(xds.NodeKey, snapshots[xds.NodeKey])
	delete(snapshots, xds.NodeKey)
	for key, s := range snapshots {
		c.server.SetSnapshot(key, s)
	}
	c.state.Store(&next)
	c.loads.watch(next.topology)
	c.sharing.configure(next.plan)
	if last == nil || last.plan.Revision != next.plan.Revision {
		c.plans.Inc()
		c.cfg.logger.Info("plan published", "revision", next.plan.Revision, "policies", len(next.set.Policies), "gateways", len(next.plan.Gateways))
	}
	return nil
}

// snapshots are those of a plan's clients, by key, but for gateways that are
// served the same already.
func (c *control) snapshots(next controlState, last *controlState) (map[string]*xds.Snapshot, error) {
	out := map[string]*xds.Snapshot{}
	served := map[string]mirror.GatewayPlan{}
	if last != nil {
		for _, g := range last.plan.Gateways {
			served[g.Gateway.ID()] = g
		}
	}
	supplied := mirror.Plan{Revision: next.plan.Revision}
	for _, g := range next.plan.Gateways {
		id := g.Gateway.ID()
		if g.Gateway.Selector != nil {
			supplied.Gateways = append(supplied.Gateways, g)
			continue
		}
		if l, ok := served[id]; ok && last.builds[id] == next.builds[id] && reflect.DeepEqual(l, g) {
			continue
		}
		config := c.gateway
		config.Plugin = c.plugins.build(id).Code
		s, err := c.gateways.Snapshot(config, g)
		if err != nil {
			return nil, err
		}
		out[xds.GatewayKey(id)] = s
	}
	var err error
	if out[xds.NodeKey], err = xdsnode.Snapshot(next.plan); err != nil {
		return nil, err
	}
	if c.cluster != nil {
		if out[mcp.Key("")], err = c.supply(supplied, last); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// supply is what istiods get of the plan. A gateway that cannot be supplied
// keeps its last plan; the others go on.
func (c *control) supply(plan mirror.Plan, last *controlState) (*xds.Snapshot, error) {
	config := c.mcp
	config.Plugins = map[string]mcp.Plugin{}
	for _, g := range plan.Gateways {
		config.Plugins[g.Gateway.ID()] = istioPlugin(c.plugins.build(g.Gateway.ID()))
	}
	clear(c.unfit)
	s, err := c.supplies.Make(config, plan)
	for err != nil {
		fault := new(mcp.GatewayError)
		if !errors.As(err, &fault) {
			return nil, fmt.Errorf("resources for istiods: %w", err)
		}
		if before, ok := c.buildBefore(last, fault.Gateway); ok && config.Plugins[fault.Gateway].Version != before.Name() {
			c.unfit[fault.Gateway] = fault.Err.Error() // told to the roll-out
			config.Plugins[fault.Gateway] = istioPlugin(before)
			s, err = c.supplies.Make(config, plan)
			continue
		}
		c.cfg.logger.Error("gateway keeps its last plan", "gateway", fault.Gateway, "error", fault.Err)
		if plan, err = keepLast(plan, c.supplied, fault.Gateway); err != nil {
			return nil, err
		}
		s, err = c.supplies.Make(config, plan)
	}
	c.supplied = plan.Gateways
	if c.readback != nil {
		c.readback.serve(s.Items, plan, time.Now())
	}
	return s.Snapshot, nil
}

// istioPlugin is a build as Istio's resources carry it.
func istioPlugin(b lua.Build) mcp.Plugin { return mcp.Plugin{Source: b.Code, Version: b.Name()} }

// buildBefore is the build of the plugin that a gateway was handed last.
func (c *control) buildBefore(last *controlState, id string) (lua.Build, bool) {
	if last == nil {
		return lua.Build{}, false
	}
	b, ok := c.plugins.builds[last.builds[id]]
	return b, ok
}

// keepLast puts a gateway's last plan in place of its new one, or takes the
// gateway out if it has had none, or that is the faulty one.
func keepLast(plan mirror.Plan, supplied []mirror.GatewayPlan, id string) (mirror.Plan, error) {
	at := slices.IndexFunc(plan.Gateways, func(g mirror.GatewayPlan) bool { return g.Gateway.ID() == id })
	if at < 0 {
		return plan, fmt.Errorf("gateway %s is not in the plan", id)
	}
	plan.Gateways = slices.Clone(plan.Gateways)
	for _, g := range supplied {
		if g.Gateway.ID() == id && g.Settings.Encode() != plan.Gateways[at].Settings.Encode() {
			plan.Gateways[at] = g
			return plan, nil
		}
	}
	plan.Gateways = slices.Delete(plan.Gateways, at, at+1)
	return plan, nil
}
