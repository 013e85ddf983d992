package conformance

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacpolicy "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matching "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	buffer "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/buffer/v3"
	extproc "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	quic "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/quic/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// listenerKind is a listener of the rig: one of our snapshot's, or made from one.
type listenerKind struct {
	name   string
	bare   bool // without our filters: what an exchange is like without us
	wide   bool // takes far more header than Envoy's defaults
	hops   bool // trusts one proxy before it
	secure bool
	asks   bool // for the client's certificate
	udp    bool // HTTP/3
}

var listenerKinds = []listenerKind{
	{name: "http"},
	{name: "bare", bare: true},
	{name: "wide", wide: true},
	{name: "wide-bare", wide: true, bare: true},
	{name: "hops", hops: true},
	{name: "https", secure: true},
	{name: "https-bare", secure: true, bare: true},
	{name: "mtls", secure: true, asks: true},
	{name: "h3", secure: true, udp: true},
	{name: "h3-bare", secure: true, udp: true, bare: true},
}

const (
	rbacFilter   = "rbac"
	bufferFilter = "buffer"
	bufferLimit  = 1 << 10
	timeoutRoute = 200 * time.Millisecond
	maxHeaders   = 20000
)

// extend adds to our own snapshot what its cases need of Envoy: listeners beside
// ours, other filters behind ours, routes of all kinds.
func (r *rig) extend(s *xds.Snapshot) *xds.Snapshot {
	var listeners []xds.Message
	for _, k := range r.listeners {
		listeners = append(listeners, xds.Message{Name: k.name, Message: r.listener(s, k)})
	}
	for typeURL, messages := range map[string][]xds.Message{
		resource.ListenerType: listeners,
		resource.RouteType:    {{Name: "default", Message: r.routes()}},
		resource.ClusterType: {
			{Name: gateway.UpstreamCluster, Message: r.cluster(gateway.UpstreamCluster, r.up.addr, false)},
			{Name: "upstream-h2", Message: r.cluster("upstream-h2", r.up.addr, true)},
			{Name: "refused", Message: r.cluster("refused", "127.0.0.1:1", false)},
		},
	} {
		var err error
		if s, err = s.With(typeURL, messages...); err != nil {
			r.t.Fatal(err)
		}
	}
	if r.transport.wait > 0 {
		s = r.changeMirror(s, func(c *cluster.Cluster) { // a slow machine has more calls under way than a gateway may
			for _, t := range c.GetCircuitBreakers().GetThresholds() {
				t.MaxRequests, t.MaxPendingRequests = wrapperspb.UInt32(4096), wrapperspb.UInt32(4096)
			}
		})
	}
	if r.transport.kind == policy.TransportExtProc && r.transport.wait > 0 {
		s = r.patient(s)
	}
	return s
}

// patient has ext_proc and its connections to the node last longer, as a slow
// machine needs it.
func (r *rig) patient(s *xds.Snapshot) *xds.Snapshot {
	var messages []xds.Message
	for _, res := range s.Resources(resource.ExtensionConfigType) {
		c := unpack(r.t, res.Any, new(core.TypedExtensionConfig))
		if c.Name == gateway.PluginFilter {
			outer := unpack(r.t, c.TypedConfig, new(matching.ExtensionWithMatcher))
			stream := unpack(r.t, outer.ExtensionConfig.TypedConfig, new(extproc.ExternalProcessor))
			stream.DeferredCloseTimeout = durationpb.New(r.transport.wait)
			outer.ExtensionConfig.TypedConfig = pack(r.t, stream)
			c.TypedConfig = pack(r.t, outer)
		}
		messages = append(messages, xds.Message{Name: res.Name, Message: c})
	}
	s, err := s.With(resource.ExtensionConfigType, messages...)
	if err != nil {
		r.t.Fatal(err)
	}
	return r.changeMirror(s, func(c *cluster.Cluster) {
		const key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
		o := unpack(r.t, c.TypedExtensionProtocolOptions[key], new(upstreamhttp.HttpProtocolOptions))
		o.GetExplicitHttpConfig().GetHttp2ProtocolOptions().ConnectionKeepalive.Timeout = durationpb.New(longWait)
		c.TypedExtensionProtocolOptions[key] = pack(r.t, o)
	})
}

