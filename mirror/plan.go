// Package mirror turns policies and the gateways there are into a plan: what
// each gateway mirrors, to which nodes, and what nodes do with it.
//
// It is pure: Compile reads no file, no clock and no network, and the same
// input gives the same Plan, revision included. The xds packages, which turn a
// Plan into resources, may import it; it imports only policy.
package mirror

import "github.com/periscope-mesh/periscope/policy"

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
	// StandIn gateways take part for every target: the gateway of periscope up
	// stands in for whichever gateways a policy names.
	StandIn bool
}

// Target is a Gateway resource.
type Target struct {
	Group     string // policy.GroupGatewayAPI or policy.GroupIstio
	Namespace string
	Name      string
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
	Policy    string // policy id, empty: none, nothing is mirrored
	Settings  Settings
	Endpoints []Endpoint // where mirrored traffic goes; none: nowhere
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
