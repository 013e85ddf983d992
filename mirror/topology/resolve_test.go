package topology

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

type set = map[string]string

func pods(namespace string, labels set, names ...string) []Pod {
	var out []Pod
	for _, n := range names {
		out = append(out, Pod{Namespace: namespace, Name: n, Labels: labels})
	}
	return out
}

func join[T any](lists ...[]T) []T {
	var out []T
	for _, l := range lists {
		out = append(out, l...)
	}
	return out
}

func istioTarget(namespace, name string) mirror.Target {
	return mirror.Target{Group: policy.GroupIstio, Namespace: namespace, Name: name}
}

func apiTarget(namespace, name string) mirror.Target {
	return mirror.Target{Group: policy.GroupGatewayAPI, Namespace: namespace, Name: name}
}

func hosted(t mirror.Target, hosts ...string) mirror.Target {
	t.Hosts = hosts
	return t
}

// manyHosts gives different ones in their order.
func manyHosts(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("h%04d.example", i)
	}
	return out
}

func TestResolve(t *testing.T) {
	ingress := set{"app": "istio-ingressgateway", "istio": "ingressgateway"}
	gateway := mirror.Gateway{
		Namespace: "istio-system", Name: "istio-ingressgateway", Labels: ingress, Selector: set{"istio": "ingressgateway"},
		Targets: []mirror.Target{istioTarget("shop", "public")}, Pods: []string{"gw-0", "gw-1"},
	}
	for name, c := range map[string]struct {
		in       Inputs
		want     []mirror.Gateway
		problems []Problem
	}{
		"nothing": {},
		"a gateway's pods are in another namespace": {
			in: Inputs{
				Istio: []IstioGateway{{Namespace: "shop", Name: "public", Selector: set{"istio": "ingressgateway"}}},
				Pods:  join(pods("istio-system", ingress, "gw-1", "gw-0"), pods("shop", set{"app": "cart"}, "cart-0")),
			},
			want: []mirror.Gateway{gateway},
		},
		"unless istiod is told not to look there": {
			in: Inputs{
				Istio:            []IstioGateway{{Namespace: "shop", Name: "public", Selector: set{"istio": "ingressgateway"}}},
				Pods:             pods("istio-system", ingress, "gw-0"),
				ScopeToNamespace: true,
			},
			problems: []Problem{{istioTarget("shop", "public"), "no pod in namespace shop carries the labels of spec.selector: istio=ingressgateway"}},
		},
		"an empty selector is no guess": {
			in: Inputs{Istio: []IstioGateway{{Namespace: "shop", Name: "all", Selector: nil}}, Pods: pods("istio-system", ingress, "gw-0")},
			problems: []Problem{{istioTarget("shop", "all"),
				"spec.selector is empty, which means every gateway of the mesh: give it the labels of the gateways that it is for"}},
		},
		"two Gateways of the same pods are one workload": {
			in: Inputs{
				Istio: []IstioGateway{{Namespace: "shop", Name: "public", Selector: set{"istio": "ingressgateway"}}, {Namespace: "bank", Name: "public", Selector: set{"app": "istio-ingressgateway"}}},
				Pods:  pods("istio-system", ingress, "gw-0"),
			},
			want: []mirror.Gateway{{
				Namespace: "istio-system", Name: "istio-ingressgateway", Labels: ingress, Selector: ingress,
				Targets: []mirror.Target{istioTarget("bank", "public"), istioTarget("shop", "public")}, Pods: []string{"gw-0"},
			}},
		},
		"one Gateway, two namespaces: two workloads": {
			in: Inputs{
				Istio: []IstioGateway{{Namespace: "shop", Name: "public", Selector: set{"istio": "gw"}}},
				Pods:  join(pods("b", set{"istio": "gw"}, "p"), pods("a", set{"istio": "gw"}, "p")),
			},
			want: []mirror.Gateway{
				{Namespace: "a", Name: "gw", Labels: set{"istio": "gw"}, Selector: set{"istio": "gw"}, Targets: []mirror.Target{istioTarget("shop", "public")}, Pods: []string{"p"}},
				{Namespace: "b", Name: "gw", Labels: set{"istio": "gw"}, Selector: set{"istio": "gw"}, Targets: []mirror.Target{istioTarget("shop", "public")}, Pods: []string{"p"}},
			},
		},
		"hosts are those that policies can name": {
			in: Inputs{
				Istio: []IstioGateway{
					{Namespace: "shop", Name: "web", Selector: set{"app": "gw"}, Hosts: []string{"shop/Shop.Example.", "./*.shop.example", "*/shop.example", "shop/", "a/b/c", "*.", "x*.example", "shop.example:80"}},
					{Namespace: "shop", Name: "all", Selector: set{"app": "gw"}, Hosts: []string{"*/*"}},
					{Namespace: "shop", Name: "many", Selector: set{"app": "gw"}, Hosts: manyHosts(2 * maxHosts)},
					{Namespace: "shop", Name: "twice", Selector: set{"app": "gw"}, Hosts: append(manyHosts(maxHosts), manyHosts(maxHosts)...)},
				},
				GatewayAPI: []APIGateway{{Namespace: "bank", Name: "gw", Addresses: []Address{{true, "gw"}}, Hosts: []string{"bank.example", "*"}}},
				Services:   []Service{{Namespace: "bank", Name: "gw", Selector: set{"app": "gw"}}},
				Pods:       pods("bank", set{"app": "gw"}, "p"),
			},
			want: []mirror.Gateway{{
				Namespace: "bank", Name: "gw", Labels: set{"app": "gw"}, Selector: set{"app": "gw"}, Pods: []string{"p"},
				Targets: []mirror.Target{
					hosted(apiTarget("bank", "gw"), "*", "bank.example"),
					hosted(istioTarget("shop", "all"), "*"),
					hosted(istioTarget("shop", "many"), manyHosts(maxHosts)...),
					hosted(istioTarget("shop", "twice"), manyHosts(maxHosts)...),
					hosted(istioTarget("shop", "web"), "*.shop.example", "shop.example"),
				},
			}},
			problems: []Problem{
				{istioTarget("shop", "many"), "it has more than 256 hosts; policies that target it don't apply to the others"},
				{istioTarget("shop", "web"), `policies that target it don't apply to 5 of its hosts, which are no names of hosts, such as "*."`},
			},
		},
		"overlapping Gateways split their pods": {
			in: Inputs{
				Istio: []IstioGateway{{Namespace: "ns", Name: "all", Selector: set{"istio": "gw"}}, {Namespace: "ns", Name: "blue", Selector: set{"color": "blue"}}},
				Pods: join(pods("ns", set{"istio": "gw", "color": "blue"}, "b"),
					pods("ns", set{"istio": "gw", "color": "red"}, "r")),
			},
			want: []mirror.Gateway{
				{Namespace: "ns", Name: "gw", Labels: set{"istio": "gw", "color": "red"}, Selector: set{"istio": "gw", "color": "red"},
					Targets: []mirror.Target{istioTarget("ns", "all")}, Pods: []string{"r"}},
				{Namespace: "ns", Name: "gw-" + digest(&mirror.Gateway{Selector: set{"istio": "gw", "color": "blue"}}),
					Labels: set{"istio": "gw", "color": "blue"}, Selector: set{"istio": "gw", "color": "blue"},
					Targets: []mirror.Target{istioTarget("ns", "all"), istioTarget("ns", "blue")}, Pods: []string{"b"}},
			},
		},
		"pods that no labels tell apart": {
			in: Inputs{
				Istio: []IstioGateway{{Namespace: "ns", Name: "all", Selector: set{"istio": "gw"}}, {Namespace: "ns", Name: "more", Selector: set{"extra": "y"}}},
				Pods: join(pods("ns", set{"istio": "gw", "pod-template-hash": "1"}, "a"),
					pods("ns", set{"istio": "gw", "extra": "y", "pod-template-hash": "2"}, "b")),
			},
			want: []mirror.Gateway{{
				Namespace: "ns", Name: "gw", Labels: set{"istio": "gw", "extra": "y", "pod-template-hash": "2"}, Selector: set{"istio": "gw", "extra": "y"},
				Targets: []mirror.Target{istioTarget("ns", "all"), istioTarget("ns", "more")}, Pods: []string{"b"},
			}},
			problems: []Problem{{istioTarget("ns", "all"),
				"no labels tell its pods in namespace ns (a, 1 in all) from those of other gateways: give them a label of their own"}},
		},
		"Gateway API, deployed by Istio": {
			in: Inputs{
				GatewayAPI: []APIGateway{
					{Namespace: "shop", Name: "public", Class: "istio"},
					{Namespace: "shop", Name: "pinned", Class: "istio", Addresses: []Address{{Value: "192.0.2.1"}}},
					{Namespace: "bank", Name: "public", Class: "istio"},
					{Namespace: "shop", Name: "waypoint", Class: "istio-waypoint"},
				},
				Pods: join(pods("shop", set{gatewayNameLabel: "public", "x": "1"}, "p-1"), pods("shop", set{gatewayNameLabel: "public", "x": "2"}, "p-2"),
					pods("shop", set{gatewayNameLabel: "pinned"}, "q"), pods("shop", set{gatewayNameLabel: "waypoint"}, "w")),
			},
			want: []mirror.Gateway{
				{Namespace: "shop", Name: "pinned", Labels: set{gatewayNameLabel: "pinned"}, Selector: set{gatewayNameLabel: "pinned"},
					Targets: []mirror.Target{apiTarget("shop", "pinned")}, Pods: []string{"q"}},
				{Namespace: "shop", Name: "public", Labels: set{gatewayNameLabel: "public"}, Selector: set{gatewayNameLabel: "public"},
					Targets: []mirror.Target{apiTarget("shop", "public")}, Pods: []string{"p-1", "p-2"}},
			},
			problems: []Problem{
				{apiTarget("bank", "public"), "no pod in namespace bank carries the label gateway.networking.k8s.io/gateway-name=public"},
				{apiTarget("shop", "waypoint"), "it is a waypoint (class istio-waypoint), not an ingress gateway"},
			},
		},
		"Gateway API, deployed by hand": {
			in: Inputs{
				GatewayAPI: []APIGateway{
					{Namespace: "shop", Name: "short", Addresses: []Address{{true, "gw"}}},
					{Namespace: "shop", Name: "long", Addresses: []Address{{true, "ingress.istio-system.svc.cluster.local"}}},
					{Namespace: "shop", Name: "bad", Addresses: []Address{{true, "www.example.com"}, {false, "192.0.2.1"}, {true, "none"}, {true, "external"}, {true, "empty"}}},
				},
				Istio: []IstioGateway{{Namespace: "shop", Name: "classic", Selector: set{"istio": "ingressgateway"}}},
				Services: []Service{
					{Namespace: "shop", Name: "gw", Selector: set{"app": "gw"}},
					{Namespace: "shop", Name: "external"},
					{Namespace: "shop", Name: "empty", Selector: set{"app": "away"}},
					{Namespace: "istio-system", Name: "ingress", Selector: set{"istio": "ingressgateway"}},
				},
				Pods: join(pods("shop", set{"app": "gw"}, "g"), pods("istio-system", ingress, "i"), pods("istio-system", set{"app": "gw"}, "other")),
			},
			want: []mirror.Gateway{
				{Namespace: "istio-system", Name: "istio-ingressgateway", Labels: ingress, Selector: set{"istio": "ingressgateway"},
					Targets: []mirror.Target{apiTarget("shop", "long"), istioTarget("shop", "classic")}, Pods: []string{"i"}},
				{Namespace: "shop", Name: "gw", Labels: set{"app": "gw"}, Selector: set{"app": "gw"}, Targets: []mirror.Target{apiTarget("shop", "short")}, Pods: []string{"g"}},
			},
			problems: []Problem{
				{apiTarget("shop", "bad"), "spec.addresses[0]: \"www.example.com\" is no Service: write NAME, or NAME.NAMESPACE.svc.DOMAIN"},
				{apiTarget("shop", "bad"), "spec.addresses[1]: only a Hostname, that of a Service, leads to pods"},
				{apiTarget("shop", "bad"), "spec.addresses[2]: there is no Service \"none\" in namespace \"shop\""},
				{apiTarget("shop", "bad"), "spec.addresses[3]: Service shop/external has no selector, so its pods can't be told"},
				{apiTarget("shop", "bad"), "spec.addresses[4]: Service shop/empty has no pods: none carries app=away"},
			},
		},
		"a name from the owner": {
			in: Inputs{
				Istio: []IstioGateway{{Namespace: "ns", Name: "g", Selector: set{"role": "edge"}}},
				Pods:  []Pod{{Namespace: "ns", Name: "Edge_GW-7d9-x", Labels: set{"role": "edge"}, Owner: "Edge_GW"}},
			},
			want: []mirror.Gateway{{Namespace: "ns", Name: "edge-gw", Labels: set{"role": "edge"}, Selector: set{"role": "edge"},
				Targets: []mirror.Target{istioTarget("ns", "g")}, Pods: []string{"Edge_GW-7d9-x"}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if c.want == nil {
				c.want = []mirror.Gateway{}
			}
			for range 5 { // whatever the order
				shuffle(c.in.Pods)
				shuffle(c.in.Istio)
				shuffle(c.in.GatewayAPI)
				shuffle(c.in.Services)
				got, problems := Resolve(c.in)
				if diff := cmp.Diff(c.want, got.Gateways); diff != "" {
					t.Fatal(diff)
				}
				if diff := cmp.Diff(c.problems, problems); diff != "" {
					t.Fatal(diff)
				}
			}
		})
	}
}

func shuffle[T any](s []T) { rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] }) }

