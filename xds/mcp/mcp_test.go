package mcp_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	extensions "istio.io/api/extensions/v1alpha1"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	envoyFilterType      = "networking.istio.io/v1alpha3/EnvoyFilter"
	trafficExtensionType = "extensions.istio.io/v1alpha1/TrafficExtension"
)

// config is the configuration with the real plugin.
func config(form mcp.Form) mcp.Config {
	return mcp.Config{Form: form, Plugin: mcp.Plugin{Source: lua.Embedded().Code, Version: lua.Embedded().Name()}}
}

func workload(name string) mirror.Gateway {
	return mirror.Gateway{Namespace: "istio-ingress", Name: name, Labels: map[string]string{"istio": name}, Selector: map[string]string{"istio": name}}
}

// policyFor is a policy of one workload's.
func policyFor(name string, change func(*policy.Spec)) policy.MirrorPolicy {
	p := policy.Default()
	p.Metadata.Namespace, p.Metadata.Name = "istio-ingress", name
	p.Spec.Selector = &policy.Selector{MatchLabels: map[string]string{"istio": name}}
	if change != nil {
		change(&p.Spec)
	}
	return p
}

func nodes(endpoints ...mirror.Endpoint) []mirror.NodeService {
	return []mirror.NodeService{{Endpoints: endpoints, StandIn: true}}
}

var oneNode = nodes(mirror.Endpoint{Host: "10.0.0.9", Port: 5050})

// plan is of one policy a workload.
func plan(names ...string) mirror.Plan {
	var t mirror.Topology
	var policies []policy.MirrorPolicy
	t.Nodes = oneNode
	for _, n := range names {
		t.Gateways = append(t.Gateways, workload(n))
		policies = append(policies, policyFor(n, nil))
	}
	return mirror.Compile(policies, t)
}

func snapshot(t testing.TB, c mcp.Config, p mirror.Plan) *xds.Snapshot {
	t.Helper()
	s, err := mcp.Snapshot(c, p)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// versions gives each resource's own version, as istiod compares it.
func versions(t testing.TB, s *xds.Snapshot) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, typeURL := range s.Types() {
		for _, r := range s.Resources(typeURL) {
			m := &mcpv1alpha1.Resource{}
			if err := r.Any.UnmarshalTo(m); err != nil {
				t.Fatal(err)
			}
			if m.GetMetadata().GetName() != r.Name || m.GetMetadata().GetCreateTime().GetSeconds() <= 0 || m.GetMetadata().GetVersion() == "" {
				t.Errorf("metadata of %s: %v", r.Name, m.GetMetadata())
			}
			for _, list := range []map[string]string{m.GetMetadata().GetLabels(), m.GetMetadata().GetAnnotations()} {
				for k := range list {
					if strings.Contains(k, "istio.io") {
						t.Errorf("%s carries %s: istiod would push each new version of it", r.Name, k)
					}
				}
			}
			out[typeURL+" "+r.Name] = m.GetMetadata().GetVersion()
		}
	}
	return out
}

func TestSnapshotHoldsAllTypes(t *testing.T) {
	for _, p := range []mirror.Plan{{}, plan("public")} {
		s := snapshot(t, config(""), p)
		if len(s.Types()) != 16 {
			t.Errorf("%d types: %v", len(s.Types()), s.Types())
		}
		for _, typeURL := range mcp.Types() {
			if s.Version(typeURL) == "" {
				t.Errorf("%s has no version", typeURL)
			}
		}
	}
}

