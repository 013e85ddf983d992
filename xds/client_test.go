package xds

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/test/logtest"
)

const (
	typeLDS  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	typeCDS  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	typeEDS  = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	typeRDS  = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	typeECDS = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
)

// snap makes a snapshot of "name=value" resources by type; what they mean
// doesn't matter to the server.
func snap(t testing.TB, resources map[string][]string) *Snapshot {
	t.Helper()
	in := map[string][]Message{}
	for typeURL, list := range resources {
		in[typeURL] = []Message{}
		for _, r := range list {
			name, value, _ := strings.Cut(r, "=")
			in[typeURL] = append(in[typeURL], Message{Name: name, Message: wrapperspb.String(r + "/" + value)})
		}
	}
	s, err := NewSnapshot(in)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// fixture is a real server, on a real port.
type fixture struct {
	t        *testing.T
	server   *Server
	registry *prometheus.Registry
	log      *logtest.Buffer
	conn     *grpc.ClientConn
}

func newFixture(t *testing.T, change ...func(*Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, registry: prometheus.NewRegistry(), log: &logtest.Buffer{}}
	c := Config{Logger: slog.New(slog.NewTextHandler(f.log, nil)), Registerer: f.registry}
	for _, ch := range change {
		ch(&c)
	}
	var err error
	if f.server, err = New(c); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := NewGRPCServer()
	f.server.Register(g)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	f.conn, err = grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(65535), grpc.WithStaticConnWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.conn.Close() })
	return f
}

func gatewayNode(id string) *core.Node {
	m, err := structpb.NewStruct(map[string]any{"role": "gateway", "gateway": id})
	if err != nil {
		panic(err)
	}
	return &core.Node{Id: "gateway~" + id, Cluster: "test", Metadata: m}
}

var testKey = GatewayKey("a/b")

// reply is what tests compare: names in order, of either protocol.
type reply struct {
	names   string // "name=value name=value"
	removed string
}

// client speaks either protocol; it is what a test reads as a story.
type client struct {
	t       *testing.T
	cancel  context.CancelFunc
	sotw    discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	delta   discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	node    *core.Node
	names   map[string][]string // sotw: subscribed by type
	nonce   map[string]string
	version map[string]string
	in      chan message
	pending []message
}

type message struct {
	typeURL, nonce, version string
	reply
	err error
}

// dial opens a stream: protocol is sotw or delta.
func (f *fixture) dial(protocol string, node *core.Node) *client {
	f.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{t: f.t, cancel: cancel, node: node, names: map[string][]string{}, nonce: map[string]string{}, version: map[string]string{}, in: make(chan message, 100)}
	api := discovery.NewAggregatedDiscoveryServiceClient(f.conn)
	var err error
	var recv func() message
	if protocol == protocolSotW {
		c.sotw, err = api.StreamAggregatedResources(ctx)
		recv = c.recvSotW
	} else {
		c.delta, err = api.DeltaAggregatedResources(ctx)
		recv = c.recvDelta
	}
	if err != nil {
		f.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			m := recv()
			c.in <- m
			if m.err != nil {
				return
			}
		}
	}()
	f.t.Cleanup(func() { cancel(); <-done })
	return c
}

func text(b []byte) string {
	v := &wrapperspb.StringValue{}
	if err := proto.Unmarshal(b, v); err != nil {
		return err.Error()
	}
	s, _, _ := strings.Cut(v.GetValue(), "/")
	return s
}

func (c *client) recvSotW() message {
	r, err := c.sotw.Recv()
	var names []string
	for _, a := range r.GetResources() {
		names = append(names, text(a.GetValue()))
	}
	return message{r.GetTypeUrl(), r.GetNonce(), r.GetVersionInfo(), reply{names: strings.Join(names, " ")}, err}
}

func (c *client) recvDelta() message {
	r, err := c.delta.Recv()
	var names []string
	for _, a := range r.GetResources() {
		names = append(names, text(a.GetResource().GetValue()))
	}
	return message{r.GetTypeUrl(), r.GetNonce(), r.GetSystemVersionInfo(), reply{strings.Join(names, " "), strings.Join(r.GetRemovedResources(), " ")}, err}
}

