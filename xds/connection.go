package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"golang.org/x/time/rate"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

const (
	maxNames        = 1000 // subscribed a type
	maxNameBytes    = 512
	maxTypeURLBytes = 256
	maxNodeBytes    = 256 // of a node id or cluster, as shown

	// maxTypes on a stream. istiod asks for 16. The delta handler's channel for
	// responses of all types holds 20, and at most one a type, and one that an
	// update made just before its watch was replaced, can be in it: so a send
	// never has to wait.
	maxTypes = 18
)

// Connection is an open stream, as /debug shows it.
type Connection struct {
	ID          string               `json:"connectionId"`
	Node        string               `json:"node"`
	Cluster     string               `json:"cluster,omitempty"`
	Version     string               `json:"version,omitempty"` // the client's own, if it says
	Address     string               `json:"address"`
	Protocol    string               `json:"protocol"` // sotw or delta
	Key         string               `json:"key,omitempty"`
	Held        string               `json:"held,omitempty"` // why the client gets no answer
	ConnectedAt time.Time            `json:"connectedAt"`
	Types       map[string]TypeState `json:"types"`
}

// connection is one stream. It is the cache and the callbacks of the stream's
// own handler. All fields but the first three groups are under the server's
// mutex.
type connection struct {
	server      *Server
	protocol    string
	address     string
	serial      uint64
	connectedAt time.Time
	certified   bool // it showed a certificate that was verified

	node *core.Node // identity by the first message; of the stream's goroutine only

	// Of the goroutine that reads the stream only.
	requests *rate.Limiter
	flooded  bool // logged

	id, cluster, version string
	key                  string
	held                 string
	types                map[string]*tracker
	rewarmed             map[string]struct{} // clusters whose endpoints are due again
	debug                bool                // istioctl's, which is nobody's client
}

// watch is a subscription that waits for a change.
type watch struct {
	owner   *connection
	typeURL string
	seen    string // the type's version that was last looked at in vain
	answer  func(*typeSet) bool
}

// try answers if the snapshot has something new; true means that the watch is
// spent: the stream's handler makes the next one with the client's reply.
func (w *watch) try(s *Snapshot) bool {
	set := s.set(w.typeURL)
	if set.version == w.seen {
		return false
	}
	w.seen = set.version
	return w.answer(set)
}

// identify fixes the client's identity by its first message: a client sends it
// only then, and a later one could only be a pretence. Its error ends the
// stream.
func (c *connection) identify(n *core.Node) (*core.Node, error) {
	if c.node != nil {
		return c.node, nil
	}
	if n == nil {
		n = &core.Node{}
	}
	// Envoy lists hundreds of extensions, which would stay as long as the stream.
	n.Extensions, n.ClientFeatures = nil, nil
	c.node = n
	key, err := c.server.sel(n)
	switch {
	case err == nil && (key == "" || len(key) > maxKeyBytes):
		err = fmt.Errorf("no snapshot key of 1 to %d bytes follows from the node", maxKeyBytes)
	case err == nil && !c.certified && c.server.certified(key):
		err = ErrNoCertificate
	}
	c.server.identified(c, key, err)
	if errors.Is(err, ErrNoCertificate) {
		return n, err
	}
	return n, nil
}

// identified notes who the client is, or why it gets no answer.
func (s *Server) identified(c *connection, key string, err error) {
	s.mu.Lock()
	c.id = clip(c.node.GetId(), maxNodeBytes)
	c.cluster = clip(c.node.GetCluster(), maxNodeBytes)
	c.version = clientVersion(c.node)
	if err == nil {
		c.key = key
		s.mu.Unlock()
		return
	}
	message, reason := "xds client held without answer", refusedIdentity
	if errors.Is(err, ErrNoCertificate) {
		message, reason = "xds client refused", refusedCertificate
	}
	c.held = clip(err.Error(), maxErrorBytes)
	s.metrics.refused.WithLabelValues(reason).Inc()
	_, known := s.logged[c.id]
	log := !known && len(s.logged) < maxLoggedClients
	if log {
		s.logged[c.id] = struct{}{}
	}
	id, held := c.id, c.held
	s.mu.Unlock()
	if log {
		s.logger.Warn(message, "node", id, "address", c.address, "reason", held)
	}
}

func clientVersion(n *core.Node) string {
	if v := n.GetUserAgentBuildVersion().GetVersion(); v != nil {
		return fmt.Sprintf("%d.%d.%d", v.GetMajorNumber(), v.GetMinorNumber(), v.GetPatch())
	}
	return clip(n.GetUserAgentVersion(), 64)
}

