package xds

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// echo answers with what it was asked.
type echo struct{ block chan struct{} }

func (e echo) Debug(ctx context.Context, typeURL string, names []string) (*discovery.DiscoveryResponse, error) {
	if len(names) == 1 && names[0] == "fault" {
		return nil, status.Error(codes.NotFound, "no such thing")
	}
	if len(names) == 1 && names[0] == "big" {
		return &discovery.DiscoveryResponse{Resources: []*anypb.Any{{Value: make([]byte, maxDebugBytes+1)}}}, nil
	}
	if e.block != nil {
		select {
		case <-e.block:
		case <-ctx.Done():
		}
	}
	return &discovery.DiscoveryResponse{Resources: []*anypb.Any{{TypeUrl: typeURL, Value: []byte(strings.Join(names, " "))}}}, nil
}

// ask is istioctl: one stream, whose first request has a nonce of its own.
func (f *fixture) ask() (discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient, context.CancelFunc) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 10*time.Second)
	f.t.Cleanup(cancel)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(f.conn).StreamAggregatedResources(ctx)
	if err != nil {
		f.t.Fatal(err)
	}
	return stream, cancel
}

func exchange(t *testing.T, stream discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient, typeURL, nonce string, names ...string) (*discovery.DiscoveryResponse, error) {
	t.Helper()
	_ = stream.Send(&discovery.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: names, ResponseNonce: nonce}) // a fault is Recv's
	return stream.Recv()
}

func TestDebugStream(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Debug = echo{} })
	stream, _ := f.ask()
	res, err := exchange(t, stream, DebugType, "now", "config_dump?proxyID=a b")
	if err != nil {
		t.Fatal(err)
	}
	if got := string(res.GetResources()[0].GetValue()); got != "config_dump?proxyID=a b" || res.GetTypeUrl() != DebugType || res.GetNonce() == "" || res.GetVersionInfo() == "" {
		t.Errorf("got %v", res)
	}
	// An acknowledgement is no question; another name, or another type, is.
	if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: DebugType, ResourceNames: []string{"x"}, ResponseNonce: res.GetNonce()}); err != nil {
		t.Fatal(err)
	}
	res, err = exchange(t, stream, DebugSyncType, "")
	if err != nil || res.GetTypeUrl() != DebugSyncType {
		t.Errorf("got %v, %v", res, err)
	}
	if list := f.server.Connections(); len(list) != 0 {
		t.Errorf("istioctl is taken for a client: %+v", list)
	}
	if _, err := exchange(t, stream, typeLDS, ""); status.Code(err) != codes.InvalidArgument {
		t.Errorf("another type on the same stream: %v", err)
	}
}

func TestDebugRefusals(t *testing.T) {
	long := strings.Repeat("x", maxNameBytes+1)
	for name, tt := range map[string]struct {
		source DebugSource
		names  []string
		want   codes.Code
	}{
		"no source":     {nil, []string{"list"}, codes.Unimplemented},
		"two names":     {echo{}, []string{"a", "b"}, codes.InvalidArgument},
		"a long name":   {echo{}, []string{long}, codes.InvalidArgument},
		"source's own":  {echo{}, []string{"fault"}, codes.NotFound},
		"a huge answer": {echo{}, []string{"big"}, codes.ResourceExhausted},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(c *Config) { c.Debug = tt.source })
			stream, _ := f.ask()
			if _, err := exchange(t, stream, DebugType, "", tt.names...); status.Code(err) != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestDebugRate(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Debug = echo{} })
	stream, _ := f.ask()
	var err error
	for range debugBurst + 100 { // more than the bucket holds and is filled with meanwhile
		if _, err = exchange(t, stream, DebugType, "", "list"); err != nil {
			break
		}
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
}

func TestDebugBucket(t *testing.T) {
	d := newDebugService(echo{})
	now := time.Unix(0, 0)
	for i := range debugBurst {
		if !d.allow(now) {
			t.Fatalf("request %d is refused", i)
		}
	}
	if d.allow(now) {
		t.Error("more than the bucket holds")
	}
	if !d.allow(now.Add(time.Second / debugPerSecond)) {
		t.Error("it is not filled again")
	}
}

