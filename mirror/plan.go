// Package mirror turns policies and the gateways there are into a plan: what
// each gateway mirrors, to which nodes, and what nodes do with it.
//
// It is pure: Compile reads no file, no clock and no network, and the same
// input gives the same Plan, revision included. The xds packages, which turn a
// Plan into resources, may import it; it imports only policy.
package mirror

import (
	"strings"

	"github.com/periscope-mesh/periscope/policy"
)

// Topology is what there is to attach policies to.
type Topology struct {
	Gateways []Gateway
	Nodes    []NodeService
}

// Gateway is an ingress gateway workload: the pods that policies govern as one.
type Gateway struct {
	Namespace string // the pods'
	Name      string
	// Labels are those that all of its pods carry: what a policy's selector is
	// compared with.
	Labels map[string]string
	// Selector picks exactly its pods within Namespace; nil for gateways that we
	// serve directly.
	Selector map[string]string
	// Targets are the Gateway resources that the workload implements, of any
	// namespace: what a policy's targetRefs name. Without any, the workload
	// stands for itself.
	Targets []Target
	Pods    []string // names, sorted
	// Machines are those that the pods run on, as far as is known, sorted, each
	// once: Kubernetes' names of them. In a plan only those of them that nodes run
	// on too are left: there the gateway prefers these nodes.
	Machines []string `json:",omitempty"`
	// StandIn gateways take part for every target: the gateway of periscope up
	// stands in for whichever gateways a policy names.
	StandIn bool
}

// Target is a Gateway resource.
type Target struct {
	Group     string // policy.GroupGatewayAPI or policy.GroupIstio
	Namespace string
	Name      string
	// Hosts are those that it takes, in the form of policy.Match.Hosts: "*" is
	// every host, and none is none. They count where several share a workload.
	Hosts []string `json:",omitempty"`
}

// is tells whether a policy of a namespace names t by ref.
func (t Target) is(ref policy.TargetRef, namespace string) bool {
	return t.Group == ref.Group && t.Namespace == namespace && t.Name == ref.Name
}

// ID names the gateway: "namespace/name".
func (g Gateway) ID() string { return g.Namespace + "/" + g.Name }

// NodeService is a service of analysis nodes.
type NodeService struct {
	Namespace string
	Name      string
	Port      int // 0: any
	Endpoints []Endpoint
	StandIn   bool // serves whichever service a policy names
}

// Endpoint is one node's address for mirrored traffic.
type Endpoint struct {
	Host string // IP address; for gateways that Istio serves also a DNS name
	Port int
	// Machine is the one that the node runs on, by the name that Gateway.Machines
	// has for it. Empty: not known, or in a plan, not one of the gateway's.
	Machine string `json:",omitempty"`
}

// Plan is everything that follows from the policies. A pure value: never
// changed once made.
type Plan struct {
	Revision    string // of the whole plan: 12 hex digits of its content's SHA-256
	Gateways    []GatewayPlan
	Nodes       []NodePolicy // by policy id
	Attachments []Attachment // one per policy, by policy id
}

// GatewayPlan is one gateway's part.
type GatewayPlan struct {
	Gateway   Gateway
	Policy    string     // id of the strongest policy, empty: none, nothing is mirrored
	Settings  Settings   // of that policy, and in Next of the others
	Nodes     string     // the node service that all of its policies name; empty: a stand-in
	Endpoints []Endpoint // where mirrored traffic goes; none: nowhere
}

// Policies gives the settings of each of the gateway's policies by precedence,
// without those of the others.
func (g GatewayPlan) Policies() []Settings {
	if g.Policy == "" {
		return nil
	}
	first := g.Settings
	first.Next = nil
	return append([]Settings{first}, g.Settings.Next...)
}

// PolicyIDs names the gateway's policies by precedence.
func (g GatewayPlan) PolicyIDs() string {
	var out []string
	for _, s := range g.Policies() {
		out = append(out, s.PolicyID)
	}
	return strings.Join(out, ", ")
}

// NodePolicy is what a node needs of one policy. An event names the policy's
// id, never the tenant or the application: those are looked up here, so that
// a gateway cannot claim them.
type NodePolicy struct {
	ID          string
	Revision    string // of this policy: what events made under it name
	Tenant      string
	Application string
	Mode        policy.Mode
	Paranoia    int
	Exclusions  []policy.Exclusion
}

// Attachment says what became of a policy.
type Attachment struct {
	Policy   string   `json:"policy"`
	Gateways []string `json:"gateways,omitempty"` // ids of the gateways it governs
	Problems []string `json:"problems,omitempty"` // why it governs fewer than it names
}
