package debug

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	admin "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/periscope-mesh/periscope/xds"
)

// resourceType reads istiod's short names; empty: none of them.
func resourceType(short string) string {
	switch strings.ToLower(short) {
	case "cds":
		return resource.ClusterType
	case "lds":
		return resource.ListenerType
	case "rds":
		return resource.RouteType
	case "eds":
		return resource.EndpointType
	case "ecds":
		return resource.ExtensionConfigType
	default:
		return ""
	}
}

// configDump shows what a proxy was sent, in the form of Envoy's admin page; or
// with types=, the bare resources of these types, as istiod does.
func (p *Pages) configDump(r *http.Request) (any, error) {
	c, err := p.proxyOf(r)
	if err != nil {
		return nil, err
	}
	query := r.URL.Query()
	if short := query.Get("types"); short != "" {
		var types []string
		for _, t := range strings.Split(short, ",") {
			typeURL := resourceType(t)
			if typeURL == "" {
				return nil, &pageError{http.StatusBadRequest, "types: known are cds, lds, rds, eds and ecds"}
			}
			if slices.Contains(types, typeURL) {
				continue
			}
			types = append(types, typeURL)
		}
		return bare(p.config.Deliveries(c.ID), types...)
	}
	configs, err := dump(p.config.Deliveries(c.ID), query.Has("include_eds"))
	if err != nil {
		return nil, err
	}
	return asJSON(&admin.ConfigDump{Configs: configs})
}

// typed is config_dump for one type.
func (p *Pages) typed(typeURL string) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		c, err := p.proxyOf(r)
		if err != nil {
			return nil, err
		}
		return bare(p.config.Deliveries(c.ID), typeURL)
	}
}

// sentOf lists the resources of a type that were sent, and of which the content
// is known still, without their secrets.
func sentOf(all map[string][]xds.Delivery, typeURL string) ([]xds.Resource, error) {
	var out []xds.Resource
	for _, d := range all[typeURL] {
		if d.Sent.Any == nil {
			continue
		}
		content, err := redact(d.Sent.Any)
		if err != nil {
			return nil, err
		}
		out = append(out, xds.Resource{Name: d.Sent.Name, Version: d.Sent.Version, Any: content})
	}
	return out, nil
}

// bare dumps resources of some types as they are.
func bare(all map[string][]xds.Delivery, types ...string) (any, error) {
	out := &admin.ConfigDump{}
	for _, typeURL := range types {
		list, err := sentOf(all, typeURL)
		if err != nil {
			return nil, err
		}
		for _, r := range list {
			out.Configs = append(out.Configs, r.Any)
		}
	}
	return asJSON(out)
}

// dump makes the messages of Envoy's /config_dump. Envoy leaves endpoints out
// unless asked for.
func dump(all map[string][]xds.Delivery, endpoints bool) ([]*anypb.Any, error) {
	clusters, listeners := &admin.ClustersConfigDump{}, &admin.ListenersConfigDump{}
	routes, extensions, eds := &admin.RoutesConfigDump{}, &admin.EcdsConfigDump{}, &admin.EndpointsConfigDump{}
	for typeURL, add := range map[string]func(r xds.Resource){
		resource.ClusterType: func(r xds.Resource) {
			clusters.DynamicActiveClusters = append(clusters.DynamicActiveClusters, &admin.ClustersConfigDump_DynamicCluster{VersionInfo: r.Version, Cluster: r.Any})
		},
		resource.ListenerType: func(r xds.Resource) {
			listeners.DynamicListeners = append(listeners.DynamicListeners, &admin.ListenersConfigDump_DynamicListener{
				Name: r.Name, ActiveState: &admin.ListenersConfigDump_DynamicListenerState{VersionInfo: r.Version, Listener: r.Any}})
		},
		resource.RouteType: func(r xds.Resource) {
			routes.DynamicRouteConfigs = append(routes.DynamicRouteConfigs, &admin.RoutesConfigDump_DynamicRouteConfig{VersionInfo: r.Version, RouteConfig: r.Any})
		},
		resource.ExtensionConfigType: func(r xds.Resource) {
			extensions.EcdsFilters = append(extensions.EcdsFilters, &admin.EcdsConfigDump_EcdsFilterConfig{VersionInfo: r.Version, EcdsFilter: r.Any})
		},
		resource.EndpointType: func(r xds.Resource) {
			eds.DynamicEndpointConfigs = append(eds.DynamicEndpointConfigs, &admin.EndpointsConfigDump_DynamicEndpointConfig{VersionInfo: r.Version, EndpointConfig: r.Any})
		},
	} {
		list, err := sentOf(all, typeURL)
		if err != nil {
			return nil, err
		}
		for _, r := range list {
			add(r)
		}
	}
	messages := []proto.Message{&admin.BootstrapConfigDump{}, clusters}
	if endpoints {
		messages = append(messages, eds)
	}
	messages = append(messages, listeners, &admin.ScopedRoutesConfigDump{}, routes, &admin.SecretsConfigDump{}, extensions)
	return pack(messages)
}

func pack(messages []proto.Message) ([]*anypb.Any, error) {
	out := make([]*anypb.Any, 0, len(messages))
	for _, m := range messages {
		a, err := anypb.New(m)
		if err != nil {
			return nil, fmt.Errorf("dump configuration: %w", err)
		}
		out = append(out, a)
	}
	return out, nil
}

// asJSON writes a message as Envoy's admin page does.
func asJSON(m proto.Message) (json.RawMessage, error) {
	raw, err := protojson.MarshalOptions{UseProtoNames: true, Resolver: lenient{protoregistry.GlobalTypes}}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return raw, nil
}

// lenient shows a message of unknown type by its type alone, rather than
// nothing at all.
type lenient struct{ *protoregistry.Types }

func (l lenient) FindMessageByURL(url string) (protoreflect.MessageType, error) {
	if t, err := l.Types.FindMessageByURL(url); err == nil {
		return t, nil
	}
	return (&emptypb.Empty{}).ProtoReflect().Type(), nil
}
