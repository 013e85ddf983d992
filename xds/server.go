package xds

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

const (
	protocolSotW  = "sotw"
	protocolDelta = "delta"

	maxRecvBytes     = 4 << 20
	maxGRPCStreams   = 100      // a client's TCP connection; xDS needs one
	windowBytes      = 64 << 10 // of a stream, that wait to be read; gRPC's own choice may grow to 16 MiB
	maxLoggedClients = 256

	defaultMaxConnections = 1000
)

// ErrNoCertificate ends a stream of a client whose identity needs one. Unlike a
// client that is held, one that is refused is told why, and comes back: but Envoy
// and our node wait longer each time.
var ErrNoCertificate = status.Error(codes.Unauthenticated,
	"gateways and nodes have to show a client certificate that the control plane trusts (for ours: --control-cert and --control-key)")

// Config is what New needs.
type Config struct {
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// Select gives the key of the snapshot that a client is served. It is
	// called once a stream. A client for which it fails is held without answer:
	// were it refused, it would come back at once, again and again.
	Select func(*core.Node) (key string, err error) // default SelectByRole
	// Certified tells the keys whose snapshots are only for clients with a
	// certificate that the server has verified. Others are refused: it is the
	// key that is guarded, whatever a client calls itself. Default: none.
	Certified      func(key string) bool
	MaxConnections int         // streams in all, default 1000; more are refused
	Debug          DebugSource // answers istioctl; nil: it is refused
}

// Server is the aggregated discovery service.
//
// Each stream has at most one unsent response a type, and gets the next only
// when it has replied to the last: what is set meanwhile is merged. Requests
// that come too fast wait in the client. So memory is bounded by the number of
// streams and the size of the snapshots, and a client that asks too much or
// reads nothing is its own loss.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	logger    *slog.Logger
	sel       func(*core.Node) (string, error)
	certified func(key string) bool
	max       int
	metrics   *metrics
	debug     *debugService
	floodLogs *rate.Limiter

	// mu guards all below, connections' fields included. Nothing done under it
	// waits: responses go into channels that have room.
	mu          sync.Mutex
	keys        map[string]*keyState
	connections map[uint64]*connection // by serial number
	opened      uint64
	logged      map[string]struct{} // clients held or refused that were logged
}

// keyState is a snapshot and who waits for its next.
type keyState struct {
	snapshot *Snapshot
	watches  map[*watch]struct{}
}

// New makes a Server; it starts nothing.
func New(c Config) (*Server, error) {
	if c.Logger == nil || c.Registerer == nil {
		return nil, fmt.Errorf("make xds server: a logger and a registerer are needed")
	}
	m, err := newMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("make xds server: %w", err)
	}
	if c.Select == nil {
		c.Select = SelectByRole
	}
	if c.Certified == nil {
		c.Certified = func(string) bool { return false }
	}
	return &Server{
		logger:      c.Logger.With("component", "xds"),
		sel:         c.Select,
		certified:   c.Certified,
		max:         cmp.Or(c.MaxConnections, defaultMaxConnections),
		metrics:     m,
		debug:       newDebugService(c.Debug),
		keys:        map[string]*keyState{},
		connections: map[uint64]*connection{},
		logged:      map[string]struct{}{},
		floodLogs:   rate.NewLimiter(floodLogPerSecond, floodLogBurst),
	}, nil
}

// NewGRPCServer makes a gRPC server with the limits that xDS clients need:
// istiod and Envoy ping more often than grpc-go's default allows.
//
// Discovery streams end only when their client goes, so GracefulStop would
// wait for ever: use Stop.
func NewGRPCServer(extra ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.MaxRecvMsgSize(maxRecvBytes),
		grpc.MaxConcurrentStreams(maxGRPCStreams),
		grpc.StaticStreamWindowSize(windowBytes),
		grpc.StaticConnWindowSize(maxGRPCStreams * windowBytes),
		grpc.ConnectionTimeout(10 * time.Second),
	}, extra...)...)
}

// Register adds the discovery service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discovery.RegisterAggregatedDiscoveryServiceServer(r, s)
}

