package gateway

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
)

// The mirror cluster's limits: what bounds the gateway's memory when nodes are
// slow or gone is requests in flight times their size. They are exported for
// package xds/mcp, which has to say the same in Istio's words.
const (
	MirrorConnectTimeout = 250 * time.Millisecond
	MirrorMaxRequests    = 64
	MirrorMaxPending     = 64
	MirrorMaxConnections = 16
	mirrorBufferBytes    = 1 << 20
	// The plugin's calls have a time-out of a second. The access log's have none,
	// whatever its gRPC service says (Envoy 1.40): without this, those to a node
	// that stalls would stay, and take all of the requests above.
	mirrorMaxDuration = 1500 * time.Millisecond

	// By ext_proc each exchange under way is a request in flight. Those beyond
	// are not copied, and Envoy counts them.
	streamMaxRequests = 1024
	// A node ends an exchange's stream after 30 s, whatever there is of it.
	streamMaxDuration = 45 * time.Second
	// Envoy slows users' bodies down to what a node takes of them. One that takes
	// nothing at all is cut off after twice this time.
	streamKeepalive = time.Second

	// A node that fails so often in a row is left out for a while; at most half
	// of the nodes are, so never the only one.
	MirrorEjectAfter      = 5
	MirrorEjectInterval   = time.Second
	MirrorEjectTime       = 5 * time.Second
	MirrorMaxEjectPercent = 50
	// Where a gateway prefers the nodes of its machine, these may all be left out,
	// whatever became of others: Envoy counts them together. The time for which a
	// node is left out grows with each time in turn; it comes back within this one.
	MirrorLocalMaxEjectPercent = 100
	mirrorLocalMaxEjectTime    = 30 * time.Second

	upstreamConnectTimeout = 5 * time.Second

	httpOptionsKey = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

func clusters(c Config, up upstream) ([]xds.Message, error) {
	u, err := upstreamCluster(c, up)
	if err != nil {
		return nil, err
	}
	m, err := servedMirrorCluster(policy.TransportLua, "")
	if err != nil {
		return nil, err
	}
	return []xds.Message{{Name: UpstreamCluster, Message: u}, {Name: MirrorCluster, Message: m}}, nil
}

func upstreamCluster(c Config, up upstream) (*cluster.Cluster, error) {
	out := &cluster.Cluster{
		Name:           UpstreamCluster,
		ConnectTimeout: durationpb.New(upstreamConnectTimeout),
		// Envoy's defaults would answer the 1,025th user at a time with 503.
		CircuitBreakers: &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
			MaxConnections:     wrapperspb.UInt32(math.MaxUint32),
			MaxPendingRequests: wrapperspb.UInt32(math.MaxUint32),
			MaxRequests:        wrapperspb.UInt32(math.MaxUint32),
		}}},
	}
	switch {
	case up.ip:
		discoverEndpoints(out)
	case up.host == "localhost":
		// It may stand for both 127.0.0.1 and ::1 while a server listens on one
		// of them: this kind tries both.
		out.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_LOGICAL_DNS}
		out.DnsLookupFamily = cluster.Cluster_ALL
		out.LoadAssignment = assignment(UpstreamCluster, mirror.Endpoint{Host: up.host, Port: int(up.port)})
	default:
		out.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STRICT_DNS}
		out.DnsLookupFamily = cluster.Cluster_V4_PREFERRED
		out.LoadAssignment = assignment(UpstreamCluster, mirror.Endpoint{Host: up.host, Port: int(up.port)})
	}
	if !up.tls {
		return out, nil
	}
	var err error
	if out.TransportSocket, err = upstreamTLS(c.UpstreamCAFile, up); err != nil {
		return nil, err
	}
	out.TypedExtensionProtocolOptions, err = httpOptions(&upstreamhttp.HttpProtocolOptions{
		UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_AutoConfig{AutoConfig: &upstreamhttp.HttpProtocolOptions_AutoHttpConfig{
			HttpProtocolOptions:  &core.Http1ProtocolOptions{},
			Http2ProtocolOptions: &core.Http2ProtocolOptions{},
		}},
	})
	return out, err
}

