package orca

import (
	"context"
	"errors"
	"fmt"
	"time"

	service "github.com/cncf/xds/go/xds/service/orca/v3"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/periscope-mesh/periscope/mirror/load"
)

var errStalled = errors.New("no report came in time")

// garbageError is of a report that can't be used.
type garbageError struct{ err error }

func (e *garbageError) Error() string { return "read report: " + e.err.Error() }
func (e *garbageError) Unwrap() error { return e.err }

// watch is one node's. What changes is under the watcher's mu.
type watch struct {
	watcher *Watcher
	state   Node
	stop    context.CancelFunc // nil: run has not been called
	fresh   bool               // the report has not been delivered
}

// told is the state at a time. Under mu.
func (n *watch) told(now time.Time) Node {
	out := n.state
	switch {
	case out.Report == nil:
		out.State = StateConnecting
	case now.Sub(out.ReceivedAt) > staleAfter:
		out.State = StateStale
	default:
		out.State = StateReporting
	}
	return out
}

// run watches the node until the context ends, or it is watched no more.
func (n *watch) run(ctx context.Context) {
	delay, complaint := minBackoff, ""
	for {
		opened := time.Now()
		err := n.stream(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(opened) > maxBackoff { // it was a good one
			delay = minBackoff
		}
		n.fail(err)
		// That a node is away is shown, and no news for the log.
		if text := err.Error(); status.Code(err) != codes.Unavailable && text != complaint {
			complaint = text
			n.watcher.log.Warn("a node's load reports don't come", "node", n.state.Address, "error", err)
		}
		wait := time.NewTimer(jitter(delay))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return
		}
		delay = min(2*delay, n.watcher.config.backoff)
	}
}

// stream takes reports by one stream, of a connection of its own: what has
// stalled is not come back to.
func (n *watch) stream(ctx context.Context) error {
	c, err := n.watcher.dialable(n.state.Address)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+n.state.Address,
		grpc.WithTransportCredentials(c),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(load.MaxBytes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(n.watcher.config.stall, func() { cancel(errStalled) })
	defer watchdog.Stop()
	err = n.receive(ctx, conn, watchdog)
	if errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%w: %v", errStalled, n.watcher.config.stall)
	}
	return err
}

func (n *watch) receive(ctx context.Context, conn *grpc.ClientConn, watchdog *time.Timer) error {
	stream, err := service.NewOpenRcaServiceClient(conn).StreamCoreMetrics(ctx, &service.OrcaLoadReportRequest{ReportInterval: durationpb.New(interval)})
	if err != nil {
		return err
	}
	n.begin()
	pace := rate.NewLimiter(perSecond, burst)
	var last *load.Report
	for {
		if err := pace.Wait(ctx); err != nil {
			return err
		}
		o, err := stream.Recv()
		if err != nil {
			return err
		}
		watchdog.Reset(n.watcher.config.stall)
		r, err := load.Decode(o)
		if err == nil {
			r, err = whole(last, r)
		}
		if err != nil {
			n.watcher.metrics.reports.WithLabelValues("refused").Inc()
			return &garbageError{err}
		}
		last = r
		n.take(r)
	}
}

// whole puts what a partial report leaves out into it.
func whole(last, r *load.Report) (*load.Report, error) {
	if !r.Partial {
		return r, nil
	}
	if last == nil || last.Epoch != r.Epoch || last.Node != r.Node {
		return nil, errors.New("a partial report without a full one of the same node before it")
	}
	r.Demands, r.Partial = load.Merge(last.Demands, r.Demands), false // those that are gone stay until the next full one
	return r, nil
}

func (n *watch) begin() {
	n.watcher.mu.Lock()
	defer n.watcher.mu.Unlock()
	n.state.Streams++
	n.state.ConnectedAt = time.Now()
}

func (n *watch) take(r *load.Report) {
	n.watcher.metrics.reports.WithLabelValues("taken").Inc()
	n.watcher.mu.Lock()
	defer n.watcher.mu.Unlock()
	if last := n.state.Report; last != nil && last.Epoch != r.Epoch {
		n.state.Restarts++
	}
	n.state.Report, n.state.ReceivedAt, n.state.Fault, n.fresh = r, time.Now(), "", true
	n.state.Reports++
	notify(n.watcher.arrived)
}

func (n *watch) fail(err error) {
	reason, garbage := endLost, new(garbageError)
	switch {
	case errors.Is(err, errStalled):
		reason = endStalled
	case errors.As(err, &garbage):
		reason = endGarbage
	}
	n.watcher.metrics.ended.WithLabelValues(reason).Inc()
	n.watcher.mu.Lock()
	defer n.watcher.mu.Unlock()
	n.state.Fault, n.state.ConnectedAt = err.Error(), time.Time{}
}
