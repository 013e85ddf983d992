package topology

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

// Bounds of what Resolve looks at. What is beyond them, in the order of
// namespace and name, is left out, and a Problem says so.
const (
	maxPods      = 100000 // of the cluster
	maxSelected  = 10000  // that Gateways stand for
	maxGateways  = 1000   // of each API
	maxServices  = 10000
	maxEndpoints = 1000 // of one node service
	maxHosts     = 256  // of one Gateway
	maxReason    = 512  // bytes
)

// gatewayNameLabel marks the pods of a Gateway API Gateway that were deployed
// for it.
const gatewayNameLabel = "gateway.networking.k8s.io/gateway-name"

// waypointClass is of Gateways that serve the mesh's inside.
const waypointClass = "istio-waypoint"

// Inputs is what a topology follows from. Resolve changes none of it.
type Inputs struct {
	Istio      []IstioGateway
	GatewayAPI []APIGateway
	Pods       []Pod // that run or are about to
	Services   []Service
	Slices     []Slice // of the node services

	NodeServices []ServiceRef // the services of analysis nodes that policies name
	// ScopeToNamespace is istiod's PILOT_SCOPE_GATEWAY_TO_NAMESPACE: an Istio
	// Gateway selects pods of its own namespace only.
	ScopeToNamespace bool
}

// IstioGateway is a Gateway of networking.istio.io.
type IstioGateway struct {
	Namespace, Name string
	Selector        map[string]string
	Hosts           []string // of its servers, as written: "ns/host" or "host"
}

// APIGateway is a Gateway of gateway.networking.k8s.io.
type APIGateway struct {
	Namespace, Name string
	Class           string
	Addresses       []Address
	Hosts           []string // of its listeners; "*" is that of a listener without any
}

// Address is one of a Gateway's spec.addresses.
type Address struct {
	Hostname bool
	Value    string
}

// Pod is what counts of a pod.
type Pod struct {
	Namespace, Name string
	Labels          map[string]string
	Owner           string // the name of its controller, a Deployment rather than its ReplicaSet
	Machine         string // Kubernetes' node of it; empty: not known
}

// Service is what counts of a Service.
type Service struct {
	Namespace, Name string
	Selector        map[string]string
	Ports           []ServicePort
}

// ServicePort is a TCP port of a Service.
type ServicePort struct {
	Name string
	Port int
}

// Slice is what counts of an EndpointSlice: its ready endpoints.
type Slice struct {
	Namespace, Service string
	Ports              []ServicePort // by the Service's port names, with the endpoints' numbers
	Endpoints          []SliceEndpoint
}

// SliceEndpoint is an endpoint of a Slice.
type SliceEndpoint struct {
	Address string
	Machine string // Kubernetes' node of it; empty: not known
}

// ServiceRef names a Service.
type ServiceRef struct{ Namespace, Name string }

// Problem is a Gateway resource that leads to no workload, or not to all of
// its pods. The zero Target stands for the topology as a whole.
type Problem struct {
	Target mirror.Target
	Reason string
}

// Resolve finds the workloads behind Gateway resources.
//
// A Gateway stands for a set of pods. Pods form one workload when they are of
// the same namespace and exactly the same Gateways stand for them: two
// Gateways with the same pods are two Targets of one workload; where the sets
// overlap, the pods in common are a workload of their own, which has the
// Targets of both. A workload whose pods no set of labels tells from others of
// its namespace is left out with a Problem, since whatever was meant for it
// would reach the others.
//
// It is pure: the same Inputs, in whatever order, give the same result.
func Resolve(in Inputs) (mirror.Topology, []Problem) {
	r := resolver{scoped: in.ScopeToNamespace, selections: map[string]*selection{}}
	r.pods = bounded(&r, in.Pods, maxPods, "pods", func(p Pod) (string, string) { return p.Namespace, p.Name })
	r.services = bounded(&r, in.Services, maxServices, "services", func(s Service) (string, string) { return s.Namespace, s.Name })
	for _, g := range bounded(&r, in.Istio, maxGateways, "Istio Gateways", func(g IstioGateway) (string, string) { return g.Namespace, g.Name }) {
		r.istio(g)
	}
	for _, g := range bounded(&r, in.GatewayAPI, maxGateways, "Gateway API Gateways", func(g APIGateway) (string, string) { return g.Namespace, g.Name }) {
		r.gatewayAPI(g)
	}
	r.selectPods()
	t := mirror.Topology{Gateways: r.workloads(), Nodes: r.nodes(in.NodeServices, in.Slices)}
	slices.SortFunc(r.problems, func(a, b Problem) int {
		return cmp.Or(compareTargets(a.Target, b.Target), cmp.Compare(a.Reason, b.Reason))
	})
	return t, slices.CompactFunc(r.problems, func(a, b Problem) bool {
		return compareTargets(a.Target, b.Target) == 0 && a.Reason == b.Reason
	})
}

