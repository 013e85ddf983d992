package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/periscope-mesh/periscope/atomicfile"
	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/topology"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// clusterWait is how long the start waits for the Kubernetes API before it goes
// on with the topology known last.
const clusterWait = 5 * time.Second

// openCluster makes the watcher of gateways, if a Kubernetes API is named.
func (c *control) openCluster() error {
	f := c.cfg.controlFlags
	if f.kubeconfig == "" && !f.inCluster {
		return nil
	}
	var err error
	if f.inCluster {
		c.kube, err = rest.InClusterConfig()
	} else {
		c.kube, err = clientcmd.BuildConfigFromFlags("", f.kubeconfig)
	}
	if err != nil {
		return fmt.Errorf("find the Kubernetes API: %w", err)
	}
	c.cluster, err = topology.New(topology.Config{REST: c.kube, Logger: c.cfg.logger, Registerer: c.registry, SyncTimeout: clusterWait})
	return err
}

func (c *control) topologyFile() string { return filepath.Join(c.cfg.dataDir, "topology.json") }

// loadCluster gives the gateways there are, or those known last when the
// Kubernetes API is away; false: none are known, so that istiods must wait.
func (c *control) loadCluster(ctx context.Context) (topology.Result, bool) {
	result, err := c.cluster.Load(ctx)
	if err == nil {
		c.keep(result)
		return result, true
	}
	raw, readErr := os.ReadFile(c.topologyFile())
	if readErr == nil {
		readErr = json.Unmarshal(raw, &result)
	}
	c.cfg.logger.Warn("the Kubernetes API is away", "error", err, "gateways_known_last", readErr == nil)
	return result, readErr == nil
}

// observe takes a new topology.
func (c *control) observe(result topology.Result) {
	if err := c.publish(func(s *controlState) { c.place(s, result) }); err != nil {
		c.cfg.logger.Error("plan not published", "error", err)
		return
	}
	c.keep(result)
}

// keep writes a topology down for a start without the Kubernetes API.
func (c *control) keep(result topology.Result) {
	raw, err := json.Marshal(result)
	if err == nil {
		err = atomicfile.Replace(c.topologyFile(), raw)
	}
	if err != nil {
		c.cfg.logger.Error("topology not kept", "error", err)
	}
}

// place puts what the cluster has beside what the flags name; nodes named by
// flags stand in for every service.
func (c *control) place(s *controlState, result topology.Result) {
	s.topology = mirror.Topology{
		Gateways: append(append([]mirror.Gateway{}, c.static.Gateways...), result.Topology.Gateways...),
		Nodes:    append(append([]mirror.NodeService{}, c.static.Nodes...), result.Topology.Nodes...),
	}
	s.problems = result.Problems
	s.placed = true
}

// follow asks the cluster for the services that policies name.
func (c *control) follow(set source.Set) {
	if c.cluster == nil {
		return
	}
	var refs []topology.ServiceRef
	for i := range set.Policies {
		namespace, name := set.Policies[i].NodeService()
		refs = append(refs, topology.ServiceRef{Namespace: namespace, Name: name})
	}
	c.cluster.SetNodeServices(refs)
}

// selectClient tells istiods from gateways and nodes. All istiods are served
// the same, whatever their revision: each uses only what is for its own
// gateways, and revisions' tags cannot be told from here.
func (c *control) selectClient(n *core.Node) (string, error) {
	if _, ok := mcp.Select(n); !ok {
		return xds.SelectByRole(n)
	}
	if c.cluster == nil {
		return "", errors.New("this control plane supplies no istiod: it was started without --kubeconfig and --in-cluster")
	}
	return mcp.Key(""), nil
}

// certified tells the snapshots that are for clients with a certificate, where
// certificates are asked for: all but istiods', which cannot show one.
func (c *control) certified(key string) bool {
	return c.cfg.xdsClientCA != "" && key != mcp.Key("")
}
