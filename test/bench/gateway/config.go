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
	setmetadata "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_metadata/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	upstream "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	backendCluster = "backend"
	// mirrorCluster is the name that the plugin calls; the other receivers use
	// it too.
	mirrorCluster = "periscope_mirror"

	mirrorMaxRequests = 64
	mirrorMaxPending  = 32

	// The receivers that we compare with get breakers that never open, so that
	// they deliver all that they can.
	peerMaxRequests = 20000

	// deferredClose is how long ext_proc keeps each stream after its exchange.
	// Envoy's default of 5 s would let one variant's streams end during the
	// next ones' bursts, and cost ext_proc a lot more memory.
	deferredClose = 200 * time.Millisecond
)

// bootstrapJSON is a static configuration of v: everything equal but the
// filters, the route's mirroring and the receiver's cluster.
func bootstrapJSON(v variant, backendPort, receiverPort int) ([]byte, error) {
	filters, err := httpFilters(v)
	if err != nil {
		return nil, err
	}
	action := &route.RouteAction{
		ClusterSpecifier: &route.RouteAction_Cluster{Cluster: backendCluster},
		Timeout:          durationpb.New(30 * time.Second),
	}
	if v.copies == copiesRequests {
		action.RequestMirrorPolicies = []*route.RouteAction_RequestMirrorPolicy{{Cluster: mirrorCluster}}
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

func httpFilters(v variant) ([]*hcm.HttpFilter, error) {
	var out []*hcm.HttpFilter
	var fault error
	add := func(name string, m proto.Message) {
		packed, err := anypb.New(m)
		if err != nil {
			fault = fmt.Errorf("pack filter %s: %w", name, err)
			return
		}
		out = append(out, &hcm.HttpFilter{Name: name, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: packed}})
	}
	if v.copies == copiesEvents {
		text, digest := settings(v.share)
		add("periscope-settings", &setmetadata.Config{Metadata: []*setmetadata.Metadata{
			metadata("periscope.rev", "r", digest),
			metadata("periscope.settings", "s", text),
		}})
	}
	if v.script != "" {
		add("envoy.filters.http.lua", &lua.Lua{
			DefaultSourceCode: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: v.script}},
		})
	}
	if v.copies == copiesProcessor {
		add("envoy.filters.http.ext_proc", externalProcessor())
	}
	add("envoy.filters.http.router", &router.Router{})
	return out, fault
}

func metadata(namespace, key, value string) *setmetadata.Metadata {
	return &setmetadata.Metadata{
		MetadataNamespace: namespace,
		Value:             &structpb.Struct{Fields: map[string]*structpb.Value{key: structpb.NewStringValue(value)}},
	}
}

func externalProcessor() *extproc.ExternalProcessor {
	return &extproc.ExternalProcessor{
		GrpcService: &core.GrpcService{
			TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: mirrorCluster}},
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
	c := staticCluster(mirrorCluster, receiverPort)
	limits := &cluster.CircuitBreakers_Thresholds{
		MaxConnections:     wrapperspb.UInt32(peerMaxRequests),
		MaxRequests:        wrapperspb.UInt32(peerMaxRequests),
		MaxPendingRequests: wrapperspb.UInt32(peerMaxRequests),
	}
	if v.copies == copiesEvents {
		limits = &cluster.CircuitBreakers_Thresholds{
			MaxRequests:        wrapperspb.UInt32(mirrorMaxRequests),
			MaxPendingRequests: wrapperspb.UInt32(mirrorMaxPending),
			MaxRetries:         wrapperspb.UInt32(0),
		}
	}
	c.CircuitBreakers = &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{limits}}
	if v.copies != copiesRequests {
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
