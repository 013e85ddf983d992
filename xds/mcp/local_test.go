package mcp_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/encoding/protojson"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// beside is a plan of a gateway with pods on machines, to these nodes.
func beside(machines []string, nodes ...mirror.Endpoint) mirror.Plan {
	g := workload("public")
	g.Machines = machines
	return mirror.Compile([]policy.MirrorPolicy{policyFor("public", nil)},
		mirror.Topology{Gateways: []mirror.Gateway{g}, Nodes: []mirror.NodeService{{Endpoints: nodes, StandIn: true}}})
}

// What a large fleet's EnvoyFilter holds is bounded, the cluster for all pods is
// its last, and no node stands in for many more machines than others.
func TestLocalClusters(t *testing.T) {
	var nodes []mirror.Endpoint
	var machines []string
	for i := range 1000 {
		machines = append(machines, fmt.Sprintf("host-%03d.eu-central-1.compute.internal", i))
		nodes = append(nodes, mirror.Endpoint{Host: fmt.Sprintf("10.1.%d.%d", i/256, i%256), Port: 5050, Machine: machines[i]})
	}
	patches := clusterPatches(t, beside(machines, nodes...))
	seen, standIns := map[string]bool{}, map[string]int{}
	for i, p := range patches {
		machine := p.Match.GetProxy().GetMetadata()["NODE_NAME"]
		if last := i == len(patches)-1; last != (machine == "") || seen[machine] {
			t.Fatalf("patch %d of %d is for machine %q", i, len(patches), machine)
		}
		seen[machine] = true
		if machine == "" {
			continue
		}
		raw, err := protojson.Marshal(p.Patch.Value)
		c := &cluster.Cluster{}
		if err := errors.Join(err, protojson.Unmarshal(raw, c)); err != nil {
			t.Fatal(err)
		}
		groups := c.GetLoadAssignment().GetEndpoints()
		if len(groups) != 2 || len(groups[0].LbEndpoints) != 1 || len(groups[1].LbEndpoints) != 32 {
			t.Fatalf("%s: %v", machine, groups)
		}
		for _, e := range groups[1].LbEndpoints {
			standIns[e.GetEndpoint().GetAddress().GetSocketAddress().GetAddress()]++
		}
	}
	if len(seen) != 129 {
		t.Errorf("clusters for %d machines", len(seen)-1)
	}
	for node, n := range standIns {
		if n > 32 {
			t.Errorf("%s stands in for %d machines", node, n)
		}
	}
}

// clusterPatches are those of a plan's one gateway.
func clusterPatches(t *testing.T, p mirror.Plan) []*networking.EnvoyFilter_EnvoyConfigObjectPatch {
	t.Helper()
	var out []*networking.EnvoyFilter_EnvoyConfigObjectPatch
	for _, r := range snapshot(t, config(mcp.FormEnvoyFilter), p).Resources(envoyFilterType) {
		m, filter := &mcpv1alpha1.Resource{}, &networking.EnvoyFilter{}
		if err := errors.Join(r.Any.UnmarshalTo(m), m.GetBody().UnmarshalTo(filter)); err != nil {
			t.Fatal(err)
		}
		if n := len(r.Any.GetValue()); n > 1<<20 {
			t.Errorf("%s has %d bytes", r.Name, n)
		}
		for _, p := range filter.ConfigPatches {
			if p.ApplyTo == networking.EnvoyFilter_CLUSTER {
				out = append(out, p)
			}
		}
	}
	return out
}

// A machine's name that fits into no label makes no difference in the form that
// takes labels.
func TestMachineThatIsNoLabel(t *testing.T) {
	long := strings.Repeat("a.", 32) + "b"
	nodes := func(machine string) mirror.Plan {
		return beside([]string{machine}, mirror.Endpoint{Host: "10.0.0.1", Port: 1, Machine: machine}, mirror.Endpoint{Host: "10.0.0.2", Port: 1})
	}
	if got, want := render(t, config(mcp.FormTrafficExtension), nodes(long)), render(t, config(mcp.FormTrafficExtension), nodes("")); got != want {
		t.Errorf("a service with a label of %d bytes", len(long))
	}
}