// request checks and accounts for any request, of either protocol.
func (c *connection) request(typeURL, nonce string, fault *rpcstatus.Status, names ...[]string) error {
	for _, list := range names {
		if err := c.checkNames(list); err != nil {
			return err
		}
	}
	now := time.Now()
	s := c.server
	s.mu.Lock()
	t := c.types[typeURL]
	if t == nil {
		if len(typeURL) > maxTypeURLBytes || len(c.types) >= maxTypes {
			s.mu.Unlock()
			return s.refuse(refusedTypes, "at most %d types a stream, with URLs of at most %d bytes", maxTypes, maxTypeURLBytes)
		}
		t = &tracker{}
		c.types[typeURL] = t
	}
	p, ok := t.replied(nonce, fault, now)
	log := ok && fault != nil && t.logged != p.version
	if log {
		t.logged = p.version
	}
	id, reason := c.id, t.state.LastError
	s.mu.Unlock()
	switch {
	case !ok:
	case fault == nil:
		s.metrics.acked(typeURL, now.Sub(p.at))
	default:
		s.metrics.nacks.WithLabelValues(shortName(typeURL)).Inc()
		if log {
			s.logger.Warn("xds resources rejected", "node", id, "address", c.address, "type", typeURL,
				"version", p.version, "resources", slices.Sorted(maps.Keys(p.resources)), "reason", reason)
		}
	}
	return nil
}

// rewarm makes the endpoints of clusters due again, right behind the clusters.
// Envoy warms a cluster that changed until its endpoints come, or 15 s have
// passed; it doesn't ask for them if it has some already, and replies to the
// clusters only when they are warm. Under the server's mutex, and in the
// stream's goroutine: what is put into its channel now goes out next.
func (c *connection) rewarm(clusters push) {
	if c.rewarmed == nil {
		c.rewarmed = map[string]struct{}{}
	}
	for name := range clusters.resources {
		c.rewarmed[name] = struct{}{}
	}
	k := c.server.keys[c.key]
	if k == nil || k.snapshot == nil {
		return
	}
	for w := range k.watches {
		if w.owner == c && w.typeURL == resource.EndpointType {
			w.seen = ""
			if w.try(k.snapshot) {
				delete(k.watches, w)
			}
		}
	}
}

// forgetful is a subscription to endpoints that doesn't know those of clusters
// which are warming.
type forgetful struct {
	cache.Subscription
	known map[string]string
}

func (f forgetful) ReturnedResources() map[string]string { return f.known }

// view is sub as it is to be answered. Under the server's mutex.
func (c *connection) view(typeURL string, sub cache.Subscription) cache.Subscription {
	if typeURL != resource.EndpointType || len(c.rewarmed) == 0 {
		return sub
	}
	known := maps.Clone(sub.ReturnedResources())
	for name := range c.rewarmed {
		if known[name] != absent {
			delete(known, name)
		}
	}
	return forgetful{sub, known}
}

// queued notes that a response goes into the stream's channel. Under the
// server's mutex.
func (c *connection) queued(typeURL string, set *typeSet, d difference) {
	t := c.types[typeURL]
	t.building = newPush(set.version, d)
	t.building.known = t.known(set, d)
	if typeURL == resource.EndpointType {
		c.rewarmed = nil
	}
}

func (c *connection) checkNames(names []string) error {
	if len(names) > maxNames {
		return c.server.refuse(refusedNames, "at most %d resource names a type", maxNames)
	}
	for _, name := range names {
		if len(name) > maxNameBytes {
			return c.server.refuse(refusedNames, "a resource name is longer than %d bytes", maxNameBytes)
		}
	}
	return nil
}

// open adds a watch, unless it can be answered at once.
func (c *connection) open(w *watch) (cancel func()) {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.key == "" {
		return nil
	}
	k := s.key(c.key)
	if k.snapshot != nil && w.try(k.snapshot) {
		return nil
	}
	k.watches[w] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(k.watches, w)
		s.release(c.key, k)
	}
}

// CreateWatch is called by the state-of-the-world handler with each request.
// The channel has room for one response and is this watch's own.
func (c *connection) CreateWatch(req *cache.Request, sub cache.Subscription, out chan cache.Response) (func(), error) {
	typeURL := req.GetTypeUrl()
	return c.open(&watch{owner: c, typeURL: typeURL, answer: func(set *typeSet) bool {
		c.types[typeURL].forget(set)
		d := sotwDifference(typeURL, set, c.view(typeURL, sub))
		if !d.due {
			c.types[typeURL].upToDate(set)
			return false
		}
		resp := &discovery.DiscoveryResponse{VersionInfo: set.version, TypeUrl: typeURL}
		for _, r := range d.changed {
			resp.Resources = append(resp.Resources, r.Any)
		}
		select {
		case out <- &cache.PassthroughResponse{Request: req, DiscoveryResponse: resp, ReturnedResources: d.known}:
			c.queued(typeURL, set, d)
			return true
		default: // not possible: the channel has room
			return false
		}
	}}), nil
}