func upstreamTLS(caFile string, up upstream) (*core.TransportSocket, error) {
	context := &tls.UpstreamTlsContext{CommonTlsContext: &tls.CommonTlsContext{}}
	if !up.ip { // a server name is never an address (RFC 6066, section 3)
		context.Sni = up.host
	}
	if caFile != "" {
		context.CommonTlsContext.ValidationContextType = &tls.CommonTlsContext_ValidationContext{ValidationContext: validation(caFile, up.host, up.ip)}
	}
	return tlsSocket(context)
}

// validation is by the authorities in caFile, for the server's name or address.
func validation(caFile, host string, ip bool) *tls.CertificateValidationContext {
	san := &tls.SubjectAltNameMatcher{
		SanType: tls.SubjectAltNameMatcher_DNS,
		Matcher: &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: host}},
	}
	if ip {
		san.SanType = tls.SubjectAltNameMatcher_IP_ADDRESS
	}
	return &tls.CertificateValidationContext{
		TrustedCa:                 file(caFile),
		MatchTypedSubjectAltNames: []*tls.SubjectAltNameMatcher{san},
	}
}

func file(name string) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_Filename{Filename: name}}
}

// FixedMirrorCluster is the mirror cluster with its endpoints in it, for
// gateways that aren't served endpoints by us: changed nodes are a changed
// cluster there. Names are looked up by Envoy.
func FixedMirrorCluster(nodes []mirror.Endpoint, transport policy.Transport) (*cluster.Cluster, error) {
	return LocalMirrorCluster("", nodes, transport)
}

// LocalMirrorCluster is FixedMirrorCluster for gateways on a machine: they go to
// the nodes there, and to the others while those fail.
func LocalMirrorCluster(machine string, nodes []mirror.Endpoint, transport policy.Transport) (*cluster.Cluster, error) {
	if err := checkEndpoints(nodes); err != nil {
		return nil, err
	}
	out, err := mirrorCluster(transport, machine)
	if err != nil {
		return nil, err
	}
	out.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}
	for _, n := range nodes {
		if _, err := netip.ParseAddr(n.Host); err != nil {
			out.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STRICT_DNS}
			out.DnsLookupFamily = cluster.Cluster_V4_PREFERRED
		}
	}
	out.LoadAssignment = nodeAssignment(machine, nodes)
	return out, nil
}

// servedMirrorCluster is the mirror cluster for gateways that we serve endpoints.
func servedMirrorCluster(transport policy.Transport, machine string) (*cluster.Cluster, error) {
	out, err := mirrorCluster(transport, machine)
	if err != nil {
		return nil, err
	}
	discoverEndpoints(out)
	return out, nil
}

