package main

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/topology"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/mcp"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// controlState is what was published last, and what it follows from. A value
// of it is never changed.
type controlState struct {
	set      source.Set
	topology mirror.Topology
	problems []topology.Problem
	plan     mirror.Plan
}

// publish changes what the plan follows from, compiles it and hands the result
// to the xDS server. With an error, all goes on as it was.
func (c *control) publish(change func(*controlState)) error {
	c.publishing.Lock()
	defer c.publishing.Unlock()
	next := controlState{set: c.set, topology: c.static}
	last := c.state.Load()
	if last != nil {
		next = *last
	}
	change(&next)
	next.plan = mirror.Compile(next.set.Policies, next.topology)
	supplied := mirror.Plan{Revision: next.plan.Revision}
	for i, g := range next.plan.Gateways {
		if g.Gateway.Selector != nil {
			supplied.Gateways = append(supplied.Gateways, next.plan.Gateways[i])
			continue
		}
		if last != nil && slices.ContainsFunc(last.plan.Gateways, func(l mirror.GatewayPlan) bool { return reflect.DeepEqual(l, g) }) {
			continue // served already
		}
		s, err := gateway.Snapshot(c.gateway, g)
		if err != nil {
			return err
		}
		c.server.SetSnapshot(xds.GatewayKey(g.Gateway.ID()), s)
	}
	s, err := xdsnode.Snapshot(next.plan)
	if err != nil {
		return err
	}
	c.server.SetSnapshot(xds.NodeKey, s)
	if err := c.supply(supplied, last); err != nil {
		return err
	}
	c.state.Store(&next)
	if last == nil || last.plan.Revision != next.plan.Revision {
		c.plans.Inc()
		c.cfg.logger.Info("plan published", "revision", next.plan.Revision, "policies", len(next.set.Policies), "gateways", len(next.plan.Gateways))
	}
	return nil
}

// supply hands the plan's gateways of Istio's to the istiods. One that cannot
// be supplied keeps its last plan; the others go on.
func (c *control) supply(plan mirror.Plan, last *controlState) error {
	if c.cluster == nil {
		return nil
	}
	s, err := mcp.Snapshot(c.mcp, plan)
	for err != nil {
		fault := new(mcp.GatewayError)
		if !errors.As(err, &fault) {
			return fmt.Errorf("resources for istiods: %w", err)
		}
		c.cfg.logger.Error("gateway keeps its last plan", "gateway", fault.Gateway, "error", fault.Err)
		if plan, err = keepLast(plan, last, fault.Gateway); err != nil {
			return err
		}
		s, err = mcp.Snapshot(c.mcp, plan)
	}
	c.server.SetSnapshot(mcp.Key(""), s)
	if c.readback == nil {
		return nil
	}
	return c.readback.serve(c.mcp, plan, time.Now())
}

// keepLast puts a gateway's last plan in place of its new one, or takes the
// gateway out if it has had none, or that is the faulty one.
func keepLast(plan mirror.Plan, last *controlState, id string) (mirror.Plan, error) {
	at := slices.IndexFunc(plan.Gateways, func(g mirror.GatewayPlan) bool { return g.Gateway.ID() == id })
	if at < 0 {
		return plan, fmt.Errorf("gateway %s is not in the plan", id)
	}
	plan.Gateways = slices.Clone(plan.Gateways)
	if last != nil {
		for _, g := range last.plan.Gateways {
			if g.Gateway.ID() == id && g.Settings.Encode() != plan.Gateways[at].Settings.Encode() {
				plan.Gateways[at] = g
				return plan, nil
			}
		}
	}
	plan.Gateways = slices.Delete(plan.Gateways, at, at+1)
	return plan, nil
}