// resolver is the state of one Resolve.
type resolver struct {
	scoped   bool
	pods     []Pod
	services []Service
	problems []Problem

	selections map[string]*selection
	ordered    []*selection // in the order they were made
}

// selection is a set of pods that some Gateways stand for. Gateways that
// select alike share one, so that a thousand of them cost little more than one.
type selection struct {
	id        int
	namespace string // empty: all
	labels    map[string]string
	claims    []claim
	pods      []int
}

// claim is a Gateway's on the pods of a selection.
type claim struct {
	target mirror.Target
	absent string // the problem if there are none
}

// label is one that a selection asks for.
type label struct{ key, value string }

func bounded[T any](r *resolver, all []T, limit int, what string, key func(T) (string, string)) []T {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b T) int {
		an, am := key(a)
		bn, bm := key(b)
		return cmp.Or(cmp.Compare(an, bn), cmp.Compare(am, bm))
	})
	if len(all) > limit {
		r.problem(mirror.Target{}, "there are %d %s; those beyond the first %d are left out", len(all), what, limit)
		all = all[:limit]
	}
	return all
}

func (r *resolver) problem(t mirror.Target, format string, args ...any) {
	t.Hosts = nil // a problem is of the resource
	r.problems = append(r.problems, Problem{Target: t, Reason: clip(fmt.Sprintf(format, args...), maxReason)})
}

func (r *resolver) istio(g IstioGateway) {
	target := mirror.Target{Group: policy.GroupIstio, Namespace: g.Namespace, Name: g.Name}
	target.Hosts = r.hosts(target, g.Hosts)
	if len(g.Selector) == 0 {
		r.problem(target, "spec.selector is empty, which means every gateway of the mesh: give it the labels of the gateways that it is for")
		return
	}
	namespace := ""
	if r.scoped {
		namespace = g.Namespace
	}
	r.claim(target, namespace, g.Selector, fmt.Sprintf("no pod%s carries the labels of spec.selector: %s", in(namespace), labelText(g.Selector)))
}

func (r *resolver) gatewayAPI(g APIGateway) {
	target := mirror.Target{Group: policy.GroupGatewayAPI, Namespace: g.Namespace, Name: g.Name}
	target.Hosts = r.hosts(target, g.Hosts)
	switch {
	case g.Class == waypointClass:
		r.problem(target, "it is a waypoint (class %s), not an ingress gateway", waypointClass)
		return
	case automated(g.Addresses):
		r.claim(target, g.Namespace, map[string]string{gatewayNameLabel: g.Name},
			fmt.Sprintf("no pod%s carries the label %s=%s", in(g.Namespace), gatewayNameLabel, g.Name))
		return
	}
	for i, a := range g.Addresses {
		service, reason := r.addressed(g.Namespace, a)
		if reason != "" {
			r.problem(target, "spec.addresses[%d]: %s", i, reason)
			continue
		}
		r.claim(target, service.Namespace, service.Selector, fmt.Sprintf("spec.addresses[%d]: Service %s/%s has no pods: none carries %s",
			i, service.Namespace, service.Name, labelText(service.Selector)))
	}
}

// hosts gives those of a Gateway as policies write them, sorted. What Istio has
// before a slash says whose routes may use the host: it doesn't widen it.
func (r *resolver) hosts(t mirror.Target, written []string) []string {
	var out, unfit []string
	for _, h := range written {
		host, ok := policy.HostPattern(h[strings.IndexByte(h, '/')+1:])
		if ok {
			out = append(out, host)
		} else {
			unfit = append(unfit, h)
		}
	}
	if len(unfit) > 0 {
		r.problem(t, "policies that target it don't apply to %d of its hosts, which are no names of hosts, such as %q", len(unfit), clip(slices.Min(unfit), maxReason/4))
	}
	slices.Sort(out)
	if out = slices.Compact(out); len(out) > maxHosts {
		r.problem(t, "it has more than %d hosts; policies that target it don't apply to the others", maxHosts)
		out = out[:maxHosts]
	}
	return out
}