func TestSnapshotEnvoyFilter(t *testing.T) {
	list := snapshot(t, config(""), plan("public")).Resources(envoyFilterType)
	if len(list) != 2 {
		t.Fatalf("%d resources", len(list))
	}
	for i, want := range []string{"istio-ingress/periscope-public-plugin", "istio-ingress/periscope-public-settings"} {
		if list[i].Name != want || list[i].Any.GetTypeUrl() != "type.googleapis.com/istio.mcp.v1alpha1.Resource" {
			t.Errorf("resource %d is %s, a %s", i, list[i].Name, list[i].Any.GetTypeUrl())
		}
	}
	m, filter := &mcpv1alpha1.Resource{}, &networking.EnvoyFilter{}
	if err := errors.Join(list[0].Any.UnmarshalTo(m), m.GetBody().UnmarshalTo(filter)); err != nil {
		t.Fatal(err)
	}
	var patches []string
	for _, p := range filter.GetConfigPatches() {
		patches = append(patches, fmt.Sprint(p.GetApplyTo(), " ", p.GetPatch().GetOperation(), " ", p.GetPatch().GetValue().GetFields()["name"].GetStringValue()))
	}
	want := []string{
		"HTTP_FILTER INSERT_FIRST periscope.mirror", "HTTP_FILTER INSERT_FIRST periscope.settings", // the later stands first
		"NETWORK_FILTER MERGE envoy.filters.network.http_connection_manager",
		"EXTENSION_CONFIG ADD periscope.mirror", "CLUSTER ADD periscope_mirror",
	}
	if d := cmp.Diff(want, patches); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

// An edit of a policy changes the settings of its own gateways and nothing else;
// so do new nodes and new plugins with what is theirs.
func TestWhatChangesWhat(t *testing.T) {
	topology := func(n []mirror.NodeService) mirror.Topology {
		return mirror.Topology{Gateways: []mirror.Gateway{workload("a"), workload("b")}, Nodes: n}
	}
	compile := func(n []mirror.NodeService, change func(*policy.Spec)) mirror.Plan {
		return mirror.Compile([]policy.MirrorPolicy{policyFor("a", change), policyFor("b", nil)}, topology(n))
	}
	newer := func(c mcp.Config) mcp.Config { c.Plugin.Source += "\n-- new\n"; return c }
	canary := func(c mcp.Config) mcp.Config {
		c.Plugins = map[string]mcp.Plugin{"istio-ingress/a": {Source: "-- new\n"}}
		return c
	}
	edit := func(s *policy.Spec) { s.Sampling.Percent = 7 }
	const ef, te = envoyFilterType + " istio-ingress/periscope-", trafficExtensionType + " istio-ingress/periscope-"
	const se = "networking.istio.io/v1/ServiceEntry istio-ingress/periscope-"
	for name, tc := range map[string]struct {
		form mcp.Form
		plan mirror.Plan
		with func(mcp.Config) mcp.Config
		want []string
	}{
		"policy":               {plan: compile(oneNode, edit), want: []string{ef + "a-settings"}},
		"policy of a node":     {plan: compile(oneNode, func(s *policy.Spec) { s.Detection.Paranoia = 3 }), want: []string{ef + "a-settings"}},
		"nodes":                {plan: compile(nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 1}), nil), want: []string{ef + "a-plugin", ef + "b-plugin"}},
		"release":              {plan: compile(oneNode, nil), with: newer, want: []string{ef + "a-plugin", ef + "b-plugin"}},
		"canary":               {plan: compile(oneNode, nil), with: canary, want: []string{ef + "a-plugin"}},
		"off":                  {plan: compile(oneNode, func(s *policy.Spec) { s.Mode = policy.ModeOff }), want: []string{ef + "a-plugin", ef + "a-settings"}},
		"release, off":         {plan: compile(oneNode, func(s *policy.Spec) { s.Mode = policy.ModeOff }), with: newer, want: []string{ef + "a-plugin", ef + "a-settings", ef + "b-plugin"}},
		"nothing":              {plan: compile(oneNode, nil)},
		"inline policy":        {form: mcp.FormTrafficExtension, plan: compile(oneNode, edit), want: []string{te + "a-plugin"}},
		"nodes beside inline":  {form: mcp.FormTrafficExtension, plan: compile(nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 1}), nil), want: []string{se + "a-nodes", se + "b-nodes"}},
		"nothing beside, both": {form: mcp.FormTrafficExtension, plan: compile(oneNode, nil)},
	} {
		t.Run(name, func(t *testing.T) {
			c := config(tc.form)
			before := snapshot(t, c, compile(oneNode, nil))
			if tc.with != nil {
				c = tc.with(c)
			}
			after := snapshot(t, c, tc.plan)
			changed := map[string]bool{}
			was := versions(t, before)
			for id, v := range versions(t, after) {
				if v != was[id] {
					changed[id] = true
				}
			}
			for _, typeURL := range mcp.Types() {
				old, list := before.Resources(typeURL), after.Resources(typeURL)
				for i := range list {
					if same := proto.Equal(old[i].Any, list[i].Any); same == changed[typeURL+" "+list[i].Name] {
						t.Errorf("%s: identical %v, though its version says otherwise", list[i].Name, same)
					}
				}
			}
			want := map[string]bool{}
			for _, id := range tc.want {
				want[id] = true
			}
			if d := cmp.Diff(want, changed); d != "" {
				t.Errorf("changed, -want +got\n%s", d)
			}
		})
	}
}

