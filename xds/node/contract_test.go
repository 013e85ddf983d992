package node_test

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/mirror"
	client "github.com/periscope-mesh/periscope/node/policy"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/node"
)

// TestContract sends plans through the real server to the node's real client:
// the two share nothing but the message.
func TestContract(t *testing.T) {
	defer goleak.VerifyNone(t)
	server, err := xds.New(xds.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := xds.NewGRPCServer()
	server.Register(g)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	defer func() { g.Stop(); <-served }()

	c, err := client.New(client.Config{Address: l.Addr().String(), NodeID: node.Identity("one").GetId(),
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}()

	push := func(revision string, paranoia int) {
		s, err := node.Snapshot(mirror.Plan{Revision: revision, Nodes: []mirror.NodePolicy{{ID: "default/a", Tenant: "shop", Mode: policy.ModeMonitor, Paranoia: paranoia}}})
		if err != nil {
			t.Fatal(err)
		}
		server.SetSnapshot(xds.NodeKey, s)
	}
	await := func(what string, ok func() bool) {
		t.Helper()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		deadline := time.After(10 * time.Second)
		for !ok() {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("not within 10s: %s", what)
			}
		}
	}
	push("rev1", 1)
	await("the first revision", func() bool { _, exact := c.Lookup("rev1", "default/a"); return exact })
	push("rev2", 3)
	await("the second revision", func() bool {
		p, exact := c.Lookup("rev2", "default/a")
		return exact && p.Paranoia == 3 && p.Tenant == "shop"
	})
	if p, exact := c.Lookup("rev1", "default/a"); !exact || p.Paranoia != 1 {
		t.Errorf("the first revision was lost: %+v", p)
	}

	state := func() xds.TypeState {
		for _, conn := range server.Connections() {
			return conn.Types[xds.NodePolicyType]
		}
		return xds.TypeState{}
	}
	push("rev3", 9)
	await("the rejection", func() bool { return state().LastError != "" })
	if c.Revision() != "rev2" {
		t.Errorf("revision is %s", c.Revision())
	}
	push("rev4", 4)
	await("the next good one", func() bool { s := state(); return c.Revision() == "rev4" && s.LastError == "" && s.Acked == s.Sent })
}
