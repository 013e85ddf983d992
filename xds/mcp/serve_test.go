package mcp_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// serve runs the real xDS server, and gives its address too.
func serve(t testing.TB) (*xds.Server, string) {
	t.Helper()
	server, err := xds.New(xds.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Select: func(n *core.Node) (string, error) {
		if key, ok := mcp.Select(n); ok {
			return key, nil
		}
		return xds.SelectByRole(n)
	}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := xds.NewGRPCServer()
	server.Register(g)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-served })
	return server, l.Addr().String()
}

// istiod behaves as istiod's client for config sources does, oddities included
// (pkg/adsc): its first requests carry a nonce of its own making and no
// version, its acknowledgements its node; what a response lacks is deleted, and
// what has the version that is known is ignored.
type istiod struct {
	t        *testing.T
	node     *core.Node
	api      discovery.AggregatedDiscoveryServiceClient
	stream   discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	cancel   context.CancelFunc
	received chan *discovery.DiscoveryResponse
	store    map[string]map[string]string // type to name to version
	synced   map[string]bool
	updates  []string // resources created, updated or deleted since last asked
}

func newIstiod(t *testing.T, address string, metadata map[string]any) *istiod {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	metadata["GENERATOR"], metadata["ISTIO_VERSION"] = "api", "65536.65536.65536"
	i := &istiod{
		t: t, api: discovery.NewAggregatedDiscoveryServiceClient(conn), store: map[string]map[string]string{}, synced: map[string]bool{},
		node: node(t, "sidecar~10.0.0.1~istiod-0.istio-system~istio-system.svc.cluster.local", metadata),
	}
	i.connect()
	return i
}

