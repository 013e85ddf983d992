package main

import (
	"context"
	"time"

	"github.com/periscope-mesh/periscope/node/extproc"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/node/report"
	"github.com/periscope-mesh/periscope/node/store"
)

const gatewaysInterval = 5 * time.Second

// gatewayReports is what this node tells the control plane of gateways.
func (n *node) gatewayReports() []report.Gateway {
	var out []report.Gateway
	for _, g := range n.heard() {
		out = append(out, report.Gateway{Gateway: g.Gateway, Plugin: g.Plugin, Seen: g.Seen, Errors: g.Errors})
	}
	return out
}

// heard is what gateways told of themselves, by the plugin and by ext_proc.
func (n *node) heard() []ingest.GatewayCount {
	out := n.handler.Gateways()
	for _, g := range n.streams.Gateways() {
		out = append(out, ingest.GatewayCount{Gateway: g.Gateway, Plugin: extproc.Plugin, Seen: g.Seen, Errors: g.Errors, Last: g.Last})
	}
	return out
}

// storeGateways adds what is new of gateways to the store until the context
// ends. What could not be written is written the next time.
func (n *node) storeGateways(ctx context.Context) error {
	type build struct{ gateway, plugin string }
	type counts struct{ seen, errors uint64 }
	written := map[build]counts{}
	tick := time.NewTicker(gatewaysInterval)
	defer tick.Stop()
	for failing := false; ; {
		var list []store.Gateway
		next := map[build]counts{}
		for _, g := range n.heard() {
			key, now := build{g.Gateway, g.Plugin}, counts{g.Seen, g.Errors}
			next[key] = now
			if before, known := written[key]; !known || before != now {
				list = append(list, store.Gateway{Gateway: g.Gateway, Plugin: g.Plugin, Last: g.Last, Seen: int64(now.seen - before.seen), Errors: int64(now.errors - before.errors)})
			}
		}
		var err error
		if len(list) > 0 {
			err = n.store.AddGateways(ctx, list)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			written = next
		case !failing:
			n.cfg.logger.Error("gateways not stored", "error", err)
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
