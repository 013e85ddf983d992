package main

import (
	"context"
	"log/slog"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/node/console"
	"github.com/periscope-mesh/periscope/node/store"
)

func newConsole(o *options) *cobra.Command {
	var addr, dataDir, control string
	cmd := &cobra.Command{
		Use:   "console",
		Short: "Serve the pages Attacks, Gateways and Load, and the API",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := o.logger()
			if err != nil {
				return err
			}
			source, err := newControlLoad(control)
			if err != nil {
				return err
			}
			reader, err := store.OpenReader(cmd.Context(), storePath(dataDir))
			if err != nil {
				return err
			}
			defer reader.Close()
			c, err := openConsole(cmd.Context(), consoleConfig{addr: addr, store: reader, load: source, logger: logger, registry: newRegistry()})
			if err != nil {
				return err
			}
			return c.run(cmd.Context())
		},
	}
	cmd.Flags().StringVar(&addr, "console", consoleAddr, "loopback address of the pages and the API")
	cmd.Flags().StringVar(&control, "control-debug", "127.0.0.1:15080", "loopback address of the control plane's /debug, which the Load page is made of; empty: none")
	cmd.Flags().StringVar(&dataDir, "data", o.stateDir(), "directory of the node's store")
	return cmd
}

const consoleAddr = "127.0.0.1:8090"

type consoleConfig struct {
	addr       string
	store      console.Store
	load       console.LoadSource // nil: none
	logger     *slog.Logger
	registry   prometheus.Registerer
	tryCommand string
}

// consoleServer is the API and the pages:
//
//	browser, API client ─► listener ─► console ─┬─► store
//	                                            └─► control plane, of load
type consoleServer struct {
	cfg      consoleConfig
	listener net.Listener
	run      func(context.Context) error
}

func openConsole(ctx context.Context, cfg consoleConfig) (*consoleServer, error) {
	if err := localweb.RequireLoopback("--console", cfg.addr); err != nil {
		return nil, err
	}
	h, err := console.New(console.Config{Store: cfg.store, Load: cfg.load, Logger: cfg.logger, Registerer: cfg.registry, Version: version, TryCommand: cfg.tryCommand})
	if err != nil {
		return nil, err
	}
	l, err := listenLocal(ctx, "the console", cfg.addr)
	if err != nil {
		return nil, err
	}
	c := &consoleServer{cfg: cfg, listener: l}
	c.run = func(ctx context.Context) error {
		cfg.logger.Info("console started", "url", "http://"+l.Addr().String()+"/attacks")
		return serve(ctx, l, pages(h, cfg.logger))
	}
	return c, nil
}
