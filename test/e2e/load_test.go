package e2e

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

type pressure struct {
	Nodes []struct {
		Address, State, Fault string
		Restarts              int
		Budget                *struct{ Counts, Demand float64 }
		Report                *struct {
			Node               string
			Analysed, Priority uint64
			DelaySeconds       struct{ Worst float64 }
			Demands            []struct {
				Policy                       string
				Eligible, Priority, Mirrored uint64
			}
		}
	}
}

// A node tells its load and what its gateways want, by ORCA; one that is stopped
// is stale, one that comes back as another is told as such.
func TestLoadReports(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.yaml")
	mustWrite(t, file, `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: load}
spec:
  sampling: {percent: 20, always: [Suspicious]}
`)
	r := newRig(t)
	r.up(t, "--node", r.nodeListen, "--policy", file)
	var p pressure
	state := func(what string, is func() bool) {
		t.Helper()
		envoytest.Eventually(t, 15*time.Second, what, func() bool {
			p = pressure{}
			getJSON(t, "http://"+r.debug+"/debug/pressurez", &p)
			return len(p.Nodes) == 1 && is()
		})
	}
	state("a fault without a node", func() bool { return p.Nodes[0].State == "connecting" && p.Nodes[0].Fault != "" })
	node := start(t, r.nodeArgs()...)
	node.waitFor("node started")
	state("the node reports", func() bool {
		return p.Nodes[0].State == "reporting" && p.Nodes[0].Fault == "" && p.Nodes[0].Budget != nil && p.Nodes[0].Budget.Counts == 1
	})
	synced(t, r.debug)

	const each = 50
	for i := range each {
		get(t, fmt.Sprintf("http://%s/items/%d", r.http, i))
		get(t, "http://"+r.http+"/etc/passwd")
	}
	state("what the gateway wants", func() bool {
		get(t, "http://"+r.http+"/etc/passwd") // a busy node may have missed the batch that told it last
		n := p.Nodes[0].Report
		return len(n.Demands) == 1 && n.Demands[0].Eligible >= 2*each && n.Demands[0].Priority >= each && n.Priority >= each && n.Analysed >= each
	})
	if d := p.Nodes[0].Report.Demands[0]; d.Policy != "default/load" || d.Mirrored < each || d.Mirrored > d.Eligible-each/2 {
		t.Errorf("demand %+v", d)
	}
	var shares []struct {
		Decisions []struct{ Nodes map[string]float64 }
	}
	state("where the gateway's exchanges go", func() bool {
		get(t, "http://"+r.http+"/items/1") // rates are of two reports
		getJSON(t, "http://"+r.debug+"/debug/sharez", &shares)
		return p.Nodes[0].Budget.Demand > 0 && len(shares) == 1 && len(shares[0].Decisions) == 1 && shares[0].Decisions[0].Nodes[p.Nodes[0].Report.Node] == 1
	})

	// Stopped, it is silent on a connection that stays open.
	if err := node.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	state("that it is stale", func() bool { return p.Nodes[0].State == "stale" && p.Nodes[0].Report != nil })
	state("that the stream was given up", func() bool { return strings.Contains(p.Nodes[0].Fault, "no report came in time") })
	if err := node.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	state("it is back", func() bool {
		return p.Nodes[0].State == "reporting" && p.Nodes[0].Fault == "" && p.Nodes[0].Restarts == 0
	})

	node.stop(syscall.SIGKILL)
	state("a fault", func() bool { return p.Nodes[0].Fault != "" && p.Nodes[0].Report != nil })
	again := start(t, r.nodeArgs()...)
	again.waitFor("node started")
	state("the new one", func() bool {
		return p.Nodes[0].State == "reporting" && p.Nodes[0].Restarts == 1 && p.Nodes[0].Report.Analysed < each
	})
}

// By TLS, with certificates on both sides, a node may tell its load on any
// address.
func TestLoadReportsTLS(t *testing.T) {
	r, a, dir := newRig(t), newAuthority(t), t.TempDir()
	ca := filepath.Join(dir, "ca.crt")
	mustWrite(t, ca, a.pem)
	pair := func(serial int64) (cert, key string) {
		cert, key = filepath.Join(dir, fmt.Sprint(serial, ".crt")), filepath.Join(dir, fmt.Sprint(serial, ".key"))
		certPEM, keyPEM := a.issue(serial, net.IPv4(127, 0, 0, 1))
		mustWrite(t, cert, certPEM)
		mustWrite(t, key, keyPEM)
		return cert, key
	}
	nodeCert, nodeKey := pair(10)
	port := portOf(r.nodeORCA)
	start(t, append(r.nodeArgs(), "--node-orca", "0.0.0.0:"+port, "--node-orca-cert", nodeCert, "--node-orca-key", nodeKey, "--node-orca-client-ca", ca)...).waitFor("node started")
	control := func(want string, args ...string) {
		t.Helper()
		debug := envoytest.FreeAddr(t)
		start(t, append([]string{"control", "--upstream", "http://127.0.0.1:9", "--http", r.http, "--https", "", "--data", t.TempDir(), "--debug", debug, "--xds", envoytest.FreeAddr(t),
			"--node", r.nodeListen, "--orca-port", port}, args...)...).waitFor("control plane started")
		var p pressure
		envoytest.Eventually(t, 15*time.Second, want, func() bool {
			getJSON(t, "http://"+debug+"/debug/pressurez", &p)
			return len(p.Nodes) == 1 && strings.Contains(p.Nodes[0].State+" "+p.Nodes[0].Fault, want)
		})
	}
	cert, key := pair(20)
	control("reporting", "--orca-ca", ca, "--orca-cert", cert, "--orca-key", key)
	control("connecting rpc error: code = Unauthenticated", "--orca-ca", ca)
	control("connecting rpc error: code = Unavailable")
}