func TestResolveNodes(t *testing.T) {
	http := ServicePort{"http", 8080}
	at := func(addresses ...string) (out []SliceEndpoint) {
		for _, a := range addresses {
			address, machine, _ := strings.Cut(a, "@")
			out = append(out, SliceEndpoint{address, machine})
		}
		return out
	}
	got, problems := Resolve(Inputs{
		NodeServices: []ServiceRef{{"ns", "node"}, {"ns", "node"}, {"ns", "absent"}, {"ns", "idle"}},
		Services: []Service{
			{Namespace: "ns", Name: "node", Ports: []ServicePort{{"mirror", 5050}, {"http", 80}}},
			{Namespace: "ns", Name: "idle", Ports: []ServicePort{{"", 5050}}},
			{Namespace: "ns", Name: "unnamed", Ports: []ServicePort{{"", 5050}}},
		},
		Slices: []Slice{
			{"ns", "node", []ServicePort{{"mirror", 15050}, http}, at("10.0.0.2@b", "10.0.0.1", "10.0.0.1@a", "bad", "fe80::1%eth0")},
			{"ns", "node", []ServicePort{{"mirror", 25050}, {"mirror", 70000}}, at("fd00:0::1")},
			{"other", "node", []ServicePort{{"mirror", 1}}, at("10.0.0.9")},
			{"ns", "unnamed", []ServicePort{http}, at("10.0.0.8")},
		},
	})
	want := []mirror.NodeService{
		{Namespace: "ns", Name: "idle", Port: 5050},
		{Namespace: "ns", Name: "node", Port: 80, Endpoints: []mirror.Endpoint{{Host: "10.0.0.1", Port: 8080, Machine: "a"}, {Host: "10.0.0.2", Port: 8080, Machine: "b"}}},
		{Namespace: "ns", Name: "node", Port: 5050, Endpoints: []mirror.Endpoint{
			{Host: "10.0.0.1", Port: 15050, Machine: "a"}, {Host: "10.0.0.2", Port: 15050, Machine: "b"}, {Host: "fd00::1", Port: 25050}}},
	}
	if diff := cmp.Diff(want, got.Nodes); diff != "" {
		t.Error(diff)
	}
	if len(problems) > 0 {
		t.Error(problems)
	}
}

