package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"k8s.io/client-go/rest"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/mirror/topology"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/certs"
	"github.com/periscope-mesh/periscope/xds/debug"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/mcp"
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
	// Of periscope control alone: inside periscope up all is on loopback.
	xdsCert     string
	xdsKey      string
	xdsClientCA string
	// Of periscope control alone: where Istio's gateways are found.
	kubeconfig string
	inCluster  bool
	form       string
	// Where istiods say what became of what they are served.
	istiods         []string
	istiodNamespace string
	istiodToken     string
	// Which build of the plugin gateways run; the default inside periscope up.
	plugin pluginFlags
	// Where nodes tell their load, and of periscope control alone: by TLS.
	orcaPort int
	orcaTLS  orcaClientFlags
}

// addMesh adds the flags that make the control plane a source of istiods'.
func (f *controlFlags) addMesh(flags *pflag.FlagSet) {
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "kubeconfig of the cluster whose ingress gateways are supplied through its istiods")
	flags.BoolVar(&f.inCluster, "in-cluster", false, "the cluster is the one that this process runs in")
	flags.StringSliceVar(&f.istiods, "istiod", nil, "base URL of an istiod's monitoring port, such as http://10.0.0.7:15014, to read back what became of our resources; one for each istiod pod, never a service; may be repeated; default: the ready pods with label app=istiod in --istiod-namespace")
	flags.StringVar(&f.istiodNamespace, "istiod-namespace", "istio-system", "namespace in which istiods are found by their pods, unless --istiod names them")
	flags.StringVar(&f.istiodToken, "istiod-token", "", "file with the projected service-account token, of audience istio-ca, to show istiods; those on this host ask for none; default: "+istiodToken+" if it is there")
	flags.StringVar(&f.form, "form", string(mcp.FormEnvoyFilter), "Istio's resources that carry the plugin: EnvoyFilter, or TrafficExtension (Istio 1.30 and later; each change closes connections)")
}

// addTLS adds the flags that open the xDS server to other hosts.
func (f *controlFlags) addTLS(flags *pflag.FlagSet) {
	flags.StringVar(&f.xdsCert, "xds-tls-cert", "", "certificate chain of the xDS server, PEM; followed when the file changes; with it --xds may be any address; default: plain text")
	flags.StringVar(&f.xdsKey, "xds-tls-key", "", "private key of the xDS server, PEM")
	flags.StringVar(&f.xdsClientCA, "xds-tls-client-ca", "", "authorities, PEM, of clients' certificates: gateways and nodes must have one then, istiods need not; who has one may ask for debug pages from other hosts too, by istioctl --cert-dir")
}

func (f *controlFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.policy, "policy", "", "MirrorPolicy file, or directory of them; default: mirror everything")
	flags.StringVar(&f.xds, "xds", "127.0.0.1:15051", "address of the xDS server; loopback, unless periscope control is given a certificate for it")
	flags.StringVar(&f.debug, "debug", "127.0.0.1:15080", "loopback address of /debug, /ready, /metrics and /version")
	flags.StringVar(&f.http, "http", "127.0.0.1:8080", "address at which the gateway takes HTTP; empty: none")
	flags.StringVar(&f.https, "https", "127.0.0.1:8443", "address at which the gateway takes HTTPS (HTTP/1.1 and HTTP/2); empty: none")
	flags.StringVar(&f.upstream, "upstream", "", "URL of the server behind the gateway, such as http://127.0.0.1:3000")
	flags.StringVar(&f.ca, "upstream-ca", "", "certificate authorities that an https upstream is verified with, PEM; default: it is not verified")
	flags.StringVar(&f.certFile, "tls-cert", "", "certificate chain of the HTTPS listener, PEM; default: self-signed")
	flags.StringVar(&f.keyFile, "tls-key", "", "private key of the HTTPS listener, PEM")
	flags.IntVar(&f.orcaPort, "orca-port", 9091, "port at which nodes tell their load (their --node-orca), at the address to which traffic is mirrored; 0: none is asked")
	flags.StringVar(&f.gateway, "gateway", "default/gateway", "NAMESPACE/NAME of the gateway; it stands in for every gateway that a policy targets")
}

