package gateway

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
)

var update = flag.Bool("update", false, "write the golden files anew")

var testGateway = mirror.Gateway{Namespace: "default", Name: "gateway"}

// testPlan has few settings: what they encode to is package mirror's to test.
func testPlan(endpoints ...mirror.Endpoint) mirror.GatewayPlan {
	return mirror.GatewayPlan{Gateway: testGateway, Endpoints: endpoints, Settings: mirror.Settings{Mode: policy.ModeMonitor, SharePPM: mirror.Everything}}
}

// idlePlan is of a gateway that copies nothing.
func idlePlan() mirror.GatewayPlan {
	p := testPlan(mirror.Endpoint{Host: "127.0.0.1", Port: 5050})
	p.Settings.SharePPM = 0
	return p
}

// streamingPlan is of a gateway by ext_proc.
func streamingPlan(share int) mirror.GatewayPlan {
	p := testPlan(mirror.Endpoint{Host: "127.0.0.1", Port: 5050})
	p.Settings = mirror.Settings{Gateway: "default/100%", Transport: policy.TransportExtProc, Mode: policy.ModeMonitor, SharePPM: share, Mask: policy.Mask{Headers: []string{"cookie"}},
		Next: []mirror.Settings{{Mode: policy.ModeOff, SharePPM: mirror.Everything, Mask: policy.Mask{Headers: []string{"authorization", "cookie"}}}}}
	return p
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	file = filepath.Join("testdata", file)
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (go test -update writes it)", err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", file, d)
	}
}

// render writes a snapshot as JSON, but for the settings, which package mirror
// answers for.
func render(t *testing.T, s *xds.Snapshot) []byte {
	t.Helper()
	doc := map[string][]json.RawMessage{}
	for _, typeURL := range s.Types() {
		for _, r := range s.Resources(typeURL) {
			if r.Name == SettingsFilter {
				continue
			}
			raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(r.Any)
			if err != nil {
				t.Fatal(err)
			}
			doc[typeURL] = append(doc[typeURL], raw)
		}
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		t.Fatal(err)
	}
	out.WriteByte('\n')
	return out.Bytes()
}

func TestSnapshotGoldens(t *testing.T) {
	base := Config{HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.1:3000", Plugin: "function envoy_on_request(h) end\n"}
	both := base
	both.HTTPS, both.CertFile, both.KeyFile = "[::1]:8443", "/etc/periscope/tls.crt", "/etc/periscope/tls.key"
	with := func(c Config, upstream, ca string) Config {
		c.Upstream, c.UpstreamCAFile = upstream, ca
		return c
	}
	beside := func(p mirror.GatewayPlan, machines ...string) mirror.GatewayPlan {
		p.Gateway.Machines = machines
		p.Endpoints = []mirror.Endpoint{{Host: "192.0.2.1", Port: 5050}, {Host: "192.0.2.2", Port: 5050, Machine: "host-a"}, {Host: "192.0.2.3", Port: 5050}}
		return p
	}
	for name, tt := range map[string]struct {
		config Config
		plan   mirror.GatewayPlan
	}{
		"local-nodes":           {base, beside(testPlan(), "host-a")},
		"local-nodes-extproc":   {base, beside(streamingPlan(mirror.Everything), "host-a")},
		"both-listeners":        {both, testPlan(mirror.Endpoint{Host: "127.0.0.1", Port: 5050}, mirror.Endpoint{Host: "2001:db8::1", Port: 5051})},
		"no-nodes":              {base, testPlan()},
		"idle":                  {base, idlePlan()},
		"extproc":               {base, streamingPlan(mirror.Everything)},
		"extproc-share":         {base, streamingPlan(250_000)},
		"upstream-name":         {with(base, "http://api.example.com", ""), testPlan()},
		"upstream-localhost":    {with(base, "http://localhost:3000/", ""), testPlan()},
		"upstream-tls":          {with(base, "https://api.example.com", "/etc/ssl/ca.pem"), testPlan()},
		"upstream-tls-by-ip":    {with(base, "https://[2001:db8::2]:8443", "/etc/ssl/ca.pem"), testPlan()},
		"upstream-tls-unproven": {with(base, "https://api.example.com", ""), testPlan()},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Snapshot(tt.config, tt.plan)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".json", render(t, s))
		})
	}
}

