package mcp

import (
	"fmt"
	"slices"

	envoytype "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/periscope-mesh/periscope/mirror"
)

// Item is one Istio resource that a gateway is supplied by.
type Item struct {
	Kind, Namespace, Name string
	Version               string   // its metadata's, as istiod shows it
	Types                 []string // type URLs of the xDS resources that it changes at the gateway
}

// Inventory lists what Snapshot serves for each gateway, by its id: for those
// who ask istiod what became of it. Errors are Snapshot's.
func Inventory(c Config, plan mirror.Plan) (map[string][]Item, error) {
	out := map[string][]Item{}
	for _, g := range plan.Gateways {
		list, err := build(c, mirror.Plan{Gateways: []mirror.GatewayPlan{g}})
		if err != nil {
			return nil, err
		}
		for _, r := range list {
			m, err := r.message()
			if err != nil {
				return nil, fmt.Errorf("istio resources: %s %s/%s: %w", r.kind.name, r.namespace, r.name, err)
			}
			id := g.Gateway.ID()
			out[id] = append(out[id], Item{Kind: r.kind.name, Namespace: r.namespace, Name: r.name, Version: m.GetMetadata().GetVersion(), Types: r.types()})
		}
	}
	return out, nil
}

// types are those of the xDS resources that istiod makes of r.
func (r resource) types() []string {
	filter, ok := r.spec.(*networking.EnvoyFilter)
	switch {
	case ok:
	case r.kind.name == "TrafficExtension":
		return []string{envoytype.ListenerType}
	default:
		return []string{envoytype.ClusterType}
	}
	var out []string
	for _, p := range filter.GetConfigPatches() {
		t := map[networking.EnvoyFilter_ApplyTo]string{
			networking.EnvoyFilter_EXTENSION_CONFIG: envoytype.ExtensionConfigType,
			networking.EnvoyFilter_HTTP_FILTER:      envoytype.ListenerType,
			networking.EnvoyFilter_CLUSTER:          envoytype.ClusterType,
		}[p.GetApplyTo()]
		if t != "" && !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	slices.Sort(out)
	return out
}
