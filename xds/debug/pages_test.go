package debug

import (
	"encoding/json"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlspb "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/xds"
)

func packed(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// tlsListener has a private key, by file and inline, deep in it.
func tlsListener(t testing.TB) *anypb.Any {
	return packed(t, &listener.Listener{Name: "https", FilterChains: []*listener.FilterChain{{TransportSocket: &core.TransportSocket{
		Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: packed(t, &tlspb.DownstreamTlsContext{CommonTlsContext: &tlspb.CommonTlsContext{
			TlsCertificates: []*tlspb.TlsCertificate{{
				CertificateChain: &core.DataSource{Specifier: &core.DataSource_Filename{Filename: "/gateway.crt"}},
				PrivateKey:       &core.DataSource{Specifier: &core.DataSource_Filename{Filename: "/gateway.key"}},
				Password:         &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: []byte("hunter2")}},
			}}}})}}}}})
}

const gatewayID = "gateway~shop/public-7"

// meshFixture has a gateway, a node and a client that gets no answer.
func meshFixture(t *testing.T) *Pages {
	plugin := func(version string) xds.Resource {
		return xds.Resource{Name: "plugin", Version: version, Any: packed(t, &core.TypedExtensionConfig{Name: "plugin", TypedConfig: packed(t, wrapperspb.String(version))})}
	}
	list := tlsListener(t)
	settings := xds.Resource{Name: "settings", Version: "s1"}
	policies := func(revision string) xds.Resource {
		return xds.Resource{Name: "nodes", Version: revision, Any: packed(t, wrapperspb.String(revision))}
	}
	deliveries := map[string]map[string][]xds.Delivery{
		gatewayID: {
			resource.ListenerType: {{Sent: xds.Resource{Name: "https", Version: "l1", Any: list}, Acked: xds.Resource{Name: "https", Version: "l1", Any: list}}},
			resource.EndpointType: {{Sent: xds.Resource{Name: "e", Version: "e1", Any: packed(t, wrapperspb.String("e"))}}},
			resource.ClusterType:  {{Sent: xds.Resource{Name: "forgotten", Version: "c1"}}},
			resource.RouteType:    {{Sent: xds.Resource{Name: "r", Version: "r1", Any: &anypb.Any{TypeUrl: "type.googleapis.com/from.the.future", Value: []byte{8, 1}}}}},
			resource.ExtensionConfigType: {
				{Sent: plugin("2"), Acked: plugin("1")},
				{Sent: settings, Acked: settings},
			},
		},
		"node~a-8": {xds.NodePolicyType: {{Sent: policies("r2"), Acked: policies("r1")}}},
	}
	return fixture(t, func(c *Config) {
		c.Connections = func() []xds.Connection {
			return []xds.Connection{
				{ID: gatewayID, Node: "gateway~shop/public", Key: "gateway/shop/public", Cluster: "shop/public", Version: "1.40.0", Address: "127.0.0.1:1", ConnectedAt: at, Types: map[string]xds.TypeState{
					resource.ListenerType: {Sent: "l1", Acked: "l1", SentAt: at},
					resource.ClusterType:  {},
					resource.RouteType:    {Sent: "r1", SentAt: at, Watched: []string{"r"}},
					resource.ExtensionConfigType: {Sent: "x2", Acked: "x1", SentAt: at, LastError: "no Lua", Watched: []string{"plugin", "settings"},
						Rejected: []xds.Rejection{{Name: "plugin", Version: "2", Reason: "no Lua", At: at}}},
				}},
				{ID: "node~a-8", Node: "node~a", Key: xds.NodeKey, Address: "127.0.0.1:2", ConnectedAt: at, Types: map[string]xds.TypeState{xds.NodePolicyType: {Sent: "n2", Acked: "n1", SentAt: at}}},
				{ID: "x-9", Node: "x", Held: "no role", Address: "127.0.0.1:3", ConnectedAt: at, Types: map[string]xds.TypeState{}},
			}
		}
		c.Deliveries = func(id string) map[string][]xds.Delivery { return deliveries[id] }
		c.Rollout = func() any { return map[string]string{"phase": "complete"} }
		c.Plugin = func(r xds.Resource) (Plugin, bool) { return Plugin{r.Version, "d" + r.Version}, r.Name == "plugin" }
		c.Shares = func() []Share {
			return []Share{
				{Gateway: "shop/public", Policy: "shop/p", Percent: 12.5, Ceiling: 20, Carrier: "settings filter", Resource: "settings"},
				{Gateway: "shop/private", Percent: 100, Ceiling: 100, Carrier: "istiod"},
			}
		}
		c.NodeRevision = func(r xds.Resource) string { return r.Version }
		c.Snapshots = func() map[string]*xds.Snapshot {
			s, err := xds.NewSnapshot(map[string][]xds.Message{
				resource.ListenerType:                      {{Name: "a", Message: wrapperspb.String("a")}, {Name: "b", Message: wrapperspb.String("b")}},
				"networking.istio.io/v1alpha3/EnvoyFilter": {}, "odd": {},
			})
			if err != nil {
				t.Fatal(err)
			}
			return map[string]*xds.Snapshot{"k2": s, "k1": s}
		}
		c.Mesh = func() any { return "mesh" }
		c.Ledger = func() any { return "ledger" }
		c.Pressure = func() any { return "pressure" }
		c.Load = func() any { return "load" }
		c.Instance = Instance{ID: "control-0", Build: BuildInfo{Version: "0.2.0"}}
	})
}

