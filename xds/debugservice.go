package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// What istioctl asks for, as types of resources.
const (
	DebugType           = "istio.io/debug"             // the page named
	DebugSyncType       = "istio.io/debug/syncz"       // the state of each proxy
	DebugConfigDumpType = "istio.io/debug/config_dump" // what the proxy named was sent
)

const (
	debugAtOnce    = 4        // answers being made or sent; more requests are refused
	debugBurst     = 100      // requests
	debugPerSecond = 20       // requests, in the long run
	maxDebugBytes  = 32 << 20 // one answer
	maxDebugNames  = 1        // in a request
	maxDebugIdle   = time.Minute
)

// DebugSource answers istioctl: the resources and the control plane's identity,
// for one of the Debug types and the names with it. Its errors are passed on.
type DebugSource interface {
	Debug(ctx context.Context, typeURL string, names []string) (*discovery.DiscoveryResponse, error)
}

type debugStream = discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer

func isDebug(typeURL string) bool {
	return typeURL == DebugType || strings.HasPrefix(typeURL, DebugType+"/")
}

// debugService bounds what istioctl may cost. Its methods may be called from
// several goroutines.
type debugService struct {
	source DebugSource // nil: refused
	slots  chan struct{}
	pace   *rate.Limiter // that all callers share
}

func newDebugService(source DebugSource) *debugService {
	return &debugService{source: source, slots: make(chan struct{}, debugAtOnce), pace: rate.NewLimiter(debugPerSecond, debugBurst)}
}

func (d *debugService) allow(now time.Time) bool { return d.pace.AllowN(now, 1) }

// serveDebug answers istioctl's requests, one after the other. A stream on which
// nothing happens ends.
func (s *Server) serveDebug(c *connection, stream debugStream, req *discovery.DiscoveryRequest) error {
	s.mu.Lock()
	c.debug = true
	s.mu.Unlock()
	if err := s.mayDebug(stream.Context()); err != nil {
		return err
	}
	nonce := ""
	for served := 0; ; {
		if nonce == "" || req.GetResponseNonce() != nonce { // else it acknowledges
			served++
			nonce = fmt.Sprintf("debug-%d", served)
			if err := s.answerDebug(stream, req, nonce); err != nil {
				return err
			}
		}
		var err error
		if req, err = receiveWithin(stream, maxDebugIdle); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if !isDebug(req.GetTypeUrl()) {
			return status.Errorf(codes.InvalidArgument, "a stream that began with %s serves nothing else", DebugType)
		}
	}
}

// receiveWithin receives the next request. If none comes in time, the caller
// must end the stream, which ends the goroutine that waits for it.
func receiveWithin(stream debugStream, d time.Duration) (*discovery.DiscoveryRequest, error) {
	type received struct {
		req *discovery.DiscoveryRequest
		err error
	}
	next := make(chan received, 1)
	go func() {
		req, err := stream.Recv()
		next <- received{req, err}
	}()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case r := <-next:
		return r.req, r.err
	case <-timer.C:
		return nil, status.Error(codes.DeadlineExceeded, "nothing was asked for a while")
	}
}

// mayDebug lets in callers on this host, and those with a certificate that the
// server has verified.
func (s *Server) mayDebug(ctx context.Context) error {
	p, ok := peer.FromContext(ctx)
	switch {
	case s.debug.source == nil:
		return status.Error(codes.Unimplemented, "this server has no debug pages")
	case ok && (isLoopback(p.Addr) || Certified(ctx)):
		return nil
	}
	s.metrics.refused.WithLabelValues(refusedDebug).Inc()
	return status.Error(codes.PermissionDenied, "debug pages are for callers on the control plane's host, or with a client certificate that it trusts")
}

func isLoopback(addr net.Addr) bool {
	ap, err := netip.ParseAddrPort(addr.String())
	return err == nil && ap.Addr().Unmap().IsLoopback()
}

// Certified tells whether the client of a gRPC call has shown a certificate
// that the server has verified.
func Certified(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	t, ok := p.AuthInfo.(credentials.TLSInfo)
	return ok && len(t.State.VerifiedChains) > 0
}

func (s *Server) answerDebug(stream debugStream, req *discovery.DiscoveryRequest, nonce string) error {
	names := req.GetResourceNames()
	if len(names) > maxDebugNames || len(names) == 1 && len(names[0]) > maxNameBytes || len(req.GetTypeUrl()) > maxTypeURLBytes {
		return status.Errorf(codes.InvalidArgument, "at most %d name, of at most %d bytes", maxDebugNames, maxNameBytes)
	}
	if !s.debug.allow(time.Now()) {
		return s.refuse(refusedDebug, "more than %d debug requests a second", debugPerSecond)
	}
	select {
	case s.debug.slots <- struct{}{}:
		defer func() { <-s.debug.slots }()
	default:
		return s.refuse(refusedDebug, "%d debug answers are being made already", debugAtOnce)
	}
	res, err := s.debug.source.Debug(stream.Context(), req.GetTypeUrl(), names)
	if err != nil {
		return err
	}
	bytes := 0
	for _, r := range res.GetResources() {
		bytes += len(r.GetValue())
	}
	if bytes > maxDebugBytes {
		return s.refuse(refusedDebug, "the answer has %d bytes, more than %d; ask for a part of it", bytes, maxDebugBytes)
	}
	res.TypeUrl, res.Nonce, res.VersionInfo = req.GetTypeUrl(), nonce, nonce
	return stream.Send(res)
}
