package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/rollout"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/istiod"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// runRollout moves the roll-out of the plugin on until the context ends.
func (c *control) runRollout(ctx context.Context) error {
	tick := time.NewTicker(rolloutInterval)
	defer tick.Stop()
	for complaint := ""; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			err := c.advance()
			if text := fmt.Sprint(err); err != nil && text != complaint {
				complaint = text
				c.cfg.logger.Error("plugin not published", "error", err)
			}
		}
	}
}

// advance publishes anew when a gateway is to run another build than it is
// served. While the newest plan can't be published, the last one is.
func (c *control) advance() error {
	c.publishing.Lock()
	defer c.publishing.Unlock()
	last := c.state.Load()
	if last == nil {
		return nil
	}
	if c.plugins.underWay() {
		c.stepPlugins(last.plan)
	}
	same := true
	for _, g := range last.plan.Gateways {
		id := g.Gateway.ID()
		same = same && c.plugins.build(id).Name() == last.builds[id]
	}
	if same {
		return nil
	}
	if c.publishNext() == nil {
		return nil
	}
	defer c.fault.Store(c.fault.Load()) // the newest plan's: it stands
	return c.hand(*last)
}

// stepPlugins decides which build each gateway of a plan is to run.
func (c *control) stepPlugins(plan mirror.Plan) {
	connections := c.server.Connections()
	c.plugins.step(c.evidence(plan, connections), c.nodesKnown(connections))
}

// evidence is what is known of each gateway's build.
func (c *control) evidence(plan mirror.Plan, connections []xds.Connection) []rollout.Gateway {
	heard := map[string]map[string]rollout.Count{}
	for _, h := range c.reports.Gateways() {
		if heard[h.Gateway] == nil {
			heard[h.Gateway] = map[string]rollout.Count{}
		}
		heard[h.Gateway][h.Plugin] = rollout.Count{Seen: h.Seen, Errors: h.Errors, Last: h.Last}
	}
	told := func(mirror.Gateway) (rollout.Delivery, string) { return rollout.Unknown, "" }
	if c.readback != nil {
		told = toldBy(c.readback.poller.State(), c.readback.current())
	}
	served := map[string][]xds.Connection{}
	for _, conn := range connections {
		served[conn.Key] = append(served[conn.Key], conn)
	}
	out := make([]rollout.Gateway, 0, len(plan.Gateways))
	for _, g := range plan.Gateways {
		if g.Settings.Transport == policy.TransportExtProc || !g.Settings.Copies() {
			continue // it runs no plugin
		}
		id := g.Gateway.ID()
		e := rollout.Gateway{ID: id, Runs: heard[id]}
		if unfit, ok := c.unfit[id]; ok {
			e.Delivery, e.Reason = rollout.Refused, unfit
		} else if g.Gateway.Selector != nil {
			if !c.mcp.Supplies(g) {
				continue // it has no plugin
			}
			e.Delivery, e.Reason = told(g.Gateway)
		} else {
			e.Delivery, e.Reason = c.delivered(served[xds.GatewayKey(id)], c.plugins.build(id).Name())
		}
		out = append(out, e)
	}
	return out
}

// delivered tells how far a build has come to the Envoys of a gateway of ours.
func (c *control) delivered(envoys []xds.Connection, build string) (rollout.Delivery, string) {
	if len(envoys) == 0 {
		return rollout.Unknown, "no Envoy is connected as this gateway"
	}
	state := rollout.Acknowledged
	for _, e := range envoys {
		var plugin xds.Delivery
		for _, d := range c.server.Deliveries(e.ID)[resource.ExtensionConfigType] {
			if d.Sent.Name == gateway.PluginFilter {
				plugin = d
			}
		}
		if c.plugins.nameOf(plugin.Acked) == build {
			continue
		}
		state = rollout.Pending
		for _, r := range e.Types[resource.ExtensionConfigType].Rejected {
			if r.Name == gateway.PluginFilter && r.Version == plugin.Sent.Version && c.plugins.nameOf(plugin.Sent) == build {
				return rollout.Refused, r.Reason
			}
		}
	}
	return state, ""
}

