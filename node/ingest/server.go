package ingest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/netutil"
)

// maxConnections bounds the gateways' connections: a gateway's worker has one
// HTTP/2 connection to a node, a few at most.
const maxConnections = 1024

// Listen opens the listener for mirrored traffic. Unless insecure, only
// loopback addresses are taken: nothing authenticates the other end yet. Who
// needs the sockets themselves gets them by wrap: what is returned hides them.
func Listen(ctx context.Context, addr string, insecure bool, wrap ...func(net.Listener) net.Listener) (net.Listener, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("listen for mirrored traffic: %q is not host:port: %w", addr, err)
	}
	if ip := net.ParseIP(host); !insecure && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return nil, fmt.Errorf("listen for mirrored traffic: %s is not a loopback address; use --insecure-listen %s to accept traffic from anybody who can reach it", addr, addr)
	}
	// Multipath TCP, Go's default for listeners, hides sockets from the
	// counters that watch for overload.
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for mirrored traffic: %w", err)
	}
	for _, w := range wrap {
		l = w(l)
	}
	return netutil.LimitListener(l, maxConnections), nil
}

// Server makes the HTTP server for a Handler: HTTP/1.1 and HTTP/2 in plain text
// (h2c, which the gateways speak), with bounds on time and headers.
func Server(h http.Handler, logger *slog.Logger) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           h,
		Protocols:         protocols,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 250},
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}