// changeMirror changes the mirror cluster of a snapshot.
func (r *rig) changeMirror(s *xds.Snapshot, change func(*cluster.Cluster)) *xds.Snapshot {
	c := new(cluster.Cluster)
	for _, res := range s.Resources(resource.ClusterType) {
		if res.Name == gateway.MirrorCluster {
			unpack(r.t, res.Any, c)
		}
	}
	change(c)
	s, err := s.With(resource.ClusterType, xds.Message{Name: c.Name, Message: c})
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func unpack[M proto.Message](t testing.TB, from *anypb.Any, to M) M {
	t.Helper()
	if err := from.UnmarshalTo(to); err != nil {
		t.Fatal(err)
	}
	return to
}

func pack(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	out, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// listener makes a listener from ours.
func (r *rig) listener(s *xds.Snapshot, k listenerKind) *listener.Listener {
	from := gateway.HTTPListener
	if k.secure {
		from = gateway.HTTPSListener
	}
	l := new(listener.Listener)
	for _, res := range s.Resources(resource.ListenerType) {
		if res.Name == from {
			unpack(r.t, res.Any, l)
		}
	}
	l.Name = k.name
	l.Address = address(r.addr[k.name])
	filter := l.FilterChains[0].Filters[0]
	m := unpack(r.t, filter.GetTypedConfig(), new(hcm.HttpConnectionManager))
	m.StatPrefix = k.name
	m.HttpProtocolOptions = &core.Http1ProtocolOptions{AcceptHttp_10: true, EnableTrailers: true}
	m.UpgradeConfigs = append(m.UpgradeConfigs, &hcm.HttpConnectionManager_UpgradeConfig{UpgradeType: "CONNECT"})
	m.Http2ProtocolOptions.AllowConnect = true
	if k.wide {
		m.MaxRequestHeadersKb = wrapperspb.UInt32(8192)
		m.CommonHttpProtocolOptions = &core.HttpProtocolOptions{MaxHeadersCount: wrapperspb.UInt32(maxHeaders)}
	}
	if k.hops {
		m.XffNumTrustedHops = 1
	}
	router := m.HttpFilters[len(m.HttpFilters)-1]
	ours := m.HttpFilters[:len(m.HttpFilters)-1]
	if k.bare {
		ours = nil
	}
	m.HttpFilters = append(slices.Clone(ours),
		&hcm.HttpFilter{Name: rbacFilter, Disabled: true, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: pack(r.t, &rbac.RBAC{})}},
		&hcm.HttpFilter{Name: bufferFilter, Disabled: true, ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: pack(r.t, &buffer.Buffer{MaxRequestBytes: wrapperspb.UInt32(bufferLimit)})}},
		router)
	if k.asks {
		r.askForCertificate(l)
	}
	if k.udp {
		r.overQUIC(l, m)
	}
	filter.ConfigType = &listener.Filter_TypedConfig{TypedConfig: pack(r.t, m)}
	return l
}

func (r *rig) askForCertificate(l *listener.Listener) {
	socket := l.FilterChains[0].TransportSocket
	c := unpack(r.t, socket.GetTypedConfig(), new(tlsv3.DownstreamTlsContext))
	c.RequireClientCertificate = wrapperspb.Bool(true)
	c.CommonTlsContext.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa: &core.DataSource{Specifier: &core.DataSource_Filename{Filename: r.keys.certFile}},
	}}
	socket.ConfigType = &core.TransportSocket_TypedConfig{TypedConfig: pack(r.t, c)}
}

func (r *rig) overQUIC(l *listener.Listener, m *hcm.HttpConnectionManager) {
	l.Address.GetSocketAddress().Protocol = core.SocketAddress_UDP
	l.UdpListenerConfig = &listener.UdpListenerConfig{QuicOptions: &listener.QuicProtocolOptions{}}
	l.EnableReusePort = nil
	l.ListenerFilters = nil // QUIC tells the server name itself
	socket := l.FilterChains[0].TransportSocket
	c := unpack(r.t, socket.GetTypedConfig(), new(tlsv3.DownstreamTlsContext))
	c.CommonTlsContext.AlpnProtocols = nil
	l.FilterChains[0].TransportSocket = &core.TransportSocket{
		Name:       "envoy.transport_sockets.quic",
		ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: pack(r.t, &quic.QuicDownstreamTransport{DownstreamTlsContext: c})},
	}
	m.CodecType = hcm.HttpConnectionManager_HTTP3
	m.Http3ProtocolOptions = &core.Http3ProtocolOptions{}
}

func address(hostport string) *core.Address {
	host, port, _ := net.SplitHostPort(hostport)
	n, _ := strconv.ParseUint(port, 10, 16)
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: host, PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(n)},
	}}}
}

func (r *rig) cluster(name, addr string, h2 bool) *cluster.Cluster {
	options := &upstreamhttp.HttpProtocolOptions{
		CommonHttpProtocolOptions: &core.HttpProtocolOptions{MaxHeadersCount: wrapperspb.UInt32(maxHeaders), MaxResponseHeadersKb: wrapperspb.UInt32(8192)},
	}
	explicit := &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{}
	if h2 {
		explicit.ProtocolConfig = &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &core.Http2ProtocolOptions{AllowConnect: true}}
	} else {
		explicit.ProtocolConfig = &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &core.Http1ProtocolOptions{EnableTrailers: true}}
	}
	options.UpstreamProtocolOptions = &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: explicit}
	none := wrapperspb.UInt32(1 << 30)
	return &cluster.Cluster{
		Name:                          name,
		ConnectTimeout:                durationpb.New(5 * time.Second),
		ClusterDiscoveryType:          &cluster.Cluster_Type{Type: cluster.Cluster_STATIC},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(r.t, options)},
		CircuitBreakers: &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
			MaxConnections: none, MaxPendingRequests: none, MaxRequests: none, MaxRetries: none,
		}}},
		LoadAssignment: assignment(name, address(addr)),
	}
}

