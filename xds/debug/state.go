package debug

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/xds"
)

// States, in istioctl's words.
const (
	stateSynced  = "SYNCED"
	stateStale   = "STALE"
	stateError   = "ERROR"
	stateNotSent = "NOT SENT"
)

// Plugin is a build of the gateway plugin.
type Plugin struct {
	Version string `json:"version"`
	Digest  string `json:"digest"`
}

// Share is the part of its exchanges that a gateway is to mirror.
type Share struct {
	Gateway  string  `json:"gateway"`          // namespace/name
	Policy   string  `json:"policy,omitempty"` // that governs it
	Percent  float64 `json:"percent"`          // in force, at pods without one of their own
	Ceiling  float64 `json:"ceiling"`          // the policy's percentage
	Revision string  `json:"revision,omitempty"`
	// Pods have shares of their own.
	Pods map[string]float64 `json:"pods,omitempty"`
	// Decisions are load control's, by pod; without nodes that tell of their load
	// there are none.
	Decisions any `json:"decisions,omitempty"`
	// Carrier is how the share reaches the gateway, and Resource the extension
	// configuration that it travels in.
	Carrier  string `json:"carrier"`
	Resource string `json:"resource,omitempty"`
}

// holder is a proxy's state in respect of one resource.
type holder struct {
	Proxy        string `json:"proxy"`
	ConnectionID string `json:"connectionId"`
	State        string `json:"state"`
	LastError    string `json:"lastError,omitempty"`
}

// holding tells what became of one resource at a proxy.
func holding(c xds.Connection, typeURL string, d xds.Delivery) holder {
	h := holder{Proxy: proxyName(c), ConnectionID: c.ID, State: stateStale}
	for _, r := range c.Types[typeURL].Rejected {
		if r.Name == d.Sent.Name {
			h.State, h.LastError = stateError, r.Reason
			return h
		}
	}
	switch d.Sent.Version {
	case "":
		h.State = stateNotSent
	case d.Acked.Version:
		h.State = stateSynced
	}
	return h
}

// gatewayPlugin is one proxy on pluginz. Running is what it acknowledged last:
// after a refusal, the build before.
type gatewayPlugin struct {
	holder
	Gateway string  `json:"gateway"`
	Sent    *Plugin `json:"sent,omitempty"`
	Running *Plugin `json:"running,omitempty"`
}

// pluginState is pluginz.
type pluginState struct {
	Rollout any             `json:"rollout,omitempty"`
	Proxies []gatewayPlugin `json:"proxies"` // Envoys that we serve directly
}

// pluginz shows the roll-out, and what each Envoy of ours was sent and runs,
// also those that were sent no plugin.
func (p *Pages) pluginz() any {
	out := pluginState{Proxies: []gatewayPlugin{}}
	if p.config.Rollout != nil {
		out.Rollout = p.config.Rollout()
	}
	for _, c := range p.config.Connections() {
		namespace, name, ok := gatewayOf(c)
		if !ok {
			continue
		}
		g := gatewayPlugin{holder: holding(c, resource.ExtensionConfigType, xds.Delivery{}), Gateway: namespace + "/" + name}
		for _, d := range p.config.Deliveries(c.ID)[resource.ExtensionConfigType] {
			sent, is := p.config.Plugin(d.Sent)
			if !is {
				continue
			}
			g.holder, g.Sent = holding(c, resource.ExtensionConfigType, d), &sent
			if running, is := p.config.Plugin(d.Acked); is {
				g.Running = &running
			}
		}
		out.Proxies = append(out.Proxies, g)
	}
	return out
}

// shareState is a share, and who has it in force.
type shareState struct {
	Share
	Proxies []holder `json:"proxies"`
}

func (p *Pages) sharez() any {
	out, list := []shareState{}, p.config.Connections()
	for _, share := range p.config.Shares() {
		s := shareState{Share: share, Proxies: []holder{}}
		for _, c := range list {
			if share.Resource == "" || c.Key != xds.GatewayKey(share.Gateway) {
				continue
			}
			var found xds.Delivery
			for _, d := range p.config.Deliveries(c.ID)[resource.ExtensionConfigType] {
				if d.Sent.Name == share.Resource {
					found = d
				}
			}
			s.Proxies = append(s.Proxies, holding(c, resource.ExtensionConfigType, found))
		}
		out = append(out, s)
	}
	return out
}

// nodeState is one analysis node on nodez. Revisions are the plan's.
type nodeState struct {
	Node         string    `json:"node"`
	ConnectionID string    `json:"connectionId"`
	Address      string    `json:"address"`
	ConnectedAt  time.Time `json:"connectedAt"`
	State        string    `json:"state"`
	Sent         string    `json:"sent,omitempty"`
	Acked        string    `json:"acked,omitempty"`
	LastError    string    `json:"lastError,omitempty"`
	Wires        []int     `json:"wireVersions,omitempty"` // of the wire contract that it says it reads
}

func (p *Pages) nodez() any {
	out := []nodeState{}
	for _, c := range p.config.Connections() {
		if c.Key != xds.NodeKey || c.Held != "" {
			continue
		}
		n := nodeState{Node: strings.TrimPrefix(c.Node, xds.RoleNode+"~"), ConnectionID: c.ID, Address: c.Address, ConnectedAt: c.ConnectedAt, State: stateNotSent}
		if p.config.NodeWires != nil {
			n.Wires = p.config.NodeWires(n.Node)
		}
		for _, d := range p.config.Deliveries(c.ID)[xds.NodePolicyType] {
			h := holding(c, xds.NodePolicyType, d)
			n.State, n.LastError = h.State, h.LastError
			n.Sent, n.Acked = p.config.NodeRevision(d.Sent), p.config.NodeRevision(d.Acked)
		}
		out = append(out, n)
	}
	return out
}

// servedType is one type of resources under one key. The first three are all
// that istiod's page has.
type servedType struct {
	Group   string `json:"group"`
	Version string `json:"version"`
	Kind    string `json:"kind"`
	TypeURL string `json:"typeUrl"`
	Key     string `json:"key"` // whom it is for
	Count   int    `json:"count"`
	Content string `json:"contentVersion"`
}

func resourcesz(snapshots map[string]*xds.Snapshot) []servedType {
	out := []servedType{}
	for key, s := range snapshots {
		for _, typeURL := range s.Types() {
			t := servedType{TypeURL: typeURL, Key: key, Count: len(s.Resources(typeURL)), Content: s.Version(typeURL)}
			t.Group, t.Version, t.Kind = groupVersionKind(typeURL)
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b servedType) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.TypeURL, b.TypeURL))
	})
	return out
}

// groupVersionKind reads "group/v1/Kind", as Istio's types are named, and
// "type.googleapis.com/some.package.v1.Kind", as messages are.
func groupVersionKind(typeURL string) (group, version, kind string) {
	if parts := strings.Split(typeURL, "/"); len(parts) == 3 {
		return parts[0], parts[1], parts[2]
	}
	parts := strings.Split(typeURL[strings.LastIndex(typeURL, "/")+1:], ".")
	kind, parts = parts[len(parts)-1], parts[:len(parts)-1]
	if len(parts) > 0 {
		version, parts = parts[len(parts)-1], parts[:len(parts)-1]
	}
	return strings.Join(parts, "."), version, kind
}
