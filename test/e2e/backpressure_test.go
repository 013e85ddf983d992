package e2e

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/cgrouptest"
	"github.com/periscope-mesh/periscope/test/envoytest"
)

const pressedPolicy = `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: web, namespace: gw-ns}
spec:
  targetRefs: [{group: networking.istio.io, kind: Gateway, name: web}]
  sampling: {percent: 100, always: [Suspicious], adaptive: {minPercent: 1}}
`

// pressed is /debug/pressurez, as far as it is looked at here.
type pressed struct {
	Total struct {
		Capacity, Demand, Budget, DelaySeconds, EffectSeconds float64
	}
	Nodes []struct {
		Report struct{ Utilization, Rate float64 }
	}
}

// watch logs what load control sees and does, at the end of the test.
func (m *mesh) watch(t *testing.T) {
	t.Helper()
	var lines strings.Builder
	begin, stop, done := time.Now(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(250 * time.Millisecond):
			}
			var p pressed
			getJSON(t, "http://"+m.debug+"/debug/pressurez", &p)
			fmt.Fprintf(&lines, "%6.2f %7.1f %8.0f %8.0f %8.0f %8.0f %8.0f", time.Since(begin).Seconds(), m.share(t), p.Total.Demand, p.Total.Capacity, p.Total.Budget, p.Total.DelaySeconds*1000, p.Total.EffectSeconds*1000)
			for _, n := range p.Nodes {
				fmt.Fprintf(&lines, " %8.0f %6.2f", n.Report.Rate, n.Report.Utilization)
			}
			fmt.Fprintln(&lines)
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		t.Logf("     s share %%   demand capacity   budget delay ms effect ms analysed   used\n%s", lines.String())
	})
}

// share is the part of its traffic that a gateway mirrors, in percent, as load
// control has it.
func (m *mesh) share(t *testing.T) (percent float64) {
	t.Helper()
	var shares []struct {
		Percent float64
		Pods    map[string]float64
	}
	getJSON(t, "http://"+m.debug+"/debug/sharez", &shares)
	if len(shares) != 1 {
		t.Fatalf("%d shares", len(shares))
	}
	if own, ok := shares[0].Pods["gw-0"]; ok {
		return own
	}
	return shares[0].Percent
}

