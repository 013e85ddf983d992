package main

import (
	"fmt"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// meshGateways is how many gateways an istiod's mesh has.
const meshGateways = 100

// gatewayID is the i-th gateway's; a gateway is one client here.
func gatewayID(i int) mirror.Gateway {
	return mirror.Gateway{Namespace: "bench", Name: fmt.Sprintf("gateway-%05d", i)}
}

// nodeID is the i-th gateway's as an xDS client.
func nodeID(i int) string { return "gateway~" + gatewayID(i).ID() }

// settings are those of the default policy, in the revision given.
func settings(id string, revision int) mirror.Settings {
	spec := policy.Default().Spec
	return mirror.Settings{
		Gateway: id, PolicyID: "bench/default", PolicyRev: fmt.Sprintf("%012x", revision),
		SharePPM: 1e6, Mode: spec.Mode, Request: spec.Body.Request, Response: spec.Body.Response, Mask: spec.Mask,
	}
}

func nodeEndpoints() []mirror.Endpoint {
	return []mirror.Endpoint{{Host: "192.0.2.1", Port: 5050}, {Host: "192.0.2.2", Port: 5050}}
}

// material is what gateways are served, as messages: both servers make their
// snapshots from the same.
type material struct {
	fixed map[string][]xds.Message // all but the settings, alike for all gateways
	names map[string][]string      // of all resources, by type
}

func newMaterial() (*material, error) {
	c := gateway.Config{
		HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.3:3000",
		Plugin: lua.Embedded().Code,
	}
	s, err := gateway.Snapshot(c, mirror.GatewayPlan{Gateway: gatewayID(0), Settings: settings("", 0), Endpoints: nodeEndpoints()})
	if err != nil {
		return nil, err
	}
	m := &material{fixed: map[string][]xds.Message{}, names: map[string][]string{}}
	for _, t := range s.Types() {
		for _, r := range s.Resources(t) {
			m.names[t] = append(m.names[t], r.Name)
			if r.Name == gateway.SettingsFilter {
				continue
			}
			message, err := r.Any.UnmarshalNew()
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", r.Name, err)
			}
			m.fixed[t] = append(m.fixed[t], xds.Message{Name: r.Name, Message: message})
		}
	}
	return m, nil
}

// settingsMessage is the one resource that is a gateway's own.
func settingsMessage(i, revision int) (xds.Message, error) {
	s, err := gateway.SettingsExtension(settings(gatewayID(i).ID(), revision))
	if err != nil {
		return xds.Message{}, err
	}
	return xds.Message{Name: gateway.SettingsFilter, Message: s}, nil
}

// meshPlan is what istiods are served the resources of; revisions are those of
// its gateways' settings.
func meshPlan(revisions []int) mirror.Plan {
	plan := mirror.Plan{Gateways: make([]mirror.GatewayPlan, len(revisions))}
	for i, revision := range revisions {
		g := gatewayID(i)
		g.Selector = map[string]string{"istio": g.Name}
		plan.Gateways[i] = mirror.GatewayPlan{Gateway: g, Policy: "bench/default", Settings: settings(g.ID(), revision), Endpoints: nodeEndpoints()}
	}
	return plan
}

func meshConfig() mcp.Config {
	return mcp.Config{Plugin: mcp.Plugin{Source: lua.Embedded().Code, Version: lua.Embedded().Name()}}
}

// gatewayNode is how the i-th gateway introduces itself.
func gatewayNode(i int) *core.Node {
	return &core.Node{Id: nodeID(i), Cluster: gatewayID(i).ID(), Metadata: stringsOf("role", xds.RoleGateway, "gateway", gatewayID(i).ID())}
}

// istiodNode is how the i-th istiod does.
func istiodNode(i int) *core.Node {
	return &core.Node{
		Id:       fmt.Sprintf("sidecar~192.0.2.4~istiod-%d.istio-system~istio-system.svc.cluster.local", i),
		Metadata: stringsOf("GENERATOR", "api", "ISTIO_VERSION", "65536.65536.65536"),
	}
}

func stringsOf(pairs ...string) *structpb.Struct {
	s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for i := 0; i < len(pairs); i += 2 {
		s.Fields[pairs[i]] = structpb.NewStringValue(pairs[i+1])
	}
	return s
}

// selectKey is how a control plane tells its clients apart.
func selectKey(n *core.Node) (string, error) {
	if key, ok := mcp.Select(n); ok {
		return key, nil
	}
	return xds.SelectByRole(n)
}
