package mirror_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

func istio(namespace, name string, hosts ...string) mirror.Target {
	return mirror.Target{Group: policy.GroupIstio, Namespace: namespace, Name: name, Hosts: hosts}
}

// shared is the usual Istio set-up: one workload, Gateways of many namespaces.
func shared(targets ...mirror.Target) mirror.Gateway {
	return mirror.Gateway{Namespace: "ingress", Name: "gw", Labels: map[string]string{"istio": "gw"}, Selector: map[string]string{"istio": "gw"}, Targets: targets}
}

// of is a policy of namespace for Gateways there, limited to hosts.
func of(namespace, name string, gateways []string, hosts ...string) policy.MirrorPolicy {
	return named(namespace, name, func(p *policy.MirrorPolicy) {
		p.Spec.Nodes.Service = "periscope-node.ingress"
		for _, g := range gateways {
			p.Spec.TargetRefs = append(p.Spec.TargetRefs, policy.TargetRef{Group: policy.GroupIstio, Kind: "Gateway", Name: g})
		}
		if hosts != nil {
			p.Spec.Match = []policy.Match{{Hosts: hosts}}
		}
	})
}

func changed(p policy.MirrorPolicy, change func(*policy.MirrorPolicy)) policy.MirrorPolicy {
	change(&p)
	return p
}

// paths limits a policy to some.
func paths(p policy.MirrorPolicy, prefixes ...string) policy.MirrorPolicy {
	return changed(p, func(p *policy.MirrorPolicy) {
		m := policy.Match{}
		if len(p.Spec.Match) > 0 {
			m = p.Spec.Match[0]
		}
		for _, v := range prefixes {
			m.Paths = append(m.Paths, policy.PathMatch{Type: policy.PathPrefix, Value: v})
		}
		p.Spec.Match = []policy.Match{m}
	})
}

// share is one policy's part of a gateway.
type share struct {
	Policy        string
	Hosts, Except []string
}

