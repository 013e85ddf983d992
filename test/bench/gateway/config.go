package main

import (
	"fmt"
	"time"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	extproc "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	lua "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
)

const (
	backendCluster = "backend"

	// The receivers that we compare with get breakers that never open, so that
	// they deliver all that they can.
	peerMaxRequests = 20000

	// deferredClose is how long ext_proc keeps each stream after its exchange.
	// Envoy's default of 5 s would let one variant's streams end during the
	// next ones' bursts, and cost ext_proc a lot more memory.
	deferredClose = 200 * time.Millisecond
)

// bootstrapJSON is a static configuration of v: everything equal but the
// filters, the route's mirroring and the receiver's cluster. Ours are those that
// a gateway is served.
func bootstrapJSON(v variant, limit, backendPort, receiverPort int) ([]byte, error) {
	filters, err := httpFilters(v, limit)
	if err != nil {
		return nil, err
	}
	action := &route.RouteAction{
		ClusterSpecifier: &route.RouteAction_Cluster{Cluster: backendCluster},
		Timeout:          durationpb.New(30 * time.Second),
	}
	if v.copies == copiesRequests {
		action.RequestMirrorPolicies = []*route.RouteAction_RequestMirrorPolicy{{Cluster: xdsgateway.MirrorCluster}}
	}
	manager, err := anypb.New(connectionManager(filters, action))
	if err != nil {
		return nil, fmt.Errorf("pack connection manager: %w", err)
	}
	clusters, err := clustersOf(v, backendPort, receiverPort)
	if err != nil {
		return nil, err
	}
	b := &bootstrap.Bootstrap{
		Node:  &core.Node{Id: "bench-" + v.name, Cluster: "bench"},
		Admin: &bootstrap.Admin{Address: loopback(0)},
		StaticResources: &bootstrap.Bootstrap_StaticResources{
			Listeners: []*listener.Listener{{
				Name:    "bench",
				Address: loopback(0),
				FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
					Name:       "envoy.filters.network.http_connection_manager",
					ConfigType: &listener.Filter_TypedConfig{TypedConfig: manager},
				}}}},
			}},
			Clusters: clusters,
		},
	}
	out, err := protojson.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("marshal bootstrap: %w", err)
	}
	return out, nil
}

func connectionManager(filters []*hcm.HttpFilter, action *route.RouteAction) *hcm.HttpConnectionManager {
	return &hcm.HttpConnectionManager{
		StatPrefix:        "ingress",
		UseRemoteAddress:  wrapperspb.Bool(true),
		GenerateRequestId: wrapperspb.Bool(true),
		HttpFilters:       filters,
		RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{
			Name: "bench",
			VirtualHosts: []*route.VirtualHost{{
				Name:    "bench",
				Domains: []string{"*"},
				Routes: []*route.Route{{
					Name:   "main",
					Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
					Action: &route.Route_Route{Route: action},
				}},
			}},
		}},
	}
}

func httpFilters(v variant, limit int) ([]*hcm.HttpFilter, error) {
	var out []*hcm.HttpFilter
	add := func(name string, config *anypb.Any) {
		out = append(out, &hcm.HttpFilter{Name: name, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: config}})
	}
	if v.copies == copiesEvents {
		s, err := xdsgateway.SettingsExtension(settings(v.share, limit))
		if err != nil {
			return nil, err
		}
		code := v.script
		if v.share == 0 { // as the control plane has it
			code = xdsgateway.IdleCode
		}
		p, err := xdsgateway.PluginExtension(code)
		if err != nil {
			return nil, err
		}
		add(s.GetName(), s.GetTypedConfig())
		add(p.GetName(), p.GetTypedConfig())
	}
	var others []proto.Message
	switch {
	case v.copies == copiesProcessor:
		others = append(others, externalProcessor())
	case v.copies == copiesNothing && v.script != "":
		others = append(others, &lua.Lua{
			DefaultSourceCode: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: v.script}},
		})
	}
	for _, m := range append(others, &router.Router{}) {
		packed, err := anypb.New(m)
		if err != nil {
			return nil, fmt.Errorf("pack filter: %w", err)
		}
		add(string(m.ProtoReflect().Descriptor().FullName()), packed)
	}
	return out, nil
}

func externalProcessor() *extproc.ExternalProcessor {
	return &extproc.ExternalProcessor{
		GrpcService: &core.GrpcService{
			TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: xdsgateway.MirrorCluster}},
			Timeout:         durationpb.New(2 * time.Second),
		},
		FailureModeAllow:     true,
		ObservabilityMode:    true,
		DeferredCloseTimeout: durationpb.New(deferredClose),
		ProcessingMode: &extproc.ProcessingMode{
			RequestHeaderMode:   extproc.ProcessingMode_SEND,
			ResponseHeaderMode:  extproc.ProcessingMode_SEND,
			RequestBodyMode:     extproc.ProcessingMode_STREAMED,
			ResponseBodyMode:    extproc.ProcessingMode_STREAMED,
			RequestTrailerMode:  extproc.ProcessingMode_SKIP,
			ResponseTrailerMode: extproc.ProcessingMode_SKIP,
		},
	}
}

func clustersOf(v variant, backendPort, receiverPort int) ([]*cluster.Cluster, error) {
	out := []*cluster.Cluster{staticCluster(backendCluster, backendPort)}
	if v.copies == copiesNothing {
		return out, nil
	}
	if v.copies == copiesEvents {
		c, err := xdsgateway.FixedMirrorCluster([]mirror.Endpoint{{Host: "127.0.0.1", Port: receiverPort}}, policy.TransportLua)
		return append(out, c), err
	}
	c := staticCluster(xdsgateway.MirrorCluster, receiverPort)
	c.CircuitBreakers = &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
		MaxConnections:     wrapperspb.UInt32(peerMaxRequests),
		MaxRequests:        wrapperspb.UInt32(peerMaxRequests),
		MaxPendingRequests: wrapperspb.UInt32(peerMaxRequests),
	}}}
	if v.copies == copiesProcessor {
		options, err := anypb.New(&upstream.HttpProtocolOptions{
			UpstreamProtocolOptions: &upstream.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &upstream.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &upstream.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
						Http2ProtocolOptions: &core.Http2ProtocolOptions{},
					},
				},
			},
		})
		if err != nil {
			return nil, fmt.Errorf("pack protocol options: %w", err)
		}
		c.TypedExtensionProtocolOptions = map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}
	}
	return append(out, c), nil
}

func staticCluster(name string, port int) *cluster.Cluster {
	return &cluster.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(250 * time.Millisecond),
		LoadAssignment: &endpoint.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: []*endpoint.LbEndpoint{{
				HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: loopback(port)}},
			}}}},
		},
	}
}

func loopback(port int) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address:       "127.0.0.1",
		PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}