func TestDebugAtOnce(t *testing.T) {
	e := echo{block: make(chan struct{})}
	f := newFixture(t, func(c *Config) { c.Debug = e })
	var codesSeen = make(chan codes.Code, debugAtOnce+1)
	for range debugAtOnce + 1 {
		stream, _ := f.ask()
		if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: DebugType, ResourceNames: []string{"list"}}); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := stream.Recv()
			codesSeen <- status.Code(err)
		}()
	}
	if c := <-codesSeen; c != codes.ResourceExhausted { // the others wait
		t.Errorf("got %v", c)
	}
	close(e.block)
	for range debugAtOnce {
		if c := <-codesSeen; c != codes.OK {
			t.Errorf("got %v", c)
		}
	}
}

// TestStreamsEndEarly: streams on which no request comes, or only a part of one.
func TestStreamsEndEarly(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Debug = echo{} })
	stream, _ := f.ask()
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if m, err := stream.Recv(); err == nil || status.Code(err) != codes.Unknown && err.Error() != "EOF" {
		t.Errorf("got %v, %v", m, err)
	}
	stream, _ = f.ask()
	if _, err := exchange(t, stream, DebugType, "", "list"); err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err == nil || err.Error() != "EOF" {
		t.Errorf("got %v", err)
	}
}

// silent is a stream on which nothing comes until it ends.
type silent struct {
	debugStream
	ctx context.Context
}

func (s silent) Recv() (*discovery.DiscoveryRequest, error) {
	<-s.ctx.Done()
	return nil, s.ctx.Err()
}

func TestDebugIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		start := time.Now()
		_, err := receiveWithin(silent{ctx: ctx}, maxDebugIdle)
		if status.Code(err) != codes.DeadlineExceeded || time.Since(start) != maxDebugIdle {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		cancel()
		if _, err := receiveWithin(silent{ctx: ctx}, maxDebugIdle); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestMayDebug(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Debug = echo{} })
	verified := credentials.TLSInfo{State: tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{{}}}}}
	presented := credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}}}
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	for _, tt := range []struct {
		addr net.Addr
		auth credentials.AuthInfo
		want codes.Code
	}{
		{tcp("127.0.0.1"), nil, codes.OK},
		{tcp("::1"), nil, codes.OK},
		{tcp("::ffff:127.0.0.1"), nil, codes.OK},
		{tcp("10.1.2.3"), nil, codes.PermissionDenied},
		{tcp("10.1.2.3"), credentials.TLSInfo{}, codes.PermissionDenied},
		{tcp("10.1.2.3"), presented, codes.PermissionDenied},
		{tcp("10.1.2.3"), verified, codes.OK},
		{&net.UnixAddr{Name: "127.0.0.1"}, nil, codes.PermissionDenied},
	} {
		t.Run(fmt.Sprint(tt.addr), func(t *testing.T) {
			err := f.server.mayDebug(peer.NewContext(t.Context(), &peer.Peer{Addr: tt.addr, AuthInfo: tt.auth}))
			if status.Code(err) != tt.want {
				t.Errorf("got %v", err)
			}
		})
	}
	if err := f.server.mayDebug(t.Context()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("without a peer: %v", err)
	}
}

// versions writes deliveries as "name sent/acked", versions as their content.
func deliveries(s *Server, typeURL string) []string {
	var out []string
	list := s.Connections()
	if len(list) != 1 {
		return []string{fmt.Sprint(len(list), " connections")}
	}
	content := func(r Resource) string {
		if r.Any == nil {
			return r.Version
		}
		return text(r.Any.GetValue())
	}
	for _, d := range s.Deliveries(list[0].ID)[typeURL] {
		out = append(out, content(d.Sent)+"/"+content(d.Acked))
	}
	return out
}

