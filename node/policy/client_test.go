package policy

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/logtest"
	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// control is a control plane that says what the test tells it to.
type control struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	requests chan *discovery.DeltaDiscoveryRequest
	send     chan *discovery.DeltaDiscoveryResponse // nil ends the stream
	done     chan struct{}
}

func (c *control) DeltaAggregatedResources(s discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	received := make(chan struct{})
	go func() {
		defer close(received)
		for {
			r, err := s.Recv()
			if err != nil {
				return
			}
			c.requests <- r
		}
	}()
	for {
		select {
		case r := <-c.send:
			if r == nil {
				return nil
			}
			if err := s.Send(r); err != nil {
				return err
			}
		case <-received:
			return nil
		case <-c.done:
			return nil
		}
	}
}

// startControl listens on address, which may be a port that was in use before.
func startControl(t *testing.T, address string) (*control, string, func()) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	c := &control{requests: make(chan *discovery.DeltaDiscoveryRequest, 100), send: make(chan *discovery.DeltaDiscoveryResponse), done: make(chan struct{})}
	g := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(g, c)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			close(c.done)
			g.Stop()
			<-served
		}
	}
	t.Cleanup(stop)
	return c, l.Addr().String(), stop
}

func (c *control) request(t *testing.T) *discovery.DeltaDiscoveryRequest {
	t.Helper()
	select {
	case r := <-c.requests:
		return r
	case <-time.After(10 * time.Second):
		t.Fatal("no request within 10s")
		return nil
	}
}

func (c *control) push(t *testing.T, nonce string, raw []byte) {
	t.Helper()
	c.respond(t, &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: nonce, Resources: []*discovery.Resource{{
		Name: resourceName, Version: "v" + nonce, Resource: &anypb.Any{TypeUrl: typeURL, Value: raw},
	}}})
}

func (c *control) respond(t *testing.T, r *discovery.DeltaDiscoveryResponse) {
	t.Helper()
	select {
	case c.send <- r:
	case <-time.After(10 * time.Second):
		t.Fatal("nothing takes the response")
	}
}

func encode(t testing.TB, revision string, policies ...*nodev1.NodePolicy) []byte {
	t.Helper()
	raw, err := proto.Marshal(&nodev1.NodePolicySet{Revision: revision, Policies: policies})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func monitor(id string, paranoia uint32) *nodev1.NodePolicy {
	return &nodev1.NodePolicy{Id: id, Tenant: "shop", Application: "storefront", Mode: nodev1.Mode_MODE_MONITOR, Paranoia: paranoia,
		Exclusions: []*nodev1.Exclusion{{RuleId: 942100, Target: "ARGS:q"}}}
}

func newClient(t *testing.T, c Config) (*Client, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	c.NodeID, c.Logger, c.Registerer = "node~one", slog.New(slog.DiscardHandler), registry
	client, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return client, registry
}

// run runs the client until the test ends.
func run(t *testing.T, c *Client) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
}