// contents are the resources that a snapshot shares with others.
func contents(s *xds.Snapshot) map[string]*anypb.Any {
	out := map[string]*anypb.Any{}
	for _, typeURL := range s.Types() {
		for _, r := range s.Resources(typeURL) {
			out[typeURL+" "+r.Name] = r.Any
		}
	}
	return out
}

// A Maker gives what is made anew gives, and makes only what changed.
func TestMaker(t *testing.T) {
	for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
		var m mcp.Maker
		edited := func(s *policy.Spec) { s.Sampling.Percent = 7 }
		compile := func(change func(*policy.Spec), n []mirror.NodeService, names ...string) mirror.Plan {
			var gateways []mirror.Gateway
			for _, name := range names {
				gateways = append(gateways, workload(name))
			}
			return mirror.Compile([]policy.MirrorPolicy{policyFor("a", change), policyFor("b", nil)}, mirror.Topology{Gateways: gateways, Nodes: n})
		}
		canary := config(form)
		canary.Plugins = map[string]mcp.Plugin{"istio-ingress/b": {Source: "-- another build"}}
		released := config(form)
		released.Plugin.Version += ".1"
		prefixed := config(form)
		prefixed.Prefix = "other-"
		last := map[string]*anypb.Any{}
		for _, step := range []struct {
			what   string
			config mcp.Config
			plan   mirror.Plan
			made   string // gateways whose resources are made
		}{
			{"first", config(form), compile(nil, oneNode, "a", "b"), "ab"},
			{"same", config(form), compile(nil, oneNode, "a", "b"), ""},
			{"edit", config(form), compile(edited, oneNode, "a", "b"), "a"},
			{"canary", canary, compile(edited, oneNode, "a", "b"), "b"},
			{"rolled back", config(form), compile(edited, oneNode, "a", "b"), "b"},
			{"release", released, compile(edited, oneNode, "a", "b"), "ab"},
			{"nodes", released, compile(edited, nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 1}), "a", "b"), "ab"},
			{"gone", released, compile(edited, nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 1}), "b"), ""},
			{"back", released, compile(edited, nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 1}), "b", "a"), "a"},
			{"prefix", prefixed, compile(edited, nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 1}), "b", "a"), "ab"},
		} {
			got, err := m.Make(step.config, step.plan)
			if err != nil {
				t.Fatalf("%s: %v", step.what, err)
			}
			fresh, err := new(mcp.Maker).Make(step.config, step.plan)
			if err != nil {
				t.Fatalf("%s: %v", step.what, err)
			}
			for _, typeURL := range mcp.Types() {
				if got.Snapshot.Version(typeURL) != fresh.Snapshot.Version(typeURL) {
					t.Errorf("%s, %s: %s is another than made anew", form, step.what, typeURL)
				}
			}
			if d := cmp.Diff(fresh.Items, got.Items); d != "" {
				t.Errorf("%s, %s: -anew +kept\n%s", form, step.what, d)
			}
			now := contents(got.Snapshot)
			made := map[string]bool{}
			for id, content := range now {
				if last[id] != content {
					_, name, _ := strings.Cut(id, "-ingress/") // periscope-a-plugin
					made[strings.Split(name, "-")[1]] = true
				}
			}
			if s := strings.Join(slices.Sorted(maps.Keys(made)), ""); s != step.made {
				t.Errorf("%s, %s: made anew: %q, want %q", form, step.what, s, step.made)
			}
			last = now
		}
	}
}