func TestDeliveries(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p string) {
		f := newFixture(t)
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"a=1", "b=1"}}))
		c := f.dial(p, gatewayNode("a/b"))
		c.subscribe(typeECDS, "a", "b")
		c.want(typeECDS, reply{names: "a=1"}) // each alone
		check := func(want ...string) {
			t.Helper()
			c.quiet(f) // what was sent before has arrived
			if d := cmp.Diff(want, deliveries(f.server, typeECDS)); d != "" {
				t.Error(d)
			}
		}
		check("a=1/")
		c.ack(typeECDS)
		c.want(typeECDS, reply{names: "b=1"})
		check("a=1/a=1", "b=1/")
		c.ack(typeECDS)
		check("a=1/a=1", "b=1/b=1")
		f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"a=2", "b=1"}}))
		c.want(typeECDS, reply{names: "a=2"})
		c.nack(typeECDS, "bad")
		check("a=2/a=1", "b=1/b=1") // what is in force is still known
		if got := f.server.Connections()[0].Types[typeECDS].Watched; cmp.Diff([]string{"a", "b"}, got) != "" {
			t.Errorf("watched: %v", got)
		}
		for _, id := range []string{"", "nobody", "nobody-1", "-", "-1"} {
			if f.server.Deliveries(id) != nil {
				t.Errorf("deliveries of %q", id)
			}
		}
		if s := f.server.Snapshots(); len(s) != 1 || s[testKey] == nil {
			t.Errorf("snapshots: %v", s)
		}
	})
}

// TestDeliveriesAfterReconnect: an incremental client that comes back says what
// it has, and is sent nothing.
func TestDeliveriesAfterReconnect(t *testing.T) {
	f := newFixture(t)
	s := snap(t, map[string][]string{typeECDS: {"a=1"}})
	f.server.SetSnapshot(testKey, s)
	c := f.dial(protocolDelta, gatewayNode("a/b"))
	c.request(typeECDS, []string{"a"}, nil, "", map[string]string{"a": s.Resources(typeECDS)[0].Version})
	c.quiet(f)
	if d := cmp.Diff([]string{"a=1/a=1"}, deliveries(f.server, typeECDS)); d != "" {
		t.Error(d)
	}
	if state := f.server.Connections()[0].Types[typeECDS]; state.Sent != s.Version(typeECDS) || state.Acked != state.Sent {
		t.Errorf("state %+v", state)
	}
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeECDS: {"a=2"}}))
	c.want(typeECDS, reply{names: "a=2"})
	if d := cmp.Diff([]string{"a=2/a=1"}, deliveries(f.server, typeECDS)); d != "" {
		t.Error(d)
	}
	c.request(typeECDS, nil, []string{"a"}, "", nil)
	c.quiet(f)
	if got := f.server.Connections()[0].Types[typeECDS].Watched; len(got) != 0 {
		t.Errorf("watched: %v", got)
	}
}

// TestDeliveriesAreBounded: whatever a client says, only so much is kept.
func TestDeliveriesAreBounded(t *testing.T) {
	var list []string
	claims := map[string]string{}
	for i := range 2 * maxDelivered {
		list = append(list, fmt.Sprintf("r%03d=1", i))
		claims[fmt.Sprintf("x%03d", i)] = strings.Repeat("v", 10*maxNameBytes)
	}
	f := newFixture(t)
	f.server.SetSnapshot(testKey, snap(t, map[string][]string{typeCDS: list}))
	c := f.dial(protocolDelta, gatewayNode("a/b"))
	c.request(typeCDS, nil, nil, "", nil)
	c.next(typeCDS)
	if got := deliveries(f.server, typeCDS); len(got) != maxDelivered {
		t.Errorf("%d are kept", len(got))
	}
	c.request(typeEDS, []string{"y"}, nil, "", claims)
	c.next(typeEDS)
	if n := len(deliveries(f.server, typeEDS)); n > maxDelivered {
		t.Errorf("%d are kept", n)
	}
}