// A cluster of hostile labels and sizes is resolved in reasonable time, and
// what comes of it is bounded and sound.
func TestResolveHostile(t *testing.T) {
	var in Inputs
	odd := []string{"", "*", "\x00", "..", strings.Repeat("x", 1<<16), "\xff\xfe", "a=b,c=d", "日本"}
	for i := range 2 * maxGateways {
		in.Istio = append(in.Istio, IstioGateway{"ns", fmt.Sprint(i), set{odd[i%len(odd)]: odd[i/len(odd)%len(odd)], "g": fmt.Sprint(i % 50)}, odd})
		in.GatewayAPI = append(in.GatewayAPI, APIGateway{Namespace: "ns", Name: fmt.Sprint(i), Addresses: []Address{{true, odd[i%len(odd)]}}})
	}
	for i := range maxSelected + 5000 {
		labels := set{"g": fmt.Sprint(i % 50), "app": odd[i%len(odd)]}
		for _, k := range odd {
			labels[k] = odd[i/50%len(odd)]
		}
		in.Pods = append(in.Pods, Pod{"ns", fmt.Sprint(i), labels, odd[i%len(odd)], odd[i%len(odd)]})
	}
	start := time.Now()
	got, problems := Resolve(in)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
	seen := map[string]bool{}
	owner := map[string]string{}
	for _, g := range got.Gateways {
		if seen[g.ID()] || g.Name == "" || len(g.Name) > maxNameBytes || len(g.Selector) == 0 {
			t.Fatalf("gateway %q: repeated, unnamed or unselected", g.ID())
		}
		seen[g.ID()] = true
		for _, p := range g.Pods {
			if owner[p] != "" {
				t.Fatalf("pod %s is of %s and %s", p, owner[p], g.ID())
			}
			owner[p] = g.ID()
		}
	}
	for _, p := range problems {
		if len(p.Reason) > maxReason {
			t.Fatalf("a reason of %d bytes", len(p.Reason))
		}
	}
	if len(got.Gateways) == 0 || len(problems) == 0 {
		t.Errorf("%d gateways, %d problems", len(got.Gateways), len(problems))
	}
}

