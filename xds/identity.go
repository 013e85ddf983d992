package xds

import (
	"fmt"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
)

// Roles that a client's node metadata may state under "role".
const (
	RoleGateway = "gateway" // states its gateway's id under "gateway" too
	RoleNode    = "node"
)

// NodeKey is the key of the snapshot that all analysis nodes share.
const NodeKey = "node"

// NodePolicyType is the type URL of the analysis nodes' policies.
const NodePolicyType = "type.googleapis.com/periscope.node.v1alpha1.NodePolicySet"

const maxKeyBytes = 512

// GatewayKey is the key of the snapshot for the gateway "namespace/name".
func GatewayKey(id string) string { return "gateway/" + id }

// SelectByRole gives the snapshot key for a client by its metadata's "role".
// It is what New uses unless its Config says otherwise.
func SelectByRole(n *core.Node) (string, error) {
	fields := n.GetMetadata().GetFields()
	switch role := fields["role"].GetStringValue(); role {
	case RoleNode:
		return NodeKey, nil
	case RoleGateway:
		id := fields["gateway"].GetStringValue()
		if id == "" {
			return "", fmt.Errorf(`node metadata lacks "gateway": state the gateway's namespace/name`)
		}
		return GatewayKey(id), nil
	case "":
		return "", fmt.Errorf(`node metadata lacks "role": state %q or %q`, RoleGateway, RoleNode)
	default:
		return "", fmt.Errorf("unknown role %q in node metadata: want %q or %q", clip(role, 64), RoleGateway, RoleNode)
	}
}

// shortName gives a type's name in metrics: a closed set.
func shortName(typeURL string) string {
	switch typeURL {
	case resource.ListenerType:
		return "lds"
	case resource.RouteType:
		return "rds"
	case resource.ClusterType:
		return "cds"
	case resource.EndpointType:
		return "eds"
	case resource.ExtensionConfigType:
		return "ecds"
	case NodePolicyType:
		return "node_policy"
	default:
		return "other"
	}
}