// limitedNode starts the node in a control group, with all capabilities or as a user
// who has none.
func (m *mesh) limitedNode(t *testing.T) *cgrouptest.Group {
	t.Helper()
	g := newGroup(t)
	if err := g.Quota(1); err != nil {
		t.Fatal(err)
	}
	args := append([]string{program}, m.nodeArgs()...)
	if m.nobody {
		for _, dir := range []string{filepath.Dir(program), filepath.Dir(m.dataDir), m.dataDir} {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chown(m.dataDir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"}, args...)
	}
	m.node = startCommand(t, g.Command(args[0], args[1:]...))
	m.node.waitFor("node started")
	return g
}

// A node gets ten times slower under steady load. Through the real istiod the
// gateway's share falls, what is suspicious is found all the same, and with the
// node's speed the share comes back; no user notices, and what was not analysed is
// counted.
func TestBackpressureThroughIstiod(t *testing.T) {
	backpressure(t, startMeshOf(t, pressedMesh()))
}

// The same of a node without any capability, on a fallback that it tells of.
func TestBackpressureWithoutCapability(t *testing.T) {
	c := pressedMesh()
	c.nobody = true
	m := startMeshOf(t, c)
	for text, of := range map[string]string{"sockets are watched": "inet_diag", "sockets can't be watched by a better back end": "CAP_BPF"} {
		_, line, _ := strings.Cut(m.node.output(), text)
		if line, _, _ = strings.Cut(line, "\n"); !strings.Contains(line, of) {
			t.Errorf("%s: the node's log does not tell of %s: %q", text, of, line)
		}
	}
	var state struct {
		Sockets struct {
			Backend string
			Refused map[string]string
		}
	}
	getJSON(t, "http://"+m.nodeAdmin+"/debug/pressurez", &state)
	if s := state.Sockets; s.Backend != "inet_diag" || !strings.Contains(s.Refused["ebpf"], "CAP_BPF") || s.Refused["ebpf-pinned"] == "" {
		t.Errorf("/debug/pressurez tells %+v", s)
	}
	backpressure(t, m)
}

func backpressure(t *testing.T, m *mesh) {
	quota := func(cpus float64) {
		t.Helper()
		if err := m.nodeGroup.Quota(cpus); err != nil {
			t.Fatal(err)
		}
	}
	const rate = 250
	l := startLoad("http://"+m.http+"/api/orders", rate, 8)
	defer l.end()
	time.Sleep(5 * time.Second)
	envoytest.Eventually(t, 20*time.Second, "all is mirrored at full speed", func() bool { return m.share(t) >= 95 })
	defer func() {
		if t.Failed() {
			t.Logf("calls to nodes: %s", m.gateway.Stats("cluster.periscope_mirror"))
		}
	}()
	healthy, errs := l.cut()
	if len(errs) > 0 {
		t.Errorf("%d users' requests failed, such as %v", len(errs), errs[0])
	}
	m.watch(t)
	listeners := m.gateway.Stat("listener_manager.listener_modified")

	quota(0.1)
	slowed := time.Now()
	envoytest.Eventually(t, 10*time.Second, "the share falls", func() bool { return m.share(t) < 60 })
	t.Logf("below 60 %% after %v", time.Since(slowed).Round(time.Millisecond))
	time.Sleep(time.Second) // what came before the share fell is worked off
	const attacks = 40
	for i := range attacks {
		get(t, fmt.Sprintf("http://%s/find%s?file=%s", m.http, word(i), url.QueryEscape("../../etc/passwd")))
		time.Sleep(150 * time.Millisecond)
	}
	var p pressed
	getJSON(t, "http://"+m.debug+"/debug/pressurez", &p)
	if p.Total.EffectSeconds == 0.1 {
		t.Error("how long shares take to have an effect is not measured")
	}
	t.Logf("while it is slow: share %.1f %%, %+v", m.share(t), p.Total)
	found := map[string]bool{}
	defer func() {
		if len(found) < attacks {
			t.Logf("%d of %d suspicious requests are found", len(found), attacks)
		}
	}()
	envoytest.Eventually(t, 5*time.Second, "every suspicious request is found", func() bool {
		clear(found)
		for _, a := range m.attacks(t) {
			if strings.HasPrefix(a.Path, "/find") {
				found[a.Path] = true
			}
		}
		return len(found) == attacks
	})
	slow, errs := l.cut()
	if len(errs) > 0 {
		t.Errorf("with a slow node %d users' requests failed, such as %v", len(errs), errs[0])
	}

	quota(1)
	restored := time.Now()
	envoytest.Eventually(t, 20*time.Second, "the share comes back", func() bool { return m.share(t) >= 95 })
	t.Logf("at 95 %% again after %v", time.Since(restored).Round(time.Millisecond))
	for what, took := range map[string][]time.Duration{"healthy": healthy, "slow": slow} {
		slices.Sort(took)
		t.Logf("users with a node that is %s: %d requests, p50 %v, p99 %v", what, len(took), took[len(took)/2], took[len(took)*99/100])
	}
	if n := m.gateway.Stat("listener_manager.listener_modified"); n != listeners {
		t.Errorf("shares modified listeners %d times", n-listeners)
	}
	l.end()
	m.balanced(t)
}

// pressedMesh is a mesh whose node's CPU time is bounded.
func pressedMesh() meshConfig {
	c := webMesh()
	c.policies, c.limited = pressedPolicy, true
	return c
}

// word is a path of its own, which no grouping takes for a number.
func word(i int) string { return "/" + strings.Repeat("x", 1+i/26) + string(rune('a'+i%26)) }

// balanced waits until every exchange that the gateway saw is accounted for: what
// its breaker did not let through, while the node was too slow for 64 calls, by Envoy.
func (m *mesh) balanced(t *testing.T) {
	t.Helper()
	get(t, "http://"+m.http+"/last")
	var ledger struct {
		Steps []struct {
			Step       string
			Count      int
			Became     map[string]int
			Difference int
		}
	}
	defer func() { t.Logf("ledger: %+v", ledger.Steps) }()
	envoytest.Eventually(t, 15*time.Second, "the ledger is balanced", func() bool {
		getJSON(t, "http://"+m.debug+"/debug/ledgerz", &ledger)
		dropped := m.gateway.Stat("cluster.periscope_mirror.upstream_rq_active_overflow")
		for _, s := range ledger.Steps {
			switch {
			case s.Step == "batches sent by gateways" && s.Difference == dropped:
			case s.Step == "exchanges mirrored" && s.Difference >= 0 && (s.Difference > 0) == (dropped > 0): // some a batch
			case s.Difference != 0:
				return false
			}
		}
		return len(ledger.Steps) > 0 && ledger.Steps[0].Count > 0
	})
}

// Without a control plane, and with a node that stands still for a while, users
// notice nothing; the guard does what it can, and once they are back shares are
// decided anew.
func TestBackpressureFaults(t *testing.T) {
	m := &mesh{rig: newRig(t)}
	m.upstream(t)
	m.policy = filepath.Join(t.TempDir(), "policy.yaml")
	mustWrite(t, m.policy, `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: web}
spec:
  sampling: {percent: 100, always: [Suspicious], adaptive: {minPercent: 1}}
`)
	startControl := func() {
		t.Helper()
		m.control = start(t, "control", "--upstream", "http://127.0.0.1:"+m.upstreamPort, "--http", m.http, "--https", "", "--policy", m.policy, "--data", m.dataDir,
			"--xds", m.xds, "--debug", m.debug, "--node", m.nodeListen, "--orca-port", portOf(m.nodeORCA))
		m.control.waitFor("control plane started")
	}
	startControl()
	m.nodeGroup = m.limitedNode(t)
	start(t, "console", "--console", m.console, "--data", m.dataDir).waitFor("console started")
	m.gateway = envoytest.Start(t, printBootstrap(t, "--xds", m.xds))
	synced(t, m.debug)
	l := startLoad("http://"+m.http+"/api/orders", 250, 8)
	defer l.end()
	unharmed := func(while string) {
		t.Helper()
		if _, errs := l.cut(); len(errs) > 0 {
			t.Errorf("%s: %d users' requests failed, such as %v", while, len(errs), errs[0])
		}
	}
	quota := func(cpus float64) {
		t.Helper()
		if err := m.nodeGroup.Quota(cpus); err != nil {
			t.Fatal(err)
		}
	}
	discarded := func() float64 { return metric(t, m.nodeAdmin, `periscope_ingest_events_total{outcome="discarded"}`) }
	time.Sleep(3 * time.Second)
	unharmed("node at full speed")

	m.control.stop(syscall.SIGKILL)
	quota(0.1)
	before := discarded()
	time.Sleep(4 * time.Second)
	if n := discarded() - before; n < 100 {
		t.Errorf("the guard discards %v exchanges while nobody lowers the share", n)
	}
	unharmed("slow node, no control plane")
	startControl()
	envoytest.Eventually(t, 20*time.Second, "a control plane that comes back lowers the share", func() bool { return m.share(t) < 60 })
	quota(1)
	envoytest.Eventually(t, 30*time.Second, "the share comes back", func() bool { return m.share(t) >= 95 })
	unharmed("control plane back")

	if err := m.node.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	if err := m.node.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	envoytest.Eventually(t, 30*time.Second, "the share comes back after a standstill", func() bool { return m.share(t) >= 95 })
	unharmed("node at a standstill")
	path := "/after/etc/passwd"
	get(t, "http://"+m.http+path)
	m.attack(t, "an attack after all that", func(a attackRow) bool { return a.Path == path })
}

// periscope bench overload plots a whole run, and accounts for it.
func TestBenchOverload(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), program, "bench", "overload", "--envoy", envoytest.Path(t), "--before", "3s", "--for", "4s", "--after", "3s").CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	text := string(out)
	if strings.Count(text, " 0 failed") != 3 || strings.Count(text, " s ") < 7 || !strings.Contains(text, "left out by the share") || strings.Contains(text, ": 0 analysed") || strings.Contains(text, " 0 found") {
		t.Error("that is not it")
	}
}
