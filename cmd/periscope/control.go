package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/debug"
	"github.com/periscope-mesh/periscope/xds/gateway"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

// controlFlags are the flags of a control plane, also inside periscope up.
type controlFlags struct {
	policy   string
	xds      string
	debug    string
	http     string
	https    string
	upstream string
	ca       string
	certFile string
	keyFile  string
	gateway  string
}

func (f *controlFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.policy, "policy", "", "MirrorPolicy file, or directory of them; default: mirror everything")
	flags.StringVar(&f.xds, "xds", "127.0.0.1:15051", "loopback address of the xDS server")
	flags.StringVar(&f.debug, "debug", "127.0.0.1:15080", "loopback address of /debug, /ready, /metrics and /version")
	flags.StringVar(&f.http, "http", "127.0.0.1:8080", "address at which the gateway takes HTTP; empty: none")
	flags.StringVar(&f.https, "https", "127.0.0.1:8443", "address at which the gateway takes HTTPS (HTTP/1.1 and HTTP/2); empty: none")
	flags.StringVar(&f.upstream, "upstream", "", "URL of the server behind the gateway, such as http://127.0.0.1:3000")
	flags.StringVar(&f.ca, "upstream-ca", "", "certificate authorities that an https upstream is verified with, PEM; default: it is not verified")
	flags.StringVar(&f.certFile, "tls-cert", "", "certificate chain of the HTTPS listener, PEM; default: self-signed")
	flags.StringVar(&f.keyFile, "tls-key", "", "private key of the HTTPS listener, PEM")
	flags.StringVar(&f.gateway, "gateway", "default/gateway", "NAMESPACE/NAME of the gateway; it stands in for every gateway that a policy targets")
}

// gatewayID reads --gateway.
func (f *controlFlags) gatewayID() (mirror.Gateway, error) {
	namespace, name, ok := strings.Cut(f.gateway, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return mirror.Gateway{}, fmt.Errorf("--gateway: %q is not NAMESPACE/NAME", f.gateway)
	}
	return mirror.Gateway{Namespace: namespace, Name: name, StandIn: true}, nil
}

// parseEndpoints reads node addresses.
func parseEndpoints(addrs []string) ([]mirror.Endpoint, error) {
	var out []mirror.Endpoint
	for _, a := range addrs {
		ap, err := netip.ParseAddrPort(a)
		if err != nil {
			return nil, fmt.Errorf("--node: %q is not an IP address and a port, such as 127.0.0.1:5050", a)
		}
		out = append(out, mirror.Endpoint{Host: ap.Addr().String(), Port: int(ap.Port())})
	}
	return out, nil
}

