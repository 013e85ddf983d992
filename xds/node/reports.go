package node

import (
	"cmp"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

// Bounds of what nodes may tell. A node beyond them is told so and comes back
// later; a gateway beyond them is left out.
const (
	maxReporters = 1000
	maxHeard     = 20000 // builds, each at each gateway, in all
	maxReported  = 10000 // of one node
	maxWires     = 16
	maxCounts    = 256
	maxTextBytes = 320
	// heardFor is how long a build, or a node, that nobody speaks of any more is
	// known; what is too old is looked for no more often than evictEvery.
	heardFor   = time.Hour
	evictEvery = time.Minute
	// A node reports once a second at most; reports that come faster are read
	// late.
	reportsPerSecond = 2
	reportBurst      = 10
)

// Reports takes what nodes tell of themselves and of gateways. What it gives
// may be asked for at any time from anywhere.
type Reports struct {
	nodev1.UnimplementedNodeReportServiceServer

	config ReportsConfig

	mu        sync.Mutex
	serial    uint64
	reporters map[uint64]*reporter
	heard     map[heardKey]*Heard
	told      map[string]*told // by node
	evicted   time.Time        // when what is too old was looked for last
}

// told is what a node's counters were when it reported last: it may have come
// back to say more.
type told struct {
	counts map[heardKey]count
	at     time.Time
}

type heardKey struct{ gateway, plugin string }

// reporter is a node that is connected.
type reporter struct{ state Reporter }

type count struct{ seen, errors uint64 }

// Reporter is a node that reports.
type Reporter struct {
	Node        string    `json:"node"`
	Address     string    `json:"address"`
	ConnectedAt time.Time `json:"connectedAt"`
	ReportedAt  time.Time `json:"reportedAt"`
	Wires       []int     `json:"wireVersions"` // that it reads
	// Counts say what became of exchanges, by series of its /metrics.
	Counts map[string]uint64 `json:"-"`
}

// Heard is what nodes heard from a gateway by one build of the plugin since
// their start. A gateway's batches go to all of its nodes, and each tells all
// that the gateway has counted: with several nodes Seen and Errors are so many
// times too large, and their ratio is right.
type Heard struct {
	Gateway string    `json:"gateway"`
	Plugin  string    `json:"plugin"`
	Seen    uint64    `json:"seen"`          // exchanges
	Errors  uint64    `json:"errors"`        // of the plugin
	Last    time.Time `json:"last,omitzero"` // when this control plane heard that they had grown
}

// ReportsConfig is what NewReports needs.
type ReportsConfig struct {
	Now func() time.Time
	// Certified refuses nodes that show no certificate which the server has
	// verified, as xds.Config's does.
	Certified bool
}

// NewReports makes a Reports.
func NewReports(c ReportsConfig) *Reports {
	return &Reports{config: c, reporters: map[uint64]*reporter{}, heard: map[heardKey]*Heard{}, told: map[string]*told{}}
}

// Register adds the service to a gRPC server.
func (r *Reports) Register(s grpc.ServiceRegistrar) { nodev1.RegisterNodeReportServiceServer(s, r) }

// StreamReports takes one node's reports until it goes.
func (r *Reports) StreamReports(stream grpc.ClientStreamingServer[nodev1.NodeReport, nodev1.NodeReportReply]) error {
	if r.config.Certified && !xds.Certified(stream.Context()) {
		return xds.ErrNoCertificate
	}
	n := &reporter{state: Reporter{ConnectedAt: r.config.Now()}}
	if p, ok := peer.FromContext(stream.Context()); ok {
		n.state.Address = p.Addr.String()
	}
	serial, ok := r.open(n)
	if !ok {
		return status.Errorf(codes.ResourceExhausted, "%d nodes report already", maxReporters)
	}
	defer r.close(serial)
	pace := rate.NewLimiter(reportsPerSecond, reportBurst)
	for {
		if err := pace.Wait(stream.Context()); err != nil {
			return err
		}
		report, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&nodev1.NodeReportReply{})
		}
		if err != nil {
			return err
		}
		if err := check(report); err != nil {
			return err
		}
		r.take(n, report)
	}
}

func (r *Reports) open(n *reporter) (uint64, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.reporters) >= maxReporters {
		return 0, false
	}
	r.serial++
	r.reporters[r.serial] = n
	return r.serial, true
}