// gatewayID reads --gateway.
func (f *controlFlags) gatewayID() (mirror.Gateway, error) {
	namespace, name, ok := strings.Cut(f.gateway, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return mirror.Gateway{}, fmt.Errorf("--gateway: %q is not NAMESPACE/NAME", f.gateway)
	}
	return mirror.Gateway{Namespace: namespace, Name: name, Machines: []string{gatewayMachine}, StandIn: true}, nil
}

// gatewayMachine is the one that the gateway of our own runs on, and with it the
// nodes at its loopback addresses.
const gatewayMachine = "localhost"

// parseEndpoints reads node addresses.
func parseEndpoints(addrs []string) ([]mirror.Endpoint, error) {
	var out []mirror.Endpoint
	for _, a := range addrs {
		ap, err := netip.ParseAddrPort(a)
		if err != nil {
			return nil, fmt.Errorf("--node: %q is not an IP address and a port, such as 127.0.0.1:5050", a)
		}
		e := mirror.Endpoint{Host: ap.Addr().String(), Port: int(ap.Port())}
		if ap.Addr().Unmap().IsLoopback() {
			e.Machine = gatewayMachine
		}
		out = append(out, e)
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
			if f.upstream == "" && f.kubeconfig == "" && !f.inCluster {
				return errors.New("no gateway to serve: name a cluster of Istio's (--kubeconfig or --in-cluster), or with --upstream the server behind a gateway of our own, such as http://127.0.0.1:3000")
			}
			logger, err := o.logger()
			if err != nil {
				return err
			}
			dir, err := makeDataDir(dataDir)
			if err != nil {
				return err
			}
			if f.upstream == "" && !cmd.Flags().Changed("node") {
				nodes = nil // those of the services that policies name
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
	f.addTLS(cmd.Flags())
	f.orcaTLS.add(cmd.Flags())
	f.addMesh(cmd.Flags())
	f.plugin.add(cmd.Flags())
	cmd.Flags().StringSliceVar(&nodes, "node", []string{"127.0.0.1:5050"}, "IP address and port of an analysis node; may be repeated: a gateway of our own prefers those on loopback; without --upstream the default is the service that a policy names")
	cmd.Flags().StringVar(&dataDir, "data", o.stateDir(), "directory for the accepted policies and the self-signed certificate")
	return cmd
}

type controlConfig struct {
	controlFlags
	nodes   []mirror.Endpoint
	orca    []string // where nodes tell their load; nil: see --orca-port
	dataDir string
	strict  bool // refuse to start with a faulty policy
	logger  *slog.Logger
	info    func() any // what the index of /debug shows besides
}

// control is the control plane:
//
//	policy files ─► [1] source ──┬─► mirror.Compile ─► plan ─┬─► gateway.Maker ────┬─► [2] xDS server ─► gateways, nodes, istiods
//	Kubernetes ───► [1] cluster ─┘                           ├─► node.Snapshot ────┤       │
//	istiods ◄───── [1] readback ◄── Kubernetes               └─► mcp.Maker ────────┘       │
//	nodes ◄─────── [5] loads ◄── their addresses in the plan
//	operators ─► [4] /debug ◄─────────────────────────────── acknowledged, refused ────────┘
//	             [3] listeners
type control struct {
	cfg      controlConfig
	registry *prometheus.Registry
	static   mirror.Topology // by flags
	gateway  gateway.Config
	mcp      mcp.Config
	kube     *rest.Config      // of the cluster; nil: there is none
	cluster  *topology.Watcher // nil: no istiod is supplied
	readback *readback         // nil: no istiod is asked
	plugins  *plugins          // which build each gateway runs
	reports  *xdsnode.Reports  // of nodes
	loads    *loads            // of nodes; nil: none is asked
	sharing  *sharing          // of nodes' capacity; nil: shares are those of the policies
	history  *loadHistory      // of load, for people
	source   *source.Source    // nil: the default policy
	server   *xds.Server
	grpc     *grpc.Server
	xds      net.Listener
	debug    net.Listener
	pages    *debug.Pages
	certs    *certs.Certificates // nil: the xDS server speaks plain text
	closers  []func() error
	state    atomic.Pointer[controlState]
	fault    atomic.Pointer[planFault]
	plans    prometheus.Counter
	faults   prometheus.Counter

	publishing sync.Mutex    // held while a plan is made and handed on; those below are under it
	next       controlState  // what the next plan follows from
	gateways   gateway.Maker // of gateways' snapshots
	supplies   mcp.Maker     // of istiods'
	// unfit are the gateways that can't be supplied with the build of the plugin
	// that they are to run, with the reasons.
	unfit map[string]string
	// supplied are gateways' plans as istiods were handed them last.
	supplied []mirror.GatewayPlan
}

func openControl(ctx context.Context, cfg controlConfig) (_ *control, err error) {
	c := &control{cfg: cfg, registry: newRegistry(), unfit: map[string]string{}}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := c.configure(); err != nil {
		return nil, err
	}
	c.history = newLoadHistory(c)
	c.plans = prometheus.NewCounter(prometheus.CounterOpts{Name: "periscope_control_plans_total", Help: "Plans compiled and published."})
	c.faults = prometheus.NewCounter(prometheus.CounterOpts{Name: "periscope_control_plan_faults_total", Help: "Plans that could not be published: the one before stayed in force."})
	c.registry.MustRegister(c.plans, c.faults)
	// [4] before [2], which asks it on behalf of istioctl.
	if c.pages, err = debug.New(c.debugConfig()); err != nil {
		return nil, err
	}
	// [2] before [1]: what the source loads is published at once.
	c.reports = xdsnode.NewReports(xdsnode.ReportsConfig{Now: time.Now, Certified: c.certified(xds.NodeKey)})
	c.server, err = xds.New(xds.Config{Logger: cfg.logger, Registerer: c.registry, Select: c.selectClient, Certified: c.certified, Debug: c.pages})
	if err != nil {
		return nil, err
	}
	if err := c.openGRPC(); err != nil {
		return nil, err
	}
	if c.plugins, err = openPlugins(ctx, pluginConfig{pluginFlags: cfg.plugin, dataDir: cfg.dataDir, logger: cfg.logger, reg: c.registry}); err != nil {
		return nil, err
	}
	// [5] before [1], which tells it where nodes are.
	if err := c.openLoads(); err != nil {
		return nil, err
	}
	// [1]
	if err := errors.Join(c.openCluster(), c.openReadback()); err != nil {
		return nil, err
	}
	if err := c.load(ctx); err != nil {
		return nil, err
	}
	// [3]
	if err := localweb.RequireLoopback("--debug", cfg.debug); err != nil {
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

// openGRPC makes the gRPC server; without TLS its address must be loopback.
func (c *control) openGRPC() (err error) {
	f := c.cfg.controlFlags
	var options []grpc.ServerOption
	switch {
	case f.xdsCert != "" && f.xdsKey != "":
		c.certs, err = certs.New(certs.Config{CertFile: f.xdsCert, KeyFile: f.xdsKey, ClientCAFile: f.xdsClientCA, Logger: c.cfg.logger})
		if err != nil {
			return err
		}
		options = append(options, grpc.Creds(credentials.NewTLS(c.certs.ServerConfig())))
	case f.xdsCert+f.xdsKey+f.xdsClientCA != "":
		return errors.New("--xds-tls-cert, --xds-tls-key, --xds-tls-client-ca: the first two are needed, both")
	default:
		if err := localweb.RequireLoopback("--xds", f.xds); err != nil {
			return fmt.Errorf("%w; or give it --xds-tls-cert and --xds-tls-key", err)
		}
	}
	c.grpc = xds.NewGRPCServer(options...)
	c.server.Register(c.grpc)
	c.reports.Register(c.grpc)
	return nil
}

// configure works out what does not follow from policies.
func (c *control) configure() error {
	if len(c.cfg.nodes) > 0 {
		c.static.Nodes = []mirror.NodeService{{Endpoints: c.cfg.nodes, StandIn: true}}
	}
	c.mcp = mcp.Config{Form: mcp.Form(c.cfg.form), Plugin: istioPlugin(lua.Embedded())}
	if err := c.mcp.Validate(); err != nil {
		return fmt.Errorf("--form: %w", err)
	}
	if c.cfg.upstream == "" {
		return nil // only istiods' gateways
	}
	gw, err := c.cfg.gatewayID()
	if err != nil {
		return err
	}
	c.static.Gateways = []mirror.Gateway{gw}
	c.gateway = gateway.Config{
		HTTP: c.cfg.http, HTTPS: c.cfg.https, CertFile: c.cfg.certFile, KeyFile: c.cfg.keyFile,
		Upstream: c.cfg.upstream, UpstreamCAFile: c.cfg.ca,
	}
	if c.cfg.https != "" && c.cfg.certFile == "" && c.cfg.keyFile == "" {
		c.gateway.CertFile, c.gateway.KeyFile, err = selfSigned(c.cfg.dataDir, time.Now())
		if err != nil {
			return fmt.Errorf("self-signed certificate: %w", err)
		}
	}
	return c.gateway.Validate()
}

// load reads policies and gateways for the first time, and publishes the plan
// once both are known: an istiod that is answered before loses what it has.
func (c *control) load(ctx context.Context) error {
	set := source.Set{Policies: []policy.MirrorPolicy{policy.Default()}}
	if c.cfg.policy != "" {
		var err error
		c.source, err = source.New(source.Config{Path: c.cfg.policy, StateFile: filepath.Join(c.cfg.dataDir, "accepted-policies.json"), Logger: c.cfg.logger})
		if err != nil {
			return err
		}
		if set, err = c.source.Load(); err != nil {
			return err
		}
	}
	if faults := set.Refused(); c.cfg.strict && len(faults) > 0 {
		return faultError(faults)
	}
	c.follow(set)
	var found topology.Result
	known := true
	if c.cluster != nil {
		found, known = c.loadCluster(ctx)
	}
	return c.publish(func(s *controlState) {
		s.set = set
		if known {
			c.place(s, found)
		}
	})
}

func (c *control) run(ctx context.Context) error {
	c.cfg.logger.Info("control plane started", "xds", c.xds.Addr().String(), "debug", c.debug.Addr().String())
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return serveGRPC(ctx, "xDS", c.xds, c.grpc)
	})
	group.Go(func() error {
		return serve(ctx, c.debug, pages(c.pages, c.cfg.logger))
	})
	if c.certs != nil {
		group.Go(func() error { c.certs.Run(ctx); return nil })
	}
	if c.source != nil {
		group.Go(func() error {
			return c.source.Run(ctx, func(set source.Set) {
				c.follow(set)
				// Policies are valid here: only our own faults are left, and the
				// plan before stays in force.
				if err := c.publish(func(s *controlState) { s.set = set }); err != nil {
					c.cfg.logger.Error("plan not published", "error", err)
				}
			})
		})
	}
	if c.cluster != nil {
		group.Go(func() error { return c.cluster.Run(ctx, c.observe) })
	}
	if c.readback != nil {
		group.Go(func() error { return c.readback.run(ctx) })
	}
	if c.loads != nil {
		group.Go(func() error { return c.loads.run(ctx) })
		group.Go(func() error { return c.sharing.run(ctx) })
	}
	group.Go(func() error { return c.history.run(ctx) })
	group.Go(func() error { return c.runRollout(ctx) })
	return group.Wait()
}

func (c *control) close() { closeAll(c.closers, c.cfg.logger) }
