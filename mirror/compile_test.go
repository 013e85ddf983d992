package mirror_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

func named(namespace, name string, change func(*policy.MirrorPolicy)) policy.MirrorPolicy {
	p := policy.Default()
	p.Metadata.Namespace, p.Metadata.Name = namespace, name
	if change != nil {
		change(&p)
	}
	return p
}

func ref(name string) policy.TargetRef {
	return policy.TargetRef{Group: "gateway.networking.k8s.io", Kind: "Gateway", Name: name}
}

var (
	public   = mirror.Gateway{Namespace: "ingress", Name: "public", Labels: map[string]string{"istio": "public"}}
	internal = mirror.Gateway{Namespace: "ingress", Name: "internal", Labels: map[string]string{"istio": "internal"}}
	standIn  = mirror.Gateway{Namespace: "default", Name: "gateway", StandIn: true}
	nodes    = []mirror.NodeService{{Namespace: "ingress", Name: "periscope-node", Endpoints: []mirror.Endpoint{{Host: "10.0.0.9", Port: 5050}}}, {Namespace: "ingress", Name: "idle"}}
)

func TestCompileAttachments(t *testing.T) {
	for name, tc := range map[string]struct {
		policies []policy.MirrorPolicy
		gateways []mirror.Gateway
		want     []mirror.Attachment
	}{
		"by reference": {
			[]policy.MirrorPolicy{named("ingress", "a", func(p *policy.MirrorPolicy) { p.Spec.TargetRefs = []policy.TargetRef{ref("public"), ref("gone")} })},
			[]mirror.Gateway{public, internal},
			[]mirror.Attachment{{Policy: "ingress/a", Gateways: []string{"ingress/public"}, Problems: []string{`spec.targetRefs[1]: no Gateway "gone" of gateway.networking.k8s.io in namespace ingress`}}},
		},
		"by labels": {
			[]policy.MirrorPolicy{named("ingress", "a", func(p *policy.MirrorPolicy) {
				p.Spec.Selector = &policy.Selector{MatchLabels: map[string]string{"istio": "internal"}}
			})},
			[]mirror.Gateway{public, internal},
			[]mirror.Attachment{{Policy: "ingress/a", Gateways: []string{"ingress/internal"}}},
		},
		"whole namespace": {
			[]policy.MirrorPolicy{named("ingress", "a", nil)},
			[]mirror.Gateway{public, internal},
			[]mirror.Attachment{{Policy: "ingress/a", Gateways: []string{"ingress/internal", "ingress/public"}}},
		},
		"other namespace": {
			[]policy.MirrorPolicy{named("shop", "a", func(p *policy.MirrorPolicy) { p.Spec.Nodes.Service = "periscope-node.ingress" })},
			[]mirror.Gateway{public},
			[]mirror.Attachment{{Policy: "shop/a", Problems: []string{"no gateway in namespace shop"}}},
		},
		"the first wins": {
			[]policy.MirrorPolicy{named("ingress", "z", nil), named("ingress", "a", nil)},
			[]mirror.Gateway{public},
			[]mirror.Attachment{
				{Policy: "ingress/a", Problems: []string{"gateway ingress/public is governed by the older policy ingress/z"}},
				{Policy: "ingress/z", Gateways: []string{"ingress/public"}},
			},
		},
		"by the resource it implements": {
			[]policy.MirrorPolicy{named("shop", "a", func(p *policy.MirrorPolicy) {
				p.Spec.TargetRefs = []policy.TargetRef{{Group: "networking.istio.io", Kind: "Gateway", Name: "web"}, {Group: "gateway.networking.k8s.io", Kind: "Gateway", Name: "web"}}
				p.Spec.Nodes.Service = "periscope-node.ingress"
			})},
			[]mirror.Gateway{{Namespace: "ingress", Name: "public", Targets: []mirror.Target{{Group: "networking.istio.io", Namespace: "shop", Name: "web"}}}},
			[]mirror.Attachment{{Policy: "shop/a", Gateways: []string{"ingress/public"}, Problems: []string{`spec.targetRefs[1]: no Gateway "web" of gateway.networking.k8s.io in namespace shop`}}},
		},
		"stand-in": {
			[]policy.MirrorPolicy{named("ingress", "a", func(p *policy.MirrorPolicy) { p.Spec.TargetRefs = []policy.TargetRef{ref("public")} })},
			[]mirror.Gateway{standIn},
			[]mirror.Attachment{{Policy: "ingress/a", Gateways: []string{"default/gateway"}}},
		},
		"no such nodes": {
			[]policy.MirrorPolicy{named("ingress", "a", func(p *policy.MirrorPolicy) { p.Spec.Nodes.Service = "elsewhere" })},
			[]mirror.Gateway{public},
			[]mirror.Attachment{{Policy: "ingress/a", Gateways: []string{"ingress/public"}, Problems: []string{`spec.nodes: no service "elsewhere" with port 5050 is known; nothing is mirrored until it is`}}},
		},
		"nodes that are not ready": {
			[]policy.MirrorPolicy{named("ingress", "a", func(p *policy.MirrorPolicy) { p.Spec.Nodes.Service = "idle" })},
			[]mirror.Gateway{public},
			[]mirror.Attachment{{Policy: "ingress/a", Gateways: []string{"ingress/public"}, Problems: []string{`spec.nodes: service "idle" has no endpoint that is ready; nothing is mirrored until it has`}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			plan := mirror.Compile(tc.policies, mirror.Topology{Gateways: tc.gateways, Nodes: nodes})
			if d := cmp.Diff(tc.want, plan.Attachments, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("-want +got\n%s", d)
			}
		})
	}
}

// All policies of a gateway go by one transport, the oldest's.
func TestTransports(t *testing.T) {
	extproc := func(p *policy.MirrorPolicy) {
		p.Spec.Transport = policy.TransportExtProc
		p.Spec.Match = []policy.Match{{Hosts: []string{"a.example"}}}
	}
	streams, batches := named("ingress", "a", extproc), named("ingress", "b", nil)
	for _, tc := range []struct {
		policies []policy.MirrorPolicy
		want     policy.Transport
		problem  string
	}{
		{[]policy.MirrorPolicy{streams, batches}, policy.TransportExtProc, "gateway ingress/public mirrors by the transport ExtProc of the older policy ingress/a: write the same spec.transport"},
		{[]policy.MirrorPolicy{named("ingress", "a", func(p *policy.MirrorPolicy) { extproc(p); p.Spec.Transport = policy.TransportLua }), named("ingress", "b", func(p *policy.MirrorPolicy) { p.Spec.Transport = policy.TransportExtProc })},
			"", "gateway ingress/public mirrors by the transport Lua of the older policy ingress/a: write the same spec.transport"},
		{[]policy.MirrorPolicy{streams, named("ingress", "b", func(p *policy.MirrorPolicy) { p.Spec.Transport = policy.TransportExtProc })}, policy.TransportExtProc, "gateway ingress/public: the older policy ingress/a governs [a.example]"},
	} {
		plan := mirror.Compile(tc.policies, mirror.Topology{Gateways: []mirror.Gateway{public}, Nodes: nodes})
		if got := plan.Gateways[0].Settings.Transport; got != tc.want {
			t.Errorf("transport is %q, want %q", got, tc.want)
		}
		if got := strings.Join(plan.Attachments[1].Problems, "\n"); got != tc.problem {
			t.Errorf("problems %q, want %q", got, tc.problem)
		}
	}
	if batches.ID() != "ingress/b" || mirror.Compile([]policy.MirrorPolicy{batches}, mirror.Topology{}).Nodes[0].Revision == mirror.Compile([]policy.MirrorPolicy{named("ingress", "b", extproc)}, mirror.Topology{}).Nodes[0].Revision {
		t.Error("another transport is no other revision")
	}
}

func TestStreamPPM(t *testing.T) {
	s := mirror.Settings{Mode: policy.ModeOff, SharePPM: mirror.Everything, Next: []mirror.Settings{{Mode: policy.ModeMonitor, SharePPM: 7}, {Mode: policy.ModeMonitor, SharePPM: 5}}}
	if got := s.StreamPPM(); got != 7 {
		t.Errorf("share is %d, want the largest of those that are on", got)
	}
}

func TestCopies(t *testing.T) {
	always := []policy.Class{policy.ClassAuthentication}
	for _, tc := range []struct {
		settings mirror.Settings
		want     bool
	}{
		{mirror.Settings{Mode: policy.ModeMonitor, SharePPM: 1}, true},
		{mirror.Settings{Mode: policy.ModeMonitor}, false},
		{mirror.Settings{Mode: policy.ModeMonitor, Always: always}, true},
		{mirror.Settings{Mode: policy.ModeOff, SharePPM: mirror.Everything, Always: always}, false},
		{mirror.Settings{Mode: policy.ModeOff, Next: []mirror.Settings{{Mode: policy.ModeMonitor}, {Mode: policy.ModeMonitor, SharePPM: 1}}}, true},
		{mirror.Settings{Mode: policy.ModeOff, Next: []mirror.Settings{{Mode: policy.ModeMonitor}}}, false},
		{mirror.Compile(nil, mirror.Topology{Gateways: []mirror.Gateway{{Name: "a"}}}).Gateways[0].Settings, false},
	} {
		if got := tc.settings.Copies(); got != tc.want {
			t.Errorf("%+v: %v", tc.settings, got)
		}
	}
}

func TestCompileIsDeterministic(t *testing.T) {
	policies := []policy.MirrorPolicy{named("ingress", "a", nil)}
	one := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{public, internal}, Nodes: nodes})
	two := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{internal, public}, Nodes: nodes})
	if d := cmp.Diff(one, two); d != "" {
		t.Errorf("the order of gateways matters:\n%s", d)
	}
	policies[0].Spec.Sampling.Percent = 50
	if three := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{public, internal}, Nodes: nodes}); three.Revision == one.Revision {
		t.Error("another policy, the same revision")
	}
	if one.Gateways[0].Settings.PolicyRev == "" || one.Gateways[0].Settings.PolicyRev != one.Nodes[0].Revision {
		t.Error("gateways and nodes don't know the policy by the same revision")
	}
}

