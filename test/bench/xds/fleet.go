package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

const (
	// maxConnections is how many TCP connections a fleet has at most; beyond,
	// clients share them. Servers take 100 streams on each.
	maxConnections = 1000
	maxJoining     = 256 // clients that wait for their first resources at a time
	maxRecvBytes   = 64 << 20
)

// fleet is all clients of one server.
type fleet struct {
	clients []discovery.AggregatedDiscoveryServiceClient // one a TCP connection
	conns   []*grpc.ClientConn
	names   map[string][]string
	cancel  context.CancelFunc
	group   *errgroup.Group

	joining chan struct{}
	joined  atomic.Int64
	all     chan struct{} // closed when all have joined

	acks    atomic.Int64
	updates atomic.Int64 // settings that came after the first
}

// startFleet starts n clients, and waits until each has everything.
func startFleet(ctx context.Context, address string, n int, mesh bool, names map[string][]string) (*fleet, error) {
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	f := &fleet{
		names: names, cancel: cancel, group: group,
		joining: make(chan struct{}, maxJoining), all: make(chan struct{}),
	}
	for range min(n, maxConnections) {
		conn, err := grpc.NewClient("passthrough:"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxRecvBytes)))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("connect: %w", err), f.stop())
		}
		f.conns = append(f.conns, conn)
		f.clients = append(f.clients, discovery.NewAggregatedDiscoveryServiceClient(conn))
	}
	client := f.gateway
	if mesh {
		client = f.istiod
	}
	for i := range n {
		group.Go(func() error {
			select {
			case f.joining <- struct{}{}:
			case <-ctx.Done():
				return ctx.Err()
			}
			err := client(ctx, i, func() {
				<-f.joining
				if f.joined.Add(1) == int64(n) {
					close(f.all)
				}
			})
			if ctx.Err() != nil {
				return ctx.Err() // the cause, or that they were stopped
			}
			return fmt.Errorf("client %d: %w", i, err)
		})
	}
	select {
	case <-f.all:
		return f, nil
	case <-ctx.Done():
		cause := f.stop()
		return nil, fmt.Errorf("%d of %d clients joined: %w", f.joined.Load(), n, cmp.Or(cause, ctx.Err()))
	}
}

// stop ends all clients; the error is that of the first which failed before.
func (f *fleet) stop() error {
	f.cancel()
	err := f.group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	for _, c := range f.conns {
		_ = c.Close() // nothing is in flight
	}
	return err
}

// gateway is one Envoy: clusters, then their endpoints, then listeners, then
// what those name. It acknowledges everything.
func (f *fleet) gateway(ctx context.Context, i int, joined func()) error {
	stream, err := f.clients[i%len(f.clients)].DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: gatewayNode(i), TypeUrl: resource.ClusterType}); err != nil {
		return err
	}
	missing := resourceCount(f.names)
	var settings string // version
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, got := range r.GetResources() {
			if got.GetName() == gateway.SettingsFilter {
				if settings != "" && settings != got.GetVersion() {
					f.updates.Add(1)
				}
				settings = got.GetVersion()
			}
		}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}); err != nil {
			return err
		}
		f.acks.Add(1)
		if missing <= 0 {
			continue
		}
		for _, next := range follow(r.GetTypeUrl(), f.names) {
			if err := stream.Send(next); err != nil {
				return err
			}
		}
		if missing -= len(r.GetResources()); missing <= 0 {
			joined()
		}
	}
}

// follow is what an Envoy that has just got its first resources of a type
// subscribes to then.
func follow(typeURL string, names map[string][]string) []*discovery.DeltaDiscoveryRequest {
	named := func(t string) *discovery.DeltaDiscoveryRequest {
		return &discovery.DeltaDiscoveryRequest{TypeUrl: t, ResourceNamesSubscribe: names[t]}
	}
	switch typeURL {
	case resource.ClusterType:
		return []*discovery.DeltaDiscoveryRequest{named(resource.EndpointType)}
	case resource.EndpointType:
		return []*discovery.DeltaDiscoveryRequest{{TypeUrl: resource.ListenerType}} // all there are
	case resource.ListenerType:
		return []*discovery.DeltaDiscoveryRequest{named(resource.RouteType), named(resource.ExtensionConfigType)}
	default:
		return nil
	}
}

func resourceCount(names map[string][]string) int {
	n := 0
	for _, list := range names {
		n += len(list)
	}
	return n
}

const envoyFilterType = "networking.istio.io/v1alpha3/EnvoyFilter"

// istiod is one istiod: it subscribes to each type at once, is sent full state,
// and acknowledges whatever comes.
func (f *fleet) istiod(ctx context.Context, i int, joined func()) error {
	stream, err := f.clients[i%len(f.clients)].StreamAggregatedResources(ctx)
	if err != nil {
		return err
	}
	node := istiodNode(i)
	missing := mcp.Types()
	for _, t := range missing {
		if err := stream.Send(istiodRequest(node, t, "", "made up")); err != nil {
			return err
		}
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(missing) == 0 && r.GetTypeUrl() == envoyFilterType && len(r.GetResources()) == 2*meshGateways {
			f.updates.Add(1)
		}
		if err := stream.Send(istiodRequest(node, r.GetTypeUrl(), r.GetVersionInfo(), r.GetNonce())); err != nil {
			return err
		}
		f.acks.Add(1)
		if len(missing) == 0 {
			continue
		}
		if missing = slices.DeleteFunc(missing, func(t string) bool { return t == r.GetTypeUrl() }); len(missing) == 0 {
			joined()
		}
	}
}

func istiodRequest(node *core.Node, typeURL, version, nonce string) *discovery.DiscoveryRequest {
	return &discovery.DiscoveryRequest{Node: node, TypeUrl: typeURL, VersionInfo: version, ResponseNonce: nonce}
}