// One that can't be supplied costs the others nothing.
func TestMakerAfterFault(t *testing.T) {
	var m mcp.Maker
	first, err := m.Make(config(""), plan("a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	bad := plan("a", "b")
	bad.Gateways[0].Endpoints = []mirror.Endpoint{{Host: "a_b", Port: 1}}
	if _, err := m.Make(config(""), bad); err == nil {
		t.Fatal("a node without an address is served")
	}
	again, err := m.Make(config(""), plan("a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	was, is := contents(first.Snapshot), contents(again.Snapshot)
	for id := range is {
		if kept := was[id] == is[id]; kept != strings.Contains(id, "periscope-b") {
			t.Errorf("%s: kept %v", id, kept)
		}
	}
}

// The order in which somebody found gateways and nodes changes nothing.
func TestDeterministic(t *testing.T) {
	for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
		a, b := mirror.Endpoint{Host: "10.0.0.8", Port: 5050}, mirror.Endpoint{Host: "10.0.0.9", Port: 5050}
		policies := []policy.MirrorPolicy{policyFor("a", nil), policyFor("b", nil)}
		one := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{workload("a"), workload("b")}, Nodes: nodes(a, b)})
		two := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{workload("b"), workload("a")}, Nodes: nodes(b, a, b)})
		s1, s2 := snapshot(t, config(form), one), snapshot(t, config(form), two)
		for _, typeURL := range mcp.Types() {
			if s1.Version(typeURL) != s2.Version(typeURL) {
				t.Errorf("%s: %s differs", form, typeURL)
			}
		}
		if d := cmp.Diff(render(t, config(form), one), render(t, config(form), two)); d != "" {
			t.Error(d)
		}
	}
}

// A gateway that several policies share carries all of them in what it has
// anyway, and stays for the last that is on.
func TestSeveralPolicies(t *testing.T) {
	shop := func(mode policy.Mode) policy.MirrorPolicy {
		p := policyFor("public", func(s *policy.Spec) { s.Mode, s.Match = mode, []policy.Match{{Hosts: []string{"shop.example"}}} })
		p.Metadata.Name = "shop"
		return p
	}
	for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
		one := versions(t, snapshot(t, config(form), plan("public")))
		several := mirror.Compile([]policy.MirrorPolicy{shop(policy.ModeOff), policyFor("public", nil)},
			mirror.Topology{Gateways: []mirror.Gateway{workload("public")}, Nodes: oneNode})
		if got := versions(t, snapshot(t, config(form), several)); !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(one))) {
			t.Errorf("%s: %v, want those of %v", form, got, one)
		}
		out := render(t, config(form), several)
		for _, want := range []string{"periscope.dev/policy: istio-ingress/shop, istio-ingress/public\n", several.Nodes[1].Revision + ", " + several.Nodes[0].Revision + "\n"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s: no %q", form, want)
			}
		}
	}
}