func assignment(cluster string, to *core.Address) *endpoint.ClusterLoadAssignment {
	return &endpoint.ClusterLoadAssignment{ClusterName: cluster, Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: []*endpoint.LbEndpoint{{
		HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: to}},
	}}}}}
}

// routes are ours, and before it one for each way in which Envoy answers itself
// or does more than hand on. The route's name is its first path segment.
func (r *rig) routes() *route.RouteConfiguration {
	to := func(cluster string) *route.RouteAction {
		return &route.RouteAction{ClusterSpecifier: &route.RouteAction_Cluster{Cluster: cluster}, Timeout: durationpb.New(0)}
	}
	named := func(name string, action *route.RouteAction) *route.Route {
		return &route.Route{Name: name, Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/" + name + "/"}}, Action: &route.Route_Route{Route: action}}
	}
	retry := to(gateway.UpstreamCluster)
	retry.RetryPolicy = &route.RetryPolicy{RetryOn: "5xx,reset", NumRetries: wrapperspb.UInt32(2), RetryBackOff: &route.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(time.Millisecond)}}
	slow := to(gateway.UpstreamCluster)
	slow.Timeout = durationpb.New(timeoutRoute)
	internal := to(gateway.UpstreamCluster)
	internal.InternalRedirectPolicy = &route.InternalRedirectPolicy{MaxInternalRedirects: wrapperspb.UInt32(2)}
	denied, buffered := named("denied", to(gateway.UpstreamCluster)), named("buffer", to(gateway.UpstreamCluster))
	denied.TypedPerFilterConfig = map[string]*anypb.Any{rbacFilter: pack(r.t, &rbac.RBACPerRoute{Rbac: &rbac.RBAC{Rules: &rbacpolicy.RBAC{
		Action: rbacpolicy.RBAC_DENY,
		Policies: map[string]*rbacpolicy.Policy{"nobody": {
			Permissions: []*rbacpolicy.Permission{{Rule: &rbacpolicy.Permission_Any{Any: true}}},
			Principals:  []*rbacpolicy.Principal{{Identifier: &rbacpolicy.Principal_Any{Any: true}}},
		}},
	}}})}
	buffered.TypedPerFilterConfig = map[string]*anypb.Any{bufferFilter: pack(r.t, &buffer.BufferPerRoute{Override: &buffer.BufferPerRoute_Buffer{
		Buffer: &buffer.Buffer{MaxRequestBytes: wrapperspb.UInt32(bufferLimit)},
	}})}
	connect := to(gateway.UpstreamCluster)
	connect.UpgradeConfigs = []*route.RouteAction_UpgradeConfig{{UpgradeType: "CONNECT"}}
	tunnel := &route.Route{Name: "connect", Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_ConnectMatcher_{ConnectMatcher: &route.RouteMatch_ConnectMatcher{}}}, Action: &route.Route_Route{Route: connect}}
	redirect := &route.Route{Name: "redirect", Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/redirect/"}}, Action: &route.Route_Redirect{
		Redirect: &route.RedirectAction{HostRedirect: "elsewhere.example"}}}
	direct := &route.Route{Name: "direct", Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/direct/"}}, Action: &route.Route_DirectResponse{
		DirectResponse: &route.DirectResponseAction{Status: 418, Body: &core.DataSource{Specifier: &core.DataSource_InlineString{InlineString: "short and stout"}}}}}
	all := &route.Route{Name: "default", Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}}, Action: &route.Route_Route{Route: to(gateway.UpstreamCluster)}}
	return &route.RouteConfiguration{
		Name:                   "default",
		RequestHeadersToRemove: []string{"x-envoy-external-address", "x-envoy-internal"},
		VirtualHosts: []*route.VirtualHost{
			{Name: "none", Domains: []string{"none.example"}},
			{Name: "all", Domains: []string{"*"}, Routes: []*route.Route{
				tunnel, named("h2", to("upstream-h2")), named("refused", to("refused")),
				named("retry", retry), named("timeout", slow), named("internal", internal), denied, buffered, redirect, direct, all,
			}},
		},
	}
}

// keys are a certificate of our own making, for server and client alike.
type keys struct {
	certFile, keyFile string
	pair              tls.Certificate
}

const (
	clientURI = "spiffe://cluster.example/ns/shop/sa/cart"
	serverDNS = "gateway.example"
)

func newKeys(t testing.TB) *keys {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, _ := url.Parse(clientURI)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cart", Organization: []string{"Shop, Ltd"}}, DNSNames: []string{serverDNS, "localhost"},
		URIs: []*url.URL{uri}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM, keyPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	dir := t.TempDir()
	k := &keys{certFile: filepath.Join(dir, "cert.pem"), keyFile: filepath.Join(dir, "key.pem")}
	for name, content := range map[string][]byte{k.certFile: certPEM, k.keyFile: keyPEM} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if k.pair, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	return k
}

// tls is how a client of a secure listener speaks.
func (r *rig) tls(name string, alpn ...string) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true, ServerName: serverDNS, NextProtos: alpn}
	if strings.HasPrefix(name, "mtls") {
		c.Certificates = []tls.Certificate{r.keys.pair}
	}
	return c
}
