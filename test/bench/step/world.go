package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/overload"
	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/bench/sink"
	"github.com/periscope-mesh/periscope/test/cgrouptest"
	"github.com/periscope-mesh/periscope/xds"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// answerBytes is small: most of what analysis costs is by bytes of JSON.
const answerBytes = 64

// conns are kept open to each gateway, for either kind of request.
const conns = 24

// cpuWeight of the node's control group, where others have 100.
const cpuWeight = 10

// world is what all runs have in common:
//
//	load.Client ×2n ─► Envoy ×n ─► sink.Backend
//	                      ├ copies ─► node, in its control group; one for each run
//	        xds.Server ◄──┘ ADS         │ ORCA
//	            └──── one control ◄─────┘
type world struct {
	options
	dir    string // for temporary files
	gauge  *gauge
	group  *cgrouptest.Group
	ln     net.Listener // of the xDS server
	server *xds.Server
	maker  xdsgateway.Maker
	config xdsgateway.Config
	plan   mirror.Plan
	node   addresses

	gateways []*gateway
}

// gateway is a real one, with those who send requests to it.
type gateway struct {
	id       string
	http     string // address
	envoy    *proxy.Envoy
	routine  *load.Client
	priority *load.Client
	plan     mirror.GatewayPlan
	limit    int // of what may be under way to nodes, as it was served last
}

// requests of the two kinds.
func request(path string) load.Request {
	return load.Request{Raw: []byte("GET " + path + " HTTP/1.1\r\nhost: shop.example\r\nuser-agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36\r\n" +
		"accept: application/json\r\naccept-language: en-GB,en;q=0.8\r\ncookie: theme=dark; visit=9b1c7e\r\n\r\n"), BodyBytes: answerBytes}
}

// The path of priority requests makes them Authentication, an always-class.
func routineRequest() load.Request  { return request("/api/items/1234?page=2&sort=price") }
func priorityRequest() load.Request { return request("/api/login/1234?page=2&sort=price") }

// within makes a world with so many gateways, calls f, and takes it all down.
func within(ctx context.Context, o options, gateways int, f func(context.Context, *world) error) (err error) {
	w := &world{options: o}
	if w.dir, err = os.MkdirTemp("", "bench-pressure-"); err != nil {
		return fmt.Errorf("create temporary folder: %w", err)
	}
	defer os.RemoveAll(w.dir)
	if w.gauge, err = newGauge(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.gauge.close()) }()
	if w.group, err = cgrouptest.New(); err != nil {
		return fmt.Errorf("%w: run as root", err)
	}
	defer func() { err = errors.Join(err, w.group.Remove()) }()
	// As deploy/ has it: users go first.
	if err := w.group.Weight(cpuWeight); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	parts, ctx := errgroup.WithContext(ctx)
	err = func() error {
		defer cancel()
		if err := w.open(ctx, parts, gateways); err != nil {
			return err
		}
		defer w.stop()
		return f(ctx, w)
	}()
	if failed := parts.Wait(); failed != nil {
		return failed // the cause; err is then only that everything was stopped
	}
	return err
}

// open starts the backend, the xDS server and the gateways.
func (w *world) open(ctx context.Context, parts *errgroup.Group, gateways int) error {
	backend, err := sink.ListenBackend(answerBytes)
	if err != nil {
		return err
	}
	parts.Go(func() error { return backend.Run(ctx) })
	w.node = addresses{freeAddr(), freeAddr(), freeAddr()}
	w.config = xdsgateway.Config{Upstream: fmt.Sprintf("http://127.0.0.1:%d", backend.Port()), Plugin: lua.Embedded().Code}
	if w.plan, err = planFor(gateways, w.node.listen); err != nil {
		return err
	}
	if err := w.serve(ctx, parts); err != nil {
		return err
	}
	for _, p := range w.plan.Gateways {
		g := &gateway{id: p.Gateway.ID(), http: freeAddr(), plan: p}
		w.gateways = append(w.gateways, g)
		if err := w.put(g, nil, xdsgateway.MirrorMaxRequests); err != nil {
			return err
		}
		if err := w.start(ctx, g); err != nil {
			w.stop()
			return fmt.Errorf("gateway %s: %w", g.id, err)
		}
	}
	return nil
}

func (w *world) stop() {
	for _, g := range w.gateways {
		for _, c := range []*load.Client{g.routine, g.priority} {
			if c != nil {
				c.Close()
			}
		}
		if g.envoy != nil {
			g.envoy.Stop()
		}
	}
}