func TestClientTakesPolicies(t *testing.T) {
	control, address, _ := startControl(t, "127.0.0.1:0")
	c, _ := newClient(t, Config{Address: address})
	run(t, c)

	first := control.request(t)
	if first.GetNode().GetId() != "node~one" || first.GetNode().GetMetadata().GetFields()["role"].GetStringValue() != "node" ||
		first.GetTypeUrl() != typeURL || !cmp.Equal(first.GetResourceNamesSubscribe(), []string{"nodes"}) {
		t.Errorf("first request: %v", first)
	}
	if c.Ready() {
		t.Error("ready without policies")
	}
	control.push(t, "1", encode(t, "rev1", monitor("default/a", 2)))
	if r := control.request(t); r.GetResponseNonce() != "1" || r.GetErrorDetail() != nil || r.GetNode() != nil {
		t.Errorf("reply: %v", r)
	}
	want := Policy{ID: "default/a", Revision: "rev1", Tenant: "shop", Application: "storefront", Mode: ModeMonitor, Paranoia: 2, Exclusions: []Exclusion{{RuleID: 942100, Target: "ARGS:q"}}}
	got, exact := c.Lookup("rev1", "default/a")
	if d := cmp.Diff(want, got); d != "" || !exact || !c.Ready() || c.Revision() != "rev1" {
		t.Errorf("exact %v, ready %v, revision %s: %s", exact, c.Ready(), c.Revision(), d)
	}

	// An unfit set is refused with a reason; what was before stays.
	control.push(t, "2", encode(t, "rev2", monitor("default/a", 9)))
	if r := control.request(t); r.GetResponseNonce() != "2" || !strings.Contains(r.GetErrorDetail().GetMessage(), "paranoia 9") {
		t.Errorf("reply: %v", r)
	}
	if got, exact := c.Lookup("rev2", "default/a"); exact || got.Paranoia != 2 {
		t.Errorf("exact %v, %+v", exact, got)
	}

	// A removed set is acknowledged and changes nothing.
	control.respond(t, &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: "3", RemovedResources: []string{"nodes"}})
	if r := control.request(t); r.GetErrorDetail() != nil || !c.Ready() {
		t.Errorf("reply: %v", r)
	}

	// A strange resource is refused.
	control.respond(t, &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: "4", Resources: []*discovery.Resource{
		{Name: "other"}, {Name: "nodes", Resource: &anypb.Any{TypeUrl: "own/Type"}},
	}})
	if m := control.request(t).GetErrorDetail().GetMessage(); !strings.Contains(m, `unknown resource "other"`) || !strings.Contains(m, `is a "own/Type"`) {
		t.Errorf("reason: %s", m)
	}
}

func TestClientReconnects(t *testing.T) {
	control, address, stop := startControl(t, envoytest.FreeAddr(t))
	c, _ := newClient(t, Config{Address: address})
	run(t, c)
	control.request(t)
	control.push(t, "1", encode(t, "rev1", monitor("default/a", 2)))
	control.request(t)
	control.respond(t, nil) // ends the stream
	if r := control.request(t); r.GetNode() == nil || r.GetInitialResourceVersions()["nodes"] != "v1" || r.GetResponseNonce() != "" {
		t.Errorf("first request of the second stream: %v", r)
	}
	stop()
	again, _, _ := startControl(t, address)
	if r := again.request(t); r.GetInitialResourceVersions()["nodes"] != "v1" {
		t.Errorf("first request to the second server: %v", r)
	}
	if _, exact := c.Lookup("rev1", "default/a"); !exact {
		t.Error("policies were lost")
	}
}

// TestFault: why there are no policies is told, and logged once a reason, though
// the control plane refuses each attempt.
func TestFault(t *testing.T) {
	address := envoytest.FreeAddr(t)
	c, _ := newClient(t, Config{Address: address})
	log := &logtest.Buffer{}
	c.logger = slog.New(slog.NewTextHandler(log, nil))
	if c.Fault() != "" {
		t.Errorf("a fault before the first try: %s", c.Fault())
	}
	run(t, c)
	envoytest.Eventually(t, 10*time.Second, "nobody is there", func() bool { return strings.Contains(c.Fault(), "connection refused") })

	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var refused atomic.Int64
	g := grpc.NewServer(grpc.StreamInterceptor(func(any, grpc.ServerStream, *grpc.StreamServerInfo, grpc.StreamHandler) error {
		refused.Add(1)
		return status.Error(codes.Unauthenticated, "show a certificate")
	}))
	discovery.RegisterAggregatedDiscoveryServiceServer(g, discovery.UnimplementedAggregatedDiscoveryServiceServer{})
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-served })
	envoytest.Eventually(t, 20*time.Second, "the control plane refuses twice", func() bool { return refused.Load() >= 2 })
	if !strings.Contains(c.Fault(), "show a certificate") {
		t.Errorf("the fault is %s", c.Fault())
	}
	for _, reason := range []string{"connection refused", "show a certificate"} {
		if n := log.Count(reason); n != 1 {
			t.Errorf("%q is logged %d times", reason, n)
		}
	}
}

