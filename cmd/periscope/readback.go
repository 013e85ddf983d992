package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/xds/istiod"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// readback asks istiods what became of what they are served.
type readback struct {
	poller *istiod.Poller
	mu     sync.Mutex
	served istiod.Served
	serial uint64 // of what is served
}

// openReadback makes it, if istiods are named.
func (c *control) openReadback() error {
	f := c.cfg.controlFlags
	if len(f.istiods) == 0 || c.cluster == nil {
		return nil
	}
	r := &readback{}
	var token func() (string, error)
	if f.istiodToken != "" {
		token = func() (string, error) {
			raw, err := os.ReadFile(f.istiodToken)
			if err != nil {
				return "", fmt.Errorf("--istiod-token: %w", err)
			}
			return strings.TrimSpace(string(raw)), nil
		}
	}
	var err error
	r.poller, err = istiod.New(istiod.Config{
		Endpoints: func() []string { return f.istiods }, Served: r.current, Token: token, Logger: c.cfg.logger, Registerer: c.registry})
	if err != nil {
		return fmt.Errorf("--istiod: %w", err)
	}
	c.readback = r
	return nil
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
	r.serial++
	next := istiod.Served{Serial: r.serial, Resources: map[string]istiod.Resource{}}
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