// planFor is one policy for so many gateways.
func planFor(gateways int, node string) (mirror.Plan, error) {
	host, port, err := net.SplitHostPort(node)
	if err != nil {
		return mirror.Plan{}, err
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return mirror.Plan{}, err
	}
	p := policy.Default()
	p.Spec.Sampling.Always = []policy.Class{policy.ClassAuthentication}
	p.Spec.Sampling.Adaptive.MinPercent = 0
	t := mirror.Topology{Nodes: []mirror.NodeService{{StandIn: true, Endpoints: []mirror.Endpoint{{Host: host, Port: n}}}}}
	for i := range gateways {
		t.Gateways = append(t.Gateways, mirror.Gateway{Namespace: p.Metadata.Namespace, Name: fmt.Sprintf("gateway-%02d", i), StandIn: true})
	}
	return mirror.Compile([]policy.MirrorPolicy{p}, t), nil
}

// serve starts the xDS server, for nodes too.
func (w *world) serve(ctx context.Context, parts *errgroup.Group) (err error) {
	w.server, err = xds.New(xds.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		return err
	}
	nodes, err := xdsnode.Snapshot(w.plan)
	if err != nil {
		return err
	}
	w.server.SetSnapshot(xds.NodeKey, nodes)
	if w.ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return fmt.Errorf("listen for the control plane: %w", err)
	}
	srv := xds.NewGRPCServer()
	w.server.Register(srv)
	xdsnode.NewReports(xdsnode.ReportsConfig{Now: time.Now}).Register(srv)
	parts.Go(func() error {
		stop := context.AfterFunc(ctx, srv.Stop)
		defer stop()
		if err := srv.Serve(w.ln); err != nil && ctx.Err() == nil {
			return fmt.Errorf("serve the control plane: %w", err)
		}
		return nil
	})
	return nil
}

// start starts a gateway's Envoy, and connects to it.
func (w *world) start(ctx context.Context, g *gateway) error {
	dir, err := os.MkdirTemp(w.dir, "gateway-")
	if err != nil {
		return fmt.Errorf("create folder for envoy: %w", err)
	}
	config, err := xdsgateway.Bootstrap(xdsgateway.BootstrapConfig{Gateway: g.plan.Gateway, XDS: w.ln.Addr().String(), Admin: freeAddr()})
	if err != nil {
		return err
	}
	if g.envoy, err = proxy.Start(w.envoy, dir, config); err != nil {
		return err
	}
	if err := g.envoy.Ready(ctx); err != nil {
		g.envoy = nil // it was stopped
		return err
	}
	if g.routine, err = load.Dial(load.Config{Addr: g.http, Conns: conns}); err != nil {
		return err
	}
	g.priority, err = load.Dial(load.Config{Addr: g.http, Conns: conns})
	return err
}

// put serves a gateway its shares, and a mirror cluster with so many requests under
// way; 0: without a limit.
func (w *world) put(g *gateway, shares *mirror.Shares, limit int) error {
	config, plan := w.config, g.plan
	config.HTTP, plan.Settings.Shares = g.http, shares
	s, err := w.maker.Snapshot(config, plan)
	if err == nil && limit != xdsgateway.MirrorMaxRequests {
		s, err = limited(s, limit)
	}
	if err != nil {
		return err
	}
	g.limit = limit
	w.server.SetSnapshot(xds.GatewayKey(g.id), s)
	return nil
}

// limited is s with other limits of the mirror cluster's.
func limited(s *xds.Snapshot, limit int) (*xds.Snapshot, error) {
	if limit == 0 {
		limit = math.MaxUint32
	}
	for _, r := range s.Resources(resource.ClusterType) {
		if r.Name != xdsgateway.MirrorCluster {
			continue
		}
		c := new(cluster.Cluster)
		if err := r.Any.UnmarshalTo(c); err != nil {
			return nil, fmt.Errorf("read mirror cluster: %w", err)
		}
		for _, t := range c.CircuitBreakers.Thresholds {
			t.MaxRequests, t.MaxPendingRequests = wrapperspb.UInt32(uint32(limit)), wrapperspb.UInt32(uint32(limit))
		}
		return s.With(resource.ClusterType, xds.Message{Name: r.Name, Message: c})
	}
	return nil, errors.New("there is no mirror cluster")
}

// sharesOf are a gateway's as the product hands them on.
func sharesOf(s overload.Shares) *mirror.Shares {
	ppm := func(v float64) int { return int(math.Round(v * mirror.Everything)) }
	out := &mirror.Shares{Default: []mirror.Share{{PPM: ppm(s.Routine), Priority: ppm(s.Priority)}}}
	out.Seal()
	return out
}

// settled waits until gateways have acknowledged what they were served.
func (w *world) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		ready := 0
		for _, c := range w.server.Connections() {
			done := len(c.Types) > 0
			for typeURL, t := range c.Types {
				if len(t.Rejected) > 0 {
					return fmt.Errorf("%s refuses %s: %s", c.Node, typeURL, t.LastError)
				}
				done = done && t.Sent == t.Acked
			}
			if done && c.Key != xds.NodeKey {
				ready++
			}
		}
		if ready >= len(w.gateways) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gateways don't acknowledge: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// freeAddr is an address on which nobody listens, below the ports that the kernel
// gives to connections.
func freeAddr() string {
	for {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(16000+rand.IntN(16000)))
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
}
