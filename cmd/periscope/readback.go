package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/xds/istiod"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// istiodToken is where the token for istiods is, unless --istiod-token says
// otherwise: where Istio's own pods have theirs.
const istiodToken = "/var/run/secrets/tokens/istio-token"

// readback asks istiods what became of what they are served.
type readback struct {
	poller    *istiod.Poller
	discovery *istiod.Discovery // nil: flags name the istiods
	mu        sync.Mutex
	served    istiod.Served
}

// openReadback makes it, if istiods are supplied.
func (c *control) openReadback() error {
	if c.cluster == nil {
		return nil
	}
	f := c.cfg.controlFlags
	r := &readback{}
	endpoints := func() ([]string, error) { return f.istiods, nil }
	if len(f.istiods) == 0 {
		client, err := kubernetes.NewForConfig(c.kube)
		if err != nil {
			return fmt.Errorf("find istiods: %w", err)
		}
		if r.discovery, err = istiod.NewDiscovery(client, f.istiodNamespace); err != nil {
			return fmt.Errorf("--istiod-namespace: %w", err)
		}
		endpoints = r.discovery.Endpoints
	}
	var err error
	r.poller, err = istiod.New(istiod.Config{
		Endpoints: endpoints, Served: r.current, Token: readToken(f.istiodToken, istiodToken), Logger: c.cfg.logger, Registerer: c.registry})
	if err != nil {
		return fmt.Errorf("--istiod: %w", err)
	}
	c.readback = r
	return nil
}

// readToken gives what reads the token from the named file or, if none is
// named, from the usual one; nil if that isn't there.
func readToken(named, usual string) func() (string, error) {
	if named == "" {
		if _, err := os.Stat(usual); err != nil {
			return nil
		}
		named = usual
	}
	return func() (string, error) {
		raw, err := os.ReadFile(named)
		if err != nil {
			return "", fmt.Errorf("--istiod-token: %w", err)
		}
		return strings.TrimSpace(string(raw)), nil
	}
}

// run asks until the context ends.
func (r *readback) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.poller.Run(ctx) })
	if r.discovery != nil {
		group.Go(func() error { return r.discovery.Run(ctx, r.poller.Refresh) })
	}
	return group.Wait()
}

func (r *readback) current() istiod.Served {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.served
}

// serve notes what istiods are served from now on, and has it asked for soon.
func (r *readback) serve(items map[string][]mcp.Item, plan mirror.Plan, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := istiod.Served{Serial: r.served.Serial + 1, Resources: map[string]istiod.Resource{}}
	for _, g := range plan.Gateways {
		gateway := istiod.Gateway{ID: g.Gateway.ID(), Policy: g.PolicyIDs(), Namespace: g.Gateway.Namespace, Pods: g.Gateway.Pods}
		for _, item := range items[g.Gateway.ID()] {
			key := istiod.Key(item.Kind, item.Namespace, item.Name)
			resource := istiod.Resource{Version: item.Version, Types: item.Types, Since: now}
			if before, ok := r.served.Resources[key]; ok && before.Version == item.Version {
				resource.Since = before.Since
			}
			next.Resources[key] = resource
			gateway.Resources = append(gateway.Resources, key)
		}
		if len(gateway.Resources) > 0 {
			next.Gateways = append(next.Gateways, gateway)
		}
	}
	r.served = next
	r.poller.Refresh()
}