// A policy is found by its own revision, in whichever set it came, as long as
// one of the last sets has it.
func TestLookupByPolicyRevision(t *testing.T) {
	c, _ := newClient(t, Config{Address: "127.0.0.1:1"})
	adopt := func(plan int, a, b string) {
		pa, pb := monitor("default/a", uint32(1+plan%4)), monitor("default/b", 2)
		pa.Revision, pb.Revision = a, b
		r, err := decodeSet(encode(t, fmt.Sprint("plan", plan), pa, pb))
		if err != nil {
			t.Fatal(err)
		}
		c.adopt(r)
	}
	adopt(0, "a1", "b1")
	adopt(1, "a2", "b1")
	adopt(2, "a3", "b1")
	for _, tt := range []struct {
		rev, id  string
		exact    bool
		paranoia int
	}{
		{"a1", "default/a", true, 1},
		{"a2", "default/a", true, 2},
		{"a3", "default/a", true, 3},
		{"b1", "default/b", true, 2},
		{"plan2", "default/b", false, 2}, // the plan's revision isn't the policy's
		{"a1", "default/b", false, 2},    // another policy's
	} {
		if p, exact := c.Lookup(tt.rev, tt.id); exact != tt.exact || p.Paranoia != tt.paranoia {
			t.Errorf("%s %s: exact %v, %+v", tt.rev, tt.id, exact, p)
		}
	}
	for i := range keptRevisions { // of the other policy: this one's stay known
		adopt(3+i, fmt.Sprint("a", 4+i), "b1")
	}
	if _, exact := c.Lookup("b1", "default/b"); !exact {
		t.Error("edits of one policy made another's revision unknown")
	}
	if _, exact := c.Lookup("a3", "default/a"); exact {
		t.Error("a revision of nine sets ago is still known")
	}
	if _, err := decodePolicy(&nodev1.NodePolicy{Id: "default/a", Revision: strings.Repeat("x", maxNameBytes+1)}); err == nil || !strings.Contains(err.Error(), "policy's revision is longer") {
		t.Errorf("error is %v", err)
	}
}

func TestLookup(t *testing.T) {
	c, registry := newClient(t, Config{Address: "127.0.0.1:1"})
	p, exact := c.Lookup("rev1", "default/a")
	if d := cmp.Diff(Policy{ID: "default/a", Mode: ModeMonitor, Paranoia: 1}, p); d != "" || exact {
		t.Errorf("default: exact %v: %s", exact, d)
	}
	adopt := func(i int, policies ...*nodev1.NodePolicy) {
		r, err := decodeSet(encode(t, fmt.Sprint("rev", i), policies...))
		if err != nil {
			t.Fatal(err)
		}
		c.adopt(r)
	}
	for i := range keptRevisions + 2 {
		adopt(i, monitor("default/a", uint32(1+i%4)))
	}
	adopt(keptRevisions+1, monitor("default/b", 4)) // the same revision again replaces
	adopt(5, monitor("default/a", 3))               // a rollback
	for _, tt := range []struct {
		rev, id  string
		exact    bool
		paranoia int
	}{
		{"rev5", "default/a", true, 3},
		{"rev8", "default/a", true, 1},
		{"rev2", "default/a", true, 3},
		{"rev1", "default/a", false, 3},       // forgotten: the newest is rev5
		{"never", "default/a", false, 3},      // never known
		{"rev9", "default/a", false, 3},       // that revision lacks it
		{"rev9", "default/b", true, 4},        //
		{"rev5", "default/b", false, 4},       // only an older one has it
		{"rev5", "default/unknown", false, 1}, // none has it
		{"", "", false, 1},                    //
	} {
		p, exact := c.Lookup(tt.rev, tt.id)
		if exact != tt.exact || p.Paranoia != tt.paranoia || p.ID != tt.id {
			t.Errorf("%s %s: exact %v, %+v; want %v, %d", tt.rev, tt.id, exact, p, tt.exact, tt.paranoia)
		}
	}
	if n := len(c.current.Load().revisions); n != keptRevisions {
		t.Errorf("%d revisions are kept", n)
	}
	want := map[string]float64{
		"periscope_node_policies":                          1,
		"periscope_node_policy_connected":                  0,
		"periscope_node_policy_lookups_total{exact}":       4,
		"periscope_node_policy_lookups_total{nearest}":     4,
		"periscope_node_policy_lookups_total{no_policies}": 1,
		"periscope_node_policy_lookups_total{unknown}":     2,
		"periscope_node_policy_state_errors_total":         0,
		"periscope_node_policy_stream_ends_total":          0,
		"periscope_node_policy_updates_total{accepted}":    0,
		"periscope_node_policy_updates_total{rejected}":    0,
	}
	if d := cmp.Diff(want, gather(t, registry)); d != "" {
		t.Error(d)
	}
}

