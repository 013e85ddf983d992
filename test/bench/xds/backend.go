package main

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// Names of the servers under test.
const (
	ours = "periscope"
	peer = "go-control-plane"
)

// backend is a server under test.
type backend interface {
	register(grpc.ServiceRegistrar)
	// setGateway makes a gateway's snapshot, of what all have and its settings,
	// and sets it.
	setGateway(i int, settings xds.Message) error
	// setMesh makes the snapshot of all istiods and sets it.
	setMesh(revisions []int) error
}

func newBackend(name string, clients int, fixed map[string][]xds.Message) (backend, error) {
	switch name {
	case ours:
		s, err := xds.New(xds.Config{
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Select: selectKey, MaxConnections: clients,
		})
		if err != nil {
			return nil, err
		}
		base, err := xds.NewSnapshot(fixed)
		if err != nil {
			return nil, err
		}
		return &periscope{server: s, base: base}, nil
	case peer:
		c := cache.NewSnapshotCache(true, byID{}, nil)
		return &controlPlane{cache: c, delta: delta.NewServer(context.Background(), c, nil), fixed: fixed}, nil
	default:
		return nil, fmt.Errorf("no server is called %q", name)
	}
}

// periscope is package xds, with snapshots as xds/gateway and xds/mcp make them.
type periscope struct {
	server *xds.Server
	base   *xds.Snapshot
	maker  mcp.Maker
}

func (p *periscope) register(r grpc.ServiceRegistrar) { p.server.Register(r) }

func (p *periscope) setGateway(i int, settings xds.Message) error {
	s, err := p.base.With(resource.ExtensionConfigType, settings)
	if err != nil {
		return err
	}
	p.server.SetSnapshot(xds.GatewayKey(gatewayID(i).ID()), s)
	return nil
}

func (p *periscope) setMesh(revisions []int) error {
	s, err := p.maker.Make(meshConfig(), meshPlan(revisions))
	if err != nil {
		return err
	}
	p.server.SetSnapshot(mcp.Key(""), s.Snapshot)
	return nil
}

// controlPlane is go-control-plane with its own cache of snapshots.
type controlPlane struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	cache    cache.SnapshotCache
	delta    delta.Server
	fixed    map[string][]xds.Message
	versions int
}

// byID has a snapshot for each client.
type byID struct{}

func (byID) ID(n *core.Node) string { return n.GetId() }

func (c *controlPlane) register(r grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(r, c)
}

// DeltaAggregatedResources is what the library's own server does.
func (c *controlPlane) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return c.delta.DeltaStreamHandler(stream, resource.AnyType)
}

func (c *controlPlane) setGateway(i int, settings xds.Message) error {
	resources := make(map[string][]types.Resource, len(c.fixed))
	for typeURL, list := range c.fixed {
		for _, m := range list {
			resources[typeURL] = append(resources[typeURL], m.Message)
		}
	}
	resources[resource.ExtensionConfigType] = append(resources[resource.ExtensionConfigType], settings.Message)
	c.versions++
	s, err := cache.NewSnapshot(strconv.Itoa(c.versions), resources)
	if err != nil {
		return fmt.Errorf("make snapshot: %w", err)
	}
	if err := c.cache.SetSnapshot(context.Background(), nodeID(i), s); err != nil {
		return fmt.Errorf("set snapshot: %w", err)
	}
	return nil
}

func (c *controlPlane) setMesh([]int) error {
	return fmt.Errorf("%s's cache knows Envoy's types only", peer)
}