// SetSnapshot swaps what clients of a key are served, as a whole, and answers
// those that wait for something which changed. A nil snapshot takes the key
// away: its clients keep what they have and get no further answer.
func (s *Server) SetSnapshot(key string, snapshot *Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.key(key)
	k.snapshot = snapshot
	if snapshot == nil {
		s.release(key, k)
		return
	}
	for w := range k.watches {
		if w.try(snapshot) {
			delete(k.watches, w)
		}
	}
}

// key gives the state of a key, made if need be. Under s.mu.
func (s *Server) key(key string) *keyState {
	k := s.keys[key]
	if k == nil {
		k = &keyState{watches: map[*watch]struct{}{}}
		s.keys[key] = k
	}
	return k
}

// release forgets a key that has neither snapshot nor watches, so that clients
// can't fill memory with keys they make up. Under s.mu.
func (s *Server) release(key string, k *keyState) {
	if k.snapshot == nil && len(k.watches) == 0 && s.keys[key] == k {
		delete(s.keys, key)
	}
}

// StreamAggregatedResources serves the state-of-the-world protocol. The
// library's handler is made for each stream, with the stream's connection as
// its cache: so a watch knows whose it is. What istioctl asks for is told by
// the first request's type, and goes to the DebugSource.
func (s *Server) StreamAggregatedResources(stream discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	c, err := s.open(stream.Context(), protocolSotW)
	if err != nil {
		return err
	}
	defer s.close(c)
	first, err := stream.Recv()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	case isDebug(first.GetTypeUrl()):
		return s.serveDebug(c, stream, first)
	}
	return sotw.NewServer(stream.Context(), c, c).StreamHandler(&pacedSotW{stream, c, first}, "")
}

// DeltaAggregatedResources serves the incremental protocol.
func (s *Server) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	c, err := s.open(stream.Context(), protocolDelta)
	if err != nil {
		return err
	}
	defer s.close(c)
	return delta.NewServer(stream.Context(), c, c).DeltaStreamHandler(&pacedDelta{stream, c}, "")
}

func (s *Server) open(ctx context.Context, protocol string) (*connection, error) {
	c := &connection{server: s, protocol: protocol, connectedAt: time.Now(), types: map[string]*tracker{},
		requests: rate.NewLimiter(requestPerSecond, requestBurst)}
	if p, ok := peer.FromContext(ctx); ok {
		c.address, c.certified = p.Addr.String(), Certified(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.connections) >= s.max {
		return nil, s.refuse(refusedConnections, "the server has its %d streams", s.max)
	}
	s.opened++
	c.serial = s.opened
	s.connections[c.serial] = c
	s.metrics.connections.WithLabelValues(protocol).Inc()
	return c, nil
}

func (s *Server) close(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.connections, c.serial)
	s.metrics.connections.WithLabelValues(c.protocol).Dec()
}

// refuse counts and makes the error that ends a stream.
func (s *Server) refuse(reason, format string, args ...any) error {
	s.metrics.refused.WithLabelValues(reason).Inc()
	return status.Errorf(codes.ResourceExhausted, format, args...)
}

// Connections lists the open streams, the oldest first, istioctl's left out.
func (s *Server) Connections() []Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*connection, 0, len(s.connections))
	for _, c := range s.connections {
		if !c.debug {
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b *connection) int { return cmp.Compare(a.serial, b.serial) })
	out := make([]Connection, 0, len(list))
	for _, c := range list {
		out = append(out, c.export())
	}
	return out
}

// Deliveries tells what a stream was sent of which types, each by name: nil if
// there is no such stream. The resources are shared: don't change them.
func (s *Server) Deliveries(connectionID string) map[string][]Delivery {
	serial, err := strconv.ParseUint(connectionID[strings.LastIndex(connectionID, "-")+1:], 10, 64)
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.connections[serial]
	if c == nil || c.debug || c.connectionID() != connectionID {
		return nil
	}
	out := make(map[string][]Delivery, len(c.types))
	for typeURL, t := range c.types {
		out[typeURL] = slices.Clone(t.delivered)
	}
	return out
}

// Snapshots gives the snapshots that are being served, by key.
func (s *Server) Snapshots() map[string]*Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]*Snapshot, len(s.keys))
	for key, k := range s.keys {
		if k.snapshot != nil {
			out[key] = k.snapshot
		}
	}
	return out
}