func gather(t *testing.T, r *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "{" + l.GetValue() + "}"
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

func TestStateFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policies.pb")
	control, address, _ := startControl(t, "127.0.0.1:0")
	c, _ := newClient(t, Config{Address: address, StateFile: file})
	if c.Ready() {
		t.Error("ready without policies")
	}
	run(t, c)
	control.request(t)
	control.push(t, "1", encode(t, "rev1", monitor("default/a", 3)))
	control.request(t) // the reply comes after the file

	later, _ := newClient(t, Config{Address: "127.0.0.1:1", StateFile: file})
	if p, exact := later.Lookup("rev1", "default/a"); !later.Ready() || !exact || p.Paranoia != 3 {
		t.Errorf("ready %v, exact %v, %+v", later.Ready(), exact, p)
	}
	if entries, err := os.ReadDir(filepath.Dir(file)); err != nil || len(entries) != 1 {
		t.Errorf("files left: %v, %v", entries, err)
	}

	if err := os.WriteFile(file, []byte("no set"), 0o600); err != nil {
		t.Fatal(err)
	}
	if bad, _ := newClient(t, Config{Address: "127.0.0.1:1", StateFile: file}); bad.Ready() {
		t.Error("ready by an unfit file")
	}
}

// TestStateFileFault: what can't be saved is in force all the same.
func TestStateFileFault(t *testing.T) {
	control, address, _ := startControl(t, "127.0.0.1:0")
	c, registry := newClient(t, Config{Address: address, StateFile: filepath.Join(t.TempDir(), "none", "policies.pb")})
	run(t, c)
	control.request(t)
	control.push(t, "1", encode(t, "rev1", monitor("default/a", 3)))
	if r := control.request(t); r.GetErrorDetail() != nil || !c.Ready() {
		t.Errorf("reply: %v", r)
	}
	if got := gather(t, registry)["periscope_node_policy_state_errors_total"]; got != 1 {
		t.Errorf("%v faults counted", got)
	}
}

func TestNewFaults(t *testing.T) {
	_, err := New(Config{})
	for _, want := range []string{"address", "node id", "logger"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v doesn't speak of the %s", err, want)
		}
	}
}

func TestDelay(t *testing.T) {
	for _, tt := range []struct {
		failures int
		random   float64
		want     time.Duration
	}{
		{0, 0, 100 * time.Millisecond},
		{0, 0.99, 100 * time.Millisecond},
		{1, 0, 200 * time.Millisecond},
		{3, 0.5, 600 * time.Millisecond},
		{6, 0, 5 * time.Second},
		{1000, 0, 5 * time.Second},
		{1000, 0.5, 3750 * time.Millisecond},
	} {
		if got := delay(tt.failures, tt.random); got != tt.want {
			t.Errorf("delay(%d, %v) is %v, want %v", tt.failures, tt.random, got, tt.want)
		}
	}
}