func TestMeshPages(t *testing.T) {
	h := meshFixture(t)
	for target, want := range map[string]string{
		"list":        `["adsz","config_dump","configz","connections","ecdsz","edsz","ledgerz","loadz","mesh","nodez","planz","pluginz","policyz","pressurez","push_status","resourcesz","sharez","syncz"]`,
		"pluginz":     `{"rollout":{"phase":"complete"},"proxies":[{"proxy":"public.shop","connectionId":"gateway~shop/public-7","state":"ERROR","lastError":"no Lua","gateway":"shop/public","sent":{"version":"2","digest":"d2"},"running":{"version":"1","digest":"d1"}}]}`,
		"sharez":      `[{"gateway":"shop/public","policy":"shop/p","percent":12.5,"ceiling":20,"carrier":"settings filter","resource":"settings","proxies":[{"proxy":"public.shop","connectionId":"gateway~shop/public-7","state":"SYNCED"}]},{"gateway":"shop/private","percent":100,"ceiling":100,"carrier":"istiod","proxies":[]}]`,
		"nodez":       `[{"node":"a","connectionId":"node~a-8","address":"127.0.0.1:2","connectedAt":"2026-01-02T03:04:05Z","state":"STALE","sent":"r2","acked":"r1"}]`,
		"push_status": `{"periscope_xds_nacks_total":{"gateway~shop/public-7 type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig plugin":{"proxy":"public.shop","message":"no Lua"}},"periscope_xds_refused_total":{"x-9":{"proxy":"x","message":"no role"}}}`,
		"mesh":        `"mesh"`,
		"ledgerz":     `"ledger"`,
		"pressurez":   `"pressure"`,
		"loadz":       `"load"`,
		"adsz?proxyID=public.shop": `{"totalClients":1,"clients":[{"connectionId":"gateway~shop/public-7","connectedAt":"2026-01-02T03:04:05Z","address":"127.0.0.1:1","metadata":{"CLUSTER_ID":"shop/public","ISTIO_VERSION":"1.40.0","NAMESPACE":"shop"},"watches":{` +
			`"type.googleapis.com/envoy.config.cluster.v3.Cluster":[],"type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig":["plugin","settings"],` +
			`"type.googleapis.com/envoy.config.listener.v3.Listener":[],"type.googleapis.com/envoy.config.route.v3.RouteConfiguration":["r"]}}]}`,
		"edsz?proxyID=gateway~shop":                `{"configs":[{"@type":"type.googleapis.com/google.protobuf.StringValue","value":"e"}]}`,
		"config_dump?proxyID=public&types=EDS,eds": `{"configs":[{"@type":"type.googleapis.com/google.protobuf.StringValue","value":"e"}]}`,
		"config_dump?proxyID=public&types=cds":     `{}`,
	} {
		t.Run(target, func(t *testing.T) {
			w := get(h, "/debug/"+target)
			if d := cmp.Diff(want, strings.TrimSpace(w.Body.String())); w.Code != 200 || d != "" {
				t.Errorf("status %d: %s", w.Code, d)
			}
		})
	}
}

