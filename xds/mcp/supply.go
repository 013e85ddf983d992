package mcp

import (
	"fmt"
	"reflect"
	"slices"

	envoytype "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/xds"
)

// Supply is what istiods are served.
type Supply struct {
	// Snapshot holds every type that istiod subscribes to, most of them empty.
	Snapshot *xds.Snapshot
	// Items lists what each gateway is supplied by, by its id: for those who
	// ask istiod what became of it.
	Items map[string][]Item
}

// Item is one Istio resource that a gateway is supplied by.
type Item struct {
	Kind, Namespace, Name string
	Version               string   // its metadata's, as istiod shows it
	Types                 []string // type URLs of the xDS resources that it changes at the gateway
}

// Snapshot makes what istiods are served, once; see Maker.
func Snapshot(c Config, plan mirror.Plan) (*xds.Snapshot, error) {
	s, err := new(Maker).Make(c, plan)
	return s.Snapshot, err
}

// maxShared is how many builds of the plugin, and maxClusters how many sets of
// nodes, by machine, a Maker keeps; with one more it begins anew.
const (
	maxShared   = 64
	maxClusters = 1024
)

// Maker makes what istiods are served for one plan after the other. It keeps the
// resources of the last: a gateway whose part of the plan, and whose build of
// the plugin, are as they were costs next to nothing. The result is the same as
// without. The zero value is ready; it is for one goroutine at a time.
type Maker struct {
	builder *builder
	kept    map[string]supplied // by gateway's id
}

// supplied is what a gateway is supplied by, and what that follows from.
type supplied struct {
	plan      mirror.GatewayPlan
	plugin    Plugin
	ids       []string
	types     []string // type URLs as istiod subscribes to them, one a resource
	resources []xds.Resource
	items     []Item
}

// Make makes it. A gateway that can't be supplied is a *GatewayError in the
// joined error, and there is no snapshot then: one without that gateway would
// take from it what it has. The caller may put the gateway's last good plan in
// its place and try again.
func (m *Maker) Make(c Config, plan mirror.Plan) (Supply, error) {
	b := m.begin(c)
	kept := make(map[string]supplied, len(plan.Gateways))
	err := b.each(plan, func(g mirror.GatewayPlan) ([]string, error) {
		id := g.Gateway.ID()
		s, ok := m.kept[id]
		if !ok || s.plugin != b.plugin(id) || !reflect.DeepEqual(s.plan, g) {
			var err error
			if s, err = b.supply(g); err != nil {
				return nil, err
			}
		}
		kept[id] = s
		return s.ids, nil
	})
	m.kept = kept
	if err != nil {
		return Supply{}, err
	}
	types := make(map[string][]xds.Resource, len(Types()))
	for _, t := range Types() {
		types[t] = nil
	}
	out := Supply{Items: make(map[string][]Item, len(kept))}
	for id, s := range kept {
		for i, r := range s.resources {
			types[s.types[i]] = append(types[s.types[i]], r)
		}
		out.Items[id] = s.items
	}
	if out.Snapshot, err = xds.Assemble(types); err != nil {
		return Supply{}, fmt.Errorf("istio resources: %w", err)
	}
	return out, nil
}

// begin gives a builder that has what the last one shared among gateways, and
// forgets what another form or prefix had made.
func (m *Maker) begin(c Config) *builder {
	b := newBuilder(c)
	last := m.builder
	m.builder = b
	switch {
	case last == nil:
	case last.config.Form != b.config.Form || last.config.Prefix != b.config.Prefix:
		m.kept = nil
	case len(last.plugins) < maxShared && len(last.clusters) < maxClusters:
		b.filters, b.plugins, b.clusters = last.filters, last.plugins, last.clusters
	}
	return b
}

// supply makes one gateway's resources as they travel.
func (b *builder) supply(g mirror.GatewayPlan) (supplied, error) {
	s := supplied{plan: g, plugin: b.plugin(g.Gateway.ID())}
	list, err := b.gateway(g)
	if err != nil {
		return s, err
	}
	for _, r := range list {
		m, err := r.message()
		if err != nil {
			return s, fmt.Errorf("%s: %w", r.id(), err)
		}
		travels, err := xds.Marshal(xds.Message{Name: m.GetMetadata().GetName(), Message: m})
		if err != nil {
			return s, fmt.Errorf("%s: %w", r.id(), err)
		}
		s.ids = append(s.ids, r.id())
		s.types = append(s.types, r.kind.typeURL())
		s.resources = append(s.resources, travels)
		s.items = append(s.items, Item{Kind: r.kind.name, Namespace: r.namespace, Name: r.name, Version: m.GetMetadata().GetVersion(), Types: r.types()})
	}
	return s, nil
}

// types are those of the xDS resources that istiod makes of r.
func (r resource) types() []string {
	filter, ok := r.spec.(*networking.EnvoyFilter)
	switch {
	case ok:
	case r.kind.name == "TrafficExtension":
		return []string{envoytype.ListenerType}
	default:
		return []string{envoytype.ClusterType}
	}
	var out []string
	for _, p := range filter.GetConfigPatches() {
		t := map[networking.EnvoyFilter_ApplyTo]string{
			networking.EnvoyFilter_EXTENSION_CONFIG: envoytype.ExtensionConfigType,
			networking.EnvoyFilter_HTTP_FILTER:      envoytype.ListenerType,
			networking.EnvoyFilter_CLUSTER:          envoytype.ClusterType,
		}[p.GetApplyTo()]
		if t != "" && !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	slices.Sort(out)
	return out
}
