package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"runtime"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	luafilter "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/mirror/topology"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/debug"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/istiod"
	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

// policyState is /debug/policyz: what was read, and what became of it.
type policyState struct {
	Revision    string              `json:"revision"`
	Source      string              `json:"source"`
	Policies    []source.Status     `json:"policies"`
	Attachments []mirror.Attachment `json:"attachments"`
	Unresolved  []topology.Problem  `json:"unresolved,omitempty"` // Gateway resources without a workload
	Fault       *planFault          `json:"fault,omitempty"`      // why the newest plan is not in force
	Delivery    *istiod.State       `json:"delivery,omitempty"`   // what istiods and their gateways did with it
}

// debugConfig asks c for everything anew with each request: its fields are set
// after the pages are made.
func (c *control) debugConfig() debug.Config {
	return debug.Config{
		Logger:       c.cfg.logger,
		Policies:     func() any { return c.policyState() },
		Configs:      c.objects,
		Connections:  func() []xds.Connection { return c.server.Connections() },
		Deliveries:   func(id string) map[string][]xds.Delivery { return c.server.Deliveries(id) },
		Snapshots:    func() map[string]*xds.Snapshot { return c.server.Snapshots() },
		Plugin:       pluginOf,
		Rollout:      func() any { return c.pluginRollout() },
		Shares:       c.shares,
		NodeRevision: nodeRevision,
		NodeWires:    func(node string) []int { return c.wires()[node] },
		Plan:         func() any { return c.current().plan },
		Mesh:         func() any { return c.mesh() },
		Pressure:     c.pressure,
		Load:         func() any { return c.history.load() },
		Ledger:       func() any { return newLedger(c.reports.Reporters()) },
		Info:         c.cfg.info,
		Ready:        c.ready,
		Version:      currentVersion(),
		Gatherer:     c.registry,
		Instance:     instance(),
	}
}

// instance is how istioctl shows this process: by its pod's name, or its host's.
func instance() debug.Instance {
	return debug.Instance{
		ID:    cmp.Or(os.Getenv("POD_NAME"), hostname()),
		Build: debug.BuildInfo{Version: version, GitRevision: "unknown", GoVersion: runtime.Version(), Status: "unknown", GitTag: version},
	}
}

// pluginOf reads which build of the plugin an extension configuration carries.
func pluginOf(r xds.Resource) (debug.Plugin, bool) {
	code, ok := pluginCode(r)
	if !ok && r.Name == gateway.PluginFilter && r.Any != nil {
		return debug.Plugin{Version: string(policy.TransportExtProc)}, true
	}
	if !ok {
		return debug.Plugin{}, false
	}
	if code == gateway.IdleCode {
		return debug.Plugin{Version: gateway.Idle}, true
	}
	if b, err := lua.Read(code); err == nil {
		return debug.Plugin{Version: b.Version, Digest: b.Digest}, true
	}
	sum := sha256.Sum256([]byte(code))
	return debug.Plugin{Version: "unknown", Digest: hex.EncodeToString(sum[:6])}, true
}

// pluginCode is the plugin's code, if it is that which a resource carries.
func pluginCode(r xds.Resource) (string, bool) {
	if r.Name != gateway.PluginFilter || r.Any == nil {
		return "", false
	}
	extension, filter := new(core.TypedExtensionConfig), new(luafilter.Lua)
	if r.Any.UnmarshalTo(extension) != nil || extension.GetTypedConfig().UnmarshalTo(filter) != nil {
		return "", false
	}
	return filter.GetDefaultSourceCode().GetInlineString(), true
}

// nodeRevision is the plan's revision in what a node was sent.
func nodeRevision(r xds.Resource) string {
	set := new(nodev1.NodePolicySet)
	if r.Any == nil || r.Any.UnmarshalTo(set) != nil {
		return ""
	}
	return set.GetRevision()
}