// connect opens a stream and subscribes to all types, in istiod's order. What
// it has stays.
func (i *istiod) connect() {
	i.t.Helper()
	if i.cancel != nil {
		i.disconnect()
	}
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	if i.stream, err = i.api.StreamAggregatedResources(ctx); err != nil {
		i.t.Fatal(err)
	}
	received := make(chan *discovery.DiscoveryResponse)
	i.received, i.cancel = received, cancel
	done := make(chan struct{})
	stream := i.stream
	go func() {
		defer close(done)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case received <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	i.t.Cleanup(func() { cancel(); <-done })
	for n, typeURL := range mcp.Types() {
		req := &discovery.DiscoveryRequest{TypeUrl: typeURL, ResponseNonce: time.Now().String()}
		if n == 0 {
			req.Node = i.node
		}
		if err := stream.Send(req); err != nil {
			i.t.Fatal(err)
		}
	}
}

func (i *istiod) disconnect() { i.cancel() }

// take handles so many responses, and acknowledges them.
func (i *istiod) take(responses int) {
	i.t.Helper()
	for range responses {
		select {
		case r := <-i.received:
			i.handle(r)
		case <-time.After(10 * time.Second):
			i.t.Fatalf("no response within 10s; synced: %v", i.synced)
		}
	}
}

func (i *istiod) handle(r *discovery.DiscoveryResponse) {
	i.t.Helper()
	typeURL := r.GetTypeUrl()
	if r.GetVersionInfo() == "" || r.GetNonce() == "" {
		i.t.Errorf("%s: version %q, nonce %q", typeURL, r.GetVersionInfo(), r.GetNonce())
	}
	known, got := i.store[typeURL], map[string]string{}
	for _, a := range r.GetResources() {
		m := &mcpv1alpha1.Resource{}
		if err := a.UnmarshalTo(m); err != nil {
			i.t.Errorf("%s: %v", typeURL, err)
			continue
		}
		name := m.GetMetadata().GetName()
		if strings.Count(name, "/") != 1 {
			i.t.Errorf("%s: name %q", typeURL, name)
		}
		if _, err := m.GetBody().UnmarshalNew(); err != nil {
			i.t.Errorf("%s: %s: %v", typeURL, name, err)
		}
		got[name] = m.GetMetadata().GetVersion()
		if known[name] != got[name] {
			i.updates = append(i.updates, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if _, ok := got[name]; !ok {
			i.updates = append(i.updates, "-"+name)
		}
	}
	i.store[typeURL], i.synced[typeURL] = got, true
	if typeURL == mcp.Types()[0] && len(got) > 0 {
		return // istiod doesn't acknowledge a mesh configuration
	}
	ack := &discovery.DiscoveryRequest{TypeUrl: typeURL, ResponseNonce: r.GetNonce(), VersionInfo: r.GetVersionInfo(), Node: i.node}
	if err := i.stream.Send(ack); err != nil {
		i.t.Fatal(err)
	}
}

// silent makes sure that nothing comes for a while.
func (i *istiod) silent(why string) {
	i.t.Helper()
	select {
	case r := <-i.received:
		i.t.Errorf("%s, but %s came", why, r.GetTypeUrl())
	case <-time.After(100 * time.Millisecond):
	}
}

func (i *istiod) changed() []string {
	out := i.updates
	i.updates = nil
	return out
}

func expect(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" && len(want)+len(got) > 0 {
		t.Errorf("%s: -want +got\n%s", what, d)
	}
}

const (
	aPlugin, aSettings = "istio-ingress/periscope-a-plugin", "istio-ingress/periscope-a-settings"
	bPlugin, bSettings = "istio-ingress/periscope-b-plugin", "istio-ingress/periscope-b-settings"
)

func TestServeIstiod(t *testing.T) {
	server, address := serve(t)
	edited := func() mirror.Plan {
		return mirror.Compile(
			[]policy.MirrorPolicy{policyFor("a", func(s *policy.Spec) { s.Sampling.Percent = 5 }), policyFor("b", nil)},
			mirror.Topology{Gateways: []mirror.Gateway{workload("a"), workload("b")}, Nodes: oneNode})
	}
	set := func(revision string, p mirror.Plan) {
		t.Helper()
		server.SetSnapshot(mcp.Key(revision), snapshot(t, config(""), p))
	}
	one := newIstiod(t, address, map[string]any{})
	canary := newIstiod(t, address, map[string]any{"ISTIO_REVISION": "canary"})
	one.silent("no snapshot is set")

	set("", plan("a", "b"))
	one.take(16)
	expect(t, "the first answers", one.changed(), aPlugin, aSettings, bPlugin, bSettings)
	if len(one.synced) != 16 {
		t.Errorf("%d types were answered", len(one.synced))
	}
	canary.silent("another revision's snapshot was set")
	acknowledged(t, server, 16)

	set("", edited())
	one.take(1)
	expect(t, "an edit", one.changed(), aSettings)
	set("", edited())
	one.silent("the same was set again")
	set("", plan("b"))
	one.take(1)
	expect(t, "a deletion", one.changed(), "-"+aPlugin, "-"+aSettings)

	// Another of the same revision, and one whose revision comes later.
	two := newIstiod(t, address, map[string]any{"ISTIO_REVISION": "default"})
	two.take(16)
	expect(t, "the second istiod", two.changed(), bPlugin, bSettings)
	set("canary", plan("a"))
	canary.take(16)
	expect(t, "the other revision", canary.changed(), aPlugin, aSettings)

	// It comes back with what it has, and its odd nonces; so much went on.
	one.disconnect()
	set("", plan("a", "b"))
	two.take(1)
	expect(t, "an addition", two.changed(), aPlugin, aSettings)
	one.connect()
	one.take(16)
	expect(t, "after a reconnection", one.changed(), aPlugin, aSettings)

	// Nothing at all is an answer too, and has a version.
	set("", mirror.Plan{})
	one.take(1)
	two.take(1)
	if len(one.changed()) != 4 || len(two.changed()) != 4 || len(one.store[envoyFilterType]) != 0 {
		t.Error("an empty snapshot left something")
	}
	three := newIstiod(t, address, map[string]any{})
	three.take(16)
	expect(t, "an empty snapshot", three.changed())

	// A snapshot that is taken away, as by a control plane that lost its state,
	// takes nothing away.
	server.SetSnapshot(mcp.Key("canary"), nil)
	canary.silent("the snapshot was taken away")
	canary.connect()
	canary.silent("there is no snapshot")
	if len(canary.store[envoyFilterType]) != 2 {
		t.Error("what it had is gone")
	}
}

// The other form's resources are of several types; each changes alone.
func TestServeTrafficExtension(t *testing.T) {
	server, address := serve(t)
	c := config(mcp.FormTrafficExtension)
	server.SetSnapshot(mcp.Key(""), snapshot(t, c, plan("a")))
	one := newIstiod(t, address, map[string]any{})
	one.take(16)
	expect(t, "first", one.changed(), "istio-ingress/periscope-a-nodes", "istio-ingress/periscope-a-nodes", "istio-ingress/periscope-a-plugin")
	p := mirror.Compile([]policy.MirrorPolicy{policyFor("a", nil)}, mirror.Topology{Gateways: []mirror.Gateway{workload("a")}, Nodes: nodes(mirror.Endpoint{Host: "10.0.0.7", Port: 5050})})
	server.SetSnapshot(mcp.Key(""), snapshot(t, c, p))
	one.take(1)
	expect(t, "other nodes", one.changed(), "istio-ingress/periscope-a-nodes")
	one.silent("nothing else changed")
}

// Many istiods at once, and one that never reads.
func TestServeMany(t *testing.T) {
	server, address := serve(t)
	slow := newIstiod(t, address, map[string]any{})
	var all []*istiod
	for range 20 {
		all = append(all, newIstiod(t, address, map[string]any{}))
	}
	for round := range 5 {
		names := []string{"a"}
		for n := range round {
			names = append(names, fmt.Sprint("more-", n))
		}
		server.SetSnapshot(mcp.Key(""), snapshot(t, config(""), plan(names...)))
		for _, i := range all {
			if round == 0 {
				i.take(16)
			} else {
				i.take(1)
			}
			if n := len(i.store[envoyFilterType]); n != 2*len(names) {
				t.Fatalf("round %d: %d resources", round, n)
			}
		}
	}
	slow.take(16)
	for len(slow.store[envoyFilterType]) != 10 {
		slow.take(1)
	}
}

// acknowledged waits until the one istiod with answers has acknowledged them.
func acknowledged(t *testing.T, server *xds.Server, types int) {
	t.Helper()
	envoytest.Eventually(t, 10*time.Second, "all answers are acknowledged", func() bool {
		n := 0
		for _, c := range server.Connections() {
			for _, s := range c.Types {
				if s.Acked != "" && s.Acked == s.Sent && s.LastError == "" {
					n++
				}
			}
		}
		return n == types
	})
}
