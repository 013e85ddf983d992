package gateway

import (
	"fmt"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matching "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	lua "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	metadata "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_metadata/v3"
	inspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
)

const (
	// Streams live as long as something moves in them; Envoy's default would
	// cut a quiet one after five minutes.
	routeIdleTimeout = time.Hour
	// How long a listener of ours waits for the plugin when it first comes up.
	// Both come from one snapshot: it waits for no more than their way.
	extensionTimeout = 2 * time.Second

	// Envoy's advice for edge proxies: its own defaults let one HTTP/2
	// connection hold 256 MiB.
	http2MaxStreams       = 100
	http2StreamWindow     = 64 << 10
	http2ConnectionWindow = 1 << 20
)

func listeners(c Config) ([]xds.Message, error) {
	var out []xds.Message
	if c.HTTP != "" {
		l, err := newListener(HTTPListener, c.HTTP, nil)
		if err != nil {
			return nil, err
		}
		out = append(out, xds.Message{Name: HTTPListener, Message: l})
	}
	if c.HTTPS != "" {
		socket, err := downstreamTLS(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, err
		}
		l, err := newListener(HTTPSListener, c.HTTPS, socket)
		if err != nil {
			return nil, err
		}
		out = append(out, xds.Message{Name: HTTPSListener, Message: l})
	}
	return out, nil
}

func newListener(name, hostport string, socket *core.TransportSocket) (*listener.Listener, error) {
	addr, err := listenAddress(hostport)
	if err != nil {
		return nil, err
	}
	manager, err := connectionManager(name)
	if err != nil {
		return nil, err
	}
	typed, err := pack(manager)
	if err != nil {
		return nil, err
	}
	var inspectors []*listener.ListenerFilter
	if socket != nil { // Envoy learns of the server's name by it alone
		typed, err := pack(&inspector.TlsInspector{})
		if err != nil {
			return nil, err
		}
		inspectors = append(inspectors, &listener.ListenerFilter{
			Name:       "envoy.filters.listener.tls_inspector",
			ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: typed},
		})
	}
	return &listener.Listener{
		Name:    name,
		Address: socketAddress(addr.Addr().String(), uint32(addr.Port())),
		// With it, a second gateway on the same port would start without a word
		// and take half of the connections.
		EnableReusePort: wrapperspb.Bool(false),
		ListenerFilters: inspectors,
		FilterChains: []*listener.FilterChain{{
			TransportSocket: socket,
			Filters: []*listener.Filter{{
				Name:       "envoy.filters.network.http_connection_manager",
				ConfigType: &listener.Filter_TypedConfig{TypedConfig: typed},
			}},
		}},
	}, nil
}

// connectionManager leaves requests and responses as they are.
func connectionManager(stat string) (*hcm.HttpConnectionManager, error) {
	filters, err := Filters(extensionTimeout)
	if err != nil {
		return nil, err
	}
	typed, err := pack(&router.Router{SuppressEnvoyHeaders: true})
	if err != nil {
		return nil, err
	}
	filters = append(filters, &hcm.HttpFilter{
		Name:       "envoy.filters.http.router",
		ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: typed},
	})
	logs, err := AccessLogs("")
	if err != nil {
		return nil, err
	}
	return &hcm.HttpConnectionManager{
		StatPrefix: stat,
		CodecType:  hcm.HttpConnectionManager_AUTO,
		RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{
			ConfigSource:    ads(nil),
			RouteConfigName: routeConfig,
		}},
		HttpFilters:                filters,
		AccessLog:                  logs,
		UseRemoteAddress:           wrapperspb.Bool(true),
		NormalizePath:              wrapperspb.Bool(false),
		GenerateRequestId:          wrapperspb.Bool(false),
		ServerHeaderTransformation: hcm.HttpConnectionManager_PASS_THROUGH,
		UpgradeConfigs:             []*hcm.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		Http2ProtocolOptions: &core.Http2ProtocolOptions{
			MaxConcurrentStreams:        wrapperspb.UInt32(http2MaxStreams),
			InitialStreamWindowSize:     wrapperspb.UInt32(http2StreamWindow),
			InitialConnectionWindowSize: wrapperspb.UInt32(http2ConnectionWindow),
		},
	}, nil
}

// Filters are our two, in the order in which they stand, before all others.
// What they do comes by ECDS: see PluginExtension and SettingsExtension. A
// listener that first comes up waits so long for it, then opens without; with
// 0 it opens at once, and mirrors from their arrival on.
func Filters(wait time.Duration) ([]*hcm.HttpFilter, error) {
	settings, err := settingsConfig("", "", false, nil)
	if err != nil {
		return nil, err
	}
	filters := make([]*hcm.HttpFilter, 0, 3)
	for _, f := range []struct {
		name  string
		empty proto.Message   // in force until the real one comes, or if it is refused
		other []proto.Message // what else may come: another transport touches no listener
	}{
		{SettingsFilter, settings, nil},
		{PluginFilter, pluginConfig(IdleCode), []proto.Message{&matching.ExtensionWithMatcher{}}},
	} {
		filter, err := discovered(f.name, f.empty, wait, f.other...)
		if err != nil {
			return nil, err
		}
		filters = append(filters, filter)
	}
	return filters, nil
}

