package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/node/orca"
	"github.com/periscope-mesh/periscope/xds/certs"
)

// maxORCAConnections bounds connections to a node's server of load reports: more than
// the streams that there may be, so that who takes none keeps nobody away.
const maxORCAConnections = 256

// orcaServerFlags open a node's load reports to other hosts.
type orcaServerFlags struct{ cert, key, clientCA string }

func (f *orcaServerFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.cert, "node-orca-cert", "", "certificate chain of the server of load reports, PEM; with it and the next two --node-orca may be any address; default: plain text")
	flags.StringVar(&f.key, "node-orca-key", "", "private key of --node-orca-cert, PEM")
	flags.StringVar(&f.clientCA, "node-orca-client-ca", "", "authorities, PEM, of the certificate that a control plane must show to take load reports")
}

// loadSource puts together what a node tells of its load. Whatever measures
// more of it adds a function to fill.
type loadSource struct {
	name    string
	epoch   uint64
	started time.Time
	ring    *ingest.Ring
	count   func() uint64 // exchanges analysed
	demands func() []load.Demand
	fill    []func(*load.Report)

	rate     float64 // exchanges a second
	counted  uint64
	measured time.Time
}

// report gives the load now; for one goroutine at a time. It is always known.
func (s *loadSource) report() (load.Report, error) {
	r := load.Report{
		Node: s.name, Epoch: s.epoch, Uptime: time.Since(s.started),
		Queue:    s.ring.Age(time.Now()),
		Analysed: s.count(), Priority: s.ring.Priority(), Overflown: s.ring.Overflown(),
		Demands: s.demands(),
	}
	r.Rate = s.measure(r.Analysed, time.Now())
	for _, fill := range s.fill {
		fill(&r)
	}
	return r, nil
}

// demands lists what either transport tells of the demand at gateways.
func (n *node) demands() []load.Demand {
	return load.Merge(n.handler.Demands(n.meter.started), n.streams.Demands(n.meter.started))
}

// measure gives the rate of a counter over about a second.
func (s *loadSource) measure(count uint64, now time.Time) float64 {
	passed := now.Sub(s.measured).Seconds()
	if passed < 0.02 {
		return s.rate
	}
	s.rate += (float64(count-s.counted)/passed - s.rate) * (1 - math.Exp(-passed))
	s.counted, s.measured = count, now
	return s.rate
}

// loadSource makes what the node tells of its load.
func (n *node) loadSource() *loadSource {
	return &loadSource{name: n.cfg.name, epoch: rand.Uint64(), started: n.meter.started, ring: n.analysis.ring, count: n.analysis.analysed.Load, demands: n.demands, fill: []func(*load.Report){n.meter.fill, n.sockets.fill}}
}

// orcaServer serves load reports.
type orcaServer struct {
	service  *orca.Server
	grpc     *grpc.Server
	listener net.Listener
	certs    *certs.Certificates // nil: plain text
}

// orcaConfig is what openORCA needs.
type orcaConfig struct {
	address  string
	tls      orcaServerFlags
	report   func() (load.Report, error)
	registry *prometheus.Registry
	logger   *slog.Logger
}

// openORCA makes the server of load reports; without certificates its address
// must be loopback.
func openORCA(ctx context.Context, cfg orcaConfig) (_ *orcaServer, err error) {
	f, s := cfg.tls, &orcaServer{}
	var options []grpc.ServerOption
	switch {
	case f.cert != "" && f.key != "" && f.clientCA != "":
		s.certs, err = certs.New(certs.Config{CertFile: f.cert, KeyFile: f.key, ClientCAFile: f.clientCA, Logger: cfg.logger})
		if err != nil {
			return nil, fmt.Errorf("--node-orca-cert, --node-orca-key, --node-orca-client-ca: %w", err)
		}
		options = append(options, grpc.Creds(credentials.NewTLS(s.certs.ServerConfig())))
	case f.cert+f.key+f.clientCA != "":
		return nil, errors.New("--node-orca-cert, --node-orca-key, --node-orca-client-ca: all three are needed")
	default:
		if err := localweb.RequireLoopback("--node-orca", cfg.address); err != nil {
			return nil, fmt.Errorf("%w; or give it --node-orca-cert, --node-orca-key and --node-orca-client-ca", err)
		}
	}
	s.service, err = orca.New(orca.Config{Report: cfg.report, Certified: s.certs != nil, Logger: cfg.logger, Registerer: cfg.registry})
	if err != nil {
		return nil, err
	}
	s.grpc = orca.NewGRPCServer(options...)
	s.service.Register(s.grpc)
	if s.listener, err = listenLocal(ctx, "load reports", cfg.address); err != nil {
		return nil, err
	}
	s.listener = netutil.LimitListener(s.listener, maxORCAConnections)
	return s, nil
}

func (s *orcaServer) run(ctx context.Context) error {
	if s.certs != nil {
		defer beside(ctx, s.certs.Run)()
	}
	return serveGRPC(ctx, "load reports", s.listener, s.grpc)
}