// Through a real istiod into real Envoys: each goes to the node on its machine,
// to others while that is away, and back. An Envoy that doesn't tell its machine,
// or is on one without nodes, goes to all.
func TestRealIstiodMachines(t *testing.T) {
	kubetest.Binary(t, "istiod")
	envoytest.Path(t)
	server, address := serve(t)
	machines := []string{"host-a", "host-b", "host-c"}
	nodes := map[string]*collector{}
	var endpoints []mirror.Endpoint
	for _, m := range machines {
		c, e := startCollector(t)
		e.Machine = m
		nodes[m], endpoints = c, append(endpoints, e)
	}
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "upstream") }))
	t.Cleanup(upstream.Close)

	cluster := kubetest.Start(t)
	cluster.InstallIstio(t)
	cluster.Namespace(t, "istio-ingress")
	_, upstreamPort, _ := net.SplitHostPort(strings.TrimPrefix(upstream.URL, "http://"))
	_, port, _ := net.SplitHostPort(envoytest.FreeAddr(t))
	cluster.Apply(t, kubetest.WebGateway("istio-ingress", "public", port, upstreamPort)+`---
apiVersion: v1
kind: Service
metadata: {name: public, namespace: istio-ingress}
spec: {selector: {istio: public}, ports: [{name: http, port: `+port+`, targetPort: web}]}
`)
	fronts := map[string]string{} // by machine
	for i, m := range []string{"host-a", "host-b", "host-d", ""} {
		fronts[m] = envoytest.FreeAddr(t)
		_, port, _ := net.SplitHostPort(fronts[m])
		cluster.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: public-%d, namespace: istio-ingress, labels: {istio: public}}
spec: {containers: [{name: istio-proxy, image: none, ports: [{name: web, containerPort: %s}]}]}
`, i, port))
	}
	pods := []string{"host-a", "host-b", "host-d"}
	publish := func(form mcp.Form) {
		server.SetSnapshot(mcp.Key(""), snapshot(t, config(form), beside(pods, endpoints...)))
	}
	publish(mcp.FormEnvoyFilter)
	i := kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: cluster, Sources: []string{"xds://" + address}})
	gateways := map[string]*envoytest.Envoy{}
	for n, m := range append(pods, "") {
		gateways[m] = kubetest.StartRouter(t, kubetest.RouterConfig{XDS: i.GRPC, Name: fmt.Sprint("public-", n), Namespace: "istio-ingress", IP: "127.0.0.9", Labels: map[string]string{"istio": "public"}, Machine: m})
	}
	client := &http.Client{Timeout: 5 * time.Second}
	t.Cleanup(client.CloseIdleConnections)
	ask := func(machine string) bool {
		res, err := client.Get("http://" + fronts[machine] + "/")
		if err != nil {
			return false
		}
		return errors.Join(res.Body.Close()) == nil && res.StatusCode == http.StatusOK
	}
	for m := range fronts {
		envoytest.Eventually(t, 30*time.Second, "the gateway on "+m+" serves", func() bool { return ask(m) })
	}
	// reaches waits until fifty batches in turn of the gateway on a machine come to
	// the nodes on these, to each some, and to no others. Meanwhile all users' requests
	// succeed.
	reaches := func(what, machine string, want ...string) {
		t.Helper()
		start := time.Now()
		before, got := map[string]int{}, map[string]int{}
		for _, m := range machines {
			before[m] = nodes[m].batches()
		}
		envoytest.Eventually(t, 40*time.Second, what, func() bool {
			if !ask(machine) {
				t.Fatalf("%s: a user's request failed", what)
			}
			total, each := 0, true
			for _, m := range machines {
				n := nodes[m].batches()
				got[m] += n - before[m]
				before[m] = n
				if got[m] > 0 && !slices.Contains(want, m) {
					clear(got)
				}
			}
			for _, m := range want {
				total += got[m]
				each = each && got[m] > 0
			}
			return total >= 50 && each
		})
		t.Logf("%s: after %v", what, time.Since(start).Round(time.Millisecond))
	}
	requests := map[mcp.Form]string{ // through the nodes' cluster; dots stand for what would mean something else in a pattern
		mcp.FormEnvoyFilter:      "cluster.periscope_mirror.upstream_rq_total",
		mcp.FormTrafficExtension: "cluster.outbound.5050..periscope-public-nodes.istio-ingress.periscope.internal..upstream_rq_total",
	}
	for _, form := range []mcp.Form{mcp.FormEnvoyFilter, mcp.FormTrafficExtension} {
		t.Run(string(form), func(t *testing.T) {
			publish(form)
			for m, g := range gateways {
				envoytest.Eventually(t, 30*time.Second, "it is in force on "+m, func() bool { ask(m); return g.Stat(requests[form]) > 0 })
			}
			reaches("host-a to its own", "host-a", "host-a")
			reaches("host-b to its own", "host-b", "host-b")
			reaches("a machine without nodes to all", "host-d", machines...)
			reaches("a machine that isn't told to all", "", machines...)
			nodes["host-a"].stop()
			reaches("host-a to the others", "host-a", "host-b", "host-c")
			reaches("host-b goes on", "host-b", "host-b")
			nodes["host-b"].stop()
			reaches("host-a to the one that is left", "host-a", "host-c")
			reaches("host-b too", "host-b", "host-c")
			nodes["host-a"].start()
			nodes["host-b"].start()
			reaches("host-a to its own again", "host-a", "host-a")
			reaches("host-b too", "host-b", "host-b")
		})
	}
}