// What a selector picks in its namespace is exactly the workload's pods.
func FuzzSelectorsAreExact(f *testing.F) {
	f.Add(uint64(1))
	f.Add(uint64(42))
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 7))
		labels := func(n int) set {
			s := set{}
			for range n {
				s[fmt.Sprint("k", r.IntN(4))] = fmt.Sprint("v", r.IntN(2))
			}
			return s
		}
		var in Inputs
		for i := range r.IntN(20) {
			in.Pods = append(in.Pods, Pod{fmt.Sprint("n", r.IntN(2)), fmt.Sprint("p", i), labels(4), "", ""})
		}
		for i := range r.IntN(6) {
			in.Istio = append(in.Istio, IstioGateway{fmt.Sprint("n", r.IntN(2)), fmt.Sprint("g", i), labels(1 + r.IntN(2)), nil})
		}
		in.ScopeToNamespace = r.IntN(2) == 0
		got, problems := Resolve(in)
		for _, g := range got.Gateways {
			var picked []string
			for _, p := range bounded(&resolver{}, in.Pods, maxPods, "", func(p Pod) (string, string) { return p.Namespace, p.Name }) {
				if p.Namespace == g.Namespace && carries(p.Labels, g.Selector) {
					picked = append(picked, p.Name)
				}
			}
			if diff := cmp.Diff(g.Pods, picked); diff != "" {
				t.Errorf("%s %v: %s", g.ID(), g.Selector, diff)
			}
		}
		if len(in.Istio) > 0 && len(got.Gateways) == 0 && len(problems) == 0 {
			t.Error("gateways vanished without a reason")
		}
	})
}

func BenchmarkResolve(b *testing.B) {
	var in Inputs
	for i := range 10000 {
		in.Pods = append(in.Pods, Pod{fmt.Sprint("ns-", i%50), fmt.Sprint("pod-", i), set{
			"app": fmt.Sprint("app-", i%500), "version": "v1", "pod-template-hash": fmt.Sprint(i % 1000), "istio": fmt.Sprint("gw-", i%1000),
		}, "", ""})
	}
	for i := range maxGateways {
		in.Istio = append(in.Istio, IstioGateway{"ns-0", fmt.Sprint("g-", i), set{"istio": fmt.Sprint("gw-", i)}, nil})
	}
	b.ReportAllocs()
	for b.Loop() {
		Resolve(in)
	}
}