// Who gets nothing.
func TestLeftOut(t *testing.T) {
	for name, change := range map[string]func(*mirror.GatewayPlan){
		"no policy":        func(g *mirror.GatewayPlan) { g.Policy = "" },
		"no selector":      func(g *mirror.GatewayPlan) { g.Gateway.Selector = nil },
		"another revision": func(g *mirror.GatewayPlan) { g.Gateway.Labels = map[string]string{"istio.io/rev": "canary"} },
	} {
		p := plan("public")
		change(&p.Gateways[0])
		c := config("")
		c.Revision = "stable"
		if got := versions(t, snapshot(t, c, p)); len(got) != 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
	for name, change := range map[string]func(*mirror.Settings){"mode Off": func(s *mirror.Settings) { s.Mode = policy.ModeOff }, "percent 0": func(s *mirror.Settings) { s.SharePPM = 0 }} {
		p := plan("public")
		change(&p.Gateways[0].Settings)
		if got := versions(t, snapshot(t, config(mcp.FormTrafficExtension), p)); len(got) != 0 {
			t.Errorf("%s inline: %v", name, got)
		}
	}
	p := plan("public")
	for _, rev := range []string{"", "stable"} {
		p.Gateways[0].Gateway.Labels = map[string]string{"istio.io/rev": "stable"}
		c := config("")
		c.Revision = rev
		if got := versions(t, snapshot(t, c, p)); len(got) != 2 {
			t.Errorf("revision %q: %v", rev, got)
		}
	}
}

func TestFaults(t *testing.T) {
	good := func() mirror.Plan { return plan("bad", "good") }
	bad := func(change func(*mirror.GatewayPlan)) mirror.Plan {
		p := good()
		change(&p.Gateways[0])
		return p
	}
	for name, tc := range map[string]struct {
		config  mcp.Config
		plan    mirror.Plan
		gateway string
		want    string
	}{
		"form":      {config: mcp.Config{Form: "Wasm", Plugin: mcp.Plugin{Source: "x"}}, want: `form "Wasm" is neither`},
		"prefix":    {config: mcp.Config{Prefix: "Peri_", Plugin: mcp.Plugin{Source: "x"}}, want: `prefix "Peri_"`},
		"plugin":    {config: mcp.Config{}, want: "the plugin has no source"},
		"plugins":   {config: mcp.Config{Plugin: mcp.Plugin{Source: "x"}, Plugins: map[string]mcp.Plugin{"a/b": {}}}, want: "the plugin of gateway a/b has no source"},
		"namespace": {config: config(""), plan: bad(func(g *mirror.GatewayPlan) { g.Gateway.Namespace = "a/b" }), gateway: "a/b/bad", want: `"a/b" can't be a namespace`},
		"selector":  {config: config(""), plan: bad(func(g *mirror.GatewayPlan) { g.Gateway.Selector = map[string]string{"app": "*"} }), gateway: "istio-ingress/bad", want: `can't be a label to select by`},
		"endpoint":  {config: config(""), plan: bad(func(g *mirror.GatewayPlan) { g.Endpoints = []mirror.Endpoint{{Host: "a_b", Port: 1}} }), gateway: "istio-ingress/bad", want: `node endpoint "a_b" port 1 can't be used`},
		"port":      {config: config(""), plan: bad(func(g *mirror.GatewayPlan) { g.Endpoints = []mirror.Endpoint{{Host: "10.0.0.1"}} }), gateway: "istio-ingress/bad", want: `port 0 can't be used`},
		"zone":      {config: config(""), plan: bad(func(g *mirror.GatewayPlan) { g.Endpoints = []mirror.Endpoint{{Host: "fe80::1%eth0", Port: 1}} }), gateway: "istio-ingress/bad", want: `can't be used`},
		"too large": {config: config(mcp.FormTrafficExtension), plan: bad(func(g *mirror.GatewayPlan) {
			g.Settings.Exclude = []policy.Match{{Paths: []policy.PathMatch{{Type: policy.PathExact, Value: "/" + strings.Repeat("x", 64<<10)}}}}
		}), gateway: "istio-ingress/bad", want: "more than the 65536 bytes of a TrafficExtension"},
		"same name": {config: config(""), plan: bad(func(g *mirror.GatewayPlan) { g.Gateway.Name = "good" }), gateway: "istio-ingress/good", want: "the name of EnvoyFilter istio-ingress/periscope-good-plugin is another gateway's"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := mcp.Snapshot(tc.config, tc.plan)
			if s != nil || err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("snapshot %v, error %v", s, err)
			}
			var ge *mcp.GatewayError
			if errors.As(err, &ge) != (tc.gateway != "") || ge != nil && ge.Gateway != tc.gateway {
				t.Errorf("error is of gateway %v", ge)
			}
		})
	}
}

