package debug

import (
	"strings"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/xds"
)

// syncStatus is istiod's form of a client's state; unlike istiod's, sent and
// acked are versions.
type syncStatus struct {
	ClusterID            string                `json:"cluster_id,omitempty"`
	ProxyID              string                `json:"proxy,omitempty"`
	ProxyType            string                `json:"proxy_type,omitempty"`
	IstioVersion         string                `json:"istio_version,omitempty"`
	ClusterSent          string                `json:"cluster_sent,omitempty"`
	ClusterAcked         string                `json:"cluster_acked,omitempty"`
	ListenerSent         string                `json:"listener_sent,omitempty"`
	ListenerAcked        string                `json:"listener_acked,omitempty"`
	RouteSent            string                `json:"route_sent,omitempty"`
	RouteAcked           string                `json:"route_acked,omitempty"`
	EndpointSent         string                `json:"endpoint_sent,omitempty"`
	EndpointAcked        string                `json:"endpoint_acked,omitempty"`
	ExtensionConfigSent  string                `json:"extensionconfig_sent,omitempty"`
	ExtensionConfigAcked string                `json:"extensionconfig_acked,omitempty"`
	Resources            map[string]syncedType `json:"resources"`
}

type syncedType struct {
	Sent      string    `json:"sent,omitempty"`
	Acked     string    `json:"acked,omitempty"`
	SentTime  time.Time `json:"sentTime,omitzero"`
	LastError string    `json:"lastError,omitempty"`
}

// syncz shows the clients that are served; those held without answer are at
// /debug/connections.
func syncz(list []xds.Connection) []syncStatus {
	out := []syncStatus{}
	for _, c := range list {
		if c.Held != "" || c.Key == "" {
			continue
		}
		s := syncStatus{
			ClusterID: c.Cluster, ProxyID: c.Node, ProxyType: proxyType(c.Node), IstioVersion: c.Version,
			Resources: make(map[string]syncedType, len(c.Types)),
		}
		for typeURL, t := range c.Types {
			s.Resources[typeURL] = syncedType{Sent: t.Sent, Acked: t.Acked, SentTime: t.SentAt, LastError: t.LastError}
		}
		s.ClusterSent, s.ClusterAcked = versions(c, resource.ClusterType)
		s.ListenerSent, s.ListenerAcked = versions(c, resource.ListenerType)
		s.RouteSent, s.RouteAcked = versions(c, resource.RouteType)
		s.EndpointSent, s.EndpointAcked = versions(c, resource.EndpointType)
		s.ExtensionConfigSent, s.ExtensionConfigAcked = versions(c, resource.ExtensionConfigType)
		out = append(out, s)
	}
	return out
}

func versions(c xds.Connection, typeURL string) (sent, acked string) {
	t := c.Types[typeURL]
	return t.Sent, t.Acked
}

// proxyType is what a node id begins with: "gateway~…", "node~…", "router~…".
func proxyType(id string) string {
	kind, _, ok := strings.Cut(id, "~")
	if !ok {
		return ""
	}
	return kind
}

// clients is istiod's frame around its connections.
type clients struct {
	Total   int              `json:"totalClients"`
	Clients []xds.Connection `json:"clients"`
}

func connections(list []xds.Connection) clients {
	return clients{Total: len(list), Clients: nonNil(list)}
}
