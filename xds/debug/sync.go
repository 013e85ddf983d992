package debug

import (
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

// pushProblem is istiod's form of something that went wrong with a client.
type pushProblem struct {
	Proxy   string `json:"proxy,omitempty"`
	Message string `json:"message,omitempty"`
}

// pushStatus lists problems by the metric that counts them, as istiod does.
func pushStatus(list []xds.Connection) map[string]map[string]pushProblem {
	out := map[string]map[string]pushProblem{}
	add := func(metric, key string, p pushProblem) {
		if out[metric] == nil {
			out[metric] = map[string]pushProblem{}
		}
		out[metric][key] = p
	}
	for _, c := range list {
		if c.Held != "" {
			add("periscope_xds_refused_total", c.ID, pushProblem{c.Node, c.Held})
		}
		for typeURL, t := range c.Types {
			for _, r := range t.Rejected {
				add("periscope_xds_nacks_total", c.ID+" "+typeURL+" "+r.Name, pushProblem{proxyName(c), r.Reason})
			}
		}
	}
	return out
}
