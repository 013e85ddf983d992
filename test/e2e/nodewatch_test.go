package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// toldOfNode is what a control plane's /debug/pressurez has of its only node.
type toldOfNode struct {
	State, Fault string
	Restarts     int
	Report       struct {
		Node         string
		DelaySeconds struct{ Kernel float64 }
		Sockets      struct {
			Backend string
			Bytes   int
		}
	}
}

func (n toldOfNode) reports() bool { return n.State == "reporting" && n.Fault == "" }

// A process beside a node tells that it is late while it stands still, stops when it
// has stood still for long, or is gone, and goes on with it.
func TestNodeWatch(t *testing.T) {
	m := &mesh{rig: newRig(t)}
	m.upstream(t)
	start(t, "control", "--upstream", "http://127.0.0.1:"+m.upstreamPort, "--http", m.http, "--https", "", "--data", m.dataDir,
		"--xds", m.xds, "--debug", m.debug, "--node", m.nodeListen, "--orca-port", portOf(m.nodeORCA)).waitFor("control plane started")
	reports, admin := envoytest.FreeAddr(t), envoytest.FreeAddr(t)
	startNode := func() *process {
		t.Helper()
		p := start(t, append(m.nodeArgs(), "--node-orca", reports)...)
		p.waitFor("node started")
		return p
	}
	told := func() (n toldOfNode) {
		t.Helper()
		var page struct{ Nodes []toldOfNode }
		getJSON(t, "http://"+m.debug+"/debug/pressurez", &page)
		if len(page.Nodes) != 1 {
			t.Fatalf("%d nodes", len(page.Nodes))
		}
		return page.Nodes[0]
	}
	await := func(within time.Duration, what string, ok func(toldOfNode) bool) {
		t.Helper()
		envoytest.Eventually(t, within, what, func() bool { return ok(told()) })
	}
	silent := func(n toldOfNode) bool { return strings.Contains(n.Fault, "tells nothing of its load") }
	healthy := func(n toldOfNode) bool {
		return n.reports() && n.Report.Node != "" && n.Report.Sockets.Backend == "inet_diag" && n.Report.DelaySeconds.Kernel == 0
	}

	start(t, "node", "watch", "--node-reports", reports, "--node-listen", m.nodeListen, "--node-orca", m.nodeORCA, "--watch-admin", admin, "--node-sockets", "inet_diag").waitFor("watching a node")
	await(10*time.Second, "that there is no node is told", silent)
	if code, text := get(t, "http://"+admin+"/ready"); code != 503 || !strings.Contains(text, reports) {
		t.Errorf("/ready: %d %s", code, text)
	}
	node := startNode()
	await(15*time.Second, "the node reports", healthy)
	envoytest.Eventually(t, 5*time.Second, "/ready", func() bool { code, _ := get(t, "http://"+admin+"/ready"); return code == 200 })

	signal := func(s syscall.Signal) {
		t.Helper()
		if err := node.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	envoytest.Eventually(t, 10*time.Second, "every thread has stopped", func() bool { return stopped(t, node.cmd.Process.Pid) })
	c, err := net.Dial("tcp", m.nodeListen)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	await(5*time.Second, "a node that stands still is late", func(n toldOfNode) bool {
		return n.reports() && n.Report.DelaySeconds.Kernel >= 0.5 && n.Report.Sockets.Bytes == 27
	})
	await(15*time.Second, "nothing is told of a node that has long stood still", silent)
	signal(syscall.SIGCONT)
	await(20*time.Second, "it goes on", healthy)

	node.stop(syscall.SIGKILL)
	await(5*time.Second, "nothing is told of a node that is gone", silent)
	startNode()
	await(15*time.Second, "another reports", func(n toldOfNode) bool { return healthy(n) && n.Restarts == 1 })
}

// stopped tells whether all threads of a process stand still: a signal takes a while
// where CPUs are busy. See proc_pid_stat(5).
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	return !slices.ContainsFunc(files, func(f string) bool {
		text, err := os.ReadFile(f)
		_, state, _ := strings.Cut(string(text), ") ")
		return err == nil && !strings.HasPrefix(state, "T")
	})
}
