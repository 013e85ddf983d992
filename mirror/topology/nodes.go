package topology

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/periscope-mesh/periscope/mirror"
)

// nodes gives the endpoints of the node services, one entry for each TCP port
// of a Service. A Service that isn't there has no entry: policies that name it
// say so themselves.
func (r *resolver) nodes(refs []ServiceRef, all []Slice) []mirror.NodeService {
	refs = slices.Clone(refs)
	slices.SortFunc(refs, compareRefs)
	bySlice := map[ServiceRef][]Slice{}
	for _, s := range all {
		ref := ServiceRef{s.Namespace, s.Service}
		bySlice[ref] = append(bySlice[ref], s)
	}
	var out []mirror.NodeService
	for _, ref := range slices.Compact(refs) {
		i, ok := slices.BinarySearchFunc(r.services, ref, func(s Service, ref ServiceRef) int {
			return compareRefs(ServiceRef{s.Namespace, s.Name}, ref)
		})
		if !ok {
			continue
		}
		for _, port := range r.services[i].Ports {
			n := mirror.NodeService{Namespace: ref.Namespace, Name: ref.Name, Port: port.Port}
			n.Endpoints = endpoints(bySlice[ref], port.Name)
			if len(n.Endpoints) > maxEndpoints {
				r.problem(mirror.Target{}, "node service %s/%s has %d endpoints; those beyond the first %d are left out",
					ref.Namespace, ref.Name, len(n.Endpoints), maxEndpoints)
				n.Endpoints = n.Endpoints[:maxEndpoints]
			}
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b mirror.NodeService) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Port, b.Port))
	})
	return out
}

// endpoints lists the ready addresses behind a Service's port. Slices name
// ports as the Service does, and have the numbers that its targetPort leads
// to, which may differ from one pod to the next.
func endpoints(all []Slice, port string) []mirror.Endpoint {
	var out []mirror.Endpoint
	for _, s := range all {
		for _, p := range s.Ports {
			if p.Name != port || p.Port < 1 || p.Port > 65535 {
				continue
			}
			for _, e := range s.Endpoints {
				if ip, err := netip.ParseAddr(e.Address); err == nil && ip.Zone() == "" {
					out = append(out, mirror.Endpoint{Host: ip.Unmap().String(), Port: p.Port, Machine: e.Machine})
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b mirror.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port), cmp.Compare(b.Machine, a.Machine))
	})
	return slices.CompactFunc(out, func(a, b mirror.Endpoint) bool { return a.Host == b.Host && a.Port == b.Port })
}

func compareRefs(a, b ServiceRef) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