// A gateway whose processes run on several machines, or on one that has no
// node, is served what it would be if nothing were known.
func TestMachinesThatMakeNoDifference(t *testing.T) {
	c := Config{HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.1:3000", Plugin: "function envoy_on_request(h) end\n"}
	plan := func(nodeMachine string, machines ...string) mirror.GatewayPlan {
		p := testPlan(mirror.Endpoint{Host: "192.0.2.1", Port: 5050}, mirror.Endpoint{Host: "192.0.2.2", Port: 5050, Machine: nodeMachine})
		p.Gateway.Machines = machines
		return p
	}
	text := func(p mirror.GatewayPlan) string {
		t.Helper()
		s, err := Snapshot(c, p)
		if err != nil {
			t.Fatal(err)
		}
		return string(render(t, s))
	}
	want := text(plan(""))
	if diff := cmp.Diff(want, text(plan("host-a", "host-a", "host-b"))); diff != "" {
		t.Error(diff)
	}
	if text(plan("host-a", "host-a")) == want {
		t.Error("a node of the gateway's machine is not preferred")
	}
}

func TestBootstrapGolden(t *testing.T) {
	b, err := Bootstrap(BootstrapConfig{Gateway: testGateway, XDS: "127.0.0.1:15051", Admin: "localhost:9901"})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "bootstrap.json", b)
	for _, c := range []BootstrapConfig{{XDS: "control:1", Admin: "127.0.0.1:1"}, {XDS: "127.0.0.1:1", Admin: "127.0.0.1"}, {XDS: "127.0.0.1:1", Admin: "127.0.0.1:0"}} {
		if _, err := Bootstrap(c); err == nil {
			t.Errorf("no error for %+v", c)
		}
	}
}

func TestControlTLSGolden(t *testing.T) {
	c := BootstrapConfig{Gateway: testGateway, XDS: "192.0.2.7:15051", Admin: "localhost:9901", TLS: &ControlTLS{
		CAFile: "/etc/certs/ca.crt", CertFile: "/etc/certs/tls.crt", KeyFile: "/etc/certs/tls.key", ServerName: "control.example", SecretsDir: "/etc/envoy"}}
	check := func(prefix string, files int) {
		t.Helper()
		b, err := Bootstrap(c)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, prefix+".json", b)
		secrets, err := Secrets(c)
		if err != nil || len(secrets) != files {
			t.Fatalf("%d secrets, %v", len(secrets), err)
		}
		for path, content := range secrets {
			golden(t, prefix+"-"+filepath.Base(path), content)
			if !bytes.Contains(b, []byte(path)) {
				t.Errorf("the bootstrap has no %s", path)
			}
		}
	}
	check("bootstrap-tls", 2)
	// By address, and without a certificate.
	c.TLS.ServerName, c.TLS.CertFile, c.TLS.KeyFile = "", "", ""
	check("bootstrap-tls-by-ip", 1)
	c.TLS = nil
	if secrets, err := Secrets(c); err != nil || secrets != nil {
		t.Errorf("plain text: %v, %v", secrets, err)
	}
}

