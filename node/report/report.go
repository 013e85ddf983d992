// Package report tells the control plane what this node reads, what it has
// heard from gateways (which build of the plugin each runs, how many exchanges
// it has seen, and how many errors it has had), and what became of exchanges
// here.
//
// It never waits for the control plane, and keeps nothing for it: each report
// stands for the one before.
//
// The commands may import it; it imports xds/node/nodev1 only.
package report

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

const (
	interval   = time.Second
	minBackoff = 100 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// Gateway is what was heard from a gateway by one build of the plugin.
type Gateway struct {
	Gateway string // "namespace/name"
	Plugin  string // "version+digest"
	Seen    uint64 // exchanges
	Errors  uint64 // of the plugin
}

// Config is what New needs.
type Config struct {
	Conn     grpc.ClientConnInterface // to the control plane
	Node     string                   // its name
	Wires    []int                    // versions of the wire contract that it reads
	Gateways func() []Gateway         // in a fixed order; called every second, as is the next
	Counts   func() map[string]uint64 // what became of exchanges, by series of /metrics
	Logger   *slog.Logger
}

// Reporter tells the control plane.
type Reporter struct {
	config Config
	api    nodev1.NodeReportServiceClient
	log    *slog.Logger
}

// New makes a Reporter; it starts nothing.
func New(c Config) (*Reporter, error) {
	if c.Conn == nil || c.Node == "" || c.Gateways == nil || c.Counts == nil || c.Logger == nil {
		return nil, errors.New("make reporter: a connection, the node's name, gateways, counts and a logger are needed")
	}
	return &Reporter{config: c, api: nodev1.NewNodeReportServiceClient(c.Conn), log: c.Logger.With("component", "report")}, nil
}

// Run reports until the context ends, and then returns nil: at the start of
// each stream, and then once a second what has changed.
func (r *Reporter) Run(ctx context.Context) error {
	delay, complaint := minBackoff, ""
	for {
		opened := time.Now()
		err := r.stream(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(opened) > interval { // it was a good one
			delay, complaint = minBackoff, ""
		}
		// That the control plane is away, the policies' stream tells; one that is
		// older than reports is no fault.
		if s := status.Convert(err); s.Code() != codes.Unavailable && s.Code() != codes.Unimplemented && s.Message() != complaint {
			complaint = s.Message()
			r.log.Warn("the control plane takes no reports", "error", err)
		}
		wait := time.NewTimer(delay)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil
		}
		delay = min(2*delay, maxBackoff)
	}
}

// stream reports until the stream ends, and says why it did.
func (r *Reporter) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := r.api.StreamReports(ctx)
	if err != nil {
		return err
	}
	// Only who receives hears of the end before there is something to send.
	ended := make(chan error, 1)
	go func() {
		ended <- cmp.Or(stream.RecvMsg(new(nodev1.NodeReportReply)), io.EOF)
	}()
	return fmt.Errorf("report: %w", r.send(stream, ended))
}

// send sends what has changed until the stream ends, and gives the reason.
func (r *Reporter) send(stream nodev1.NodeReportService_StreamReportsClient, ended <-chan error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var last *nodev1.NodeReport
	for {
		if now := r.report(); !proto.Equal(now, last) {
			if err := stream.Send(now); err != nil && !errors.Is(err, io.EOF) {
				return err // it could not be made
			} else if err != nil {
				return <-ended // tells why
			}
			last = now
		}
		select {
		case err := <-ended:
			return err
		case <-tick.C:
		}
	}
}

func (r *Reporter) report() *nodev1.NodeReport {
	out := &nodev1.NodeReport{Node: r.config.Node, Counts: r.config.Counts()}
	for _, v := range r.config.Wires {
		out.WireVersions = append(out.WireVersions, uint32(v))
	}
	for _, g := range r.config.Gateways() {
		out.Gateways = append(out.Gateways, &nodev1.GatewayReport{Gateway: g.Gateway, Plugin: g.Plugin, Seen: g.Seen, Errors: g.Errors})
	}
	return out
}
