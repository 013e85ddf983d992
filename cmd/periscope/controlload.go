package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/xds/certs"
	"github.com/periscope-mesh/periscope/xds/orca"
)

// orcaClientFlags say how a control plane reaches nodes for their load reports.
type orcaClientFlags struct{ ca, cert, key, serverName string }

func (f *orcaClientFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.ca, "orca-ca", "", "authorities, PEM, that verify nodes when they are asked for their load; default: plain text, to nodes on loopback alone")
	flags.StringVar(&f.cert, "orca-cert", "", "certificate chain, PEM, to show nodes: their --node-orca-client-ca verifies it")
	flags.StringVar(&f.key, "orca-key", "", "private key of --orca-cert, PEM")
	flags.StringVar(&f.serverName, "orca-server-name", "", "name that nodes' certificates must be valid for; default: the address of each")
}

// loads watches what nodes tell of their load.
type loads struct {
	watcher *orca.Watcher
	certs   *certs.Client // nil: plain text
	port    int
	fixed   []string // in place of the topology's nodes
}

// openLoads makes the watcher of nodes' load, unless none is to be asked.
func (c *control) openLoads() (err error) {
	f := c.cfg.orcaTLS
	switch {
	case c.cfg.orcaPort < 0 || c.cfg.orcaPort > 65535:
		return fmt.Errorf("--orca-port: %d is no port", c.cfg.orcaPort)
	case c.cfg.orcaPort == 0 && c.cfg.orca == nil:
		return nil
	case f.ca == "" && f.cert+f.key+f.serverName != "":
		return errors.New("--orca-ca: the authorities that verify nodes are needed for TLS")
	}
	l := &loads{port: c.cfg.orcaPort, fixed: c.cfg.orca}
	config := orca.Config{Logger: c.cfg.logger, Registerer: c.registry}
	if f.ca != "" {
		l.certs, err = certs.NewClient(certs.ClientConfig{CAFile: f.ca, CertFile: f.cert, KeyFile: f.key, ServerName: f.serverName, CAFlag: "--orca-ca", Logger: c.cfg.logger})
		if err != nil {
			return fmt.Errorf("--orca-ca, --orca-cert, --orca-key: %w", err)
		}
		config.Credentials = l.certs.Credentials()
	}
	c.sharing = newSharing(c)
	config.Deliver = c.sharing.take
	if l.watcher, err = orca.New(config); err != nil {
		return err
	}
	c.loads = l
	return nil
}

// watch follows the nodes there are.
func (l *loads) watch(t mirror.Topology) {
	if l == nil {
		return
	}
	addresses := slices.Clone(l.fixed)
	if l.fixed == nil {
		for _, service := range t.Nodes {
			for _, e := range service.Endpoints {
				addresses = append(addresses, net.JoinHostPort(e.Host, strconv.Itoa(l.port)))
			}
		}
	}
	l.watcher.SetNodes(addresses)
}

func (l *loads) run(ctx context.Context) error {
	if l.certs != nil {
		defer beside(ctx, l.certs.Run)()
	}
	return l.watcher.Run(ctx)
}

// pressureState is /debug/pressurez.
type pressureState struct {
	Total   *shareTotals   `json:"total,omitempty"`
	Nodes   []nodePressure `json:"nodes"`
	LeftOut int            `json:"leftOut,omitempty"` // nodes beyond those that are watched
}

type nodePressure struct {
	Address     string      `json:"address"`
	State       string      `json:"state"`           // connecting, reporting, stale
	Fault       string      `json:"fault,omitempty"` // why nothing comes
	ConnectedAt time.Time   `json:"connectedAt,omitzero"`
	ReceivedAt  time.Time   `json:"receivedAt,omitzero"`
	Reports     uint64      `json:"reports"`
	Streams     uint64      `json:"streams"`
	Restarts    uint64      `json:"restarts"` // of the node
	Budget      *nodeBudget `json:"budget,omitempty"`
	Report      *loadReport `json:"report,omitempty"`
}

// loadReport is a load.Report for people: times in seconds, demand summed up.
type loadReport struct {
	Node          string         `json:"node"`
	UptimeSeconds float64        `json:"uptimeSeconds"`
	DelaySeconds  loadDelay      `json:"delaySeconds"`
	Utilization   float64        `json:"utilization"`
	Capacity      float64        `json:"capacity"`
	Rate          float64        `json:"rate"`
	Analysed      uint64         `json:"analysed"`
	Priority      uint64         `json:"priority"`
	Discarded     uint64         `json:"discarded"`
	Overflown     uint64         `json:"overflown"`
	Sockets       *loadSockets   `json:"sockets,omitempty"`
	Demands       []policyDemand `json:"demands"`
}

type loadDelay struct {
	Worst  float64 `json:"worst"`
	Kernel float64 `json:"kernel"`
	Queue  float64 `json:"queue"`
	Lag    float64 `json:"lag"`
}

type loadSockets struct {
	Backend     string `json:"backend"`
	Connections int    `json:"connections"`
	Bytes       int64  `json:"bytes"`
	Backlog     int    `json:"backlog"`
	BacklogMax  int    `json:"backlogMax"`
	ZeroWindows uint64 `json:"zeroWindows"`
	Drops       uint64 `json:"drops"`
	Retransmits uint64 `json:"retransmits"`
}

// policyDemand is a policy's demand, summed up over gateways' workers.
type policyDemand struct {
	Policy   string `json:"policy"`
	Workers  int    `json:"workers"`
	Eligible uint64 `json:"eligible"`
	Priority uint64 `json:"priority"`
	Mirrored uint64 `json:"mirrored"`
}

// pressure shows nodes' load.
func (c *control) pressure() any {
	out := pressureState{Nodes: []nodePressure{}}
	if c.loads == nil {
		return out
	}
	var nodes []orca.Node
	var budgets map[string]*nodeBudget
	out.Total, budgets = c.sharing.totals()
	nodes, out.LeftOut = c.loads.watcher.Nodes()
	for _, n := range nodes {
		var budget *nodeBudget
		if n.Report != nil {
			budget = budgets[n.Report.Node]
		}
		out.Nodes = append(out.Nodes, nodePressure{n.Address, n.State, n.Fault, n.ConnectedAt, n.ReceivedAt, n.Reports, n.Streams, n.Restarts, budget, showReport(n.Report)})
	}
	return out
}

func showReport(r *load.Report) *loadReport {
	if r == nil {
		return nil
	}
	out := &loadReport{
		Node: r.Node, UptimeSeconds: r.Uptime.Seconds(),
		DelaySeconds: loadDelay{r.Delay().Seconds(), r.Kernel.Seconds(), r.Queue.Seconds(), r.Lag.Seconds()},
		Utilization:  r.Utilization, Capacity: r.Capacity, Rate: r.Rate,
		Analysed: r.Analysed, Priority: r.Priority, Discarded: r.Discarded, Overflown: r.Overflown,
		Demands: []policyDemand{},
	}
	if r.Sockets.Backend != "" {
		sockets := loadSockets(r.Sockets)
		out.Sockets = &sockets
	}
	byPolicy := map[string]policyDemand{}
	for _, d := range r.Demands {
		p := byPolicy[d.Policy]
		byPolicy[d.Policy] = policyDemand{d.Policy, p.Workers + 1, p.Eligible + d.Eligible, p.Priority + d.Priority, p.Mirrored + d.Mirrored}
	}
	out.Demands = slices.AppendSeq(out.Demands, maps.Values(byPolicy))
	slices.SortFunc(out.Demands, func(a, b policyDemand) int { return strings.Compare(a.Policy, b.Policy) })
	return out
}