// mirrorCluster says nothing of endpoints: where we serve them, nodes come and
// go by EDS alone, as a changed cluster would be warmed anew. Nothing is
// retried: the plugin's calls carry no retry policy. machine is that whose nodes
// are preferred; empty: none are.
func mirrorCluster(transport policy.Transport, machine string) (*cluster.Cluster, error) {
	http2, requests, pending, duration := &core.Http2ProtocolOptions{}, uint32(MirrorMaxRequests), uint32(MirrorMaxPending), mirrorMaxDuration
	if transport == policy.TransportExtProc {
		requests, pending, duration = streamMaxRequests, streamMaxRequests, streamMaxDuration
		http2.ConnectionKeepalive = &core.KeepaliveSettings{Interval: durationpb.New(streamKeepalive), Timeout: durationpb.New(streamKeepalive)}
	}
	options, err := httpOptions(&upstreamhttp.HttpProtocolOptions{
		CommonHttpProtocolOptions: &core.HttpProtocolOptions{MaxStreamDuration: durationpb.New(duration)},
		UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: http2},
		}},
	})
	if err != nil {
		return nil, err
	}
	out := &cluster.Cluster{
		Name:                          MirrorCluster,
		ConnectTimeout:                durationpb.New(MirrorConnectTimeout),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(mirrorBufferBytes),
		TypedExtensionProtocolOptions: options,
		CircuitBreakers: &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
			MaxConnections:     wrapperspb.UInt32(MirrorMaxConnections),
			MaxPendingRequests: wrapperspb.UInt32(pending),
			MaxRequests:        wrapperspb.UInt32(requests),
			MaxRetries:         wrapperspb.UInt32(0),
			TrackRemaining:     true,
		}}},
		OutlierDetection: &cluster.OutlierDetection{
			Consecutive_5Xx:      wrapperspb.UInt32(MirrorEjectAfter),
			Interval:             durationpb.New(MirrorEjectInterval),
			BaseEjectionTime:     durationpb.New(MirrorEjectTime),
			MaxEjectionPercent:   wrapperspb.UInt32(MirrorMaxEjectPercent),
			EnforcingSuccessRate: wrapperspb.UInt32(0),
		},
	}
	if machine != "" {
		out.OutlierDetection.MaxEjectionPercent = wrapperspb.UInt32(MirrorLocalMaxEjectPercent)
		out.OutlierDetection.MaxEjectionTime = durationpb.New(mirrorLocalMaxEjectTime)
	}
	return out, nil
}

func discoverEndpoints(c *cluster.Cluster) {
	c.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_EDS}
	c.EdsClusterConfig = &cluster.Cluster_EdsClusterConfig{EdsConfig: ads(nil)}
}

func httpOptions(options *upstreamhttp.HttpProtocolOptions) (map[string]*anypb.Any, error) {
	typed, err := pack(options)
	if err != nil {
		return nil, err
	}
	return map[string]*anypb.Any{httpOptionsKey: typed}, nil
}

// endpoints are of those clusters that discover them, as long as there are no
// nodes.
func endpoints(up upstream) []xds.Message {
	out := []xds.Message{{Name: MirrorCluster, Message: assignment(MirrorCluster)}}
	if up.ip {
		out = append(out, xds.Message{Name: UpstreamCluster, Message: assignment(UpstreamCluster, mirror.Endpoint{Host: up.host, Port: int(up.port)})})
	}
	return out
}

func checkEndpoints(nodes []mirror.Endpoint) error {
	for _, n := range nodes {
		if n.Host == "" || n.Port < 1 || n.Port > 65535 {
			return fmt.Errorf("node endpoint %q port %d can't be used", n.Host, n.Port)
		}
	}
	return nil
}

func assignment(name string, hosts ...mirror.Endpoint) *endpoint.ClusterLoadAssignment {
	out := &endpoint.ClusterLoadAssignment{ClusterName: name}
	if len(hosts) > 0 {
		out.Endpoints = []*endpoint.LocalityLbEndpoints{group(0, hosts)}
	}
	return out
}

// nodeAssignment puts the nodes of a gateway's machine first: of a priority Envoy
// uses a lower one as far as those above fail.
func nodeAssignment(machine string, nodes []mirror.Endpoint) *endpoint.ClusterLoadAssignment {
	var local, others []mirror.Endpoint
	for _, n := range nodes {
		if machine != "" && n.Machine == machine {
			local = append(local, n)
		} else {
			others = append(others, n)
		}
	}
	if len(local) == 0 || len(others) == 0 {
		return assignment(MirrorCluster, nodes...)
	}
	return &endpoint.ClusterLoadAssignment{ClusterName: MirrorCluster, Endpoints: []*endpoint.LocalityLbEndpoints{group(0, local), group(1, others)}}
}

func group(priority uint32, hosts []mirror.Endpoint) *endpoint.LocalityLbEndpoints {
	locality := &endpoint.LocalityLbEndpoints{Priority: priority}
	for _, h := range hosts {
		locality.LbEndpoints = append(locality.LbEndpoints, &endpoint.LbEndpoint{
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: socketAddress(h.Host, uint32(h.Port))}},
		})
	}
	return locality
}
