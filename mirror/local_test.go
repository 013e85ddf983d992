package mirror_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

func on(machine string, n int) mirror.Endpoint {
	return mirror.Endpoint{Host: fmt.Sprintf("10.0.%d.%d", n/256, n%256), Port: 5050, Machine: machine}
}

// compileOn is of one policy, for gateways in namespace ingress.
func compileOn(nodes []mirror.Endpoint, gateways ...mirror.Gateway) mirror.Plan {
	return mirror.Compile([]policy.MirrorPolicy{named("ingress", "a", nil)},
		mirror.Topology{Gateways: gateways, Nodes: []mirror.NodeService{{Namespace: "ingress", Name: "periscope-node", Endpoints: nodes}}})
}

func onMachines(name string, machines ...string) mirror.Gateway {
	return mirror.Gateway{Namespace: "ingress", Name: name, Machines: machines}
}

func TestCompileKeepsSharedMachines(t *testing.T) {
	for name, tc := range map[string]struct {
		nodes    []mirror.Endpoint
		machines []string
		want     []string // machines of the gateway in the plan
		kept     []string // machine of each node there
	}{
		"one of each":           {[]mirror.Endpoint{on("a", 1), on("b", 2)}, []string{"a", "b"}, []string{"a", "b"}, []string{"a", "b"}},
		"no pod beside b":       {[]mirror.Endpoint{on("a", 1), on("b", 2)}, []string{"a", "c"}, []string{"a"}, []string{"a", ""}},
		"two nodes on one":      {[]mirror.Endpoint{on("a", 1), on("a", 2), on("", 3)}, []string{"a"}, []string{"a"}, []string{"a", "a", ""}},
		"apart":                 {[]mirror.Endpoint{on("a", 1), on("b", 2)}, []string{"c"}, nil, []string{"", ""}},
		"pods' are unknown":     {[]mirror.Endpoint{on("a", 1), on("b", 2)}, nil, nil, []string{"", ""}},
		"nodes' are unknown":    {[]mirror.Endpoint{on("", 1), on("", 2)}, []string{"", "a"}, nil, []string{"", ""}},
		"all on one":            {[]mirror.Endpoint{on("a", 1), on("a", 2)}, []string{"a", "b"}, nil, []string{"", ""}},
		"one node":              {[]mirror.Endpoint{on("a", 1)}, []string{"a"}, nil, []string{""}},
		"no node that is ready": {nil, []string{"a"}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(tc.nodes)
			g := compileOn(tc.nodes, onMachines("public", tc.machines...)).Gateways[0]
			if diff := cmp.Diff(tc.want, g.Gateway.Machines); diff != "" {
				t.Error(diff)
			}
			var kept []string
			for _, e := range g.Endpoints {
				kept = append(kept, e.Machine)
			}
			if diff := cmp.Diff(tc.kept, kept); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(before, tc.nodes); diff != "" {
				t.Errorf("the topology was changed: %s", diff)
			}
		})
	}
}

// Where nobody runs beside a node, plans are what they were before machines were
// known, and one gateway's machines change nothing for another.
func TestMachinesLeaveOtherPlans(t *testing.T) {
	bare := []mirror.Endpoint{on("", 1), on("", 2)}
	known := []mirror.Endpoint{on("a", 1), on("b", 2)}
	if got, want := compileOn(known, onMachines("public", "c")), compileOn(bare, onMachines("public")); cmp.Diff(want, got) != "" {
		t.Error(cmp.Diff(want, got))
	}
	both := compileOn(known, onMachines("beside", "a"), onMachines("public", "c"))
	if diff := cmp.Diff(compileOn(bare, onMachines("public")).Gateways[0], both.Gateways[1]); diff != "" {
		t.Error(diff)
	}
	if both.Gateways[0].Gateway.Machines == nil {
		t.Error("a gateway beside a node does not prefer it")
	}
	ungoverned := mirror.Compile(nil, mirror.Topology{Gateways: []mirror.Gateway{onMachines("public", "a")}})
	if ungoverned.Gateways[0].Gateway.Machines != nil {
		t.Error("a gateway without nodes has machines")
	}
}

func TestMachinesAreBounded(t *testing.T) {
	var nodes []mirror.Endpoint
	var machines []string
	for i := range 200 {
		machines = append(machines, fmt.Sprintf("m%03d", i))
		nodes = append(nodes, on(machines[i], i))
	}
	plan := compileOn(nodes, onMachines("public", machines...))
	g := plan.Gateways[0]
	if n := len(g.Gateway.Machines); n != 128 {
		t.Errorf("%d machines", n)
	}
	for i, e := range g.Endpoints {
		if (e.Machine != "") != (i < 128) {
			t.Errorf("node %d: machine %q", i, e.Machine)
		}
	}
	if p := plan.Attachments[0].Problems; len(p) != 1 || !strings.Contains(p[0], "on 200 machines") {
		t.Errorf("problems %q", p)
	}
}