// A policy of one team doesn't govern another team's traffic.
func TestCompileSharedGateways(t *testing.T) {
	shop, bank := istio("shop", "web", "*.shop.example", "shop.example"), istio("bank", "web", "bank.example")
	web := []string{"web"}
	for name, tc := range map[string]struct {
		gateway  mirror.Gateway
		policies []policy.MirrorPolicy
		want     []share
		problems []string // policy: problem
	}{
		"each has its own hosts": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("shop", "p", web), of("bank", "p", web)},
			[]share{{"shop/p", []string{"*.shop.example", "shop.example"}, nil}, {"bank/p", []string{"bank.example"}, nil}},
			nil,
		},
		"two Gateways of one policy": {
			shared(bank, shop, istio("shop", "api", "api.example")),
			[]policy.MirrorPolicy{of("shop", "p", []string{"api", "web"})},
			[]share{{"shop/p", []string{"*.shop.example", "api.example", "shop.example"}, nil}},
			nil,
		},
		"the only Gateway": {
			shared(istio("shop", "web", "*")),
			[]policy.MirrorPolicy{of("shop", "p", web)},
			[]share{{"shop/p", nil, nil}},
			nil,
		},
		"all Gateways there are": {
			shared(istio("shop", "http", "*"), istio("shop", "https", "shop.example"), mirror.Target{Group: policy.GroupGatewayAPI, Namespace: "shop", Name: "http", Hosts: []string{"*"}}),
			[]policy.MirrorPolicy{of("shop", "p", []string{"http", "https"})},
			[]share{{"shop/p", nil, nil}},
			nil,
		},
		"another Gateway of the same namespace": {
			shared(istio("shop", "api", "api.example"), shop),
			[]policy.MirrorPolicy{of("shop", "p", web)},
			[]share{{"shop/p", []string{"*.shop.example", "shop.example"}, nil}},
			nil,
		},
		"every host is refused": {
			shared(bank, istio("shop", "web", "*", "shop.example")),
			[]policy.MirrorPolicy{of("shop", "p", web), of("bank", "p", web)},
			[]share{{"bank/p", []string{"bank.example"}, nil}},
			[]string{"shop/p: gateway ingress/gw: Gateway shop/web takes every host and shares its pods with others, such as Gateway bank/web; give it the hosts that it is for, or put the policy into namespace ingress"},
		},
		"every host is the owner's to have": {
			shared(bank, istio("ingress", "all", "*")),
			[]policy.MirrorPolicy{of("ingress", "p", []string{"all"})},
			[]share{{"ingress/p", nil, nil}},
			nil,
		},
		"the owner's Gateway limits too": {
			shared(bank, istio("ingress", "all", "*.example")),
			[]policy.MirrorPolicy{of("ingress", "p", []string{"all"})},
			[]share{{"ingress/p", []string{"*.example"}, nil}},
			nil,
		},
		"the owner's policy without targetRefs governs all": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("ingress", "p", nil), of("bank", "p", web)},
			[]share{{"ingress/p", nil, nil}},
			[]string{"bank/p: gateway ingress/gw is governed by the older policy ingress/p"},
		},
		"a younger one of the owner has the rest": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("bank", "p", web), of("ingress", "p", nil)},
			[]share{{"bank/p", []string{"bank.example"}, nil}, {"ingress/p", nil, nil}},
			[]string{"ingress/p: gateway ingress/gw: the older policy bank/p governs [bank.example]"},
		},
		"no host": {
			shared(bank, istio("shop", "web")),
			[]policy.MirrorPolicy{of("shop", "p", web)},
			nil,
			[]string{"shop/p: gateway ingress/gw: Gateway shop/web has no host that could be told from those of Gateway bank/web, which shares its pods; give it the hosts that it is for"},
		},
		"nothing of the Gateway": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("shop", "p", web, "bank.example", "*.bank.example")},
			nil,
			[]string{"shop/p: gateway ingress/gw: spec.match has no host of Gateway shop/web, which shares its pods with Gateway bank/web; its hosts are [*.shop.example shop.example]"},
		},
		"something of the Gateway": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("shop", "p", web, "bank.example", "a.shop.example")},
			[]share{{"shop/p", []string{"*.shop.example", "shop.example"}, nil}},
			nil,
		},
		"what others name more closely is theirs": {
			shared(bank, istio("bank", "more", "*.bank.example", "*.example"), istio("shop", "web", "*.example"), istio("shop", "own", "shop.example"), istio("ingress", "x", "x.test")),
			[]policy.MirrorPolicy{of("shop", "p", web), of("bank", "p", web)},
			[]share{{"shop/p", []string{"*.example"}, []string{"*.bank.example", "bank.example"}}, {"bank/p", []string{"bank.example"}, nil}},
			nil,
		},
		"nothing but what others name more closely": {
			shared(bank, istio("shop", "web", "*.example")),
			[]policy.MirrorPolicy{of("shop", "p", web, "bank.example")},
			nil,
			[]string{"shop/p: gateway ingress/gw: spec.match has no host of Gateway shop/web, which shares its pods with Gateway bank/web; its hosts are [*.example]"},
		},
		"too many others": {
			shared(istio("bank", "web", manyHosts(1025)...), istio("shop", "web", "*.example")),
			[]policy.MirrorPolicy{of("shop", "p", web)},
			nil,
			[]string{"shop/p: gateway ingress/gw: the hosts of Gateway shop/web stand for 1025 of other namespaces' Gateways, more than 1024; give it narrower ones"},
		},
		"the older of two that match": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("shop", "a", web, "a.shop.example", "b.shop.example"), of("shop", "b", web, "*.shop.example"), of("shop", "c", web, "b.shop.example")},
			[]share{{"shop/a", []string{"*.shop.example", "shop.example"}, nil}, {"shop/b", []string{"*.shop.example", "shop.example"}, nil}},
			[]string{
				"shop/b: gateway ingress/gw: the older policy shop/a governs [a.shop.example b.shop.example]",
				"shop/c: gateway ingress/gw is governed by the older policy shop/a",
			},
		},
		"several older ones have all of it": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("shop", "a", web, "shop.example"), of("shop", "b", web, "*.shop.example"), of("shop", "c", web)},
			[]share{{"shop/a", []string{"*.shop.example", "shop.example"}, nil}, {"shop/b", []string{"*.shop.example", "shop.example"}, nil}},
			[]string{"shop/c: gateway ingress/gw is governed by the older policy shop/b"},
		},
		"apart by paths": {
			shared(bank, shop),
			[]policy.MirrorPolicy{paths(of("shop", "a", web), "/api"), of("shop", "b", web), paths(of("shop", "c", web), "/")},
			[]share{{"shop/a", []string{"*.shop.example", "shop.example"}, nil}, {"shop/b", []string{"*.shop.example", "shop.example"}, nil}},
			[]string{"shop/c: gateway ingress/gw is governed by the older policy shop/b"},
		},
		"the closest name has the host": { // shop's own, within bank's wildcard, within shop's
			shared(istio("bank", "web", "*.bank.example"), istio("shop", "web", "*.example", "x.bank.example")),
			[]policy.MirrorPolicy{of("bank", "p", web), of("shop", "p", web)},
			[]share{{"bank/p", []string{"*.bank.example"}, []string{"x.bank.example"}}, {"shop/p", []string{"*.example", "x.bank.example"}, []string{"*.bank.example"}}},
			nil,
		},
		"other nodes": {
			shared(bank, shop),
			[]policy.MirrorPolicy{of("shop", "p", web), changed(of("bank", "p", web), func(p *policy.MirrorPolicy) { p.Spec.Nodes.Service = "nodes.bank" })},
			[]share{{"shop/p", []string{"*.shop.example", "shop.example"}, nil}},
			[]string{"bank/p: gateway ingress/gw mirrors to the nodes of the older policy shop/p: name the same spec.nodes"},
		},
		"unknown nodes keep nobody from theirs": {
			shared(bank, shop),
			[]policy.MirrorPolicy{changed(of("shop", "p", web), func(p *policy.MirrorPolicy) { p.Spec.Nodes.Service = "gone" }), of("bank", "p", web)},
			[]share{{"bank/p", []string{"bank.example"}, nil}},
			[]string{`shop/p: spec.nodes: no service "gone" with port 5050 is known; nothing is mirrored until it is`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			services := append(slices.Clone(nodes), mirror.NodeService{Namespace: "bank", Name: "nodes", Endpoints: []mirror.Endpoint{{Host: "10.0.0.8", Port: 5050}}})
			plan := mirror.Compile(tc.policies, mirror.Topology{Gateways: []mirror.Gateway{tc.gateway}, Nodes: services})
			var got []share
			for _, s := range plan.Gateways[0].Policies() {
				got = append(got, share{s.PolicyID, s.Hosts, s.Except})
			}
			if d := cmp.Diff(tc.want, got, cmpopts.EquateEmpty()); d != "" {
				t.Errorf("shares, -want +got\n%s", d)
			}
			var problems []string
			for _, a := range plan.Attachments {
				for _, p := range a.Problems {
					problems = append(problems, a.Policy+": "+p)
				}
				if governs := slices.ContainsFunc(got, func(s share) bool { return s.Policy == a.Policy }); governs != (len(a.Gateways) == 1) {
					t.Errorf("%s: governs: %v; its attachment says %v", a.Policy, governs, a.Gateways)
				}
			}
			if d := cmp.Diff(tc.problems, problems); d != "" {
				t.Errorf("problems, -want +got\n%s", d)
			}
		})
	}
}

