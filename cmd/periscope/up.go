package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// upFlags are the flags of periscope up.
type upFlags struct {
	controlFlags
	nodeFlags
	console     string
	nodes       []string
	envoy       string
	concurrency int
	dataDir     string
}

func newUp(o *options) *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start everything: a gateway before your server, control plane, node and console",
		Long: `Start everything in one process, and a real Envoy as the gateway before the
server at --upstream, or before a small sample API.

With --node, analysis is left to nodes started by periscope node, and their
attacks are shown by periscope console.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := o.logger()
			if err != nil {
				return err
			}
			return runUp(cmd.Context(), f, logger, func(r running) { announce(o.stdout, f, r) })
		},
	}
	f.controlFlags.add(cmd.Flags())
	// No programs of ours for the whole control group of whoever tries this out.
	f.nodeFlags.add(cmd.Flags(), []string{sockstat.InetDiag, sockstat.InProcess})
	cmd.Flags().StringVar(&f.console, "console", consoleAddr, "loopback address of the pages and the API")
	cmd.Flags().StringSliceVar(&f.nodes, "node", nil, "IP address and port of an analysis node that runs by itself; may be repeated: the gateway prefers those on loopback; default: one in this process")
	cmd.Flags().StringVar(&f.envoy, "envoy", "", "Envoy to start; default: the one on PATH, then the one of make tools")
	cmd.Flags().IntVar(&f.concurrency, "concurrency", 0, "Envoy's worker threads; 0: one per core")
	cmd.Flags().StringVar(&f.dataDir, "data", o.stateDir(), "directory for the store, the accepted policies, the certificate and Envoy's log")
	return cmd
}

// runUp is everything in one process, and Envoy beside it:
//
//	user ─► [6] Envoy ──────────────────────────► [1] sample API, or --upstream
//	           ▲ │ mirrored
//	       xDS │ └───────────► [4] node ─► store ─► [5] console ─► analyst
//	           │                   ▲
//	      [3] control ─────────────┘ policies
//	           ▲
//	      [2] policy files
func runUp(ctx context.Context, f upFlags, logger *slog.Logger, ready func(running)) error {
	envoy, err := findEnvoy(f.envoy)
	if err != nil {
		return err
	}
	dir, err := makeDataDir(f.dataDir)
	if err != nil {
		return err
	}
	// Envoy would start without a listener it cannot bind, and say so only in
	// its refusal.
	for flag, addr := range map[string]string{"--http": f.http, "--https": f.https} {
		if err := bindable(ctx, flag, addr); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	defer func() { cancel(); _ = group.Wait() }()

	// [1]
	upstream := f.upstream
	if upstream == "" {
		l, err := listenLocal(ctx, "the sample API", "127.0.0.1:0")
		if err != nil {
			return err
		}
		group.Go(func() error { return serve(ctx, l, pages(newSampleAPI(), logger)) })
		f.upstream = "http://" + l.Addr().String()
	}
	// [4] before [3]: the plan names the node's address.
	endpoints, err := parseEndpoints(f.nodes)
	if err != nil {
		return err
	}
	var n *node
	var orca []string
	if len(endpoints) == 0 {
		if n, err = openNode(ctx, nodeConfig{nodeFlags: f.nodeFlags, control: f.controlFlags.xds, name: "embedded", dataDir: dir, logger: logger}); err != nil {
			return err
		}
		defer n.close()
		endpoints, orca = []mirror.Endpoint{reachable(n.listener.Addr())}, []string{n.orca.listener.Addr().String()}
	}
	// [2], [3]
	c, err := openControl(ctx, controlConfig{controlFlags: f.controlFlags, nodes: endpoints, orca: orca, dataDir: dir, strict: true, logger: logger, info: func() any { return describeNode(n) }})
	if err != nil {
		return err
	}
	defer c.close()
	// [5]
	var view *consoleServer
	if n != nil {
		if view, err = openConsole(ctx, consoleConfig{addr: f.console, store: n.store, load: c.history, logger: logger, registry: n.registry, tryCommand: f.tryCommand()}); err != nil {
			return err
		}
		defer view.listener.Close()
	}
	// [6]
	g, err := newGatewayProcess(envoy, dir, f, c)
	if err != nil {
		return err
	}
	group.Go(func() error { return c.run(ctx) })
	if n != nil {
		group.Go(func() error { return n.run(ctx) })
		group.Go(func() error { return view.run(ctx) })
	}
	group.Go(func() error {
		// What the gateway mirrors first is analysed by its policy, too.
		if n != nil {
			n.awaitPolicies(ctx)
		}
		return g.run(ctx, func() { ready(running{sample: upstream == "", upstream: f.upstream, control: c, node: n, view: view}) })
	})
	return group.Wait()
}

// running is what runUp has started.
type running struct {
	sample   bool // the upstream is the sample API
	upstream string
	control  *control
	node     *node          // nil: nodes of their own
	view     *consoleServer // nil: likewise
}

// bindable tells whether the gateway will be able to listen.
func bindable(ctx context.Context, flag, addr string) error {
	if addr == "" {
		return nil
	}
	l, err := listenLocal(ctx, "the gateway", addr)
	if err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	return l.Close()
}

func newGatewayProcess(envoy, dir string, f upFlags, c *control) (*gatewayProcess, error) {
	admin, err := freeLoopback()
	if err != nil {
		return nil, err
	}
	b, err := gateway.Bootstrap(gateway.BootstrapConfig{Gateway: c.static.Gateways[0], XDS: c.xds.Addr().String(), Admin: admin})
	if err != nil {
		return nil, err
	}
	return &gatewayProcess{path: envoy, bootstrap: b, admin: admin, dir: dir, concurrency: f.concurrency}, nil
}

// reachable is the address at which this host reaches a listener.
func reachable(a net.Addr) mirror.Endpoint {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return mirror.Endpoint{}
	}
	ip := tcp.IP
	switch {
	case !ip.IsUnspecified():
	case ip.To4() != nil:
		ip = net.IPv4(127, 0, 0, 1)
	default:
		ip = net.IPv6loopback
	}
	return mirror.Endpoint{Host: ip.String(), Port: tcp.Port}
}

// describeNode is what the control plane's /debug says of the embedded node.
func describeNode(n *node) any {
	if n == nil {
		return map[string]string{"node": "in a process of its own"}
	}
	return map[string]any{"ingest": n.ingestState(), "admin": "http://" + n.admin.Addr().String() + "/debug"}
}

func (f *upFlags) tryCommand() string {
	if f.http == "" {
		return "curl -k " + localURL("https", f.https) + "/etc/passwd"
	}
	return "curl " + localURL("http", f.http) + "/etc/passwd"
}

// localURL writes loopback as localhost, as people do.
func localURL(scheme, hostport string) string {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return scheme + "://" + hostport
	}
	if host == "127.0.0.1" || host == "::1" || host == "" {
		host = "localhost"
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

// announce tells what has been started and what to try.
func announce(out io.Writer, f upFlags, r running) {
	fmt.Fprintln(out, "\nPeriscope is up.")
	if f.http != "" {
		fmt.Fprintf(out, "  gateway   %s\n", localURL("http", f.http))
	}
	if f.https != "" {
		fmt.Fprintf(out, "  gateway   %s\n", localURL("https", f.https))
	}
	if r.sample {
		fmt.Fprintf(out, "  upstream  %s (sample API; --upstream URL puts the gateway before yours)\n", r.upstream)
	} else {
		fmt.Fprintf(out, "  upstream  %s\n", r.upstream)
	}
	fmt.Fprintf(out, "  debug     %s/debug\n", localURL("http", r.control.debug.Addr().String()))
	if r.view == nil {
		fmt.Fprintf(out, "  nodes     %v (see their attacks with periscope console)\n", f.nodes)
		fmt.Fprintf(out, "\nTry an attack:\n  %s\n\n", f.tryCommand())
		return
	}
	page := localURL("http", r.view.listener.Addr().String()) + "/attacks"
	fmt.Fprintf(out, "  attacks   %s\n", page)
	fmt.Fprintf(out, "\nTry an attack, then look at %s:\n  %s\n\n", page, f.tryCommand())
}
