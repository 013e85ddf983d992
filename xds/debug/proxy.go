package debug

import (
	"net/http"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/xds"
)

// What istiod says; istioctl knows these sentences.
const (
	noProxyID    = "You must provide a proxyID in the query string"
	unknownProxy = "Proxy not connected to this Pilot instance. It may be connected to another instance."
)

// gatewayOf is the gateway that a client belongs to, if it is one's.
func gatewayOf(c xds.Connection) (namespace, name string, ok bool) {
	id, ok := strings.CutPrefix(c.Key, xds.GatewayKey(""))
	if !ok || c.Held != "" {
		return "", "", false
	}
	namespace, name, ok = strings.Cut(id, "/")
	return namespace, name, ok
}

// proxyName is how istioctl names a proxy, POD.NAMESPACE: the gateway's name
// for one with the id that our bootstrap gives, the pod's for one that has an
// id in Istio's manner, else its id.
func proxyName(c xds.Connection) string {
	if namespace, name, ok := gatewayOf(c); ok && c.Node == xds.RoleGateway+"~"+namespace+"/"+name {
		return name + "." + namespace
	}
	if parts := strings.Split(c.Node, "~"); len(parts) == 4 {
		return parts[2]
	}
	return c.Node
}

// proxyType is what a node id begins with: "gateway~…", "node~…", "router~…".
func proxyType(id string) string {
	kind, _, ok := strings.Cut(id, "~")
	if !ok {
		return ""
	}
	return kind
}

// find gives the oldest connection of which the id, or the name that istioctl
// has for it, contains a text: as istiod finds it.
func find(list []xds.Connection, proxyID string) (xds.Connection, bool) {
	for _, c := range list {
		if c.Key != "" && (strings.Contains(c.ID, proxyID) || strings.Contains(proxyName(c), proxyID)) {
			return c, true
		}
	}
	return xds.Connection{}, false
}

// proxyOf finds the connection that a request names.
func (p *Pages) proxyOf(r *http.Request) (xds.Connection, error) {
	id := r.URL.Query().Get("proxyID")
	if id == "" {
		return xds.Connection{}, &pageError{http.StatusBadRequest, noProxyID}
	}
	c, ok := find(p.config.Connections(), id)
	if !ok {
		return xds.Connection{}, &pageError{http.StatusNotFound, unknownProxy}
	}
	return c, nil
}

// adsClient is istiod's form of a connection.
type adsClient struct {
	ConnectionID string              `json:"connectionId"`
	ConnectedAt  time.Time           `json:"connectedAt"`
	PeerAddress  string              `json:"address"`
	Metadata     map[string]string   `json:"metadata,omitempty"`
	Watches      map[string][]string `json:"watches"`
}

// adsz shows one proxy if one is named, else all.
func (p *Pages) adsz(r *http.Request) (any, error) {
	list := p.config.Connections()
	if id := r.URL.Query().Get("proxyID"); id != "" {
		c, ok := find(list, id)
		if !ok {
			return nil, &pageError{http.StatusNotFound, unknownProxy}
		}
		list = []xds.Connection{c}
	}
	out := clients[adsClient]{Total: len(list), Clients: []adsClient{}}
	for _, c := range list {
		a := adsClient{ConnectionID: c.ID, ConnectedAt: c.ConnectedAt, PeerAddress: c.Address, Metadata: metadata(c), Watches: map[string][]string{}}
		for typeURL, t := range c.Types {
			a.Watches[typeURL] = nonNil(t.Watched)
		}
		out.Clients = append(out.Clients, a)
	}
	return out, nil
}

// metadata is the part of a node's metadata that istiod's users look for.
func metadata(c xds.Connection) map[string]string {
	m := map[string]string{}
	namespace, _, _ := gatewayOf(c)
	for key, value := range map[string]string{"CLUSTER_ID": c.Cluster, "NAMESPACE": namespace, "ISTIO_VERSION": c.Version} {
		if value != "" {
			m[key] = value
		}
	}
	return m
}

// clients is istiod's frame around its connections.
type clients[T any] struct {
	Total   int `json:"totalClients"`
	Clients []T `json:"clients"`
}

func connections(list []xds.Connection) clients[xds.Connection] {
	return clients[xds.Connection]{Total: len(list), Clients: nonNil(list)}
}