func manyHosts(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("h%d.example", i)
	}
	return out
}

// However many policies there are, what a gateway gets of them is bounded.
func TestCompileBoundsAGatewaysPolicies(t *testing.T) {
	compile := func(n int, change func(*policy.MirrorPolicy)) mirror.Plan {
		var policies []policy.MirrorPolicy
		var targets []mirror.Target
		for i := range n {
			ns := fmt.Sprintf("t%02d", i)
			targets = append(targets, istio(ns, "web", ns+".example"))
			policies = append(policies, changed(of(ns, "p", []string{"web"}), change))
		}
		return mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{shared(targets...)}, Nodes: nodes})
	}
	plan := compile(33, func(*policy.MirrorPolicy) {})
	if n := len(plan.Gateways[0].Policies()); n != 32 {
		t.Errorf("%d policies", n)
	}
	if d := cmp.Diff([]string{"gateway ingress/gw has 32 older policies, and takes no more"}, plan.Attachments[32].Problems); d != "" {
		t.Error(d)
	}
	plan = compile(4, func(p *policy.MirrorPolicy) {
		p.Spec.Exclude = []policy.Match{{Paths: slices.Repeat([]policy.PathMatch{{Type: policy.PathExact, Value: "/" + strings.Repeat("x", 1000)}}, 80)}}
	})
	if n := len(plan.Gateways[0].Policies()); n != 3 || len(plan.Gateways[0].Settings.Encode()) > 256<<10 {
		t.Errorf("%d policies of %d bytes", n, len(plan.Gateways[0].Settings.Encode()))
	}
	if d := cmp.Diff([]string{"gateway ingress/gw takes no more than 262144 bytes of settings: the policy and the 3 older ones say more"}, plan.Attachments[3].Problems); d != "" {
		t.Error(d)
	}
}

