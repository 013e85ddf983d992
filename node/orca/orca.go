// Package orca tells control planes of this node's load, by ORCA's out-of-band
// service (xds.service.orca.v3.OpenRcaService), as often as every 50 ms.
//
// It never waits for a control plane, and keeps nothing for it: who reads late
// gets the newest report. It knows nothing of what it reports but its kind.
//
// The commands may import it; it imports mirror/load only.
package orca

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"reflect"
	"sync"
	"time"

	data "github.com/cncf/xds/go/xds/data/orca/v3"
	service "github.com/cncf/xds/go/xds/service/orca/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	// MinInterval is the shortest interval that a client is granted, but for
	// urgent reports.
	MinInterval = 50 * time.Millisecond
	// FullEvery is how often all is told, changed or not, to clients that ask for
	// no longer an interval: longer silence is a fault.
	FullEvery = 5 * time.Second

	defaultInterval = time.Second
	maxInterval     = time.Minute
	urgentGap       = 10 * time.Millisecond // between two reports to one client
	sampleFor       = 20 * time.Millisecond // what several clients share
	stallAfter      = 15 * time.Second
	maxStreams      = 64
	perConnection   = 8
	maxRequestBytes = 64 << 10
)

// Config is what New needs.
type Config struct {
	// Report gives the load; it is called up to a hundred times a second, by one
	// goroutine at a time, and must not wait. An error says why nobody knows it:
	// streams end by it, with the status Unavailable.
	Report func() (load.Report, error)
	// Certified refuses clients that show no certificate which the server has
	// verified.
	Certified  bool
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Server serves load reports: at the start of a stream and every five seconds
// all of it, and in between, when something has changed and the client's
// interval has passed, all but the demands that are still the same.
//
// There are at most 64 streams; further ones are refused. A client that takes
// no report for 15 s is dropped.
type Server struct {
	service.UnimplementedOpenRcaServiceServer

	config  Config
	log     *slog.Logger
	stall   time.Duration
	metrics *metrics

	mu      sync.Mutex
	streams int
	urgent  chan struct{} // closed when a report is urgent
	urged   time.Time     // when that was last

	sampling sync.Mutex
	last     *load.Report
	at       time.Time // of last
}

// New makes a Server; it starts nothing.
func New(c Config) (*Server, error) {
	if c.Report == nil || c.Logger == nil {
		return nil, errors.New("make ORCA server: a report and a logger are needed")
	}
	s := &Server{config: c, log: c.Logger.With("component", "orca"), stall: stallAfter, urgent: make(chan struct{})}
	s.metrics = newMetrics(c.Registerer, s.open)
	return s, nil
}

// NewGRPCServer makes a gRPC server with the limits that fit this service.
func NewGRPCServer(extra ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, MaxConnectionIdle: 15 * time.Second}),
		grpc.MaxRecvMsgSize(maxRequestBytes),
		grpc.MaxConcurrentStreams(perConnection),
		grpc.ConnectionTimeout(10 * time.Second),
	}, extra...)...)
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) { service.RegisterOpenRcaServiceServer(r, s) }

// Urge has a report sent at once. It never waits.
func (s *Server) Urge() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.urgent)
	s.urgent, s.urged = make(chan struct{}), time.Now()
}

