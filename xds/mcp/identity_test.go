package mcp_test

import (
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/periscope-mesh/periscope/xds/mcp"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

func node(t testing.TB, id string, metadata map[string]any) *core.Node {
	t.Helper()
	m, err := structpb.NewStruct(metadata)
	if err != nil {
		t.Fatal(err)
	}
	return &core.Node{Id: id, Metadata: m}
}

func TestSelect(t *testing.T) {
	istiod := "sidecar~10.0.0.1~istiod-0.istio-system~istio-system.svc.cluster.local"
	for name, tc := range map[string]struct {
		node *core.Node
		key  string
	}{
		"istiod":               {node(t, istiod, map[string]any{"GENERATOR": "api", "ISTIO_VERSION": "65536.65536.65536"}), "istiod/default"},
		"istiod of a revision": {node(t, istiod, map[string]any{"GENERATOR": "api", "ISTIO_REVISION": "canary"}), "istiod/canary"},
		"istioctl":             {node(t, "sidecar~10.0.0.1~test-1.default~default.svc.cluster.local", map[string]any{"GENERATOR": "event", "NAMESPACE": "istio-system"}), ""},
		"a gateway of Istio's": {node(t, "router~10.0.0.1~gw-0.gw~gw.svc.cluster.local", map[string]any{"GENERATOR": "", "ISTIO_VERSION": "1.31.0"}), ""},
		"a gateway of ours":    {node(t, "gateway~a/b", map[string]any{"role": "gateway", "gateway": "a/b"}), ""},
		"both":                 {node(t, istiod, map[string]any{"GENERATOR": "api", "role": "gateway", "gateway": "a/b"}), ""},
		"an analysis node":     {xdsnode.Identity("one"), ""},
		"nobody":               {&core.Node{}, ""},
		"nil":                  {nil, ""},
	} {
		if key, ok := mcp.Select(tc.node); key != tc.key || ok != (tc.key != "") {
			t.Errorf("%s: key %q, %v", name, key, ok)
		}
	}
	if mcp.Key("") != mcp.Key("default") || mcp.Key("canary") == mcp.Key("") {
		t.Error("keys of revisions")
	}
}