// discovered is a filter whose configuration comes by ECDS. Whatever becomes
// of that, the listener works: empty stands in.
func discovered(name string, empty proto.Message, wait time.Duration, other ...proto.Message) (*hcm.HttpFilter, error) {
	typed, err := pack(empty)
	if err != nil {
		return nil, err
	}
	discovery := &core.ExtensionConfigSource{ConfigSource: ads(nil), DefaultConfig: typed, TypeUrls: append([]string{typed.GetTypeUrl()}, typeURLs(other...)...)}
	if wait > 0 {
		discovery.ConfigSource = ads(durationpb.New(wait))
	} else {
		discovery.ApplyDefaultConfigWithoutWarming = true
	}
	return &hcm.HttpFilter{Name: name, ConfigType: &hcm.HttpFilter_ConfigDiscovery{ConfigDiscovery: discovery}}, nil
}

// PluginExtension is the plugin's code, or IdleCode, as its filter discovers it
// at gateways that we don't serve.
func PluginExtension(code string) (*core.TypedExtensionConfig, error) {
	return extension(PluginFilter, pluginConfig(code))
}

// sharedPlugin is PluginExtension with one Lua VM a worker for all filter chains,
// from Envoy 1.40 on; before, and at Istio's gateways, whose istioctl does not know
// of it yet, each chain has its own.
func sharedPlugin(code string) (*core.TypedExtensionConfig, error) {
	config := pluginConfig(code)
	config.SharedVmId = statPrefix
	return extension(PluginFilter, config)
}

// SettingsExtension is a gateway's settings, as their filter discovers them.
// With transport ExtProc they say nothing: nodes have them by other means.
func SettingsExtension(s mirror.Settings) (*core.TypedExtensionConfig, error) {
	encoded, copies := "", false
	if s.Transport != policy.TransportExtProc {
		encoded, copies = s.Encode(), s.Copies()
	}
	config, err := settingsConfig(digest(encoded), encoded, copies, s.Shares)
	if err != nil {
		return nil, err
	}
	return extension(SettingsFilter, config)
}

func extension(name string, config proto.Message) (*core.TypedExtensionConfig, error) {
	typed, err := pack(config)
	if err != nil {
		return nil, err
	}
	return &core.TypedExtensionConfig{Name: name, TypedConfig: typed}, nil
}

func pluginConfig(source string) *lua.Lua {
	return &lua.Lua{
		DefaultSourceCode: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: source}},
		StatPrefix:        statPrefix,
	}
}

func settingsConfig(revision, encoded string, copies bool, shares *mirror.Shares) (*metadata.Config, error) {
	facts := map[string]any{"r": revision}
	if copies {
		facts["on"] = "1"
	}
	type part struct {
		namespace string
		value     map[string]any
	}
	parts := []part{{revisionNamespace, facts}, {settingsNamespace, map[string]any{"s": encoded}}}
	if t := shares.Encode(); t != "" {
		parts = append(parts, part{sharesNamespace, map[string]any{"r": shares.Revision, "t": t}})
	}
	config := &metadata.Config{}
	for _, m := range parts {
		value, err := structpb.NewStruct(m.value)
		if err != nil {
			return nil, fmt.Errorf("settings: %w", err)
		}
		config.Metadata = append(config.Metadata, &metadata.Metadata{
			MetadataNamespace: m.namespace,
			AllowOverwrite:    true,
			Value:             value,
		})
	}
	return config, nil
}

func downstreamTLS(certFile, keyFile string) (*core.TransportSocket, error) {
	return tlsSocket(&tls.DownstreamTlsContext{CommonTlsContext: &tls.CommonTlsContext{
		AlpnProtocols:   []string{"h2", "http/1.1"},
		TlsCertificates: []*tls.TlsCertificate{{CertificateChain: file(certFile), PrivateKey: file(keyFile)}},
	}})
}

func tlsSocket(context proto.Message) (*core.TransportSocket, error) {
	typed, err := pack(context)
	if err != nil {
		return nil, err
	}
	return &core.TransportSocket{
		Name:       "envoy.transport_sockets.tls",
		ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: typed},
	}, nil
}

func routes() *route.RouteConfiguration {
	return &route.RouteConfiguration{
		Name: routeConfig,
		// What Envoy would add about the client besides x-forwarded-for and
		// x-forwarded-proto.
		RequestHeadersToRemove: []string{"x-envoy-external-address", "x-envoy-internal"},
		VirtualHosts: []*route.VirtualHost{{
			Name:    "all",
			Domains: []string{"*"},
			Routes: []*route.Route{{
				Name:  "default",
				Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
				Action: &route.Route_Route{Route: &route.RouteAction{
					ClusterSpecifier: &route.RouteAction_Cluster{Cluster: UpstreamCluster},
					Timeout:          durationpb.New(0),
					IdleTimeout:      durationpb.New(routeIdleTimeout),
				}},
			}},
		}},
	}
}

// ads is the configuration source of everything: the one stream.
func ads(initialTimeout *durationpb.Duration) *core.ConfigSource {
	return &core.ConfigSource{
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
		ResourceApiVersion:    core.ApiVersion_V3,
		InitialFetchTimeout:   initialTimeout,
	}
}

func socketAddress(host string, port uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address:       host,
		PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
	}}}
}

func pack(m proto.Message) (*anypb.Any, error) {
	out := new(anypb.Any)
	if err := anypb.MarshalFrom(out, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().Name(), err)
	}
	return out, nil
}