func TestResourcesPage(t *testing.T) {
	var got []servedType
	if err := json.Unmarshal(get(meshFixture(t), "/debug/resourcesz").Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, s := range got {
		if s.Content == "" {
			t.Errorf("no version: %+v", s)
		}
		lines = append(lines, strings.Join([]string{s.Key, s.Group, s.Version, s.Kind, strings.Repeat("*", s.Count)}, " "))
	}
	want := []string{
		"k1 networking.istio.io v1alpha3 EnvoyFilter ", "k1   odd ", "k1 envoy.config.listener v3 Listener **",
		"k2 networking.istio.io v1alpha3 EnvoyFilter ", "k2   odd ", "k2 envoy.config.listener v3 Listener **",
	}
	if d := cmp.Diff(want, lines); d != "" {
		t.Error(d)
	}
}

func TestProxyFaults(t *testing.T) {
	h := meshFixture(t)
	for _, tt := range []struct {
		target, body string
		status       int
	}{
		{"config_dump", "You must provide a proxyID in the query string\n", 400},
		{"ecdsz", "You must provide a proxyID in the query string\n", 400},
		{"edsz?proxyID=", "You must provide a proxyID in the query string\n", 400},
		{"config_dump?proxyID=nobody", unknownProxy + "\n", 404},
		{"edsz?proxyID=x-9", unknownProxy + "\n", 404}, // held: nothing was sent
		{"adsz?proxyID=nobody", unknownProxy + "\n", 404},
		{"config_dump?proxyID=public&types=sds", "types: known are cds, lds, rds, eds and ecds\n", 400},
	} {
		if w := get(h, "/debug/"+tt.target); w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("%s: %d %q", tt.target, w.Code, w.Body)
		}
	}
}

func TestConfigDump(t *testing.T) {
	h := meshFixture(t)
	for _, target := range []string{"/debug/config_dump?proxyID=public", "/debug/config_dump?proxyID=public&include_eds"} {
		w := get(h, target)
		var got struct {
			Configs []map[string]any `json:"configs"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != 200 {
			t.Fatalf("%d %v: %s", w.Code, err, w.Body)
		}
		var types []string
		for _, c := range got.Configs {
			types = append(types, strings.TrimPrefix(c["@type"].(string), "type.googleapis.com/envoy.admin.v3."))
		}
		want := []string{"BootstrapConfigDump", "ClustersConfigDump", "ListenersConfigDump", "ScopedRoutesConfigDump", "RoutesConfigDump", "SecretsConfigDump", "EcdsConfigDump"}
		if strings.Contains(target, "include_eds") {
			want = append(want[:2:2], append([]string{"EndpointsConfigDump"}, want[2:]...)...)
		}
		if d := cmp.Diff(want, types); d != "" {
			t.Error(d)
		}
		body := w.Body.String()
		for _, part := range []string{`"dynamic_listeners":[{"name":"https","active_state":{"version_info":"l1","listener":{"@type":"type.googleapis.com/envoy.config.listener.v3.Listener"`,
			"/gateway.crt", `"private_key":{"filename":"[redacted]"}`, `"ecds_filters":[{"version_info":"2"`, "from.the.future"} {
			if !strings.Contains(body, part) {
				t.Errorf("lacks %s: %s", part, body)
			}
		}
		for _, secret := range []string{"gateway.key", "hunter2", "aHVudGVyMg"} {
			if strings.Contains(body, secret) {
				t.Errorf("shows %s: %s", secret, body)
			}
		}
	}
}

func TestRedactLeavesTheResource(t *testing.T) {
	a := tlsListener(t)
	before := proto.Clone(a)
	out, err := redact(a)
	if err != nil || proto.Equal(out, a) {
		t.Errorf("not redacted: %v", err)
	}
	if !proto.Equal(before, a) {
		t.Error("the resource itself was changed")
	}
	for _, same := range []*anypb.Any{packed(t, wrapperspb.String("x")), {TypeUrl: "unknown", Value: []byte("x")}, {}} {
		if out, err := redact(same); err != nil || out != same {
			t.Errorf("%v became %v: %v", same, out, err)
		}
	}
}

func FuzzRedact(f *testing.F) {
	f.Add(tlsListener(f).GetTypeUrl(), tlsListener(f).GetValue())
	f.Add("type.googleapis.com/google.protobuf.Struct", []byte{10, 0})
	f.Fuzz(func(t *testing.T, typeURL string, value []byte) {
		out, err := redact(&anypb.Any{TypeUrl: typeURL, Value: value})
		if err != nil {
			return
		}
		again, err := redact(out)
		if err != nil || again.GetTypeUrl() != out.GetTypeUrl() {
			t.Errorf("redacted again: %v", err)
		}
	})
}

func TestProxyName(t *testing.T) {
	for _, tt := range []struct{ node, key, want string }{
		{"gateway~a/b", "gateway/a/b", "b.a"},
		{"gateway~a/b", "gateway/x/y", "gateway~a/b"},
		{"router~10.0.0.1~pod-1.ns~ns.svc.cluster.local", "gateway/a/b", "pod-1.ns"},
		{"pod-1", "gateway/a/b", "pod-1"},
		{"", "", ""},
	} {
		if got := proxyName(xds.Connection{Node: tt.node, Key: tt.key}); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
}