// request sends one message; the node goes with the first only.
func (c *client) request(typeURL string, subscribe, unsubscribe []string, fault string, initial map[string]string) {
	c.t.Helper()
	var detail *rpcstatus.Status
	if fault != "" {
		detail = &rpcstatus.Status{Code: 3, Message: fault}
	}
	var err error
	if c.sotw != nil {
		if subscribe != nil || unsubscribe != nil {
			c.names[typeURL] = subscribe
		}
		err = c.sotw.Send(&discovery.DiscoveryRequest{Node: c.node, TypeUrl: typeURL, ResourceNames: c.names[typeURL],
			ResponseNonce: c.nonce[typeURL], VersionInfo: c.version[typeURL], ErrorDetail: detail})
	} else {
		err = c.delta.Send(&discovery.DeltaDiscoveryRequest{Node: c.node, TypeUrl: typeURL, ResourceNamesSubscribe: subscribe,
			ResourceNamesUnsubscribe: unsubscribe, ResponseNonce: c.nonce[typeURL], ErrorDetail: detail, InitialResourceVersions: initial})
		c.nonce[typeURL] = ""
	}
	if err != nil {
		c.t.Fatalf("send: %v", err)
	}
	c.node = nil
}

func (c *client) subscribe(typeURL string, names ...string) {
	c.t.Helper()
	if c.delta != nil {
		c.nonce[typeURL] = ""
	}
	c.request(typeURL, names, nil, "", nil)
}

// want takes the next response of a type, without replying to it.
func (c *client) want(typeURL string, want reply) {
	c.t.Helper()
	m := c.next(typeURL)
	if m.err != nil {
		c.t.Fatalf("%s: stream ended: %v", shortName(typeURL), m.err)
	}
	if m.reply != want {
		c.t.Fatalf("%s: got %+v, want %+v", shortName(typeURL), m.reply, want)
	}
	if m.version == "" || m.nonce == "" {
		c.t.Fatalf("%s: version %q, nonce %q", shortName(typeURL), m.version, m.nonce)
	}
	c.nonce[typeURL] = m.nonce
	if c.sotw != nil {
		c.version[typeURL] = m.version
	}
}

func (c *client) next(typeURL string) message {
	c.t.Helper()
	for i, m := range c.pending {
		if m.typeURL == typeURL {
			c.pending = append(c.pending[:i:i], c.pending[i+1:]...)
			return m
		}
	}
	deadline := time.After(10 * time.Second)
	for {
		select {
		case m := <-c.in:
			if m.typeURL == typeURL || m.err != nil {
				return m
			}
			c.pending = append(c.pending, m)
		case <-deadline:
			c.t.Fatalf("%s: no response within 10s", shortName(typeURL))
		}
	}
}

func (c *client) ack(typeURL string) {
	c.t.Helper()
	c.request(typeURL, nil, nil, "", nil)
}

func (c *client) nack(typeURL, reason string) {
	c.t.Helper()
	c.request(typeURL, nil, nil, reason, nil)
}

func (c *client) accept(typeURL string, want reply) {
	c.t.Helper()
	c.want(typeURL, want)
	c.ack(typeURL)
}

// quiet tells that nothing of any type but probe's is on its way: an answer to
// a question asked now comes after anything sent before.
func (c *client) quiet(f *fixture) {
	c.t.Helper()
	probe := fmt.Sprintf("type.googleapis.com/probe.%d", time.Now().UnixNano())
	c.subscribe(probe)
	m := c.next(probe)
	if m.err != nil {
		c.t.Fatalf("stream ended: %v", m.err)
	}
	if len(c.pending) > 0 {
		c.t.Fatalf("unexpected response: %+v", c.pending[0])
	}
}

// until polls a condition, for at most ten seconds.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 10s: %s", what)
		}
	}
}