// StreamCoreMetrics serves one client until it goes.
func (s *Server) StreamCoreMetrics(req *service.OrcaLoadReportRequest, stream grpc.ServerStreamingServer[data.OrcaLoadReport]) error {
	if s.config.Certified && !certified(stream.Context()) {
		s.metrics.ended.WithLabelValues(endCertificate).Inc()
		return status.Error(codes.Unauthenticated, "load reports are for clients with a certificate that this node trusts")
	}
	if !s.enter() {
		s.metrics.ended.WithLabelValues(endRoom).Inc()
		return status.Errorf(codes.ResourceExhausted, "%d clients take reports already", maxStreams)
	}
	defer s.leave()
	err := s.serve(newOutlet(stream, s.stall), intervalOf(req))
	if unknown := new(unknownError); errors.As(err, &unknown) {
		s.metrics.ended.WithLabelValues(endUnknown).Inc()
		return status.Error(codes.Unavailable, err.Error())
	}
	if errors.Is(err, errStalled) {
		s.metrics.ended.WithLabelValues(endStalled).Inc()
		s.log.Warn("a client that takes no load reports is dropped", "address", addressOf(stream.Context()))
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	s.metrics.ended.WithLabelValues(endClient).Inc()
	return err
}

func intervalOf(req *service.OrcaLoadReportRequest) time.Duration {
	if req.GetReportInterval() == nil {
		return defaultInterval
	}
	return min(max(req.GetReportInterval().AsDuration(), MinInterval), maxInterval)
}

// serve sends reports until the stream ends.
func (s *Server) serve(out *outlet, interval time.Duration) error {
	defer out.close()
	var told *load.Report
	var fullAt, sentAt time.Time
	timer := time.NewTimer(interval)
	defer timer.Stop()
	fresh := time.Now().Add(-sampleFor)
	for {
		// Before the report is made: what becomes urgent meanwhile is not missed.
		urgent := s.urgency()
		now, err := s.sample(fresh)
		if err != nil {
			return &unknownError{err}
		}
		full := told == nil || time.Since(fullAt) >= FullEvery
		if full || !same(told, now) {
			if err := out.send(s.message(told, now, full)); err != nil {
				return err
			}
			told, sentAt = now, time.Now()
			if full {
				fullAt = sentAt
			}
		}
		timer.Reset(interval)
		select {
		case <-timer.C:
			fresh = time.Now().Add(-sampleFor)
		case <-urgent:
			fresh = s.urgedAt()
			timer.Reset(urgentGap - time.Since(sentAt))
			select {
			case <-timer.C:
			case <-out.ended():
			}
		case <-out.ended():
		}
		if err := out.stream.Context().Err(); err != nil {
			return status.FromContextError(err).Err()
		}
	}
}

// message is what a client that has been told of one report is told of the next.
func (s *Server) message(told, now *load.Report, full bool) *data.OrcaLoadReport {
	if full {
		s.metrics.reports.WithLabelValues("full").Inc()
		return load.Encode(now)
	}
	s.metrics.reports.WithLabelValues("partial").Inc()
	part := *now
	part.Demands, part.Partial = load.Changed(told.Demands, now.Demands), true
	return load.Encode(&part)
}

// sample gives a report that was made after a time.
func (s *Server) sample(after time.Time) (*load.Report, error) {
	s.sampling.Lock()
	defer s.sampling.Unlock()
	if s.last == nil || !s.at.After(after) {
		at := time.Now()
		r, err := s.config.Report()
		if err != nil {
			return nil, err
		}
		s.last, s.at = &r, at
	}
	return s.last, nil
}

// unknownError is of a load that nobody knows.
type unknownError struct{ error }

// same tells whether nothing has changed that is worth a report: less than a
// millisecond of delay, and a hundredth of what is measured, is noise.
func same(a, b *load.Report) bool {
	if !near(a.Capacity, b.Capacity) || !near(a.Rate, b.Rate) || len(load.Changed(a.Demands, b.Demands)) > 0 {
		return false
	}
	return reflect.DeepEqual(coarse(*a), coarse(*b))
}

func coarse(r load.Report) load.Report {
	r.Uptime, r.Capacity, r.Rate, r.Demands = 0, 0, 0, nil
	for _, d := range []*time.Duration{&r.Kernel, &r.Queue, &r.Lag} {
		*d = d.Round(time.Millisecond)
	}
	r.Utilization = math.Round(r.Utilization * 100)
	return r
}

// near tells of rates whether they are about the same: below one in ten seconds all are.
func near(a, b float64) bool { return math.Abs(a-b) <= max(a, b, 10)/100 }

func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams >= maxStreams {
		return false
	}
	s.streams++
	return true
}

func (s *Server) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams--
}

func (s *Server) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

func (s *Server) urgency() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.urgent
}

func (s *Server) urgedAt() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.urged
}

var errStalled = errors.New("no report was taken in time")

// outlet sends to a client, and gives it up when it takes nothing for long.
type outlet struct {
	stream   grpc.ServerStreamingServer[data.OrcaLoadReport]
	stall    time.Duration
	messages chan *data.OrcaLoadReport
	sent     chan error
}

func newOutlet(stream grpc.ServerStreamingServer[data.OrcaLoadReport], stall time.Duration) *outlet {
	o := &outlet{stream, stall, make(chan *data.OrcaLoadReport), make(chan error, 1)}
	// A send that waits for the client ends with the stream, which ends when its
	// handler returns.
	go func() {
		for m := range o.messages {
			o.sent <- o.stream.Send(m)
		}
	}()
	return o
}

func (o *outlet) send(m *data.OrcaLoadReport) error {
	o.messages <- m
	timer := time.NewTimer(o.stall)
	defer timer.Stop()
	select {
	case err := <-o.sent:
		return err
	case <-timer.C:
		return errStalled
	}
}

func (o *outlet) ended() <-chan struct{} { return o.stream.Context().Done() }

func (o *outlet) close() { close(o.messages) }

func certified(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	t, ok := p.AuthInfo.(credentials.TLSInfo)
	return ok && len(t.State.VerifiedChains) > 0
}

func addressOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return ""
}
