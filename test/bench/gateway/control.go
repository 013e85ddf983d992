package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
)

// control is our control plane for two gateways, from their policy on. Their
// listener is the one that gateways are served, but with many filter chains, and
// at the second gateway without our filters.
type control struct {
	server *xds.Server
	ln     net.Listener
	maker  xdsgateway.Maker
	config xdsgateway.Config
	node   mirror.Endpoint
	chains int
	edits  int
}

func listenControl(chains, backendPort, nodePort int) (*control, error) {
	server, err := xds.New(xds.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the control plane: %w", err)
	}
	c := &control{
		server: server, ln: ln, chains: chains, node: mirror.Endpoint{Host: "127.0.0.1", Port: nodePort},
		config: xdsgateway.Config{
			HTTP:     "127.0.0.1:1", // replaced in manyChains
			Upstream: fmt.Sprintf("http://127.0.0.1:%d", backendPort),
			Plugin:   lua.Embedded().Code,
		},
	}
	if err := c.serve(mirroring, bare); err != nil {
		ln.Close()
		return nil, err
	}
	return c, nil
}

// Run serves until ctx ends.
func (c *control) Run(ctx context.Context) error {
	srv := xds.NewGRPCServer()
	c.server.Register(srv)
	stop := context.AfterFunc(ctx, srv.Stop)
	defer stop()
	if err := srv.Serve(c.ln); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve the control plane: %w", err)
	}
	return nil
}

// edit changes the share, or what the policy excludes, by turns.
func (c *control) edit() error {
	c.edits++
	return c.serve(mirroring)
}

// Names of the gateways.
const (
	mirroring = "mirroring"
	bare      = "bare"
)

// serve puts the policy as it is after so many edits into force.
func (c *control) serve(gateways ...string) error {
	p := policy.Default()
	p.Spec.Sampling.Percent = 100 - float64((c.edits+1)/2%100)/100
	p.Spec.Exclude = []policy.Match{{Paths: []policy.PathMatch{{Type: policy.PathExact, Value: fmt.Sprintf("/excluded/%d", c.edits/2)}}}}
	for _, name := range gateways {
		plan := plan(name, p, c.node)
		s, err := c.maker.Snapshot(c.config, plan)
		if err == nil {
			s, err = c.manyChains(s, name == bare)
		}
		if err != nil {
			return err
		}
		c.server.SetSnapshot(xds.GatewayKey(plan.Gateway.ID()), s)
	}
	return nil
}

// manyChains is s with a filter chain for each client: chain i is for the
// address of from(i).
func (c *control) manyChains(s *xds.Snapshot, bare bool) (*xds.Snapshot, error) {
	l, manager := new(listener.Listener), new(hcm.HttpConnectionManager)
	err := s.Resources(resource.ListenerType)[0].Any.UnmarshalTo(l)
	if err == nil {
		err = l.GetFilterChains()[0].GetFilters()[0].GetTypedConfig().UnmarshalTo(manager)
	}
	if err != nil {
		return nil, fmt.Errorf("read listener: %w", err)
	}
	if bare {
		manager.HttpFilters = slices.DeleteFunc(manager.HttpFilters, func(f *hcm.HttpFilter) bool { return f.GetConfigDiscovery() != nil })
	}
	packed, err := anypb.New(manager)
	if err != nil {
		return nil, fmt.Errorf("pack connection manager: %w", err)
	}
	l.Address, l.FilterChains = loopback(0), nil
	for i := range c.chains {
		l.FilterChains = append(l.FilterChains, &listener.FilterChain{
			Name:             fmt.Sprintf("chain-%d", i),
			FilterChainMatch: &listener.FilterChainMatch{SourcePrefixRanges: []*core.CidrRange{{AddressPrefix: from(i).String(), PrefixLen: wrapperspb.UInt32(32)}}},
			Filters:          []*listener.Filter{{Name: "manager", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed}}},
		})
	}
	return s.With(resource.ListenerType, xds.Message{Name: l.GetName(), Message: l})
}

// from is the address of the ith client.
func from(i int) net.IP { return net.IPv4(127, 0, byte(1+i/250), byte(1+i%250)) }

// bootstrap is what the gateway of this name is started with.
func (c *control) bootstrap(name string) ([]byte, error) {
	raw, err := xdsgateway.Bootstrap(xdsgateway.BootstrapConfig{
		Gateway: standIn(name),
		XDS:     c.ln.Addr().String(),
		Admin:   "127.0.0.1:1", // replaced below
	})
	if err != nil {
		return nil, err
	}
	b := new(bootstrap.Bootstrap)
	if err := protojson.Unmarshal(raw, b); err != nil {
		return nil, fmt.Errorf("read bootstrap: %w", err)
	}
	b.Admin.Address = loopback(0)
	if raw, err = protojson.Marshal(b); err != nil {
		return nil, fmt.Errorf("marshal bootstrap: %w", err)
	}
	return raw, nil
}
