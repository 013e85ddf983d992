package main

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/topology"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
)

func testControl(t testing.TB) *control {
	t.Helper()
	c, err := openControl(t.Context(), controlConfig{controlFlags: controlFlags{http: "127.0.0.1:8080", upstream: "http://127.0.0.1:9", gateway: "a/b", xds: "127.0.0.1:0", debug: "127.0.0.1:0"},
		nodes: []mirror.Endpoint{{Host: "127.0.0.1", Port: 1}}, dataDir: t.TempDir(), logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	return c
}

// A plan that can't be published leaves the last one in force, is seen at
// /debug/policyz, and is in force as soon as it can be.
func TestPlanFault(t *testing.T) {
	c := testControl(t)
	before := c.server.Snapshots()
	edit := func(s *controlState) {
		p := policy.Default()
		p.Spec.Sampling.Percent = 7
		s.set.Policies = []policy.MirrorPolicy{p}
	}
	good := c.gateway
	c.gateway.Upstream = "ftp://127.0.0.1"
	if err := c.publish(edit); err == nil {
		t.Fatal("a plan for a gateway without an upstream is published")
	}
	fault := c.policyState().Fault
	if fault == nil || !strings.Contains(fault.Error, "ftp") || fault.Revision == "" || fault.Revision == c.policyState().Revision || fault.At.IsZero() {
		t.Errorf("shown: %+v", fault)
	}
	for key, s := range c.server.Snapshots() {
		if before[key] != s {
			t.Errorf("%s is served something else", key)
		}
	}
	c.gateway = good
	if err := c.publish(func(*controlState) {}); err != nil {
		t.Fatal(err)
	}
	if s := c.policyState(); s.Fault != nil || s.Revision != fault.Revision {
		t.Errorf("the plan is %s, not %s; shown: %+v", s.Revision, fault.Revision, s.Fault)
	}
	if key := xds.GatewayKey("a/b"); c.server.Snapshots()[key] == before[key] {
		t.Error("the gateway is served the old plan")
	}
}

// BenchmarkPublish edits the policy of one of 10,000 gateways, from the policies
// to the snapshots: as gateways of our own take them, and as istiods do.
func BenchmarkPublish(b *testing.B) {
	const namespaces, each = 100, 100
	for _, istio := range []bool{false, true} {
		b.Run(map[bool]string{false: "own", true: "istio"}[istio], func(b *testing.B) {
			c := testControl(b)
			var t mirror.Topology
			var policies []policy.MirrorPolicy
			for i := range namespaces {
				p := policy.Default()
				p.Metadata.Namespace = fmt.Sprintf("team-%02d", i)
				policies = append(policies, p)
				for j := range each {
					g := mirror.Gateway{Namespace: p.Metadata.Namespace, Name: fmt.Sprintf("gateway-%02d", j)}
					if istio {
						g.Selector = map[string]string{"istio": g.Name}
					}
					t.Gateways = append(t.Gateways, g)
				}
			}
			edited := policy.Default()
			edited.Metadata.Namespace, edited.Metadata.Name = "team-42", "edited"
			edited.Spec.TargetRefs = []policy.TargetRef{{Group: policy.GroupIstio, Kind: "Gateway", Name: "gateway-42"}}
			t.Nodes = c.static.Nodes
			if istio {
				c.cluster = new(topology.Watcher)
			}
			publish := func(percent float64) {
				edited.Spec.Sampling.Percent = percent
				if err := c.publish(func(s *controlState) {
					s.placed, s.topology, s.set.Policies = true, t, append([]policy.MirrorPolicy{edited}, policies...)
				}); err != nil {
					b.Fatal(err)
				}
			}
			publish(100)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				publish(float64(1 + i%50))
			}
		})
	}
}

// A gateway of our own prefers the nodes on loopback to others, where there are
// both.
func TestNodesOnLoopback(t *testing.T) {
	for _, tc := range []struct {
		nodes []string
		want  []string // the machine of each in the plan
	}{
		{[]string{"127.0.0.1:1", "192.0.2.1:1", "[::1]:1"}, []string{gatewayMachine, "", gatewayMachine}},
		{[]string{"127.0.0.1:1", "127.0.0.1:2"}, []string{"", ""}},
		{[]string{"192.0.2.1:1", "192.0.2.2:1"}, []string{"", ""}},
	} {
		nodes, err := parseEndpoints(tc.nodes)
		if err != nil {
			t.Fatal(err)
		}
		gw, err := (&controlFlags{gateway: "a/b"}).gatewayID()
		if err != nil {
			t.Fatal(err)
		}
		plan := mirror.Compile([]policy.MirrorPolicy{policy.Default()},
			mirror.Topology{Gateways: []mirror.Gateway{gw}, Nodes: []mirror.NodeService{{StandIn: true, Endpoints: nodes}}})
		var got []string
		for _, e := range plan.Gateways[0].Endpoints {
			got = append(got, e.Machine)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%v: on %q, want %q", tc.nodes, got, tc.want)
		}
	}
}
