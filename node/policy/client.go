package policy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	typeURL      = "type.googleapis.com/periscope.node.v1alpha1.NodePolicySet"
	resourceName = "nodes"

	minBackoff    = 100 * time.Millisecond
	maxBackoff    = 5 * time.Second
	maxFaultBytes = 1 << 10
)

// ownPort is what differs from attempt to attempt in a connection's errors.
var ownPort = regexp.MustCompile(`:\d+->`)

// Dial makes a connection to a control plane as nodes need one: it comes back
// soon, but not all at once, and notices a control plane that went without a
// word. It connects with its first use.
func Dial(address string, c credentials.TransportCredentials) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(c),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxSetBytes+1<<20)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minBackoff, Multiplier: 2, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("control plane %s: %w", address, err)
	}
	return conn, nil
}

// Run takes policies until ctx ends, reconnecting as need be; it returns nil
// then. It starts no goroutines of its own. Call it once.
func (c *Client) Run(ctx context.Context) error {
	conn, err := Dial(c.address, c.credentials)
	if err != nil {
		return fmt.Errorf("take policies: %w", err)
	}
	defer conn.Close()
	api := discovery.NewAggregatedDiscoveryServiceClient(conn)
	s := &session{client: c}
	failures, logged := 0, ""
	for {
		opened := time.Now()
		err := s.stream(ctx, api)
		if ctx.Err() != nil {
			return nil
		}
		c.metrics.reconnects.Inc()
		if time.Since(opened) > maxBackoff { // it was a good one
			failures, logged = 0, ""
		}
		fault := clip(err.Error())
		c.fault.Store(&fault)
		if reason := ownPort.ReplaceAllString(fault, ""); reason != logged { // once, not with each attempt
			logged = reason
			c.logger.Warn("policy stream ended", "address", c.address, "error", fault)
		}
		wait := time.NewTimer(delay(failures, rand.Float64()))
		failures++
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil
		}
	}
}

// delay is the wait after so many failures in a row: doubled each time, and a
// random half of it taken off, so that nodes don't come back all at once.
func delay(failures int, random float64) time.Duration {
	d := maxBackoff
	if failures < 10 {
		d = min(maxBackoff, minBackoff<<failures)
	}
	return max(minBackoff, d-time.Duration(random*float64(d)/2))
}

// session is what outlives a stream: the version last accepted.
type session struct {
	client  *Client
	version string
}

// stream takes policies from one stream until it ends.
func (s *session) stream(ctx context.Context, api discovery.AggregatedDiscoveryServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := api.DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(s.first()); err != nil {
		_, err = stream.Recv() // tells why
		return err
	}
	s.client.metrics.connected.Set(1)
	defer s.client.metrics.connected.Set(0)
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if resp.GetTypeUrl() != typeURL {
			continue
		}
		reply := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: resp.GetNonce()}
		if err := s.take(resp); err != nil {
			s.client.metrics.rejected.Inc()
			s.client.logger.Warn("policies rejected", "error", err)
			reply.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: clip(err.Error())}
		}
		if err := stream.Send(reply); err != nil {
			_, err = stream.Recv()
			return err
		}
	}
}

func (s *session) first() *discovery.DeltaDiscoveryRequest {
	req := &discovery.DeltaDiscoveryRequest{
		Node: &core.Node{
			Id:      s.client.nodeID,
			Cluster: "node",
			Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
				"role": structpb.NewStringValue("node"),
			}},
		},
		TypeUrl:                typeURL,
		ResourceNamesSubscribe: []string{resourceName},
	}
	if s.version != "" {
		req.InitialResourceVersions = map[string]string{resourceName: s.version}
	}
	return req
}

// take puts a response in force. A removed set is no reason to forget
// policies: what is known stays.
func (s *session) take(resp *discovery.DeltaDiscoveryResponse) error {
	var faults []error
	for _, r := range resp.GetResources() {
		if r.GetName() != resourceName {
			faults = append(faults, fmt.Errorf("unknown resource %q", clip(r.GetName())))
			continue
		}
		if got := r.GetResource().GetTypeUrl(); got != typeURL {
			faults = append(faults, fmt.Errorf("resource %q is a %q", resourceName, clip(got)))
			continue
		}
		if err := s.adopt(r.GetResource().GetValue()); err != nil {
			faults = append(faults, fmt.Errorf("resource %q: %w", resourceName, err))
			continue
		}
		s.version = r.GetVersion()
	}
	return errors.Join(faults...)
}

func (s *session) adopt(raw []byte) error {
	c := s.client
	r, err := decodeSet(raw)
	if err != nil {
		return err
	}
	c.adopt(r)
	c.metrics.accepted.Inc()
	c.logger.Info("policies applied", "revision", r.name, "policies", len(r.policies))
	if c.stateFile == "" {
		return nil
	}
	if err := saveState(c.stateFile, raw); err != nil {
		// The policies are in force: that the next start may lack them is no
		// reason to refuse them.
		c.metrics.saveErrors.Inc()
		c.logger.Warn("policy state not saved", "error", err)
	}
	return nil
}

func clip(s string) string {
	if len(s) > maxFaultBytes {
		s = s[:maxFaultBytes]
	}
	return strings.ToValidUTF8(s, "")
}
