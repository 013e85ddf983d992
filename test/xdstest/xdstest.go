// Package xdstest serves snapshots to a real Envoy in tests.
//
// It is our own xDS server on a port, and nothing else of a control plane. Only
// tests may import it.
package xdstest

import (
	"log/slog"
	"net"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/xds"
)

// Serve starts a server at host:port, with port 0 at a free one, and gives the
// address that it has. It ends with the test, or with stop.
func Serve(t testing.TB, address string) (server *xds.Server, addr string, stop func()) {
	t.Helper()
	server, err := xds.New(xds.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	g := xds.NewGRPCServer()
	server.Register(g)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	stop = func() { g.Stop(); <-done }
	t.Cleanup(stop)
	return server, l.Addr().String(), stop
}