// TestSettingsAlone: a change of settings changes one resource, whatever they
// encode to, and nodes change the endpoints alone.
func TestSettingsAlone(t *testing.T) {
	c := Config{HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.1:3000", Plugin: "--"}
	versions := func(p mirror.GatewayPlan) map[string]string {
		s, err := Snapshot(c, p)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, typeURL := range s.Types() {
			for _, r := range s.Resources(typeURL) {
				out[typeURL[strings.LastIndex(typeURL, ".")+1:]+"/"+r.Name] = r.Version
			}
		}
		return out
	}
	differ := func(a, b map[string]string) (names []string) {
		for name, v := range a {
			if b[name] != v {
				names = append(names, name)
			}
		}
		return names
	}
	plan := testPlan()
	before := versions(plan)
	plan.Settings.SharePPM = 250_000
	if d := cmp.Diff([]string{"TypedExtensionConfig/" + SettingsFilter}, differ(before, versions(plan))); d != "" {
		t.Error(d)
	}
	nodes := testPlan(mirror.Endpoint{Host: "127.0.0.1", Port: 5050})
	if d := cmp.Diff([]string{"ClusterLoadAssignment/" + MirrorCluster}, differ(before, versions(nodes))); d != "" {
		t.Error(d)
	}
	s, err := Snapshot(c, plan)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := protojson.Marshal(s.Resources(resource.ExtensionConfigType)[1].Any)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(raw), digest(plan.Settings.Encode())) {
		t.Errorf("the settings resource lacks their digest: %s", raw)
	}
}

func TestFaults(t *testing.T) {
	fit := func(change func(*Config)) Config {
		c := Config{HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.1:3000"}
		change(&c)
		return c
	}
	for want, c := range map[string]Config{
		"no listener":                   fit(func(c *Config) { c.HTTP = "" }),
		"write it as host:port":         fit(func(c *Config) { c.HTTP = "8080" }),
		"an IP address or localhost":    fit(func(c *Config) { c.HTTP = "example.com:80" }),
		"port isn't in 1 to 65535":      fit(func(c *Config) { c.HTTP = "127.0.0.1:0" }),
		"a certificate file and a key":  fit(func(c *Config) { c.HTTPS = "127.0.0.1:8443" }),
		"neither http nor https":        fit(func(c *Config) { c.Upstream = "ftp://x" }),
		"it has no host":                fit(func(c *Config) { c.Upstream = "http://:80" }),
		"credentials":                   fit(func(c *Config) { c.Upstream = "http://u:secret@x" }),
		"a path, a query or a fragment": fit(func(c *Config) { c.Upstream = "http://x/api" }),
		"the port isn't in":             fit(func(c *Config) { c.Upstream = "http://x:70000" }),
		"a zone":                        fit(func(c *Config) { c.Upstream = "http://[fe80::1%25eth0]" }),
		"upstream: parse":               fit(func(c *Config) { c.Upstream = "http://x\x7f" }),
	} {
		t.Run(want, func(t *testing.T) {
			_, err := Snapshot(c, testPlan())
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error is %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Error("the error tells a password")
			}
		})
	}
	if _, err := Snapshot(fit(func(*Config) {}), testPlan(mirror.Endpoint{Host: "127.0.0.1"})); err == nil {
		t.Error("no error for an endpoint without a port")
	}
	// All faults at once.
	err := Config{HTTP: "x", HTTPS: "y", Upstream: "z"}.Validate()
	for _, want := range []string{"HTTP listener", "HTTPS listener: address", "certificate", "upstream"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q isn't among the faults: %v", want, err)
		}
	}
}

func FuzzParseUpstream(f *testing.F) {
	for _, s := range []string{"http://localhost:3000", "https://[::1]:8443/", "https://a.example", "http://", "x", "http://%zz"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		up, err := parseUpstream(raw)
		if err == nil && (up.host == "" || up.port == 0 || up.port > 65535) {
			t.Errorf("%q: %+v", raw, up)
		}
	})
}