func (c *control) shares() []debug.Share {
	var out []debug.Share
	decisions := c.sharing.decisions()
	for _, g := range c.current().plan.Gateways {
		shares := g.Settings.Shares
		share := debug.Share{Gateway: g.Gateway.ID(), Carrier: "settings filter, by our ADS", Resource: gateway.SettingsFilter}
		if g.Settings.Transport == policy.TransportExtProc {
			share.Carrier, share.Resource = "sampling filter around ext_proc, by our ADS", gateway.PluginFilter
		}
		if g.Gateway.Selector != nil {
			share.Carrier, share.Resource = c.cfg.form+", by istiod: what its proxies have in force is known to istiod", ""
		}
		if g.Policy == "" {
			out = append(out, share)
		}
		for i, s := range g.Policies() {
			of := func(pod string) float64 { return float64(shares.InForce(pod, i, &s).PPM) / 1e4 }
			share.Policy, share.Percent, share.Ceiling, share.Pods = s.PolicyID, of(""), float64(s.SharePPM)/1e4, nil
			if shares != nil {
				share.Revision = shares.Revision
				for pod := range shares.Pods {
					if share.Pods == nil {
						share.Pods = map[string]float64{}
					}
					share.Pods[pod] = of(pod)
				}
			}
			share.Decisions = nil
			if d := decisions[decided{g.Gateway.ID(), s.PolicyID}]; len(d) > 0 {
				share.Decisions = d
			}
			out = append(out, share)
		}
	}
	return out
}

// meshState is /debug/mesh: what there is, and how this control plane is set.
type meshState struct {
	Gateways []mirror.Gateway     `json:"gateways"`
	Nodes    []mirror.NodeService `json:"nodes"`
	XDS      string               `json:"xds"`
	XDSTLS   bool                 `json:"xdsTLS"`
	Debug    string               `json:"debug"`
	Upstream string               `json:"upstream"`
	HTTP     string               `json:"http,omitempty"`
	HTTPS    string               `json:"https,omitempty"`
	Policy   string               `json:"policySource,omitempty"`
}

func (c *control) mesh() meshState {
	f := c.cfg.controlFlags
	t := c.current().topology
	return meshState{Gateways: t.Gateways, Nodes: t.Nodes, XDS: f.xds, XDSTLS: c.certs != nil, Debug: f.debug,
		Upstream: f.upstream, HTTP: f.http, HTTPS: f.https, Policy: f.policy}
}

// current is what was published last; nothing, before the first plan.
func (c *control) current() *controlState {
	if s := c.state.Load(); s != nil {
		return s
	}
	return &controlState{}
}

func (c *control) policyState() policyState {
	s := c.current()
	state := policyState{Revision: s.plan.Revision, Source: c.cfg.policy, Policies: s.set.Statuses, Attachments: s.plan.Attachments, Unresolved: s.problems, Fault: c.fault.Load()}
	if c.source == nil {
		state.Source = "built in: mirror everything"
	}
	if c.readback != nil {
		delivery := c.readback.poller.State()
		state.Delivery = &delivery
	}
	return state
}

// objects are the policies in force.
func (c *control) objects() []debug.Object {
	s := c.current()
	hashes := map[string]string{}
	for _, status := range s.set.Statuses {
		hashes[status.ID] = status.Hash
	}
	out := []debug.Object{}
	for _, p := range s.set.Policies {
		m := p.Metadata
		out = append(out, debug.Object{Kind: p.Kind, APIVersion: p.APIVersion, Spec: p.Spec, Metadata: debug.Metadata{
			Name: m.Name, Namespace: m.Namespace, ResourceVersion: hashes[p.ID()], CreationTimestamp: m.CreationTimestamp, Labels: m.Labels, Annotations: m.Annotations}})
	}
	return out
}

func (c *control) ready() error {
	if c.state.Load() == nil {
		return errors.New("no plan is being served yet")
	}
	return nil
}