// automated tells whether Istio deploys the gateway itself: it does unless the
// addresses name Services.
func automated(addresses []Address) bool {
	return len(addresses) == 0 || len(addresses) == 1 && !addresses[0].Hostname
}

// addressed gives the Service that an address names, or why there is none.
func (r *resolver) addressed(namespace string, a Address) (*Service, string) {
	if !a.Hostname {
		return nil, "only a Hostname, that of a Service, leads to pods"
	}
	name, rest, qualified := strings.Cut(a.Value, ".")
	if qualified {
		var domain string
		namespace, domain, _ = strings.Cut(rest, ".")
		if domain != "svc" && !strings.HasPrefix(domain, "svc.") {
			return nil, fmt.Sprintf("%q is no Service: write NAME, or NAME.NAMESPACE.svc.DOMAIN", a.Value)
		}
	}
	i, ok := slices.BinarySearchFunc(r.services, ServiceRef{namespace, name}, func(s Service, ref ServiceRef) int {
		return cmp.Or(cmp.Compare(s.Namespace, ref.Namespace), cmp.Compare(s.Name, ref.Name))
	})
	if !ok {
		return nil, fmt.Sprintf("there is no Service %q in namespace %q", name, namespace)
	}
	service := &r.services[i]
	if len(service.Selector) == 0 {
		return nil, fmt.Sprintf("Service %s/%s has no selector, so its pods can't be told", namespace, name)
	}
	return service, ""
}

// claim notes that a Gateway stands for the pods that carry labels, in one
// namespace or (empty) all.
func (r *resolver) claim(t mirror.Target, namespace string, labels map[string]string, absent string) {
	key := namespace
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		key += fmt.Sprintf("\x00%d:%s=%s", len(k), k, labels[k])
	}
	s := r.selections[key]
	if s == nil {
		s = &selection{id: len(r.ordered), namespace: namespace, labels: labels}
		r.selections[key] = s
		r.ordered = append(r.ordered, s)
	}
	if !slices.ContainsFunc(s.claims, func(c claim) bool { return compareTargets(c.target, t) == 0 }) {
		s.claims = append(s.claims, claim{t, absent})
	}
}

// selectPods finds the pods of every selection. It goes through the cluster's
// pods once, and for each selection through those with its rarest label.
func (r *resolver) selectPods() {
	byLabel := map[label][]int{}
	for _, s := range r.ordered {
		for k, v := range s.labels {
			byLabel[label{k, v}] = nil
		}
	}
	for i, p := range r.pods {
		for k, v := range p.Labels {
			if pods, wanted := byLabel[label{k, v}]; wanted {
				byLabel[label{k, v}] = append(pods, i)
			}
		}
	}
	selected := map[int]struct{}{}
	for _, s := range r.ordered {
		for _, i := range rarest(byLabel, s.labels) {
			if p := &r.pods[i]; (s.namespace == "" || p.Namespace == s.namespace) && carries(p.Labels, s.labels) {
				if _, known := selected[i]; !known && len(selected) >= maxSelected {
					r.problem(mirror.Target{}, "Gateways stand for more than %d pods; the others are left out", maxSelected)
					break
				}
				selected[i] = struct{}{}
				s.pods = append(s.pods, i)
			}
		}
		if len(s.pods) == 0 {
			for _, c := range s.claims {
				r.problem(c.target, "%s", c.absent)
			}
		}
	}
}

func rarest(byLabel map[label][]int, labels map[string]string) []int {
	var out []int
	first := true
	for k, v := range labels {
		if pods := byLabel[label{k, v}]; first || len(pods) < len(out) {
			out, first = pods, false
		}
	}
	return out
}

func carries(labels, wanted map[string]string) bool {
	for k, v := range wanted {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

func in(namespace string) string {
	if namespace == "" {
		return ""
	}
	return " in namespace " + namespace
}

// labelText shows labels as kubectl takes them.
func labelText(labels map[string]string) string {
	var b strings.Builder
	for i, k := range slices.Sorted(maps.Keys(labels)) {
		if i > 0 {
			b.WriteByte(',')
		}
		if b.Len() > maxReason {
			break
		}
		b.WriteString(k + "=" + labels[k])
	}
	return clip(b.String(), maxReason/2)
}

// clip cuts, at a character's boundary, what must be bounded.
func clip(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit-3] + "..."
	}
	return strings.ToValidUTF8(s, "")
}

// compareTargets is by the resources that they are.
func compareTargets(a, b mirror.Target) int {
	return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}
