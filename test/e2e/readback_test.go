package e2e

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/test/netnstest"
)

// told is what the control plane knows of a gateway, and from which istiod.
type told struct{ Gateway, Pod, Istiod, Stage, Reason string }

// delivery is that part of /debug/policyz.
type delivery struct {
	Problem string
	Istiods []struct{ URL, Problem string }
	Pods    []told
}

func (r *rig) delivery(t *testing.T) delivery {
	t.Helper()
	var state struct{ Delivery delivery }
	getJSON(t, "http://"+r.debug+"/debug/policyz", &state)
	return state.Delivery
}

// awaitPods waits until both gateways' pods are as ok says.
func (r *rig) awaitPods(t *testing.T, what string, ok func(a, b told) bool) {
	t.Helper()
	var last delivery
	defer func() {
		if t.Failed() {
			t.Logf("%s: %+v", what, last)
		}
	}()
	envoytest.Eventually(t, time.Minute, what, func() bool {
		last = r.delivery(t)
		return len(last.Pods) == 2 && ok(last.Pods[0], last.Pods[1])
	})
}

func (p told) acknowledged(by *kubetest.Istiod) bool {
	return p.Stage == "acknowledged" && p.Istiod == "http://"+by.Monitoring
}

func (p told) unknown(reason string) bool {
	return p.Stage == "unknown" && strings.Contains(p.Reason, reason)
}

// bothUnknown is for awaitPods.
func bothUnknown(reason string) func(a, b told) bool {
	return func(a, b told) bool { return a.unknown(reason) && b.unknown(reason) }
}

// pair is a cluster with two istiods of different revisions, each on an address
// of its own and to have one gateway, and a control plane that supplies both.
type pair struct {
	*rig
	cluster *kubetest.Cluster
	policy  string // file
	token   string // file
	istiods [2]*kubetest.Istiod
}

// names of what belongs to an istiod of a pair.
func names(i int) (istiod, namespace string) {
	return fmt.Sprintf("istiod-%d", i), fmt.Sprintf("gw-%d", i)
}

func startPair(t *testing.T) *pair {
	t.Helper()
	dir := t.TempDir()
	p := &pair{rig: newRig(t), cluster: kubetest.Start(t), policy: filepath.Join(dir, "policy.yaml"), token: filepath.Join(dir, "istio-token")}
	p.cluster.InstallIstio(t)
	p.cluster.Namespace(t, "periscope-system")
	var policies []string
	for i := range p.istiods {
		_, namespace := names(i)
		p.cluster.Namespace(t, namespace)
		_, port, _ := net.SplitHostPort(envoytest.FreeAddr(t))
		p.cluster.Apply(t, kubetest.WebGateway(namespace, namespace, port, port))
		p.cluster.Apply(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s-0, namespace: %[1]s, labels: {istio: %[1]s}}
spec: {containers: [{name: istio-proxy, image: none}]}
`, namespace))
		policies = append(policies, strings.ReplaceAll(meshPolicy, "gw-ns", namespace))
	}
	mustWrite(t, p.policy, strings.Join(policies, "---\n"))
	mustWrite(t, p.token, p.cluster.ServiceAccountToken(t, "periscope-system", "periscope-control", "istio-ca"))
	p.start(t, p.rig, p.cluster.Kubeconfig, "--istiod-token", p.token)
	for i, host := range []string{netnstest.Address, netnstest.Second} {
		name, _ := names(i)
		c := kubetest.IstiodConfig{Cluster: p.cluster, Name: name, BindHost: host, Sources: []string{"xds://" + p.xds},
			Environment: []string{"DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES=periscope-system"}}
		if i == 0 {
			c.Monitoring = net.JoinHostPort(host, "15014")
		} else {
			c.Revision = "canary"
		}
		p.istiods[i] = kubetest.StartIstiod(t, c)
	}
	return p
}

// start starts a control plane of the pair.
func (p *pair) start(t *testing.T, r *rig, kubeconfig string, args ...string) {
	t.Helper()
	r.process = start(t, append([]string{"control", "--kubeconfig", kubeconfig, "--policy", p.policy, "--data", r.dataDir,
		"--xds", r.xds, "--debug", r.debug, "--node", r.nodeListen}, args...)...)
	r.waitFor("control plane started")
}

// istiodPod puts the pod of an istiod into the API, as a kubelet would, or
// changes whether it is ready. The first has the usual monitoring port.
func (p *pair) istiodPod(t *testing.T, i int, ready bool) {
	t.Helper()
	name, _ := names(i)
	host, port, _ := net.SplitHostPort(p.istiods[i].Monitoring)
	annotations := "{}"
	if i > 0 {
		annotations = fmt.Sprintf(`{prometheus.io/port: %q}`, port)
	}
	id := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: istio-system, labels: {app: istiod, istio.io/rev: %s}, annotations: %s}\n",
		name, []string{"default", "canary"}[i], annotations)
	p.cluster.Apply(t, id+"spec: {containers: [{name: discovery, image: none}]}\n")
	condition := map[bool]string{true: "True", false: "False"}[ready]
	p.cluster.ApplyStatus(t, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: istio-system}
status: {phase: Running, podIP: %s, podIPs: [{ip: %s}], conditions: [{type: Ready, status: %q}]}
`, name, host, host, condition))
}

