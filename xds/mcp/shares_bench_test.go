package mcp_test

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// proxies are simulated Envoys at an istiod: they acknowledge what it sends, and
// tell when their settings come.
type proxies struct {
	b       *testing.B
	api     discovery.AggregatedDiscoveryServiceClient
	changed chan time.Time // a gateway's settings have come
	wg      sync.WaitGroup

	mu    sync.Mutex
	count map[string]int // responses, by type
}

// start opens the stream of one, as istio-proxy does: the difference of each type.
func (p *proxies) start(ctx context.Context, kind, namespace, name string, ip int, labels map[string]any) {
	p.b.Helper()
	stream, err := p.api.DeltaAggregatedResources(ctx)
	if err != nil {
		p.b.Fatal(err)
	}
	n := node(p.b, fmt.Sprintf("%s~10.1.%d.%d~%s.%s~%s.svc.cluster.local", kind, ip/250, 1+ip%250, name, namespace, namespace),
		map[string]any{"NAMESPACE": namespace, "NAME": name, "CLUSTER_ID": "test", "ISTIO_VERSION": "1.31.0", "LABELS": labels, "PROXY_CONFIG": map[string]any{}})
	for _, r := range []*discovery.DeltaDiscoveryRequest{
		{TypeUrl: resource.ClusterType, Node: n},
		{TypeUrl: resource.ListenerType},
		{TypeUrl: resource.ExtensionConfigType, ResourceNamesSubscribe: []string{gateway.SettingsFilter, gateway.PluginFilter}},
	} {
		if err := stream.Send(r); err != nil {
			p.b.Fatal(err)
		}
	}
	p.wg.Go(func() {
		settings := ""
		for {
			r, err := stream.Recv()
			if err != nil {
				if ctx.Err() == nil && err != io.EOF {
					p.b.Error(err)
				}
				return
			}
			p.mu.Lock()
			p.count[r.GetTypeUrl()]++
			p.mu.Unlock()
			for _, r := range r.GetResources() {
				if now := string(r.GetResource().GetValue()); r.GetName() == gateway.SettingsFilter && now != settings {
					settings = now
					select {
					case p.changed <- time.Now():
					case <-ctx.Done():
					}
				}
			}
			if stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}) != nil {
				return
			}
		}
	})
}

func (p *proxies) take(count int) (last time.Time) {
	p.b.Helper()
	deadline := time.After(30 * time.Second)
	for i := range count {
		select {
		case last = <-p.changed:
		case <-deadline:
			p.b.Fatalf("%d of %d gateways got their shares", i, count)
		}
	}
	return last
}

// What it costs istiod that shares of so many of a hundred gateways move each
// second, and how long they take through it. None is the cost of the same istiod
// with nothing to do. 400 sidecars of another namespace are connected as well.
func BenchmarkSharesThroughIstiod(b *testing.B) {
	const gateways, others = 100, 400
	kubetest.Binary(b, "istiod")
	cluster := kubetest.Start(b)
	cluster.InstallIstio(b)
	cluster.Namespace(b, "shop")
	server, address := serve(b)
	names := make([]string, gateways)
	for i := range names {
		names[i] = fmt.Sprintf("gateway-%03d", i)
	}
	var maker mcp.Maker
	base := plan(names...)
	revision := 0
	publish := func(moving int) {
		b.Helper()
		p := base
		p.Gateways = slices.Clone(base.Gateways)
		revision++
		for i := range moving {
			s := &p.Gateways[i].Settings
			s.Shares = &mirror.Shares{Revision: fmt.Sprintf("%08x", revision), Default: []mirror.Share{{PPM: 1000 * (1 + revision%900), Priority: mirror.Everything}}}
		}
		base = p // those that don't move stay as they are
		made, err := maker.Make(config(""), p)
		if err != nil {
			b.Fatal(err)
		}
		server.SetSnapshot(mcp.Key(""), made.Snapshot)
	}
	publish(0)
	istiod := kubetest.StartIstiod(b, kubetest.IstiodConfig{Cluster: cluster, Sources: []string{"xds://" + address}, Environment: []string{"PILOT_MAX_REQUESTS_PER_SECOND=1000"}})
	conn, err := grpc.NewClient("passthrough:///"+istiod.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(context.Background())
	p := &proxies{b: b, api: discovery.NewAggregatedDiscoveryServiceClient(conn), changed: make(chan time.Time, gateways), count: map[string]int{}}
	defer p.wg.Wait()
	defer cancel()
	for i, name := range names {
		p.start(ctx, "router", "istio-ingress", name+"-0", i, map[string]any{"istio": name})
	}
	for i := range others {
		p.start(ctx, "sidecar", "shop", fmt.Sprintf("other-%03d", i), gateways+i, map[string]any{"app": "other"})
		time.Sleep(2 * time.Millisecond)
	}
	p.take(gateways)
	time.Sleep(2 * time.Second)

	for _, moving := range []int{0, 1, 10, 100} {
		b.Run(fmt.Sprintf("moving=%d", moving), func(b *testing.B) {
			var took time.Duration
			p.mu.Lock()
			clear(p.count)
			p.mu.Unlock()
			before := istiod.CPU(b)
			for range b.N {
				begin := time.Now()
				if moving > 0 {
					publish(moving)
					took += p.take(moving).Sub(begin)
				}
				time.Sleep(time.Until(begin.Add(time.Second)))
			}
			b.ReportMetric(float64((istiod.CPU(b)-before).Microseconds())/1000/float64(b.N), "istiod-ms/s")
			b.ReportMetric(float64(took.Milliseconds())/float64(b.N), "ms-to-last")
			p.mu.Lock()
			defer p.mu.Unlock()
			for typeURL, n := range p.count {
				b.ReportMetric(float64(n)/float64(b.N), typeURL[strings.LastIndexByte(typeURL, '.')+1:]+"s/s")
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
