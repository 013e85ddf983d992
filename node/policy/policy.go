// Package policy is the node's view of the policies: it takes them from the
// control plane by ADS, keeps the last few revisions, and tells by a policy's
// id what tenant and application an exchange belongs to and how to inspect it.
//
// It never decides anything itself, never asks the control plane while an
// exchange waits, and never loses what it has: while the control plane is away,
// or sends something unfit, the last good revisions stay in force. It knows
// nothing of the control plane's own types: the message of package
// xds/node/nodev1 is all that the two share.
//
// Packages of the node and the commands may import it; it imports
// xds/node/nodev1 only.
package policy

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// keptRevisions are kept, the newest first; older ones are forgotten. Events
// come at most seconds after the policy they were made under was replaced.
const keptRevisions = 8

// Modes of a policy.
const (
	ModeOff     = "Off"
	ModeMonitor = "Monitor"
	ModeEnforce = "Enforce"
)

// Policy is what a node needs of one policy. Its slices are shared: don't
// change them.
type Policy struct {
	ID          string
	Revision    string // its own
	Tenant      string
	Application string
	Mode        string
	Paranoia    int
	Exclusions  []Exclusion
}

// Exclusion silences one rule, for one target or for all.
type Exclusion struct {
	RuleID int
	Target string // empty: every target
}

// Config is what New needs.
type Config struct {
	Address    string // "host:port" of the control plane
	NodeID     string // "node~name"
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// StateFile keeps the last set, so that a node which starts while the
	// control plane is away has one; empty: none is kept.
	StateFile string
	// Credentials verify the control plane; default: plain text.
	Credentials credentials.TransportCredentials
}

// Client keeps the policies. Lookup and Ready may be called at any time from
// anywhere.
type Client struct {
	address     string
	nodeID      string
	stateFile   string
	credentials credentials.TransportCredentials
	logger      *slog.Logger
	metrics     *metrics
	current     atomic.Pointer[history]
	fault       atomic.Pointer[string] // why the last stream ended
}

// revision is the policies of one plan, by id; never changed once made.
type revision struct {
	name     string
	policies map[string]Policy
	gateways map[string]Settings // by gateway id
}

// Settings are those of a gateway that leaves it to nodes to select, cut and
// mask, as the control plane encodes them. They are shared: don't change them.
type Settings struct {
	Revision string
	Encoded  []byte
}

// history is the revisions, the newest first; never changed once made.
type history struct {
	revisions []*revision
}

// New makes a Client and reads its state file; it starts nothing. An unfit
// state file is logged and ignored: the control plane sends the policies anew.
func New(c Config) (*Client, error) {
	var faults []error
	if c.Address == "" {
		faults = append(faults, errors.New("the control plane's address is empty"))
	}
	if c.NodeID == "" {
		faults = append(faults, errors.New("the node id is empty"))
	}
	if c.Logger == nil || c.Registerer == nil {
		faults = append(faults, errors.New("a logger and a registerer are needed"))
	}
	if err := errors.Join(faults...); err != nil {
		return nil, fmt.Errorf("make policy client: %w", err)
	}
	m, err := newMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("make policy client: %w", err)
	}
	if c.Credentials == nil {
		c.Credentials = insecure.NewCredentials()
	}
	client := &Client{
		address: c.Address, nodeID: c.NodeID, stateFile: c.StateFile, credentials: c.Credentials,
		logger: c.Logger.With("component", "node_policy"), metrics: m,
	}
	client.current.Store(&history{})
	if c.StateFile != "" {
		switch r, err := loadState(c.StateFile); {
		case err != nil:
			client.logger.Warn("policy state file ignored", "file", c.StateFile, "error", err)
		case r != nil:
			client.adopt(r)
		}
	}
	return client, nil
}

// Ready tells that some revision is known, from the control plane or from the
// state file.
func (c *Client) Ready() bool { return len(c.current.Load().revisions) > 0 }

// Fault is why the last stream to the control plane ended, or could not be
// opened; empty: none has.
func (c *Client) Fault() string {
	if f := c.fault.Load(); f != nil {
		return *f
	}
	return ""
}

// Revision is the newest revision known; empty: none.
func (c *Client) Revision() string {
	if h := c.current.Load(); len(h.revisions) > 0 {
		return h.revisions[0].name
	}
	return ""
}

// Mirrors tells whether any policy of the newest revision wants exchanges; as
// long as none is known, they count as wanted.
func (c *Client) Mirrors() bool {
	h := c.current.Load()
	if len(h.revisions) == 0 {
		return true
	}
	for _, p := range h.revisions[0].policies {
		if p.Mode != ModeOff {
			return true
		}
	}
	return false
}

// Lookup gives the policy that an event was made under, by the policy's own
// revision. exact tells that it is that very one. Else it is the newest known revision's that has the
// policy; and if none has, a default: nothing of it is inspected less than by a
// policy without wishes. Both are counted.
func (c *Client) Lookup(policyRev, policyID string) (p Policy, exact bool) {
	h := c.current.Load()
	for _, r := range h.revisions {
		if p, ok := r.policies[policyID]; ok && p.Revision == policyRev {
			c.metrics.exact.Inc()
			return p, true
		}
	}
	for _, r := range h.revisions {
		if p, ok := r.policies[policyID]; ok {
			c.metrics.nearest.Inc()
			return p, false
		}
	}
	if len(h.revisions) == 0 {
		c.metrics.noPolicies.Inc()
	} else {
		c.metrics.unknown.Inc()
	}
	return Policy{ID: policyID, Mode: ModeMonitor, Paranoia: 1}, false
}

// Settings gives those of a gateway by their revision or, where that is not
// known, the newest; false: none are known.
func (c *Client) Settings(gateway, revision string) (Settings, bool) {
	h := c.current.Load()
	var newest Settings
	for _, r := range h.revisions {
		s, ok := r.gateways[gateway]
		if ok && s.Revision == revision {
			return s, true
		}
		if newest.Encoded == nil {
			newest = s
		}
	}
	return newest, newest.Encoded != nil
}

// adopt puts a revision first; one that comes back, as after a rollback, moves.
// Only New and Run call it, never at the same time.
func (c *Client) adopt(r *revision) {
	old := c.current.Load()
	next := &history{revisions: append(make([]*revision, 0, keptRevisions), r)}
	for _, o := range old.revisions {
		if o.name != r.name && len(next.revisions) < keptRevisions {
			next.revisions = append(next.revisions, o)
		}
	}
	c.current.Store(next)
	c.metrics.policies.Set(float64(len(r.policies)))
}
