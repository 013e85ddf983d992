package mcp

import (
	"slices"
	"testing"

	envoytype "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

// The items are what the snapshot holds, with its versions.
func TestItems(t *testing.T) {
	g := mirror.Gateway{Namespace: "ingress", Name: "public", Selector: map[string]string{"istio": "public"}}
	plan := mirror.Compile([]policy.MirrorPolicy{{Kind: policy.Kind, Metadata: policy.Metadata{Namespace: "ingress", Name: "p"}, Spec: policy.Default().Spec}},
		mirror.Topology{Gateways: []mirror.Gateway{g}, Nodes: []mirror.NodeService{{StandIn: true, Endpoints: []mirror.Endpoint{{Host: "10.0.0.9", Port: 5050}}}}})
	config := Config{Plugin: Plugin{Source: "-- plugin"}}
	supply, err := new(Maker).Make(config, plan)
	if err != nil {
		t.Fatal(err)
	}
	items := supply.Items["ingress/public"]
	if len(items) != 2 || len(supply.Items) != 1 {
		t.Fatalf("items %+v", supply.Items)
	}
	served := map[string]string{}
	for _, r := range supply.Snapshot.Resources("networking.istio.io/v1alpha3/EnvoyFilter") {
		m := new(mcpv1alpha1.Resource)
		if err := r.Any.UnmarshalTo(m); err != nil {
			t.Fatal(err)
		}
		served[m.GetMetadata().GetName()] = m.GetMetadata().GetVersion()
	}
	for _, i := range items {
		if v := served[i.Namespace+"/"+i.Name]; v == "" || v != i.Version {
			t.Errorf("%+v, served in version %q", i, v)
		}
		settings := i.Name == "periscope-public-settings"
		if settings && !slices.Equal(i.Types, []string{envoytype.ExtensionConfigType}) || !settings && len(i.Types) != 3 {
			t.Errorf("%s changes %v", i.Name, i.Types)
		}
	}
}
