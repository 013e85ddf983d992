package mirror

import (
	"fmt"
	"maps"
	"slices"
)

// maxMachines of a gateway's have nodes of their own to prefer: each takes a
// cluster in the configuration of Istio's gateways.
const maxMachines = 128

// preferLocal leaves of what is known of machines only what makes a difference:
// where pods of a gateway run beside some of its nodes, but not all. All other
// plans are those that they would be if nothing were known.
func preferLocal(plan *Plan) {
	bare := map[string][]Endpoint{} // without machines, by node service
	for i := range plan.Gateways {
		g := &plan.Gateways[i]
		if len(g.Endpoints) == 0 {
			g.Gateway.Machines = nil
			continue
		}
		machines := shared(g.Gateway.Machines, g.Endpoints)
		if n := len(machines); n > maxMachines {
			machines = machines[:maxMachines]
			problem := fmt.Sprintf("gateway %s has nodes beside its pods on %d machines: its pods on those beyond the first %d don't prefer them", g.Gateway.ID(), n, maxMachines)
			for k := range plan.Attachments {
				if a := &plan.Attachments[k]; a.Policy == g.Policy {
					a.Problems = append(a.Problems, problem)
				}
			}
		}
		g.Gateway.Machines = machines
		if machines != nil {
			g.Endpoints = onMachines(g.Endpoints, machines)
			continue
		}
		if _, ok := bare[g.Nodes]; !ok {
			bare[g.Nodes] = onMachines(g.Endpoints, nil)
		}
		g.Endpoints = bare[g.Nodes]
	}
}

// shared gives those of a gateway's machines that have some of the nodes, but
// not all of them, sorted; nil: none.
func shared(machines []string, nodes []Endpoint) []string {
	if len(machines) == 0 {
		return nil
	}
	has := map[string]int{}
	for _, n := range nodes {
		if _, ok := slices.BinarySearch(machines, n.Machine); ok && n.Machine != "" {
			has[n.Machine]++
		}
	}
	maps.DeleteFunc(has, func(_ string, n int) bool { return n == len(nodes) })
	return slices.Sorted(maps.Keys(has))
}

// onMachines is nodes with no other machines than these, which are sorted.
func onMachines(nodes []Endpoint, machines []string) []Endpoint {
	out := slices.Clone(nodes)
	for i := range out {
		if _, ok := slices.BinarySearch(machines, out[i].Machine); !ok {
			out[i].Machine = ""
		}
	}
	return out
}
