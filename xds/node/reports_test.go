package node_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/periscope-mesh/periscope/node/report"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/node"
	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

// serveReports serves reports, and gives a connection to them.
func serveReports(t *testing.T, certified bool) (*node.Reports, *grpc.ClientConn) {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	reports := node.NewReports(node.ReportsConfig{Now: time.Now, Certified: certified})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := xds.NewGRPCServer()
	reports.Register(server)
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-served })
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return reports, conn
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// A node's reporter and the control plane's service speak to each other.
func TestReports(t *testing.T) {
	reports, conn := serveReports(t, false)
	var counts atomic.Pointer[[]report.Gateway]
	counts.Store(&[]report.Gateway{{Gateway: "a/web", Plugin: "1+old", Seen: 1000, Errors: 7}})
	reporter, err := report.New(report.Config{Conn: conn, Node: "one", Wires: []int{1, 2}, Logger: slog.New(slog.DiscardHandler), Gateways: func() []report.Gateway { return *counts.Load() },
		Counts: func() map[string]uint64 { return map[string]uint64{"series": 7} }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- reporter.Run(ctx) }()
	eventually(t, "the node reports", func() bool {
		list := reports.Reporters()
		return len(list) == 1 && list[0].Node == "one" && list[0].Counts["series"] == 7 && cmp.Equal(list[0].Wires, []int{1, 2})
	})
	// What it counted before it came is known, and not new.
	if h := reports.Gateways(); len(h) != 1 || h[0].Seen != 1000 || h[0].Errors != 7 || !h[0].Last.IsZero() {
		t.Errorf("heard at first: %+v", h)
	}
	counts.Store(&[]report.Gateway{{Gateway: "a/web", Plugin: "1+old", Seen: 1010, Errors: 7}, {Gateway: "a/web", Plugin: "2+new", Seen: 5, Errors: 1}})
	eventually(t, "the node reports what is new", func() bool {
		h := reports.Gateways()
		return len(h) == 2 && h[0].Seen == 1010 && h[0].Errors == 7 && !h[0].Last.IsZero() && h[1].Plugin == "2+new" && h[1].Seen == 5 && h[1].Errors == 1 && !h[1].Last.IsZero()
	})
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	eventually(t, "the node is gone", func() bool { return len(reports.Reporters()) == 0 })
	if h := reports.Gateways(); len(h) != 2 {
		t.Errorf("what was heard is forgotten: %+v", h)
	}
}

// A node that has nothing new to say notices that its control plane went, and
// says it all to the next.
func TestReportsAfterARestart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reporter, err := report.New(report.Config{Conn: conn, Node: "one", Logger: slog.New(slog.DiscardHandler), Gateways: func() []report.Gateway { return nil }, Counts: func() map[string]uint64 { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- reporter.Run(ctx) }()
	for range 2 {
		reports, server, served := node.NewReports(node.ReportsConfig{Now: time.Now}), xds.NewGRPCServer(), make(chan struct{})
		reports.Register(server)
		go func() { defer close(served); _ = server.Serve(l) }()
		eventually(t, "the node reports", func() bool { return len(reports.Reporters()) == 1 })
		server.Stop()
		<-served
		if l, err = net.Listen("tcp", address); err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestReportsAreBounded(t *testing.T) {
	_, conn := serveReports(t, false)
	for want, r := range map[string]*nodev1.NodeReport{
		"node: a name":                {},
		"wire_versions: there are 17": {Node: "n", WireVersions: make([]uint32, 17)},
		"gateways: there are 10001":   {Node: "n", Gateways: make([]*nodev1.GatewayReport, 10001)},
		"counts: there are 257":       {Node: "n", Counts: many(257)},
		"counts: a name has":          {Node: "n", Counts: map[string]uint64{strings.Repeat("c", 321): 1}},
		"gateways[0]: a name has":     {Node: "n", Gateways: []*nodev1.GatewayReport{{Gateway: strings.Repeat("g", 321)}}},
	} {
		stream, err := nodev1.NewNodeReportServiceClient(conn).StreamReports(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for i, g := range r.Gateways {
			if g == nil {
				r.Gateways[i] = &nodev1.GatewayReport{}
			}
		}
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.CloseAndRecv(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// Who must show a certificate, and has none, tells nothing.
func TestReportsNeedACertificate(t *testing.T) {
	reports, conn := serveReports(t, true)
	stream, err := nodev1.NewNodeReportServiceClient(conn).StreamReports(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&nodev1.NodeReport{Node: "one"})
	if _, err := stream.CloseAndRecv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("%v", err)
	}
	if list := reports.Reporters(); len(list) != 0 {
		t.Errorf("%+v", list)
	}
}

func many(n int) map[string]uint64 {
	out := map[string]uint64{}
	for i := range n {
		out[fmt.Sprint(i)] = 1
	}
	return out
}