// A policy's revision is its own: neither another policy nor the topology
// changes it, and everything that gateways or nodes do by it does.
func TestPolicyRevision(t *testing.T) {
	topology := mirror.Topology{Gateways: []mirror.Gateway{public, internal}, Nodes: nodes}
	compile := func(topology mirror.Topology, change func(a, b *policy.MirrorPolicy)) (a, b string) {
		policies := []policy.MirrorPolicy{
			named("ingress", "a", func(p *policy.MirrorPolicy) { p.Spec.TargetRefs = []policy.TargetRef{ref("public")} }),
			named("ingress", "b", func(p *policy.MirrorPolicy) { p.Spec.TargetRefs = []policy.TargetRef{ref("internal")} }),
		}
		if change != nil {
			change(&policies[0], &policies[1])
		}
		plan := mirror.Compile(policies, topology)
		for _, g := range plan.Gateways {
			for _, n := range plan.Nodes {
				if n.ID == g.Policy && n.Revision != g.Settings.PolicyRev {
					t.Errorf("%s: gateway has revision %q, nodes have %q", n.ID, g.Settings.PolicyRev, n.Revision)
				}
			}
		}
		return plan.Nodes[0].Revision, plan.Nodes[1].Revision
	}
	a, b := compile(topology, nil)
	if a == b || len(a) != 12 {
		t.Fatalf("revisions %q and %q", a, b)
	}
	for name, change := range map[string]func(a, _ *policy.MirrorPolicy){
		"sampling":  func(a, _ *policy.MirrorPolicy) { a.Spec.Sampling.Percent = 3 },
		"detection": func(a, _ *policy.MirrorPolicy) { a.Spec.Detection.Paranoia = 4 },
		"tenant":    func(a, _ *policy.MirrorPolicy) { a.Spec.Tenant = "shop" },
		"mode":      func(a, _ *policy.MirrorPolicy) { a.Spec.Mode = policy.ModeOff },
	} {
		if a2, b2 := compile(topology, change); a2 == a || b2 != b {
			t.Errorf("%s of a: a from %q to %q, b from %q to %q", name, a, a2, b, b2)
		}
	}
	other := mirror.Topology{Gateways: []mirror.Gateway{public, internal, {Namespace: "ingress", Name: "more"}}}
	if a2, b2 := compile(other, nil); a2 != a || b2 != b {
		t.Error("another topology, other revisions")
	}
}

