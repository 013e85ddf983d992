package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"google.golang.org/grpc"
)

// listenLocal opens a TCP listener; what names it in errors.
func listenLocal(ctx context.Context, what, addr string) (net.Listener, error) {
	lc := net.ListenConfig{}
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w", what, err)
	}
	return l, nil
}

// pages makes the HTTP server for pages and APIs.
func pages(h http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      2 * time.Minute, // profiles take their time
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
}

// serveGRPC serves on l until the context ends; what names it in errors.
func serveGRPC(ctx context.Context, what string, l net.Listener, s *grpc.Server) error {
	stop := context.AfterFunc(ctx, s.Stop) // streams do not end by themselves
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", what, err)
	}
	return nil
}

// serve serves on l until the context ends, and then gives requests a second.
func serve(ctx context.Context, l net.Listener, s *http.Server) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			_ = s.Close()
		}
	})
	err := s.Serve(l)
	if !stop() {
		<-stopped
		return nil
	}
	return fmt.Errorf("serve on %s: %w", l.Addr(), err)
}

// closeAll closes what was opened, the last first. What its server has closed is no
// error.
func closeAll(closers []func() error, logger *slog.Logger) {
	for _, f := range slices.Backward(closers) {
		if err := f(); err != nil && !errors.Is(err, net.ErrClosed) {
			logger.Debug("close", "error", err)
		}
	}
}

// beside runs f until what it gives is called, which waits for f's end.
func beside(ctx context.Context, f func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	return func() { cancel(); <-done }
}
