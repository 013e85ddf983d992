package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/xds"
)

const xdsCluster = "periscope_xds"

// BootstrapConfig is what an Envoy needs to be told before it can ask.
type BootstrapConfig struct {
	Gateway mirror.Gateway
	NodeID  string      // unique for each process; default "gateway~" and the gateway's id
	XDS     string      // "host:port" of the control plane, by address
	Admin   string      // "host:port" for Envoy's admin page; anyone who reaches it owns the gateway
	TLS     *ControlTLS // nil: the control plane is asked in plain text
}

// Bootstrap makes Envoy's bootstrap, as JSON: everything else comes by ADS, on
// one incremental stream.
func Bootstrap(c BootstrapConfig) ([]byte, error) {
	b, err := newBootstrap(c)
	if err != nil {
		return nil, fmt.Errorf("bootstrap of gateway %s: %w", c.Gateway.ID(), err)
	}
	out, err := marshalJSON(b)
	if err != nil {
		return nil, fmt.Errorf("bootstrap of gateway %s: %w", c.Gateway.ID(), err)
	}
	return out, nil
}

func newBootstrap(c BootstrapConfig) (*bootstrap.Bootstrap, error) {
	control, errXDS := listenAddress(c.XDS)
	admin, errAdmin := listenAddress(c.Admin)
	if err := errors.Join(errXDS, errAdmin); err != nil {
		return nil, err
	}
	metadata, err := structpb.NewStruct(map[string]any{"role": xds.RoleGateway, "gateway": c.Gateway.ID()})
	if err != nil {
		return nil, err
	}
	if c.NodeID == "" {
		c.NodeID = xds.RoleGateway + "~" + c.Gateway.ID()
	}
	server, err := controlCluster(control.Addr().String(), uint32(control.Port()))
	if err != nil {
		return nil, err
	}
	if c.TLS != nil {
		if server.TransportSocket, err = c.TLS.socket(control.Addr().String()); err != nil {
			return nil, err
		}
	}
	return &bootstrap.Bootstrap{
		Node:  &core.Node{Id: c.NodeID, Cluster: c.Gateway.ID(), Metadata: metadata},
		Admin: &bootstrap.Admin{Address: socketAddress(admin.Addr().String(), uint32(admin.Port()))},
		DynamicResources: &bootstrap.Bootstrap_DynamicResources{
			LdsConfig: ads(nil),
			CdsConfig: ads(nil),
			AdsConfig: &core.ApiConfigSource{
				ApiType:             core.ApiConfigSource_DELTA_GRPC,
				TransportApiVersion: core.ApiVersion_V3,
				GrpcServices: []*core.GrpcService{{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{
					EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: xdsCluster},
				}}},
				SetNodeOnFirstMessageOnly: true,
			},
		},
		StaticResources: &bootstrap.Bootstrap_StaticResources{Clusters: []*cluster.Cluster{server}},
	}, nil
}

func controlCluster(host string, port uint32) (*cluster.Cluster, error) {
	options, err := httpOptions(&upstreamhttp.HttpProtocolOptions{
		UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{
				// A control plane that vanished without a word is noticed.
				ConnectionKeepalive: &core.KeepaliveSettings{
					Interval: durationpb.New(30 * time.Second),
					Timeout:  durationpb.New(5 * time.Second),
				},
			}},
		}},
	})
	if err != nil {
		return nil, err
	}
	return &cluster.Cluster{
		Name:                          xdsCluster,
		ClusterDiscoveryType:          &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		ConnectTimeout:                durationpb.New(time.Second),
		TypedExtensionProtocolOptions: options,
		LoadAssignment: &endpoint.ClusterLoadAssignment{
			ClusterName: xdsCluster,
			Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: []*endpoint.LbEndpoint{{
				HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: socketAddress(host, port)}},
			}}}},
		},
	}, nil
}

// marshalJSON is protojson without its deliberate variations of white space.
func marshalJSON(m proto.Message) ([]byte, error) {
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}