// router starts the gateway of one of the istiods.
func (p *pair) router(t *testing.T, i int) {
	t.Helper()
	_, namespace := names(i)
	kubetest.StartRouter(t, kubetest.RouterConfig{XDS: p.istiods[i].GRPC, Name: namespace + "-0", Namespace: namespace,
		IP: fmt.Sprintf("10.1.1.%d", i+1), Labels: map[string]string{"istio": namespace}})
}

// What became of the plan is read back from two istiods, found by their pods,
// that demand an identity and know one gateway each. Where one may not look,
// nothing is known.
func TestReadBack(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	p := startPair(t)
	p.awaitPods(t, "no istiod is known", bothUnknown("no pod with label app=istiod is ready in namespace istio-system"))
	for i := range p.istiods {
		p.istiodPod(t, i, true)
	}
	envoytest.Eventually(t, 30*time.Second, "both istiods are found and read", func() bool {
		d := p.delivery(t)
		return d.Problem == "" && len(d.Istiods) == 2 && d.Istiods[0].Problem == "" && d.Istiods[1].Problem == ""
	})
	p.awaitPods(t, "no gateway is connected", bothUnknown("connected to none of the istiods"))
	for i := range p.istiods {
		p.router(t, i)
	}
	acknowledged := func(a, b told) bool { return a.acknowledged(p.istiods[0]) && b.acknowledged(p.istiods[1]) }
	p.awaitPods(t, "each istiod tells that its gateway acknowledged", acknowledged)

	// Another control plane, of the same plan but without an identity.
	blind := newRig(t)
	p.start(t, blind, p.cluster.Kubeconfig)
	blind.awaitPods(t, "without a token nothing is known", bothUnknown("istiod demands an identity (HTTP 401)"))
	blind.stop(syscall.SIGTERM)
	for _, identity := range []struct{ what, namespace, audience, reason string }{
		{"a token for another audience", "periscope-system", "elsewhere", "istiod demands an identity (HTTP 401)"},
		{"a token of a namespace that istiods don't let in", "default", "istio-ca", "istiod doesn't let this identity look (HTTP 403)"},
	} {
		mustWrite(t, p.token, p.cluster.ServiceAccountToken(t, identity.namespace, "periscope-control", identity.audience))
		p.awaitPods(t, identity.what, bothUnknown(identity.reason))
	}
	mustWrite(t, p.token, p.cluster.ServiceAccountToken(t, "periscope-system", "periscope-control", "istio-ca"))
	p.awaitPods(t, "a renewed token", acknowledged)

	p.istiods[0].Stop(syscall.SIGKILL)
	p.awaitPods(t, "an istiod that is away tells nothing", func(a, b told) bool {
		return a.unknown("http://"+p.istiods[0].Monitoring) && b.acknowledged(p.istiods[1])
	})
	p.istiodPod(t, 0, false)
	p.awaitPods(t, "its gateway has no istiod", func(a, b told) bool {
		return a.unknown("connected to none of the istiods") && b.acknowledged(p.istiods[1])
	})

	p.stop(syscall.SIGTERM)
	nobody := filepath.Join(t.TempDir(), "kubeconfig")
	p.cluster.WriteKubeconfig(t, nobody, p.cluster.ServiceAccountToken(t, "default", "nobody", ""))
	p.start(t, p.rig, nobody, "--istiod-token", p.token)
	p.awaitPods(t, "who may not list pods knows nothing", bothUnknown("pods is forbidden"))
	if status, body := get(t, "http://"+p.debug+"/ready"); status != http.StatusOK {
		t.Errorf("the control plane is not ready: %d %s", status, body)
	}
}
