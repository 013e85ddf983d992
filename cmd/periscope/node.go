package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/accesslog"
	"github.com/periscope-mesh/periscope/node/detect"
	"github.com/periscope-mesh/periscope/node/extproc"
	"github.com/periscope-mesh/periscope/node/ingest"
	nodepolicy "github.com/periscope-mesh/periscope/node/policy"
	"github.com/periscope-mesh/periscope/node/report"
	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/node/store"
	"github.com/periscope-mesh/periscope/xds/certs"
)

// nodeFlags are the flags of a node, also inside periscope up.
type nodeFlags struct {
	listen         string
	insecureListen string
	admin          string
	orca           string
	sockets        []string
	bpfPin         string
	workers        int
	pace           time.Duration // that a worker takes for an exchange at least; for periscope bench
	retention      time.Duration

	// For benchmarks.
	unguarded bool
	trace     string
}

// add declares the flags. sockets are the back ends that may count sockets, by
// default.
func (f *nodeFlags) add(flags *pflag.FlagSet, sockets []string) {
	flags.StringVar(&f.listen, "node-listen", "127.0.0.1:5050", "loopback address for mirrored traffic")
	flags.StringVar(&f.insecureListen, "insecure-listen", "", "address for mirrored traffic from anybody who can reach it, in place of --node-listen: nothing authenticates the sender")
	flags.StringVar(&f.admin, "node-admin", "127.0.0.1:9090", "loopback address for the node's /live, /ready, /metrics and /debug")
	flags.StringSliceVar(&f.sockets, "node-sockets", sockets, "who may count what waits in the node's sockets, the best first: "+strings.Join(sockstat.Backends(), ", ")+"; empty: nobody")
	flags.StringVar(&f.bpfPin, "node-bpf-pin", sockstat.DefaultPin, "directory of what periscope node bpf load has pinned")
	flags.StringVar(&f.orca, "node-orca", "127.0.0.1:9091", "address at which control planes take the node's load reports; loopback, unless periscope node is given certificates for it")
	flags.IntVar(&f.workers, "workers", 0, "threads that analyse; 0: one per core")
	flags.DurationVar(&f.retention, "retention", 30*24*time.Hour, "how long attacks are kept after their last hit")
	flags.BoolVar(&f.unguarded, "node-unguarded", false, "discard nothing while the node is late, for comparison")
	flags.StringVar(&f.trace, "node-trace", "", "file for a line about each exchange that is analysed or discarded")
	for _, name := range []string{"node-unguarded", "node-trace"} {
		flags.Lookup(name).Hidden = true
	}
}