// What fits to the byte is sent; one byte more isn't.
func TestInlineLimit(t *testing.T) {
	p := plan("public")
	size := func(n int) (int, error) {
		c := config(mcp.FormTrafficExtension)
		c.Plugin.Source = strings.Repeat("-", n) + "\n"
		s, err := mcp.Snapshot(c, p)
		if err != nil {
			return 0, err
		}
		m, te := &mcpv1alpha1.Resource{}, &extensions.TrafficExtension{}
		if err := errors.Join(s.Resources(trafficExtensionType)[0].Any.UnmarshalTo(m), m.GetBody().UnmarshalTo(te)); err != nil {
			return 0, err
		}
		return len(te.GetLua().GetInlineCode()), nil
	}
	least, err := size(1)
	if err != nil {
		t.Fatal(err)
	}
	room := lua.MaxBytes - least + 1
	if n, err := size(room); err != nil || n != lua.MaxBytes {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := size(room + 1); err == nil {
		t.Error("one byte too many is sent")
	}
}

func TestNames(t *testing.T) {
	seen := map[string]string{}
	for _, workload := range []string{
		"public", "Public", "public.", "pub.lic", "pub-lic", "", "-", "é", strings.Repeat("x", 44), strings.Repeat("x", 45),
		strings.Repeat("x", 200), strings.Repeat("x", 201), "a/../b", "a\nb", strings.Repeat("-", 100), "gw" + strings.Repeat(".x", 60),
	} {
		p := plan("public")
		p.Gateways[0].Gateway.Name = workload
		for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
			objects, err := mcp.Objects(config(form), p)
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range objects {
				n := o.Metadata.Name
				if len(n) > 63 || !strings.HasPrefix(n, "periscope-") || strings.Trim(n, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || strings.HasSuffix(n, "-") {
					t.Errorf("%q gives the name %q", workload, n)
				}
				id := string(form) + o.Kind + n
				if other, ok := seen[id]; ok && other != workload {
					t.Errorf("%q and %q both give %s", workload, other, n)
				}
				seen[id] = workload
			}
		}
	}
}

func render(t testing.TB, c mcp.Config, p mirror.Plan) string {
	t.Helper()
	objects, err := mcp.Objects(c, p)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := mcp.WriteYAML(&b, objects); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Each testdata directory holds a policy, and what follows from it.
func TestGolden(t *testing.T) {
	beside := []mirror.Endpoint{{Host: "10.0.0.7", Port: 5050, Machine: "host-a"}, {Host: "10.0.0.8", Port: 5050, Machine: "host-b"}, {Host: "10.0.0.9", Port: 5050, Machine: "host-c"}}
	ipAndName := []mirror.Endpoint{{Host: "node-0.nodes.example", Port: 5051}, {Host: "10.0.0.9", Port: 5050}}
	for name, tc := range map[string]struct {
		form  mcp.Form
		nodes []mirror.Endpoint
	}{
		"envoyfilter":            {mcp.FormEnvoyFilter, []mirror.Endpoint{{Host: "10.0.0.9", Port: 5050}, {Host: "fd00::9", Port: 5050}}},
		"envoyfilter-dns":        {mcp.FormEnvoyFilter, ipAndName},
		"envoyfilter-extproc":    {mcp.FormEnvoyFilter, []mirror.Endpoint{{Host: "10.0.0.9", Port: 5050}}},
		"trafficextension":       {mcp.FormTrafficExtension, []mirror.Endpoint{{Host: "10.0.0.9", Port: 5050}}},
		"trafficextension-dns":   {mcp.FormTrafficExtension, ipAndName},
		"envoyfilter-local":      {mcp.FormEnvoyFilter, beside},
		"trafficextension-local": {mcp.FormTrafficExtension, beside},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join("testdata", name)
			in, err := os.ReadFile(filepath.Join(dir, "in.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			doc := policy.Parse("in.yaml", in)[0]
			if len(doc.Faults) > 0 {
				t.Fatal(doc.Faults)
			}
			g := workload("public")
			g.Machines = []string{"host-a", "host-b", "host-d"}
			p := mirror.Compile([]policy.MirrorPolicy{*doc.Policy}, mirror.Topology{Gateways: []mirror.Gateway{g}, Nodes: nodes(tc.nodes...)})
			got := render(t, mcp.Config{Form: tc.form, Plugin: mcp.Plugin{Source: "function envoy_on_request(h)\n  -- \"the\tplugin\"\nend\n", Version: "1.2.3"}}, p)
			golden := filepath.Join(dir, "out.yaml")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("-want +got\n%s", d)
			}
		})
	}
}

// What YAML readers make of the documents is what was written.
func TestYAMLRoundTrip(t *testing.T) {
	for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
		objects, err := mcp.Objects(config(form), plan("a", "b"))
		if err != nil {
			t.Fatal(err)
		}
		d := yaml.NewDecoder(strings.NewReader(render(t, config(form), plan("a", "b"))))
		for i := range objects {
			var got mcp.Object
			if err := d.Decode(&got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(fmt.Sprint(objects[i]), fmt.Sprint(got)); diff != "" {
				t.Errorf("document %d: %s", i, diff)
			}
		}
	}
}

func BenchmarkSnapshot(b *testing.B) {
	names := make([]string, 100)
	for i := range names {
		names[i] = fmt.Sprintf("gateway-%03d", i)
	}
	p := plan(names...)
	for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
		b.Run(string(form), func(b *testing.B) {
			bytes := 0
			for _, r := range snapshot(b, config(form), p).Types() {
				for _, r := range snapshot(b, config(form), p).Resources(r) {
					bytes += len(r.Any.GetValue())
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				snapshot(b, config(form), p)
			}
			b.ReportMetric(float64(bytes), "snapshot-bytes")
		})
	}
}
