package e2e

import (
	"math"
	"strings"
	"syscall"
	"testing"

	"github.com/periscope-mesh/periscope/test/cgrouptest"
)

// newGroup makes a control group, which goes after the processes of commands in it.
func newGroup(t *testing.T) *cgrouptest.Group {
	t.Helper()
	g, err := cgrouptest.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Remove(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// A node tells its control group's CPU weight and quota, and warns if nobody
// beside it goes before it.
func TestNodeCPUWeight(t *testing.T) {
	g := newGroup(t)
	newGroup(t) // beside it, with the usual weight
	if err := g.Quota(0.5); err != nil {
		t.Fatal(err)
	}
	const warning = "a busy node may slow down a gateway beside it"
	for _, tc := range []struct {
		weight int
		warns  bool
	}{{20, false}, {10_000, true}} {
		if err := g.Weight(tc.weight); err != nil {
			t.Fatal(err)
		}
		r := newRig(t)
		node := startCommand(t, g.Command(program, r.nodeArgs()...))
		node.waitFor("node started")
		var state struct {
			Cgroup, Fault, Error string
			Weight, QuotaCPUs    float64
		}
		getJSON(t, "http://"+r.nodeAdmin+"/debug/cpuz", &state)
		// Version 1 has another measure, of whole numbers.
		if off := math.Abs(state.Weight/float64(tc.weight) - 1); off > 0.01 || state.QuotaCPUs != 0.5 || state.Cgroup == "" || state.Error != "" || (state.Fault != "") != tc.warns {
			t.Errorf("weight %d: %+v", tc.weight, state)
		}
		if got := metric(t, r.nodeAdmin, "periscope_node_cpu_weight"); got != state.Weight {
			t.Errorf("weight %d: the metric is %v, the page has %v", tc.weight, got, state.Weight)
		}
		if got := metric(t, r.nodeAdmin, "periscope_node_cpu_quota_cpus"); got != 0.5 {
			t.Errorf("the metric of the quota is %v", got)
		}
		if warned := strings.Contains(node.output(), warning); warned != tc.warns {
			t.Errorf("weight %d: warned: %v\n%s", tc.weight, warned, node.output())
		}
		node.stop(syscall.SIGTERM)
	}
}