func (r *Reports) close(serial uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.reporters, serial)
}

func check(report *nodev1.NodeReport) error {
	switch {
	case report.GetNode() == "" || len(report.GetNode()) > maxTextBytes:
		return status.Errorf(codes.InvalidArgument, "node: a name of 1 to %d bytes is needed", maxTextBytes)
	case len(report.GetWireVersions()) > maxWires:
		return status.Errorf(codes.InvalidArgument, "wire_versions: there are %d, more than %d", len(report.GetWireVersions()), maxWires)
	case len(report.GetGateways()) > maxReported:
		return status.Errorf(codes.InvalidArgument, "gateways: there are %d, more than %d", len(report.GetGateways()), maxReported)
	}
	if n := len(report.GetCounts()); n > maxCounts {
		return status.Errorf(codes.InvalidArgument, "counts: there are %d, more than %d", n, maxCounts)
	}
	for name := range report.GetCounts() {
		if len(name) > maxTextBytes {
			return status.Errorf(codes.InvalidArgument, "counts: a name has more than %d bytes", maxTextBytes)
		}
	}
	for i, g := range report.GetGateways() {
		if len(g.GetGateway()) > maxTextBytes || len(g.GetPlugin()) > maxTextBytes {
			return status.Errorf(codes.InvalidArgument, "gateways[%d]: a name has more than %d bytes", i, maxTextBytes)
		}
	}
	return nil
}

// take counts by how much the node's counters have grown. What it says first
// may be old: it counts, but is no news.
func (r *Reports) take(n *reporter, report *nodev1.NodeReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.config.Now()
	n.state.Node, n.state.ReportedAt = report.GetNode(), now
	n.state.Wires, n.state.Counts = nil, report.GetCounts()
	for _, v := range report.GetWireVersions() {
		n.state.Wires = append(n.state.Wires, int(v))
	}
	r.evict(now)
	last := r.told[report.GetNode()]
	if last == nil && len(r.told) >= maxReporters {
		return
	}
	counts := make(map[heardKey]count, len(report.GetGateways()))
	for _, g := range report.GetGateways() {
		key, is := heardKey{g.GetGateway(), g.GetPlugin()}, count{g.GetSeen(), g.GetErrors()}
		counts[key] = is
		h := r.heard[key]
		if h == nil {
			if len(r.heard) >= maxHeard {
				continue
			}
			h = &Heard{Gateway: key.gateway, Plugin: key.plugin}
			r.heard[key] = h
		}
		var before count
		if last != nil {
			before = last.counts[key]
		}
		if is.seen < before.seen { // the node has started anew
			before = count{}
		}
		h.Seen += grown(before.seen, is.seen)
		h.Errors += grown(before.errors, is.errors)
		if last != nil && is != before {
			h.Last = now
		}
	}
	r.told[report.GetNode()] = &told{counts, now}
}

// evict forgets what nobody speaks of any more.
func (r *Reports) evict(now time.Time) {
	if now.Sub(r.evicted) < evictEvery {
		return
	}
	r.evicted = now
	spoken := map[heardKey]bool{}
	for node, t := range r.told {
		if now.Sub(t.at) > heardFor {
			delete(r.told, node)
			continue
		}
		for key := range t.counts {
			spoken[key] = true
		}
	}
	maps.DeleteFunc(r.heard, func(key heardKey, h *Heard) bool { return !spoken[key] && now.Sub(h.Last) > heardFor })
}

func grown(before, now uint64) uint64 {
	if now < before {
		return 0
	}
	return now - before
}

// Reporters lists the nodes that report, by name.
func (r *Reports) Reporters() []Reporter {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := []Reporter{}
	for _, n := range r.reporters {
		if n.state.Node != "" {
			out = append(out, n.state)
		}
	}
	slices.SortFunc(out, func(a, b Reporter) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), a.ConnectedAt.Compare(b.ConnectedAt))
	})
	return out
}

// Gateways lists what was heard, by gateway and build.
func (r *Reports) Gateways() []Heard {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Heard, 0, len(r.heard))
	for _, h := range r.heard {
		out = append(out, *h)
	}
	slices.SortFunc(out, func(a, b Heard) int {
		return cmp.Or(strings.Compare(a.Gateway, b.Gateway), strings.Compare(a.Plugin, b.Plugin))
	})
	return out
}