func BenchmarkSnapshot(b *testing.B) {
	c := Config{HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.1:3000", Plugin: strings.Repeat("-- a line of the plugin\n", 800)}
	for name, m := range map[string]*Maker{"alone": nil, "of many": {}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				maker := m
				if m == nil {
					maker = new(Maker)
				}
				if _, err := maker.Snapshot(c, testPlan(mirror.Endpoint{Host: "127.0.0.1", Port: 5050})); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A Maker's snapshots are those that are made apart, and share what is alike.
func TestMaker(t *testing.T) {
	c := Config{HTTP: "127.0.0.1:8080", Upstream: "http://192.0.2.1:3000", Plugin: "-- plugin"}
	other := c
	other.Plugin = "-- another build"
	faulty := c
	faulty.Upstream = "ftp://192.0.2.1"
	one, two := mirror.Endpoint{Host: "192.0.2.2", Port: 5050}, mirror.Endpoint{Host: "192.0.2.3", Port: 5050}
	var m Maker
	content := map[*anypb.Any]bool{}
	for _, step := range []struct {
		config Config
		nodes  []mirror.Endpoint
		added  int // resources that no snapshot before had
	}{
		{c, []mirror.Endpoint{one}, 8}, // a listener, routes, two clusters and their endpoints, plugin, settings
		{c, []mirror.Endpoint{one}, 1}, // settings
		{c, []mirror.Endpoint{one, two}, 2},
		{c, nil, 2}, // nobody has had these nodes
		{other, []mirror.Endpoint{one}, 8},
		{c, []mirror.Endpoint{two}, 2},
	} {
		p := testPlan(step.nodes...)
		got, err := m.Snapshot(step.config, p)
		if err != nil {
			t.Fatal(err)
		}
		want, err := Snapshot(step.config, p)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(render(t, want)), string(render(t, got))); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
		added := 0
		for _, typeURL := range got.Types() {
			if got.Version(typeURL) != want.Version(typeURL) {
				t.Errorf("%s: version %s, want %s", typeURL, got.Version(typeURL), want.Version(typeURL))
			}
			for _, r := range got.Resources(typeURL) {
				if !content[r.Any] {
					content[r.Any] = true
					added++
				}
			}
		}
		if added != step.added {
			t.Errorf("%v: %d resources are new, want %d", step.nodes, added, step.added)
		}
	}
	if _, err := m.Snapshot(faulty, testPlan()); err == nil {
		t.Error("a faulty configuration has a snapshot")
	}
	for i := range 3 * maxBases {
		if _, err := m.Snapshot(c, testPlan(mirror.Endpoint{Host: "192.0.2.2", Port: 1 + i})); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(m.bases); n > maxBases {
		t.Errorf("%d bases are kept", n)
	}
}

// What package xds/mcp builds its own resources from.
func TestParts(t *testing.T) {
	for name, tc := range map[string]struct {
		nodes []mirror.Endpoint
		kind  cluster.Cluster_DiscoveryType
		fault string
	}{
		"none":      {nil, cluster.Cluster_STATIC, ""},
		"addresses": {[]mirror.Endpoint{{Host: "10.0.0.1", Port: 1}, {Host: "fd00::1", Port: 2}}, cluster.Cluster_STATIC, ""},
		"a name":    {[]mirror.Endpoint{{Host: "10.0.0.1", Port: 1}, {Host: "node.example", Port: 2}}, cluster.Cluster_STRICT_DNS, ""},
		"no host":   {[]mirror.Endpoint{{Port: 1}}, 0, "can't be used"},
	} {
		c, err := FixedMirrorCluster(tc.nodes, policy.TransportLua)
		if tc.fault != "" {
			if err == nil || !strings.Contains(err.Error(), tc.fault) {
				t.Errorf("%s: error is %v", name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		n := 0
		for _, l := range c.GetLoadAssignment().GetEndpoints() {
			n += len(l.GetLbEndpoints())
		}
		if c.GetName() != MirrorCluster || c.GetType() != tc.kind || n != len(tc.nodes) || c.GetEdsClusterConfig() != nil {
			t.Errorf("%s: %v", name, c)
		}
	}
	for wait, opensAtOnce := range map[time.Duration]bool{time.Second: false, 0: true} {
		filters, err := Filters(wait)
		if err != nil || len(filters) != 2 || filters[0].GetName() != SettingsFilter || filters[1].GetName() != PluginFilter {
			t.Errorf("filters %v, error %v", filters, err)
		}
		for _, f := range filters {
			if d := f.GetConfigDiscovery(); d.GetApplyDefaultConfigWithoutWarming() != opensAtOnce || d.GetConfigSource().GetInitialFetchTimeout().AsDuration() != wait {
				t.Errorf("waiting for %v: %v", wait, d)
			}
		}
	}
}
