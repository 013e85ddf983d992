package gateway

import (
	"fmt"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
)

// LoadBootstrap makes the bootstrap of an Envoy that does nothing but load the
// plugin's code, for envoy --mode validate: it fails just where a gateway would
// refuse the code, in the same LuaJIT.
func LoadBootstrap(code string) ([]byte, error) {
	b, err := loadBootstrap(code)
	if err != nil {
		return nil, fmt.Errorf("bootstrap to load the plugin: %w", err)
	}
	return marshalJSON(b)
}

func loadBootstrap(code string) (*bootstrap.Bootstrap, error) {
	plugin, err := pack(pluginConfig(code))
	if err != nil {
		return nil, err
	}
	last, err := pack(&router.Router{})
	if err != nil {
		return nil, err
	}
	manager, err := pack(&hcm.HttpConnectionManager{
		StatPrefix:     "load",
		RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{Name: routeConfig}},
		HttpFilters: []*hcm.HttpFilter{
			{Name: PluginFilter, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: plugin}},
			{Name: "envoy.filters.http.router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: last}},
		},
	})
	if err != nil {
		return nil, err
	}
	return &bootstrap.Bootstrap{StaticResources: &bootstrap.Bootstrap_StaticResources{Listeners: []*listener.Listener{{
		Name:    "load",
		Address: socketAddress("127.0.0.1", 0), // nobody listens in this mode
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "envoy.filters.network.http_connection_manager", ConfigType: &listener.Filter_TypedConfig{TypedConfig: manager},
		}}}},
	}}}}, nil
}