// toldBy gives what istiods say of a gateway; nothing of what was served before
// the present state.
func toldBy(state istiod.State, served istiod.Served) func(mirror.Gateway) (rollout.Delivery, string) {
	byID := map[string]istiod.Status{}
	for _, s := range state.Gateways {
		byID[s.Gateway] = s
	}
	absent := map[string]bool{} // resources that an istiod has not taken
	for _, s := range state.Resources {
		if s.Stage == istiod.Refused {
			absent[s.Resource] = true
		}
	}
	takes := map[string]bool{} // gateways of which istiods have all that is served
	for _, g := range served.Gateways {
		takes[g.ID] = !slices.ContainsFunc(g.Resources, func(key string) bool { return absent[key] })
	}
	return func(g mirror.Gateway) (rollout.Delivery, string) {
		s, ok := byID[g.ID()]
		if !ok || state.Serial != served.Serial {
			return rollout.Pending, "istiods are being asked"
		}
		switch s.Stage {
		case istiod.Acknowledged:
			return rollout.Acknowledged, ""
		case istiod.Refused:
			// An istiod that takes nothing from us now may be about to connect,
			// or be connected to a control plane beside this one.
			if takes[g.ID()] {
				return rollout.Refused, s.Reason
			}
		case istiod.Unknown:
			return rollout.Unknown, s.Reason
		case istiod.Accepted:
			if len(g.Pods) == 0 { // nobody is there to take it
				return rollout.Acknowledged, ""
			}
		}
		return rollout.Pending, s.Reason
	}
}

// nodesKnown are the nodes that are connected, with what they read.
func (c *control) nodesKnown(connections []xds.Connection) []rollout.Node {
	wires := c.wires()
	var out []rollout.Node
	for _, conn := range connections {
		if conn.Key == xds.NodeKey && conn.Held == "" {
			name := strings.TrimPrefix(conn.Node, xds.RoleNode+"~")
			out = append(out, rollout.Node{Name: name, Wires: wires[name]})
		}
	}
	return out
}

// wires are the versions of the wire contract that nodes read, by their names.
func (c *control) wires() map[string][]int {
	out := map[string][]int{}
	for _, r := range c.reports.Reporters() {
		out[r.Node] = r.Wires
	}
	return out
}

// pluginGateway is one gateway in the roll-out, on /debug/pluginz.
type pluginGateway struct {
	Gateway string `json:"gateway"`
	rollout.Assignment
	Delivery string          `json:"delivery"`
	Reason   string          `json:"reason,omitempty"`
	Heard    []xdsnode.Heard `json:"heard,omitempty"` // what nodes heard from it, by build
}

// pluginRollout is the roll-out, on /debug/pluginz.
type pluginRollout struct {
	Target   rollout.Build     `json:"target"`
	Stable   rollout.Build     `json:"stable"`
	Phase    rollout.Phase     `json:"phase"`
	Reason   string            `json:"reason,omitempty"`
	Problem  string            `json:"problem,omitempty"` // why the build of --plugin is not taken
	Failed   map[string]string `json:"failed,omitempty"`
	Gateways []pluginGateway   `json:"gateways"`
}

func (c *control) pluginRollout() pluginRollout {
	c.publishing.Lock()
	s, problem, evidence := c.plugins.state, c.plugins.problem, c.evidence(c.current().plan, c.server.Connections())
	c.publishing.Unlock()
	out := pluginRollout{Target: s.Target, Stable: s.Stable, Phase: s.Phase, Reason: s.Reason, Problem: problem, Failed: s.Failed, Gateways: []pluginGateway{}}
	heard := map[string][]xdsnode.Heard{}
	for _, h := range c.reports.Gateways() {
		heard[h.Gateway] = append(heard[h.Gateway], h)
	}
	for _, e := range evidence {
		g := pluginGateway{Gateway: e.ID, Assignment: s.Gateways[e.ID], Delivery: string(e.Delivery), Reason: e.Reason, Heard: heard[e.ID]}
		if e.Delivery == rollout.Unknown {
			g.Delivery = "unknown"
		}
		out.Gateways = append(out.Gateways, g)
	}
	return out
}