// A policy's revision is its own, whatever its Gateway's hosts and whoever
// shares the gateway.
func TestSharesKeepRevisions(t *testing.T) {
	policies := []policy.MirrorPolicy{of("shop", "p", []string{"web"}), of("bank", "p", []string{"web"})}
	one := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{shared(istio("bank", "web", "b.example"), istio("shop", "web", "s.example"))}, Nodes: nodes})
	two := mirror.Compile(policies, mirror.Topology{Gateways: []mirror.Gateway{shared(istio("shop", "web", "t.example"))}, Nodes: nodes})
	if d := cmp.Diff(one.Nodes, two.Nodes); d != "" {
		t.Errorf("the nodes' part changed\n%s", d)
	}
	for i, want := range []string{one.Nodes[1].Revision, one.Nodes[0].Revision} { // by precedence
		if got := one.Gateways[0].Policies()[i]; got.PolicyRev != want {
			t.Errorf("%s has revision %q, nodes have %q", got.PolicyID, got.PolicyRev, want)
		}
	}
}

func TestEncodeSeveral(t *testing.T) {
	s := mirror.Settings{
		Gateway: "ns/gw", PolicyID: "a/p", PolicyRev: "1", Cluster: "c", Mode: policy.ModeMonitor,
		Hosts: []string{"*", "*.a.example", "b.example"}, Except: []string{"x.a.example", "*.y.a.example"},
		Next: []mirror.Settings{{PolicyID: "b/p", PolicyRev: "2", Mode: policy.ModeOff, Match: []policy.Match{{}}}},
	}
	want := strings.Join([]string{
		"gateway\tns/gw", "policy\ta/p", "rev\t1", "cluster\tc", "mode\tMonitor", "ppm\t0",
		"hosts\th*\tw.a.example\thb.example", "except\thx.a.example\tw.y.a.example", "request\t0", "response\t0",
		"",
		"gateway\tns/gw", "policy\tb/p", "rev\t2", "cluster\tc", "mode\tOff", "ppm\t0", "match", "request\t0", "response\t0", "",
	}, "\n")
	if d := cmp.Diff(want, s.Encode()); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}
