package istiod

import (
	"context"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	mcp "istio.io/api/mcp/v1alpha1"
	istio "istio.io/api/networking/v1alpha3"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/test/netnstest"
	"github.com/periscope-mesh/periscope/xds"
)

var update = flag.Bool("update", false, "record what a real istiod answers")

// envoyFilter adds a cluster to the gateway; without a timeout, it is one that
// istiod finds invalid.
func envoyFilter(t *testing.T, name, version string, timeout *durationpb.Duration) xds.Message {
	t.Helper()
	spec := &istio.EnvoyFilter{WorkloadSelector: &istio.WorkloadSelector{Labels: map[string]string{"istio": "public"}}}
	patch := &istio.EnvoyFilter_EnvoyConfigObjectPatch{}
	if timeout != nil {
		raw, err := protojson.Marshal(&cluster.Cluster{Name: name, ConnectTimeout: timeout})
		if err != nil {
			t.Fatal(err)
		}
		value := new(structpb.Struct)
		if err := protojson.Unmarshal(raw, value); err != nil {
			t.Fatal(err)
		}
		patch.ApplyTo = istio.EnvoyFilter_CLUSTER
		patch.Match = &istio.EnvoyFilter_EnvoyConfigObjectMatch{Context: istio.EnvoyFilter_GATEWAY}
		patch.Patch = &istio.EnvoyFilter_Patch{Operation: istio.EnvoyFilter_Patch_ADD, Value: value}
	}
	spec.ConfigPatches = append(spec.ConfigPatches, patch)
	body, err := anypb.New(spec)
	if err != nil {
		t.Fatal(err)
	}
	return xds.Message{Name: "ingress/" + name, Message: &mcp.Resource{Body: body, Metadata: &mcp.Metadata{
		Name: "ingress/" + name, Version: version, CreateTime: timestamppb.New(time.Unix(1700000000, 0)),
	}}}
}

// source is a config source for istiod.
type source struct {
	*xds.Server
	address string
}

func startSource(t *testing.T) *source {
	t.Helper()
	server, err := xds.New(xds.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
		Select: func(*core.Node) (string, error) { return "istiod", nil }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := xds.NewGRPCServer()
	server.Register(g)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return &source{server, l.Addr().String()}
}

func (s *source) serve(t *testing.T, messages ...xds.Message) {
	t.Helper()
	snapshot, err := xds.NewSnapshot(map[string][]xds.Message{"networking.istio.io/v1alpha3/EnvoyFilter": messages})
	if err != nil {
		t.Fatal(err)
	}
	s.SetSnapshot("istiod", snapshot)
}

// What a real istiod and a real Envoy do with good and bad resources is told,
// and what can't be asked is unknown.
func TestRealIstiod(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	api := kubetest.Start(t)
	api.InstallIstio(t)
	src := startSource(t)
	bad := envoyFilter(t, "invalid", "b1", nil)
	src.serve(t, envoyFilter(t, "good", "g1", durationpb.New(time.Second)), bad)
	i := kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: api, Sources: []string{"xds://" + src.address}, BindHost: "0.0.0.0"})
	_, port, _ := net.SplitHostPort(i.Monitoring)
	near := "http://127.0.0.1:" + port
	_, grpcPort, _ := net.SplitHostPort(i.GRPC)
	gateway := kubetest.StartRouter(t, kubetest.RouterConfig{XDS: "127.0.0.1:" + grpcPort, Name: "gw-0", Namespace: "ingress",
		Labels: map[string]string{"istio": "public"}, IP: "10.1.1.1"})

	good, invalid := Key("EnvoyFilter", "ingress", "good"), Key("EnvoyFilter", "ingress", "invalid")
	var served atomic.Pointer[Served]
	set := func(version string) {
		served.Store(&Served{
			Resources: map[string]Resource{
				good:    {Version: version, Since: time.Now(), Types: []string{TypeCluster}},
				invalid: {Version: "b1", Since: time.Now().Add(-time.Minute)},
			},
			Gateways: []Gateway{{ID: "ingress/public", Policy: "shop/p", Namespace: "ingress", Pods: []string{"gw-0"}, Resources: []string{good}}},
		})
	}
	set("g1")
	endpoints := []string{near}
	endpoints = append(endpoints, "http://"+net.JoinHostPort(netnstest.Address, port))
	p := start(t, Config{Endpoints: func() ([]string, error) { return endpoints, nil }, Served: func() Served { return *served.Load() }, Interval: 200 * time.Millisecond})
	is := func(stage Stage, reason string) func() bool {
		return func() bool {
			s := p.State()
			return len(s.Gateways) == 1 && s.Gateways[0].Stage == stage && strings.Contains(s.Gateways[0].Reason, reason)
		}
	}
	envoytest.Eventually(t, 30*time.Second, "unknown without an identity, since pods may be there", func() bool {
		s := find(p.State(), endpoints[1], good)
		return s.Stage == Unknown && strings.Contains(s.Reason, "401")
	})
	envoytest.Eventually(t, 20*time.Second, "an invalid resource is refused", func() bool { return find(p.State(), near, invalid).Stage == Refused })
	if s := find(p.State(), near, good); s.Stage != Accepted {
		t.Errorf("a good one is %+v", s)
	}

	// The poller saw g1 in place, so only a push from now on is evidence.
	src.serve(t, envoyFilter(t, "good", "g2", durationpb.New(2*time.Second)), bad)
	set("g2")
	p.Refresh()
	envoytest.Eventually(t, 20*time.Second, "Envoy acknowledges", is(Acknowledged, ""))
	if *update {
		record(t, near+"/debug/configz", "testdata/configz.json")
		record(t, near+"/debug/syncz", "testdata/syncz.json")
	}

	src.serve(t, envoyFilter(t, "good", "g3", durationpb.New(-time.Second)), bad)
	set("g3")
	p.Refresh()
	envoytest.Eventually(t, 20*time.Second, "Envoy's refusal", is(Refused, "Invalid duration"))
	if *update {
		record(t, near+"/debug/syncz", "testdata/syncz-refused.json")
	}
	t.Logf("refused: %s", p.State().Gateways[0].Reason)

	// istiod goes on showing the error when it pushes the next version, and while
	// Envoy says nothing that isn't a word against the new one.
	gateway.Signal(syscall.SIGSTOP)
	src.serve(t, envoyFilter(t, "good", "g4", durationpb.New(time.Second)), bad)
	set("g4")
	p.Refresh()
	envoytest.Eventually(t, 20*time.Second, "the error may be of the push before", is(Pushed, "or the one before: "))
	gateway.Signal(syscall.SIGCONT)
	envoytest.Eventually(t, 20*time.Second, "Envoy acknowledges again", is(Acknowledged, ""))
}

func find(s State, istiod, resource string) Status {
	for _, r := range s.Resources {
		if r.Istiod == istiod && r.Resource == resource {
			return r
		}
	}
	return Status{}
}

func record(t *testing.T, url, file string) {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(body, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// start runs a poller until the test ends.
func start(t *testing.T, c Config) *Poller {
	t.Helper()
	c.Logger, c.Registerer = slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	background(t, p.Run)
	return p
}

// background runs something until the test ends.
func background(t *testing.T, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
