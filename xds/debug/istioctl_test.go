package debug

import (
	"encoding/json"
	"strings"
	"testing"

	admin "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	csds "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/periscope-mesh/periscope/xds"
)

func raw(t *testing.T, p *Pages, name string) string {
	t.Helper()
	res, err := p.Debug(t.Context(), xds.DebugType, []string{name})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.GetResources()) != 1 || res.GetResources()[0].GetTypeUrl() != "istio.io/debug" {
		t.Fatalf("%s: %v", name, res)
	}
	return string(res.GetResources()[0].GetValue())
}

// TestSamePages: istioctl gets what HTTP gives, byte for byte.
func TestSamePages(t *testing.T) {
	p := meshFixture(t)
	for _, name := range append(p.names(), "list", "syncz?pretty", "config_dump?proxyID=public.shop", "config_dump?proxyID=nobody", "edsz", "nosuch") {
		if d := cmp.Diff(strings.TrimRight(get(p, "/debug/"+name).Body.String(), "\n"), raw(t, p, name)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

// TestNoPage: istioctl shows the list for anything with these words; nothing
// outside the debug pages can be reached.
func TestNoPage(t *testing.T) {
	p := meshFixture(t)
	for _, name := range []string{"", "/", "../metrics", "..", "list/", "a/b", "%2e%2e/metrics", "http://x/list", "//x/list", ":", "list#x", "?proxyID=x", "\x00", strings.Repeat("x", 1<<10)} {
		if got := raw(t, p, name); !strings.Contains(got, "404 page not found") {
			t.Errorf("%q: %s", name, got)
		}
	}
}

func TestDebugFaults(t *testing.T) {
	p := meshFixture(t)
	for _, tt := range []struct {
		typeURL string
		names   []string
	}{{xds.DebugType, nil}, {xds.DebugType, []string{"a", "b"}}, {"istio.io/debug/other", nil}} {
		if _, err := p.Debug(t.Context(), tt.typeURL, tt.names); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%+v: %v", tt, err)
		}
	}
}

func TestClientConfigs(t *testing.T) {
	p := meshFixture(t)
	res, err := p.Debug(t.Context(), xds.DebugSyncType, nil)
	if err != nil {
		t.Fatal(err)
	}
	var id struct {
		Component, ID string
		Info          map[string]string
	}
	if err := json.Unmarshal([]byte(res.GetControlPlane().GetIdentifier()), &id); err != nil || id.Component != "periscope" || id.ID != "control-0" || id.Info["version"] != "0.2.0" {
		t.Errorf("%+v, %v", id, err)
	}
	if len(res.GetResources()) != 1 { // the gateway: neither the node nor a client that is held
		t.Fatalf("%d clients", len(res.GetResources()))
	}
	config := &csds.ClientConfig{}
	if err := res.GetResources()[0].UnmarshalTo(config); err != nil {
		t.Fatal(err)
	}
	if config.GetNode().GetId() != "public.shop" {
		t.Errorf("node %v", config.GetNode())
	}
	want := map[string]string{"CLUSTER_ID": "shop/public", "NAMESPACE": "shop", "ISTIO_VERSION": "1.40.0"}
	got := map[string]string{}
	for key, value := range config.GetNode().GetMetadata().GetFields() {
		got[key] = value.GetStringValue()
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	states := map[string]string{}
	for _, g := range config.GetGenericXdsConfigs() {
		states[g.GetTypeUrl()[strings.LastIndex(g.GetTypeUrl(), ".")+1:]] = g.GetConfigStatus().String() + " " + g.GetErrorState().GetDetails()
	}
	if d := cmp.Diff(map[string]string{"Listener": "SYNCED ", "Cluster": "NOT_SENT ", "RouteConfiguration": "STALE ", "TypedExtensionConfig": "ERROR no Lua"}, states); d != "" {
		t.Error(d)
	}
}

func TestNamedDump(t *testing.T) {
	p := meshFixture(t)
	res, err := p.Debug(t.Context(), xds.DebugConfigDumpType, []string{"public.shop"})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.GetResources()) != 7 {
		t.Fatalf("%d parts", len(res.GetResources()))
	}
	listeners := &admin.ListenersConfigDump{}
	if err := res.GetResources()[2].UnmarshalTo(listeners); err != nil || len(listeners.GetDynamicListeners()) != 1 {
		t.Errorf("%v: %v", listeners, err)
	}
	for _, names := range [][]string{nil, {""}, {"nobody"}, {"a", "b"}} {
		if res, err := p.Debug(t.Context(), xds.DebugConfigDumpType, names); err != nil || len(res.GetResources()) != 0 || res.GetControlPlane() == nil {
			t.Errorf("%q: %v, %v", names, res, err)
		}
	}
}

// TestWithoutFunctions: pages that lack what they show are not there.
func TestWithoutFunctions(t *testing.T) {
	p := fixture(t, func(c *Config) { c.Connections = nil })
	if got := raw(t, p, "list"); got != `["configz","planz","policyz"]` {
		t.Errorf("list: %s", got)
	}
	for _, typeURL := range []string{xds.DebugSyncType, xds.DebugConfigDumpType} {
		if res, err := p.Debug(t.Context(), typeURL, []string{"x"}); err != nil || len(res.GetResources()) != 0 {
			t.Errorf("%s: %v, %v", typeURL, res, err)
		}
	}
}