func newControl(o *options) *cobra.Command {
	var f controlFlags
	var nodes []string
	var dataDir string
	cmd := &cobra.Command{
		Use:   "control",
		Short: "Serve gateways and nodes their configuration by xDS",
		Long: `Serve gateways and nodes their configuration by xDS.

A faulty policy is refused on its own: the version accepted last goes on being
served, over restarts too, and /debug/policyz shows the fault. Start a gateway
with the bootstrap that periscope bootstrap prints.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.upstream == "" {
				return errors.New("--upstream is required: the server behind the gateway, such as http://127.0.0.1:3000")
			}
			logger, err := o.logger()
			if err != nil {
				return err
			}
			dir, err := makeDataDir(dataDir)
			if err != nil {
				return err
			}
			endpoints, err := parseEndpoints(nodes)
			if err != nil {
				return err
			}
			c, err := openControl(cmd.Context(), controlConfig{controlFlags: f, nodes: endpoints, dataDir: dir, logger: logger})
			if err != nil {
				return err
			}
			defer c.close()
			return c.run(cmd.Context())
		},
	}
	f.add(cmd.Flags())
	cmd.Flags().StringSliceVar(&nodes, "node", []string{"127.0.0.1:5050"}, "IP address and port of an analysis node; may be repeated")
	cmd.Flags().StringVar(&dataDir, "data", o.stateDir(), "directory for the accepted policies and the self-signed certificate")
	return cmd
}

type controlConfig struct {
	controlFlags
	nodes   []mirror.Endpoint
	dataDir string
	strict  bool // refuse to start with a faulty policy
	logger  *slog.Logger
	info    func() any // what the index of /debug shows besides
}

// control is the control plane:
//
//	policy files ─► [1] source ─► mirror.Compile ─► plan ─┬─► gateway.Snapshot ─► [2] xDS server ─► gateways, nodes
//	                                                      └─► node.Snapshot ────────┘      │
//	operators ─► [4] /debug ◄─────────────────────────────── acknowledged, refused ────────┘
//	             [3] listeners
type control struct {
	cfg      controlConfig
	registry *prometheus.Registry
	topology mirror.Topology
	gateway  gateway.Config
	source   *source.Source // nil: the default policy
	server   *xds.Server
	grpc     *grpc.Server
	xds      net.Listener
	debug    net.Listener
	pages    http.Handler
	closers  []func() error
	state    atomic.Pointer[controlState]
	plans    prometheus.Counter
}

// controlState is what was compiled last.
type controlState struct {
	set  source.Set
	plan mirror.Plan
}

func openControl(ctx context.Context, cfg controlConfig) (_ *control, err error) {
	c := &control{cfg: cfg, registry: newRegistry()}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.configure(); err != nil {
		return nil, err
	}
	c.plans = prometheus.NewCounter(prometheus.CounterOpts{Name: "periscope_control_plans_total", Help: "Plans compiled and published."})
	c.registry.MustRegister(c.plans)
	// [2] before [1]: what the source loads is published at once.
	c.server, err = xds.New(xds.Config{Logger: cfg.logger, Registerer: c.registry})
	if err != nil {
		return nil, err
	}
	c.grpc = xds.NewGRPCServer()
	c.server.Register(c.grpc)
	// [1]
	if err := c.load(); err != nil {
		return nil, err
	}
	if c.pages, err = debug.New(c.debugConfig()); err != nil {
		return nil, err
	}
	// [3]
	if err := errors.Join(localweb.RequireLoopback("--xds", cfg.xds), localweb.RequireLoopback("--debug", cfg.debug)); err != nil {
		return nil, err
	}
	if c.xds, err = listenLocal(ctx, "xDS", cfg.controlFlags.xds); err != nil {
		return nil, err
	}
	c.closers = append(c.closers, c.xds.Close)
	if c.debug, err = listenLocal(ctx, "/debug", cfg.controlFlags.debug); err != nil {
		return nil, err
	}
	c.closers = append(c.closers, c.debug.Close)
	return c, nil
}

// configure works out what does not follow from policies.
func (c *control) configure() error {
	gw, err := c.cfg.gatewayID()
	if err != nil {
		return err
	}
	c.topology = mirror.Topology{
		Gateways: []mirror.Gateway{gw},
		Nodes:    []mirror.NodeService{{Endpoints: c.cfg.nodes, StandIn: true}},
	}
	c.gateway = gateway.Config{
		HTTP: c.cfg.http, HTTPS: c.cfg.https, CertFile: c.cfg.certFile, KeyFile: c.cfg.keyFile,
		Upstream: c.cfg.upstream, UpstreamCAFile: c.cfg.ca, Plugin: lua.Source(), PluginVersion: lua.Version,
	}
	if c.cfg.https != "" && c.cfg.certFile == "" && c.cfg.keyFile == "" {
		c.gateway.CertFile, c.gateway.KeyFile, err = selfSigned(c.cfg.dataDir, time.Now())
		if err != nil {
			return fmt.Errorf("self-signed certificate: %w", err)
		}
	}
	return c.gateway.Validate()
}

// load reads the policies for the first time.
func (c *control) load() error {
	if c.cfg.policy == "" {
		return c.publish(source.Set{Policies: []policy.MirrorPolicy{policy.Default()}})
	}
	var err error
	c.source, err = source.New(source.Config{Path: c.cfg.policy, StateFile: filepath.Join(c.cfg.dataDir, "accepted-policies.json"), Logger: c.cfg.logger})
	if err != nil {
		return err
	}
	set, err := c.source.Load()
	if err != nil {
		return err
	}
	if faults := set.Refused(); c.cfg.strict && len(faults) > 0 {
		return faultError(faults)
	}
	return c.publish(set)
}

// publish compiles policies and hands the result to the xDS server.
func (c *control) publish(set source.Set) error {
	plan := mirror.Compile(set.Policies, c.topology)
	for _, g := range plan.Gateways {
		s, err := gateway.Snapshot(c.gateway, g)
		if err != nil {
			return err
		}
		c.server.SetSnapshot(xds.GatewayKey(g.Gateway.ID()), s)
	}
	s, err := xdsnode.Snapshot(plan)
	if err != nil {
		return err
	}
	c.server.SetSnapshot(xds.NodeKey, s)
	c.state.Store(&controlState{set: set, plan: plan})
	c.plans.Inc()
	c.cfg.logger.Info("plan published", "revision", plan.Revision, "policies", len(set.Policies), "gateways", len(plan.Gateways))
	return nil
}

func (c *control) run(ctx context.Context) error {
	c.cfg.logger.Info("control plane started", "xds", c.xds.Addr().String(), "debug", c.debug.Addr().String())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		stop := context.AfterFunc(ctx, c.grpc.Stop) // streams do not end by themselves
		defer stop()
		if err := c.grpc.Serve(c.xds); err != nil && ctx.Err() == nil {
			return fmt.Errorf("serve xDS: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		return serve(ctx, c.debug, pages(c.pages, c.cfg.logger))
	})
	if c.source != nil {
		group.Go(func() error {
			return c.source.Run(ctx, func(set source.Set) {
				// Policies are valid here: only our own faults are left, and the
				// plan before stays in force.
				if err := c.publish(set); err != nil {
					c.cfg.logger.Error("plan not published", "error", err)
				}
			})
		})
	}
	return group.Wait()
}

func (c *control) close() {
	for i := len(c.closers) - 1; i >= 0; i-- {
		if err := c.closers[i](); err != nil && !errors.Is(err, net.ErrClosed) {
			c.cfg.logger.Debug("close", "error", err)
		}
	}
}
