// Package orca is how the control plane hears of analysis nodes' load: by one
// stream of ORCA's out-of-band service (xds.service.orca.v3.OpenRcaService) to
// each of a changing set of nodes.
//
// It judges nothing but whether a report can be read and comes in time. It sends
// nodes nothing, so that any number of control planes may watch one.
//
// The commands may import it; it imports mirror/load and localweb.
package orca

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/mirror/load"
)

const (
	maxNodes   = 1000
	minBackoff = 100 * time.Millisecond
	maxBackoff = 5 * time.Second
	// A node tells something every five seconds at least.
	staleAfter = 6 * time.Second
	stallAfter = 12 * time.Second
	interval   = 50 * time.Millisecond
	// Reports beyond are read late: a node sends no more.
	perSecond = 100
	burst     = 200
)

// Config is what New needs.
type Config struct {
	// Credentials reach nodes by TLS; nil: in plain text, those on loopback alone.
	Credentials credentials.TransportCredentials
	// Deliver takes reports, of one goroutine; nil: only Nodes tells them. While it
	// is busy only the newest of each node is kept.
	Deliver    func(Update)
	Logger     *slog.Logger
	Registerer prometheus.Registerer

	stall, backoff time.Duration // other than stallAfter and maxBackoff, in tests
}

// Update is a report that has come.
type Update struct {
	Address string // of the node
	// Report is whole: its demands are all that the node has told. It is shared:
	// nobody may write to it.
	Report   *load.Report
	Received time.Time
}

// States of a node.
const (
	StateConnecting = "connecting" // nothing has come yet
	StateReporting  = "reporting"
	StateStale      = "stale" // what came last is older than six seconds
)

// Node is what is known of a node's reports.
type Node struct {
	Address     string
	State       string
	Fault       string       // why the last stream ended; it stays until a report comes
	ConnectedAt time.Time    // when the stream began that is open; zero: none is
	ReceivedAt  time.Time    // when the last report came; zero: none has
	Report      *load.Report // the last; nil: none has come
	Reports     uint64       // that could be read
	Streams     uint64       // that were begun
	Restarts    uint64       // of the node, seen by its reports' epochs
}

// Watcher watches nodes. Its methods may be called at any time from anywhere.
type Watcher struct {
	config  Config
	log     *slog.Logger
	metrics *metrics

	mu      sync.Mutex
	nodes   map[string]*watch
	leftOut int
	changed chan struct{} // the set of nodes; of one place
	arrived chan struct{} // a report; of one place
}

// New makes a Watcher; it starts nothing.
func New(c Config) (*Watcher, error) {
	if c.Logger == nil {
		return nil, errors.New("make watcher of load reports: a logger is needed")
	}
	c.stall, c.backoff = cmp.Or(c.stall, stallAfter), cmp.Or(c.backoff, maxBackoff)
	w := &Watcher{config: c, log: c.Logger.With("component", "orca"), nodes: map[string]*watch{}, changed: make(chan struct{}, 1), arrived: make(chan struct{}, 1)}
	w.metrics = newMetrics(c.Registerer, w.count)
	return w, nil
}

// SetNodes says which nodes to watch, by host:port: from now on these. Those
// beyond the first thousand are left out.
func (w *Watcher) SetNodes(addresses []string) {
	addresses = slices.Clone(addresses)
	slices.Sort(addresses)
	addresses = slices.Compact(addresses)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leftOut = max(len(addresses)-maxNodes, 0)
	addresses = addresses[:len(addresses)-w.leftOut]
	for address, n := range w.nodes {
		if _, wanted := slices.BinarySearch(addresses, address); !wanted {
			delete(w.nodes, address)
			if n.stop != nil {
				n.stop()
			}
		}
	}
	for _, address := range addresses {
		if w.nodes[address] == nil {
			w.nodes[address] = &watch{watcher: w, state: Node{Address: address}}
		}
	}
	notify(w.changed)
}

// Nodes lists the nodes that are watched, by address, and how many are left out.
func (w *Watcher) Nodes() (nodes []Node, leftOut int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		nodes = append(nodes, n.told(time.Now()))
	}
	slices.SortFunc(nodes, func(a, b Node) int { return strings.Compare(a.Address, b.Address) })
	return nodes, w.leftOut
}

// count gives how many nodes are watched, and how many of them report.
func (w *Watcher) count() (known, reporting int) {
	nodes, _ := w.Nodes()
	for _, n := range nodes {
		if n.State == StateReporting {
			reporting++
		}
	}
	return len(nodes), reporting
}

// Run watches until the context ends; it returns nil then. Call it once.
func (w *Watcher) Run(ctx context.Context) error {
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { w.deliver(ctx) })
	for {
		w.start(ctx, &group)
		select {
		case <-ctx.Done():
			return nil
		case <-w.changed:
		}
	}
}

// start watches the nodes that are not yet.
func (w *Watcher) start(ctx context.Context, group *sync.WaitGroup) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		if n.stop == nil {
			var watched context.Context
			watched, n.stop = context.WithCancel(ctx)
			group.Go(func() { n.run(watched) })
		}
	}
}

// deliver hands on what has arrived until the context ends.
func (w *Watcher) deliver(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.arrived:
		}
		for _, u := range w.fresh() {
			if w.config.Deliver != nil {
				w.config.Deliver(u)
			}
		}
	}
}

// fresh takes the updates that nobody has been given, the oldest first.
func (w *Watcher) fresh() (out []Update) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		if n.fresh {
			n.fresh = false
			out = append(out, Update{n.state.Address, n.state.Report, n.state.ReceivedAt})
		}
	}
	slices.SortFunc(out, func(a, b Update) int {
		return cmp.Or(a.Received.Compare(b.Received), strings.Compare(a.Address, b.Address))
	})
	return out
}

// dialable gives the credentials by which a node is reached.
func (w *Watcher) dialable(address string) (credentials.TransportCredentials, error) {
	host, _, err := net.SplitHostPort(address)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q is not host:port", address)
	case w.config.Credentials != nil:
		return w.config.Credentials, nil
	case !localweb.Loopback(host):
		return nil, fmt.Errorf("%s is not a loopback address, and plain text is only for those", host)
	}
	return insecure.NewCredentials(), nil
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// jitter spreads what would come back all at once.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }
