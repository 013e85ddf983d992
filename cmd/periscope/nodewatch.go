package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/cgroup"
	"github.com/periscope-mesh/periscope/node/pressure"
	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/xds/orca"
)

// nodeWatchFlags say which node to watch, and where to tell of it.
type nodeWatchFlags struct {
	reports string
	listen  string
	orca    string
	orcaTLS orcaServerFlags
	admin   string
	cgroup  string
	sockets []string
	bpfPin  string
}

// newNodeWatch tells of a node's load in its place.
func newNodeWatch(o *options) *cobra.Command {
	var f nodeWatchFlags
	cmd := &cobra.Command{
		Use:   "watch",
		Short: "Tell control planes of a node's load in its place, from a process with CPU time of its own",
		Long: `Tell control planes of a node's load in its place, from a process with CPU time of its own.

A node that is stopped, or that its CPU quota holds up, can't tell of it. This
command counts what waits in the node's sockets, puts that into what the node tells,
and serves it where control planes ask. Start the node with --node-orca
127.0.0.1:9092, and this in its network namespace, outside of its control group.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := o.logger()
			if err != nil {
				return err
			}
			w, err := openNodeWatch(cmd.Context(), f, logger)
			if err != nil {
				return err
			}
			defer w.close()
			return w.run(cmd.Context())
		},
	}
	outside := slices.DeleteFunc(sockstat.Backends(), func(b string) bool { return b == sockstat.InProcess })
	flags := cmd.Flags()
	flags.StringVar(&f.reports, "node-reports", "127.0.0.1:9092", "loopback address at which the node tells its load: its --node-orca")
	flags.StringVar(&f.listen, "node-listen", "127.0.0.1:5050", "address at which the node takes mirrored traffic: its --node-listen, or --insecure-listen")
	flags.StringVar(&f.orca, "node-orca", "127.0.0.1:9091", "address at which control planes take load reports; loopback, unless it is given certificates for it")
	f.orcaTLS.add(flags)
	flags.StringVar(&f.admin, "watch-admin", "127.0.0.1:9093", "loopback address for this process's /live, /ready, /metrics and /debug")
	flags.StringVar(&f.cgroup, "node-cgroup", "", "directory of the node's control group, of version 2, for the back end ebpf; without, that one is left out")
	flags.StringSliceVar(&f.sockets, "node-sockets", outside, "who may count what waits in the node's sockets, the best first: "+strings.Join(outside, ", "))
	flags.StringVar(&f.bpfPin, "node-bpf-pin", sockstat.DefaultPin, "directory of what periscope node bpf load has pinned")
	return cmd
}

// nodeWatch is a process beside a node:
//
//	node ──► [1] reports ──┐
//	kernel ─► [2] sockets ─┴─► [3] ORCA ─► control planes
//	operators ─► [4] admin: /live /ready /metrics /debug
//
// Boxes are opened in the order of their numbers.
type nodeWatch struct {
	cfg      nodeWatchFlags
	log      *slog.Logger
	registry *prometheus.Registry
	reports  *orca.Watcher
	sockets  *sockets
	orca     *orcaServer
	admin    net.Listener
	started  time.Time
	closers  []func() error

	mu     sync.Mutex
	kernel time.Duration // as far as it is believed
	known  bool
	epoch  uint64        // of the last report
	uptime time.Duration // in it
}

func openNodeWatch(ctx context.Context, f nodeWatchFlags, logger *slog.Logger) (_ *nodeWatch, err error) {
	w := &nodeWatch{cfg: f, log: logger.With("component", "watch"), registry: newRegistry(), started: time.Now()}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	// [1]
	if err := localweb.RequireLoopback("--node-reports", f.reports); err != nil {
		return nil, err
	}
	w.reports, err = orca.New(orca.Config{Logger: logger, Registerer: w.registry})
	if err != nil {
		return nil, err
	}
	w.reports.SetNodes([]string{f.reports})
	// [2]
	backends, err := f.backends()
	if err != nil {
		return nil, err
	}
	w.sockets, err = openSockets(f.listen, sockstat.Config{Backends: backends, Pin: f.bpfPin, Cgroup: f.cgroup})
	if err != nil {
		return nil, err
	}
	w.closers = append(w.closers, w.sockets.close)
	if w.sockets.sampler == nil {
		return nil, fmt.Errorf("--node-listen: %q has no port", f.listen)
	}
	// [3]
	w.orca, err = openORCA(ctx, orcaConfig{address: f.orca, tls: f.orcaTLS, report: w.report, registry: w.registry, logger: logger})
	if err != nil {
		return nil, err
	}
	w.closers = append(w.closers, w.orca.listener.Close)
	// [4]
	if err := localweb.RequireLoopback("--watch-admin", f.admin); err != nil {
		return nil, err
	}
	if w.admin, err = listenLocal(ctx, "the watch's admin pages", f.admin); err != nil {
		return nil, err
	}
	w.closers = append(w.closers, w.admin.Close)
	return w, nil
}

// backends are those that may count: without the node's control group, eBPF would
// look for its sockets in this process's.
func (f *nodeWatchFlags) backends() ([]string, error) {
	var out []string
	for _, b := range f.sockets {
		switch {
		case b == sockstat.InProcess:
			return nil, fmt.Errorf("--node-sockets: %s sees none of another process: leave it out", b)
		case !slices.Contains(sockstat.Backends(), b):
			return nil, fmt.Errorf("--node-sockets: there is no %q", b)
		case b != sockstat.EBPF || f.cgroup != "":
			out = append(out, b)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("--node-sockets: nobody is left to count; ebpf needs --node-cgroup")
	}
	return out, nil
}

func (w *nodeWatch) run(ctx context.Context) error {
	w.log.Info("watching a node", "reports", w.cfg.reports, "mirrored_traffic", w.cfg.listen, "orca", w.orca.listener.Addr().String(), "admin", w.admin.Addr().String())
	w.sockets.log(w.log)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return w.reports.Run(ctx) })
	group.Go(func() error { return w.sample(ctx) })
	group.Go(func() error { return w.orca.run(ctx) })
	group.Go(func() error {
		return serve(ctx, w.admin, pages(localweb.Guard(adminPages(adminConfig{registry: w.registry, ready: w.ready,
			states: map[string]func() any{"pressurez": func() any { return w.state() }}})), w.log))
	})
	return group.Wait()
}

func (w *nodeWatch) close() { closeAll(w.closers, w.log) }

// sample looks at the node's sockets until the context ends, and has control planes
// told at once when the node gets late.
func (w *nodeWatch) sample(ctx context.Context) error {
	var outside pressure.Outside
	var complaint string
	late := false
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		told := w.told()
		if told.Report == nil {
			told.Report = &load.Report{}
		}
		age, known := w.sockets.sample()
		kernel := outside.Kernel(time.Since(w.started), age, told.Report, func() time.Duration {
			idle, err := cgroup.Host{}.Idle()
			if err != nil && err.Error() != complaint {
				complaint = err.Error()
				w.log.Warn("an age below 0.1 s is not believed unless the node says that it is busy", "error", err)
			}
			return idle
		})
		w.mu.Lock()
		w.kernel, w.known = kernel, known
		w.mu.Unlock()
		before := late
		late = max(kernel, told.Report.Queue, told.Report.Lag) > urgentDelay
		if late && !before {
			w.orca.service.Urge()
		}
	}
}

// told is what the node has told.
func (w *nodeWatch) told() orca.Node {
	nodes, _ := w.reports.Nodes()
	return nodes[0]
}

// report is what the node told last, with its sockets as they are now. Of a node that
// is gone, or has been silent for longer than a healthy one is, there is none: how
// long it still counts is for control planes to decide.
func (w *nodeWatch) report() (load.Report, error) {
	n := w.told()
	if n.State != orca.StateReporting || n.ConnectedAt.IsZero() {
		return load.Report{}, fmt.Errorf("the node at %s tells nothing of its load: %s", n.Address, cmp.Or(n.Fault, n.State))
	}
	r := *n.Report
	r.Uptime += time.Since(n.ReceivedAt)
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.Epoch == w.epoch {
		r.Uptime = max(r.Uptime, w.uptime) // the next report may have been quicker
	}
	w.epoch, w.uptime = r.Epoch, r.Uptime
	if w.known {
		r.Kernel = w.kernel
		w.sockets.fill(&r)
	}
	return r, nil
}

func (w *nodeWatch) ready() error {
	_, err := w.report()
	return err
}

// watchState is the watch's /debug/pressurez: what it tells, and what it is made of.
type watchState struct {
	Node       string      `json:"node"` // where it reports
	State      string      `json:"state"`
	Fault      string      `json:"fault,omitempty"`
	ReceivedAt time.Time   `json:"receivedAt,omitzero"`
	Told       *loadReport `json:"told,omitempty"`   // by the node
	Report     *loadReport `json:"report,omitempty"` // by this process
	Sockets    socketState `json:"sockets"`
}

func (w *nodeWatch) state() watchState {
	n := w.told()
	out := watchState{Node: n.Address, State: n.State, Fault: n.Fault, ReceivedAt: n.ReceivedAt, Told: showReport(n.Report), Sockets: w.sockets.state()}
	if r, err := w.report(); err == nil {
		out.Report = showReport(&r)
	}
	return out
}