func newNode(o *options) *cobra.Command {
	var f nodeFlags
	var tls controlTLSFlags
	var orca orcaServerFlags
	var control, dataDir, name string
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Take mirrored traffic, detect attacks and store them",
		Long: `Take mirrored traffic, detect attacks and store them.

The node takes its policies from the control plane and can start before it.
periscope console shows what it has stored.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := o.logger()
			if err != nil {
				return err
			}
			if err := tls.check("--control", control); err != nil {
				return err
			}
			client, err := tls.open(logger)
			if err != nil {
				return err
			}
			dir, err := makeDataDir(dataDir)
			if err != nil {
				return err
			}
			n, err := openNode(cmd.Context(), nodeConfig{nodeFlags: f, orcaTLS: orca, control: control, certs: client, name: name, dataDir: dir, logger: logger})
			if err != nil {
				return err
			}
			defer n.close()
			reportCPU(logger)
			return n.run(cmd.Context())
		},
	}
	f.add(cmd.Flags(), sockstat.Backends())
	cmd.Flags().StringVar(&control, "control", "127.0.0.1:15051", "address of the control plane's xDS server")
	tls.add(cmd.Flags())
	orca.add(cmd.Flags())
	cmd.Flags().StringVar(&name, "name", hostname(), "name of this node, as the control plane shows it")
	cmd.Flags().StringVar(&dataDir, "data", o.stateDir(), "directory for the store")
	cmd.AddCommand(newNodeBPF(o), newNodeWatch(o))
	return cmd
}

func hostname() string {
	if name, err := os.Hostname(); err == nil {
		return name
	}
	return "node"
}

type nodeConfig struct {
	nodeFlags
	orcaTLS orcaServerFlags
	control string
	certs   *certs.Client // nil: the control plane is reached in plain text
	name    string
	dataDir string
	logger  *slog.Logger
}

// node is an analysis node:
//
//	gateways ─► [2] listener ─► [5] ingest ─► [4] ring ─► [6] analysis ─► [3] writer ─► [1] store
//	                 ├─► [5] access log ──┤                            │
//	                 └─► [9] ext_proc ────┘                            │
//	control plane ─► [7] policies ──────┴─────────────────┘
//	control plane ◄─ [7] reports of what gateways run, from ingest
//	control plane ◄─ [10] ORCA: load reports, from ring, analysis and ingest
//	operators ─► [8] admin: /live /ready /metrics /debug
//
// Boxes are opened in the order of their numbers.
type node struct {
	cfg      nodeConfig
	registry *prometheus.Registry
	store    *store.Store
	listener net.Listener
	writer   *store.Writer
	handler  *ingest.Handler
	log      *accesslog.Log
	streams  *extproc.Handler
	auth     ingest.Authenticator
	analysis *analysis
	engine   *detect.Engine
	policies *nodepolicy.Client
	reporter *report.Reporter
	orca     *orcaServer
	meter    *meter
	sockets  *sockets
	trace    *trace
	admin    net.Listener
	closers  []func() error
}

func openNode(ctx context.Context, cfg nodeConfig) (_ *node, err error) {
	tuneGC()
	n := &node{cfg: cfg, registry: newRegistry()}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if cfg.workers <= 0 {
		n.cfg.workers = runtime.GOMAXPROCS(0)
	}
	// [1]
	n.store, err = store.Open(ctx, store.Config{Path: storePath(cfg.dataDir), Logger: cfg.logger, Registerer: n.registry, Retention: cfg.retention})
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.store.Close)
	// [3]
	n.writer, err = store.NewWriter(store.WriterConfig{Store: n.store, Logger: cfg.logger, Registerer: n.registry})
	if err != nil {
		return nil, err
	}
	// [4], [5]
	ring := ingest.NewRing(4096, 64<<20)
	n.auth = ingest.Trusting{}
	n.log, err = accesslog.New(accesslog.Config{Ring: ring, Authenticator: n.auth, Mirrors: func() bool { return n.policies.Mirrors() }, Logger: cfg.logger, Registerer: n.registry})
	if err != nil {
		return nil, err
	}
	cpuMetrics(n.registry)
	n.meter = newMeter(ring, time.Now(), n.registry)
	if n.trace, err = openTrace(cfg.trace); err != nil {
		return nil, err
	}
	if n.trace != nil {
		n.closers = append(n.closers, n.trace.close)
	}
	n.handler, err = ingest.New(ingest.Config{Ring: ring, Joiner: n.log, Guard: n.guard(), Heard: n.meter.heard, Authenticator: n.auth, Logger: cfg.logger, Registerer: n.registry})
	if err != nil {
		return nil, err
	}
	// [6], [7]
	n.engine, err = detect.New(detect.Config{Logger: cfg.logger, Registerer: n.registry})
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.engine.Close)
	policies := nodepolicy.Config{Address: cfg.control, NodeID: "node~" + cfg.name, Logger: cfg.logger, Registerer: n.registry}
	if cfg.certs != nil {
		policies.Credentials = cfg.certs.Credentials()
	}
	n.policies, err = nodepolicy.New(policies)
	if err != nil {
		return nil, err
	}
	if err := n.openReporter(); err != nil {
		return nil, err
	}
	// [9]
	if err := n.openStreams(); err != nil {
		return nil, err
	}
	n.analysis = newAnalysis(&analysis{ring: ring, policies: n.policies, engine: n.engine, writer: n.writer, pace: cfg.pace, trace: n.trace, logger: cfg.logger.With("component", "analysis")}, n.registry)
	n.meter.counts = func() (analysed, discarded uint64) {
		return n.analysis.analysed.Load(), n.handler.Discarded() + n.streams.Discarded()
	}
	n.analysis.kernel = func() time.Duration { return n.meter.level.Load().Kernel }
	n.meter.workers, n.meter.worked = n.cfg.workers, n.analysis.work.worked
	n.meter.kernel = func() time.Duration { age, _ := n.sockets.sample(); return age }
	n.meter.urge = func() { n.orca.service.Urge() }
	// [2] Late: who connects before that is served waits, and gateways would
	// fill up what they may have under way.
	listen := cmp.Or(cfg.insecureListen, cfg.listen)
	n.sockets, err = openSockets(listen, sockstat.Config{Backends: cfg.sockets, Pin: cfg.bpfPin})
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.sockets.close)
	n.listener, err = ingest.Listen(ctx, listen, cfg.insecureListen != "", n.sockets.conns.Listener)
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.listener.Close)
	// [10]
	n.orca, err = openORCA(ctx, orcaConfig{address: cfg.orca, tls: cfg.orcaTLS, report: n.loadSource().report, registry: n.registry, logger: cfg.logger})
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.orca.listener.Close)
	// [8]
	if err := localweb.RequireLoopback("--node-admin", cfg.admin); err != nil {
		return nil, err
	}
	n.admin, err = listenLocal(ctx, "the node's admin pages", cfg.admin)
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.admin.Close)
	if cfg.insecureListen != "" {
		cfg.logger.Warn("mirrored traffic is taken from anybody who can reach this address", "listen", n.listener.Addr().String())
	}
	return n, nil
}

// guard decides what is discarded; nil: nothing.
func (n *node) guard() ingest.Guard {
	switch {
	case n.cfg.unguarded:
		return nil
	case n.trace != nil:
		return tracedGuard{n.meter, n.trace}
	}
	return n.meter
}

// The garbage collector runs a quarter as often as Go has it by default, up to so
// much memory: little of what a node allocates lives for long, and exchanges wait
// while a run takes its CPU time, tens of milliseconds.
const (
	gcPercent = 400
	gcMemory  = 400 << 20
)

// tuneGC sets the garbage collector up, as far as Go's own GOGC and GOMEMLIMIT don't.
func tuneGC() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(gcMemory)
	}
}

// openStreams makes what takes exchanges that gateways stream by ext_proc.
func (n *node) openStreams() (err error) {
	n.streams, err = extproc.New(extproc.Config{
		Settings: func(gateway, revision string) (string, []byte, bool) {
			s, ok := n.policies.Settings(gateway, revision)
			return s.Revision, s.Encoded, ok
		},
		Queue: func(b *event.Batch, gateway string, received time.Time, size int) {
			n.handler.Queue(b, gateway, received, size)
		},
		Authenticate: n.auth.Authenticate, Guard: n.guard(),
		Logger: n.cfg.logger, Registerer: n.registry,
	})
	return err
}

// mirrored serves all ways by which mirrored traffic comes.
func (n *node) mirrored() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", n.handler)
	mux.Handle(extproc.Path, n.streams)
	mux.Handle(accesslog.Path, n.log)
	return mux
}

// openReporter makes what tells the control plane of this node and of gateways.
func (n *node) openReporter() error {
	credentials := insecure.NewCredentials()
	if n.cfg.certs != nil {
		credentials = n.cfg.certs.Credentials()
	}
	conn, err := nodepolicy.Dial(n.cfg.control, credentials)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	n.closers = append(n.closers, conn.Close)
	n.reporter, err = report.New(report.Config{Conn: conn, Node: n.cfg.name, Wires: event.Versions(), Logger: n.cfg.logger, Gateways: n.gatewayReports, Counts: func() map[string]uint64 { return ledgerCounts(n.registry) }})
	return err
}

func (n *node) run(ctx context.Context) error {
	n.cfg.logger.Info("node started", "mirrored_traffic", n.listener.Addr().String(), "admin", n.admin.Addr().String(), "orca", n.orca.listener.Addr().String(), "workers", n.cfg.workers, "store", storePath(n.cfg.dataDir))
	n.sockets.log(n.cfg.logger)
	// The writer outlives analysis: what was detected is stored.
	writing, stopWriting := context.WithCancel(context.WithoutCancel(ctx))
	writer, group := new(errgroup.Group), new(errgroup.Group)
	writer.Go(func() error { return n.writer.Run(writing) })
	group, ctx = errgroup.WithContext(ctx)
	group.Go(func() error { return serve(ctx, n.listener, ingest.Server(n.mirrored(), n.cfg.logger)) })
	group.Go(func() error { return n.analysis.run(ctx, n.cfg.workers) })
	group.Go(func() error { return n.meter.run(ctx) })
	group.Go(func() error { return n.policies.Run(ctx) })
	group.Go(func() error { return n.reporter.Run(ctx) })
	group.Go(func() error { return n.orca.run(ctx) })
	group.Go(func() error { return n.storeGateways(ctx) })
	if n.cfg.certs != nil {
		group.Go(func() error { n.cfg.certs.Run(ctx); return nil })
	}
	group.Go(func() error { return n.store.Run(ctx) })
	group.Go(func() error { return serve(ctx, n.admin, pages(localweb.Guard(n.adminHandler()), n.cfg.logger)) })
	err := group.Wait()
	stopWriting()
	return errors.Join(err, writer.Wait())
}

func (n *node) close() { closeAll(n.closers, n.cfg.logger) }

// ingestState is /debug/ingestz.
type ingestState struct {
	Listen         string `json:"listen"`
	Insecure       bool   `json:"insecure"`
	Authentication string `json:"authentication"`
	RingExchanges  int    `json:"ringExchanges"`
	RingBytes      int64  `json:"ringBytes"`
}

func (n *node) ingestState() ingestState {
	return ingestState{n.listener.Addr().String(), n.cfg.insecureListen != "", n.auth.String(), n.analysis.ring.Len(), n.analysis.ring.Bytes()}
}

// awaitPolicies waits until the policies have come, two seconds at most.
func (n *node) awaitPolicies(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !n.policies.Ready() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (n *node) ready() error {
	if n.policies.Ready() {
		return nil
	}
	text := "no policy has come from the control plane yet; traffic is analysed with defaults"
	if fault := n.policies.Fault(); fault != "" {
		text += "; the last try: " + fault
	}
	return errors.New(text)
}

// newRegistry makes a process's own metrics registry.
func newRegistry() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

// adminHandler serves the node's pages for operators.
func (n *node) adminHandler() http.Handler {
	return adminPages(adminConfig{registry: n.registry, ready: n.ready, states: map[string]func() any{
		"ingestz":   func() any { return n.ingestState() },
		"pressurez": func() any { return n.pressureState() },
		"cpuz":      func() any { return currentCPU() },
	}})
}