// CreateDeltaWatch is called by the delta handler with each request. The
// channel is shared by the stream's types: see maxTypes.
func (c *connection) CreateDeltaWatch(req *cache.DeltaRequest, sub cache.Subscription, out chan cache.DeltaResponse) (func(), error) {
	typeURL := req.GetTypeUrl()
	if len(sub.SubscribedResources()) > maxNames {
		return nil, c.server.refuse(refusedNames, "at most %d resource names a type", maxNames)
	}
	return c.open(&watch{owner: c, typeURL: typeURL, answer: func(set *typeSet) bool {
		c.types[typeURL].forget(set)
		d := deltaDifference(typeURL, set, c.view(typeURL, sub))
		if !d.due {
			c.types[typeURL].upToDate(set)
			return false
		}
		resp := &discovery.DeltaDiscoveryResponse{SystemVersionInfo: set.version, TypeUrl: typeURL, RemovedResources: d.removed}
		for _, r := range d.changed {
			resp.Resources = append(resp.Resources, &discovery.Resource{Name: r.Name, Version: r.Version, Resource: r.Any})
		}
		select {
		case out <- &cache.DeltaPassthroughResponse{DeltaRequest: req, DeltaDiscoveryResponse: resp, NextVersionMap: d.known}:
			c.queued(typeURL, set, d)
			return true
		default: // not possible: the channel has room
			return false
		}
	}}), nil
}

func newPush(version string, d difference) push {
	p := push{version: version, removed: d.removed, more: d.more, resources: make(map[string]string, len(d.changed))}
	for _, r := range d.changed {
		p.resources[r.Name] = r.Version
	}
	return p
}

// response notes that a response goes out now.
func (c *connection) response(typeURL, nonce, version string) {
	c.server.metrics.pushes.WithLabelValues(shortName(typeURL)).Inc()
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	t := c.types[typeURL]
	p := t.building
	p.nonce, p.version, p.at = nonce, version, time.Now()
	t.sent(p)
	if typeURL == resource.ClusterType {
		c.rewarm(p)
	}
}

// connectionID is the node's id, made unique by the stream's number.
func (c *connection) connectionID() string { return fmt.Sprintf("%s-%d", c.id, c.serial) }

func (c *connection) export() Connection {
	out := Connection{
		ID: c.connectionID(), Node: c.id, Cluster: c.cluster, Version: c.version,
		Address: c.address, Protocol: c.protocol, Key: c.key, Held: c.held, ConnectedAt: c.connectedAt,
		Types: make(map[string]TypeState, len(c.types)),
	}
	for typeURL, t := range c.types {
		out.Types[typeURL] = t.state
	}
	return out
}

// OnStreamOpen, and the other callbacks, are for the stream's handler.
func (c *connection) OnStreamOpen(context.Context, int64, string) error { return nil }

func (c *connection) OnStreamClosed(int64, *core.Node) {}

func (c *connection) OnStreamRequest(_ int64, r *discovery.DiscoveryRequest) error {
	var err error
	if r.Node, err = c.identify(r.GetNode()); err != nil {
		return err
	}
	if err := c.request(r.GetTypeUrl(), r.GetResponseNonce(), r.GetErrorDetail(), r.GetResourceNames()); err != nil {
		return err
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.types[r.GetTypeUrl()].subscribe(r.GetResourceNames())
	return nil
}

func (c *connection) OnStreamResponse(_ context.Context, _ int64, _ *discovery.DiscoveryRequest, r *discovery.DiscoveryResponse) {
	c.response(r.GetTypeUrl(), r.GetNonce(), r.GetVersionInfo())
}

func (c *connection) OnDeltaStreamOpen(context.Context, int64, string) error { return nil }

func (c *connection) OnDeltaStreamClosed(int64, *core.Node) {}

func (c *connection) OnStreamDeltaRequest(_ int64, r *discovery.DeltaDiscoveryRequest) error {
	var err error
	if r.Node, err = c.identify(r.GetNode()); err != nil {
		return err
	}
	initial := slices.Collect(maps.Keys(r.GetInitialResourceVersions()))
	if err := c.request(r.GetTypeUrl(), r.GetResponseNonce(), r.GetErrorDetail(), r.GetResourceNamesSubscribe(), r.GetResourceNamesUnsubscribe(), initial); err != nil {
		return err
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	t := c.types[r.GetTypeUrl()]
	t.resubscribe(r.GetResourceNamesSubscribe(), r.GetResourceNamesUnsubscribe())
	if k := c.server.keys[c.key]; len(initial) > 0 && t.state.Sent == "" && k != nil && k.snapshot != nil {
		t.claimed(k.snapshot.set(r.GetTypeUrl()), r.GetInitialResourceVersions())
	}
	return nil
}

func (c *connection) OnStreamDeltaResponse(_ int64, _ *discovery.DeltaDiscoveryRequest, r *discovery.DeltaDiscoveryResponse) {
	c.response(r.GetTypeUrl(), r.GetNonce(), r.GetSystemVersionInfo())
}
