package mcp

import (
	"cmp"
	"fmt"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// filterPriority has our filters applied after others': who is inserted first
// last, stands first, and sees requests as they came.
const filterPriority = 1000

// machineMetadata is where Istio's proxies say which machine they run on: their
// injection sets it to the pod's spec.nodeName.
const machineMetadata = "NODE_NAME"

// maxStandIns is how many nodes of other machines stand in for those of a
// machine.
const maxStandIns = 32

const connectionManager = "envoy.filters.network.http_connection_manager"

// builder makes resources; what many gateways have in common is made once.
type builder struct {
	config   Config
	filters  []*networking.EnvoyFilter_EnvoyConfigObjectPatch
	plugins  map[Plugin]*networking.EnvoyFilter_EnvoyConfigObjectPatch
	clusters map[string]*networking.EnvoyFilter_EnvoyConfigObjectPatch // by their machine and nodes
}

func newBuilder(c Config) *builder {
	c.Form = cmp.Or(c.Form, FormEnvoyFilter)
	c.Prefix = cmp.Or(c.Prefix, DefaultPrefix)
	return &builder{
		config:   c,
		plugins:  map[Plugin]*networking.EnvoyFilter_EnvoyConfigObjectPatch{},
		clusters: map[string]*networking.EnvoyFilter_EnvoyConfigObjectPatch{},
	}
}

func envoyFilterKind() kind { return kind{"networking.istio.io", "v1alpha3", "EnvoyFilter"} }

// envoyFilters makes a gateway's two: one for the filters, the plugin's code and
// the cluster, which changes with releases and nodes, and when a gateway begins
// or ceases to copy anything, and one for the settings, which is all that
// another edit of a policy changes.
func (b *builder) envoyFilters(g mirror.GatewayPlan, nodes []mirror.Endpoint) ([]resource, error) {
	gw := g.Gateway
	plugin := b.plugin(gw.ID())
	if !g.Settings.Copies() {
		plugin = Plugin{Source: gateway.IdleCode, Version: gateway.Idle}
	}
	patches, err := b.filterPatches()
	if err != nil {
		return nil, err
	}
	logs, err := accessLogPatch(gw.ID())
	if err != nil {
		return nil, err
	}
	version := plugin.Version
	code, err := b.pluginPatch(plugin)
	if g.Settings.Transport == policy.TransportExtProc {
		version = string(policy.TransportExtProc)
		code, err = streamPatch(g)
	}
	if err != nil {
		return nil, err
	}
	clusters, err := b.clusterPatches(gw.Machines, nodes, g.Settings.Transport)
	if err != nil {
		return nil, err
	}
	s, err := gateway.SettingsExtension(g.Settings)
	if err != nil {
		return nil, err
	}
	settings, err := patch(networking.EnvoyFilter_EXTENSION_CONFIG, networking.EnvoyFilter_Patch_ADD, s)
	if err != nil {
		return nil, err
	}
	envoyFilter := func(suffix string, notes map[string]string, patches ...*networking.EnvoyFilter_EnvoyConfigObjectPatch) resource {
		return resource{
			kind: envoyFilterKind(), namespace: gw.Namespace, name: name(b.config.Prefix, gw.Name, suffix),
			annotations: notes,
			spec: &networking.EnvoyFilter{
				WorkloadSelector: &networking.WorkloadSelector{Labels: gw.Selector},
				ConfigPatches:    patches,
				Priority:         filterPriority,
			},
		}
	}
	return []resource{
		envoyFilter("-plugin", map[string]string{gatewayNote: clean(gw.ID()), pluginNote: clean(version)},
			append(append(patches[:len(patches):len(patches)], logs, code), clusters...)...),
		envoyFilter("-settings", map[string]string{gatewayNote: clean(gw.ID()), policyNote: clean(g.PolicyIDs()), policyRevNote: revisions(g)}, settings),
	}, nil
}

// filterPatches put our filters before all others. Each one is inserted first,
// so the last of them comes first here. The listener does not wait for what
// they do: an istiod that lacks it does not answer at all, and users would wait
// with it.
func (b *builder) filterPatches() ([]*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	if b.filters != nil {
		return b.filters, nil
	}
	filters, err := gateway.Filters(0)
	if err != nil {
		return nil, err
	}
	for i := len(filters) - 1; i >= 0; i-- {
		p, err := patch(networking.EnvoyFilter_HTTP_FILTER, networking.EnvoyFilter_Patch_INSERT_FIRST, filters[i])
		if err != nil {
			return nil, err
		}
		b.filters = append(b.filters, p)
	}
	return b.filters, nil
}

// accessLogPatch adds our access logs to those that there are.
func accessLogPatch(id string) (*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	logs, err := gateway.AccessLogs(id)
	if err != nil {
		return nil, err
	}
	typed, err := anypb.New(&hcm.HttpConnectionManager{AccessLog: logs})
	if err != nil {
		return nil, err
	}
	return patch(networking.EnvoyFilter_NETWORK_FILTER, networking.EnvoyFilter_Patch_MERGE,
		&listener.Filter{Name: connectionManager, ConfigType: &listener.Filter_TypedConfig{TypedConfig: typed}})
}

func (b *builder) pluginPatch(plugin Plugin) (*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	if p := b.plugins[plugin]; p != nil {
		return p, nil
	}
	e, err := gateway.PluginExtension(plugin.Source)
	if err != nil {
		return nil, err
	}
	p, err := patch(networking.EnvoyFilter_EXTENSION_CONFIG, networking.EnvoyFilter_Patch_ADD, e)
	if err != nil {
		return nil, err
	}
	b.plugins[plugin] = p
	return p, nil
}

// streamPatch stands where the plugin's would: by it, each edit of a policy
// changes that resource too, which holds no code then.
func streamPatch(g mirror.GatewayPlan) (*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	e, err := gateway.StreamExtension(g)
	if err != nil {
		return nil, err
	}
	return patch(networking.EnvoyFilter_EXTENSION_CONFIG, networking.EnvoyFilter_Patch_ADD, e)
}

// clusterPatches add the mirror cluster, for pods on each of these machines one
// that prefers the nodes there, and last the one for all other pods. That must be
// so: a patch can't be kept from pods that another is for, and of clusters of one
// name istiod takes the first.
func (b *builder) clusterPatches(machines []string, nodes []mirror.Endpoint, transport policy.Transport) ([]*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	var out []*networking.EnvoyFilter_EnvoyConfigObjectPatch
	for _, m := range machines {
		p, err := b.clusterPatch(m, around(m, nodes), transport)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	p, err := b.clusterPatch("", nodes, transport)
	if err != nil {
		return nil, err
	}
	return append(out, p), nil
}

// around gives a machine's nodes and those that stand in for them, for which
// machines next to each other in the list have different ones.
func around(machine string, nodes []mirror.Endpoint) []mirror.Endpoint {
	var out []mirror.Endpoint
	start, others := -1, 0
	for i, n := range nodes {
		if n.Machine == machine {
			out = append(out, n)
			start = max(start, i)
		}
	}
	for i := range nodes {
		if n := nodes[(start+1+i)%len(nodes)]; n.Machine != machine && others < maxStandIns {
			out = append(out, n)
			others++
		}
	}
	return out
}

func (b *builder) clusterPatch(machine string, nodes []mirror.Endpoint, transport policy.Transport) (*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	key := fmt.Sprint(transport, machine, nodes)
	if p := b.clusters[key]; p != nil {
		return p, nil
	}
	c, err := gateway.LocalMirrorCluster(machine, nodes, transport)
	if err != nil {
		return nil, err
	}
	p, err := patch(networking.EnvoyFilter_CLUSTER, networking.EnvoyFilter_Patch_ADD, c)
	if err != nil {
		return nil, err
	}
	if machine != "" {
		p.Match.Proxy = &networking.EnvoyFilter_ProxyMatch{Metadata: map[string]string{machineMetadata: machine}}
	}
	b.clusters[key] = p
	return p, nil
}

func patch(to networking.EnvoyFilter_ApplyTo, op networking.EnvoyFilter_Patch_Operation, m proto.Message) (*networking.EnvoyFilter_EnvoyConfigObjectPatch, error) {
	value, err := toStruct(m)
	if err != nil {
		return nil, err
	}
	match := &networking.EnvoyFilter_EnvoyConfigObjectMatch{Context: networking.EnvoyFilter_GATEWAY}
	if to == networking.EnvoyFilter_HTTP_FILTER || to == networking.EnvoyFilter_NETWORK_FILTER {
		match.ObjectTypes = &networking.EnvoyFilter_EnvoyConfigObjectMatch_Listener{Listener: &networking.EnvoyFilter_ListenerMatch{
			FilterChain: &networking.EnvoyFilter_ListenerMatch_FilterChainMatch{
				Filter: &networking.EnvoyFilter_ListenerMatch_FilterMatch{Name: connectionManager},
			},
		}}
	}
	return &networking.EnvoyFilter_EnvoyConfigObjectPatch{
		ApplyTo: to, Match: match, Patch: &networking.EnvoyFilter_Patch{Operation: op, Value: value},
	}, nil
}

// toStruct writes a message as the JSON that EnvoyFilter takes, in the names
// that Envoy's documentation uses.
func toStruct(m proto.Message) (*structpb.Struct, error) {
	what := m.ProtoReflect().Descriptor().Name()
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("marshal %s: %w", what, err)
	}
	out := &structpb.Struct{}
	if err := protojson.Unmarshal(raw, out); err != nil {
		return nil, fmt.Errorf("marshal %s: %w", what, err)
	}
	return out, nil
}
