// Package node turns the nodes' part of the plan into the one resource that
// analysis nodes take by ADS, from the same server and with the same revision
// of each policy as gateways take theirs.
//
// It never sends a node anything about gateways, but for the settings of those
// whose exchanges nodes select, cut and mask (transport ExtProc), and never a
// change that left the nodes' part as it was, but for the plan's revision.
//
// The commands may import it; it imports xds, mirror and policy. Its sub-package
// nodev1, the message itself, is imported by node/policy too.
package node

import (
	"encoding/json"
	"fmt"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

// ResourceName is the name of the only resource.
const ResourceName = "nodes"

// Snapshot makes what all nodes are served, under xds.NodeKey.
func Snapshot(plan mirror.Plan) (*xds.Snapshot, error) {
	set := &nodev1.NodePolicySet{Revision: plan.Revision}
	for _, p := range plan.Nodes {
		message, err := nodePolicy(p)
		if err != nil {
			return nil, fmt.Errorf("node policies: %s: %w", p.ID, err)
		}
		set.Policies = append(set.Policies, message)
	}
	for _, g := range plan.Gateways {
		if g.Settings.Transport != policy.TransportExtProc {
			continue
		}
		raw, err := json.Marshal(g.Settings)
		if err != nil {
			return nil, fmt.Errorf("node policies: settings of gateway %s: %w", g.Gateway.ID(), err)
		}
		set.Gateways = append(set.Gateways, &nodev1.GatewaySettings{Gateway: g.Gateway.ID(), Revision: g.Settings.Revision(), Settings: raw})
	}
	s, err := xds.NewSnapshot(map[string][]xds.Message{
		xds.NodePolicyType: {{Name: ResourceName, Message: set}},
	})
	if err != nil {
		return nil, fmt.Errorf("node policies: %w", err)
	}
	return s, nil
}

func nodePolicy(p mirror.NodePolicy) (*nodev1.NodePolicy, error) {
	out := &nodev1.NodePolicy{Id: p.ID, Revision: p.Revision, Tenant: p.Tenant, Application: p.Application, Paranoia: uint32(p.Paranoia)}
	switch p.Mode { // package policy's words
	case "Off":
		out.Mode = nodev1.Mode_MODE_OFF
	case "Monitor":
		out.Mode = nodev1.Mode_MODE_MONITOR
	case "Enforce":
		out.Mode = nodev1.Mode_MODE_ENFORCE
	default:
		return nil, fmt.Errorf("unknown mode %q", p.Mode)
	}
	for _, e := range p.Exclusions {
		out.Exclusions = append(out.Exclusions, &nodev1.Exclusion{RuleId: int32(e.RuleID), Target: e.Target})
	}
	return out, nil
}

// Identity is how the node of this name introduces itself: with the id
// "node~name" and the role that xds.SelectByRole goes by.
func Identity(name string) *core.Node {
	return &core.Node{
		Id:      "node~" + name,
		Cluster: "node",
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"role": structpb.NewStringValue(xds.RoleNode),
		}},
	}
}