func TestEncode(t *testing.T) {
	s := mirror.Settings{
		Gateway: "ns/gw", PolicyID: "ns/p", PolicyRev: "r", SharePPM: 250_000, Mode: policy.ModeMonitor,
		Match:    []policy.Match{{Hosts: []string{"*.shop.example", "a.example"}, Paths: []policy.PathMatch{{Type: policy.PathPrefix, Value: "/api"}, {Type: policy.PathExact, Value: "/a\tb%\nc é"}}}, {}},
		Always:   []policy.Class{policy.ClassSuspicious},
		Session:  policy.Session{Cookie: "SID"},
		Request:  policy.BodyLimit{MaxBytes: 65536, ContentTypes: []string{"*/*"}},
		Response: policy.BodyLimit{MaxBytes: 0},
		Mask: policy.Mask{
			Headers: []string{"x-key"}, Cookies: []string{"session"}, QueryParameters: []string{"access_token", "schlüssel"}, FormFields: []string{"password"},
			JSONPaths: []string{"$.a[*].password", "$.list[*]"}, Detectors: []policy.Detector{policy.DetectorCreditCard},
		},
	}
	want := strings.Join([]string{
		"gateway\tns/gw", "policy\tns/p", "rev\tr", "mode\tMonitor", "ppm\t250000", "session\tcookie\tSID",
		"match\tw.shop.example\tha.example\tp/api\te/a%09b%25%0Ac%20%C3%A9", "match",
		"always\tSuspicious", "request\t65536", "request_types\t*/*", "response\t0", "mask_headers\tx-key", "mask_cookies\tsession",
		"mask_query\taccess_token\tschl%C3%BCssel", "mask_form\tpassword", "mask_json\tpassword\tlist", "detect_cards", "",
	}, "\n")
	if d := cmp.Diff(want, s.Encode()); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestEncodeCluster(t *testing.T) {
	s := mirror.Settings{Cluster: "outbound|5050||nodes.example"}
	if got := s.Encode(); !strings.Contains(got, "\ncluster\toutbound|5050||nodes.example\n") {
		t.Errorf("encoded:\n%s", got)
	}
}

// The statement is one line of printable ASCII, whatever the settings hold.
func TestEncodeLua(t *testing.T) {
	s := mirror.Settings{Gateway: `a"]]\b`, PolicyID: "é\x00", Mode: policy.ModeMonitor}
	want := `embedded = "gateway\009a\034]]\092b\010policy\009%C3%A9%00\010rev\009\010mode\009Monitor\010ppm\0090\010request\0090\010response\0090\010"` + "\n"
	if d := cmp.Diff(want, s.EncodeLua()); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func BenchmarkCompile(b *testing.B) {
	var policies []policy.MirrorPolicy
	var gateways []mirror.Gateway
	for i := range 100 {
		name := "g" + strings.Repeat("x", i)
		gateways = append(gateways, mirror.Gateway{Namespace: "ingress", Name: name})
		policies = append(policies, named("ingress", name, func(p *policy.MirrorPolicy) { p.Spec.TargetRefs = []policy.TargetRef{ref(name)} }))
	}
	b.ReportAllocs()
	for b.Loop() {
		mirror.Compile(policies, mirror.Topology{Gateways: gateways, Nodes: nodes})
	}
}

func TestEncodeShares(t *testing.T) {
	var none *mirror.Shares
	s := &mirror.Shares{Revision: "7", Default: []mirror.Share{{1_000_000, 1_000_000}, {50_000, 1_000_000}},
		Pods: map[string][]mirror.Share{"b": {{2000, 400_000}}, "a": {{300_000, 1_000_000}, {1_000_000, 1_000_000}}}}
	if got, want := s.Encode(), "*\t1000000\t50000\na\t300000\t1000000\nb\t2000:400000\n"; got != want || none.Encode() != "" {
		t.Errorf("encoded %q and %q", got, none.Encode())
	}
	for _, tt := range []struct {
		pod         string
		place, want int
	}{{"a", 0, 300_000}, {"b", 0, 2000}, {"b", 1, mirror.Everything}, {"c", 1, 50_000}, {"c", 2, mirror.Everything}} {
		if got := s.At(tt.pod, tt.place).PPM; got != tt.want {
			t.Errorf("%s, policy %d: %d, want %d", tt.pod, tt.place, got, tt.want)
		}
	}
	if none.At("a", 0) != (mirror.Share{PPM: mirror.Everything, Priority: mirror.Everything}) || s.At("b", 0).Priority != 400_000 {
		t.Error("without shares, a share")
	}
	many := &mirror.Shares{Pods: map[string][]mirror.Share{}}
	for i := range 300 {
		many.Pods[fmt.Sprintf("pod-%03d", i)] = []mirror.Share{{PPM: i}}
	}
	if got := strings.Count(many.Encode(), "\n"); got != mirror.MaxSharePods {
		t.Errorf("%d lines", got)
	}
}

func TestSharesFor(t *testing.T) {
	all := mirror.Share{PPM: mirror.Everything, Priority: mirror.Everything}
	s := &mirror.Shares{Policies: []string{"ns/a", "ns/b"}, Default: []mirror.Share{{PPM: 1, Priority: 2}, {PPM: 3, Priority: 4}},
		Pods: map[string][]mirror.Share{"pod": {{PPM: 5, Priority: 6}, {PPM: 7, Priority: 8}}}}
	s.Seal()
	if s.For([]string{"ns/a", "ns/b"}) != s || len(s.Revision) != 8 || (*mirror.Shares)(nil).For([]string{"ns/a"}) != nil {
		t.Error("the same policies have other shares")
	}
	got := s.For([]string{"ns/c", "ns/b"})
	if diff := cmp.Diff(&mirror.Shares{Revision: got.Revision, Policies: []string{"ns/c", "ns/b"}, Default: []mirror.Share{all, {PPM: 3, Priority: 4}},
		Pods: map[string][]mirror.Share{"pod": {all, {PPM: 7, Priority: 8}}}}, got); diff != "" || got.Revision == s.Revision {
		t.Errorf("revision %s, was %s: %s", got.Revision, s.Revision, diff)
	}
}
