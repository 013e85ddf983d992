package main

import (
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/xds/orca"
)

const (
	maxPushes   = 64   // of shares to one workload, that are remembered
	maxFollowed = 4096 // nodes' addresses
)

// effects measures how long it takes from a push of shares to the first batch that
// was made under them, of each pod: gateways name the revision that they go by.
// It is not for concurrent use.
type effects struct {
	workloads map[string]string // by pod, "namespace/pod"
	pushes    map[string][]push // by workload, in the order of time
	nodes     map[string]heardUntil
}

type push struct {
	share uint32
	at    time.Time
	seen  map[string]bool // pods of which it is known
}

// heardUntil is up to where, by its uptime, a node's reports were looked at.
type heardUntil struct {
	epoch  uint64
	uptime time.Duration
}

func newEffects() *effects {
	return &effects{workloads: map[string]string{}, pushes: map[string][]push{}, nodes: map[string]heardUntil{}}
}

// pushed takes what a workload was given.
func (e *effects) pushed(workload, revision string, at time.Time) {
	list := e.pushes[workload]
	if len(list) == maxPushes {
		list = list[1:]
	}
	e.pushes[workload] = append(list, push{load.ShareNumber(revision), at, map[string]bool{}})
}

// configure says which workloads there are, by pod.
func (e *effects) configure(workloads map[string]string) {
	e.workloads = workloads
	there := map[string]bool{}
	for _, w := range workloads {
		there[w] = true
	}
	for w := range e.pushes {
		if !there[w] {
			delete(e.pushes, w)
		}
	}
}

// take calls effect for what a report tells of it. When the report was on its way
// for some time, that counts too.
func (e *effects) take(u orca.Update, effect func(pushed, seen time.Time)) {
	r := u.Report
	until := e.nodes[u.Address]
	if until.epoch != r.Epoch {
		until.uptime = 0
	}
	if len(e.nodes) == maxFollowed {
		clear(e.nodes) // of nodes that went; what is seen twice counts once
	}
	e.nodes[u.Address] = heardUntil{r.Epoch, r.Uptime}
	for i := range r.Demands {
		d := &r.Demands[i]
		if d.Share == 0 || d.ShareSince <= until.uptime || d.ShareSince > r.Uptime {
			continue
		}
		seen := u.Received.Add(d.ShareSince - r.Uptime)
		list := e.pushes[e.workloads[d.Gateway]]
		for i := len(list) - 1; i >= 0; i-- {
			if p := list[i]; p.share == d.Share && p.at.Before(seen) {
				if !p.seen[d.Gateway] {
					p.seen[d.Gateway] = true
					effect(p.at, seen)
				}
				break
			}
		}
	}
}
