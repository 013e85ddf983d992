package kubetest

import (
	"encoding/json"
	"net"
	"testing"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// RouterConfig describes a gateway of Istio's.
type RouterConfig struct {
	XDS       string // istiod's, host:port
	Name      string // of its pod
	Namespace string
	Labels    map[string]string
	IP        string // the pod's; must not be that of any endpoint in the mesh
	Machine   string // the one that the pod runs on; empty: the proxy does not say
}

// StartRouter starts an Envoy as an ingress gateway of an istiod.
func StartRouter(t testing.TB, c RouterConfig) *envoytest.Envoy {
	t.Helper()
	host, port, err := net.SplitHostPort(c.XDS)
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]any{}
	for k, v := range c.Labels {
		labels[k] = v
	}
	metadata := map[string]any{"NAMESPACE": c.Namespace, "NAME": c.Name, "CLUSTER_ID": "test", "ISTIO_VERSION": "1.31.0",
		"LABELS": labels, "PROXY_CONFIG": map[string]any{}, "GENERATOR": ""}
	if c.Machine != "" {
		metadata["NODE_NAME"] = c.Machine
	}
	ads := map[string]any{"ads": map[string]any{}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
	return envoytest.Start(t, map[string]any{
		"node": map[string]any{
			"id":       "router~" + c.IP + "~" + c.Name + "." + c.Namespace + "~" + c.Namespace + ".svc.cluster.local",
			"cluster":  c.Name + "." + c.Namespace,
			"metadata": metadata,
		},
		"dynamic_resources": map[string]any{
			"lds_config": ads, "cds_config": ads,
			"ads_config": map[string]any{"api_type": "GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
				"grpc_services": []any{map[string]any{"envoy_grpc": map[string]any{"cluster_name": "xds-grpc"}}}},
		},
		"static_resources": map[string]any{"clusters": []any{map[string]any{
			"name": "xds-grpc", "type": "STATIC", "connect_timeout": "1s",
			"typed_extension_protocol_options": map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": map[string]any{"http2_protocol_options": map[string]any{}}}},
			"load_assignment": map[string]any{"cluster_name": "xds-grpc", "endpoints": []any{map[string]any{"lb_endpoints": []any{map[string]any{
				"endpoint": map[string]any{"address": map[string]any{"socket_address": map[string]any{"address": host, "port_value": json.Number(port)}}}}}}}},
		}}},
	})
}
