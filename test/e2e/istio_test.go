package e2e

import (
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/cgrouptest"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
)

// mesh is a real istiod with a gateway, and Periscope registered as a source
// of its configuration.
type mesh struct {
	*rig
	meshConfig
	cluster *kubetest.Cluster
	istiod  *kubetest.Istiod
	gateway *envoytest.Envoy
	control *process
	node    *process
	// nodeGroup bounds the node's CPU time; nil: nothing does.
	nodeGroup *cgrouptest.Group
	policy    string // file
	// monitoring is istiod's port of that name, which the control plane reads
	// back from.
	monitoring   string
	upstreamPort string
}

// meshConfig is what differs between the meshes of tests.
type meshConfig struct {
	gatewayAPI bool
	objects    func(namespace, port, upstreamPort string) string // the gateway's, in Kubernetes
	pod        string                                            // the gateway's
	labels     map[string]string                                 // the pod's
	policies   string
	limited    bool   // the node's CPU time, by nodeGroup
	nobody     bool   // the node runs as a user without any capability
	machine    string // the pod's, as its proxy tells it
	services   bool   // nodes are those of the service that policies name, and the test's to start
}

const meshPolicy = `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: web, namespace: gw-ns}
spec:
  targetRefs: [{group: networking.istio.io, kind: Gateway, name: web}]
`

// startMesh brings all of it up, with a Gateway of Istio's own API.
func startMesh(t *testing.T) *mesh {
	t.Helper()
	return startMeshOf(t, webMesh())
}

func webMesh() meshConfig {
	return meshConfig{pod: "gw-0", labels: map[string]string{"istio": "gw", "app": "gw"}, policies: meshPolicy,
		objects: func(namespace, port, upstreamPort string) string {
			return kubetest.WebGateway(namespace, "gw", port, upstreamPort) + "---" + gatewayPod("gw-0", port)
		}}
}

// gatewayPod is one of the gateway's pods; its port is known by the name web.
func gatewayPod(name, port string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: gw-ns, labels: {istio: gw, app: gw}}
spec: {containers: [{name: istio-proxy, image: none, ports: [{name: web, containerPort: %s}]}]}
`, name, port)
}

func startMeshOf(t *testing.T, c meshConfig) *mesh {
	t.Helper()
	m := &mesh{rig: newRig(t), meshConfig: c, cluster: kubetest.Start(t), policy: filepath.Join(t.TempDir(), "policy.yaml"), monitoring: envoytest.FreeAddr(t)}
	m.cluster.InstallIstio(t)
	if c.gatewayAPI {
		m.cluster.InstallGatewayAPI(t)
	}
	m.cluster.Namespace(t, "gw-ns")
	m.upstream(t)
	_, port, _ := net.SplitHostPort(m.http)
	m.cluster.Apply(t, c.objects("gw-ns", port, m.upstreamPort))
	mustWrite(t, m.policy, c.policies)
	m.control = m.startControl(t)
	switch {
	case c.services:
	case c.limited:
		m.nodeGroup = m.limitedNode(t)
	default:
		m.node = start(t, m.nodeArgs()...)
		m.node.waitFor("node started")
	}
	if !c.services {
		view := start(t, "console", "--console", m.console, "--data", m.dataDir)
		view.waitFor("console started")
	}
	m.istiod = kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: m.cluster, Sources: []string{"xds://" + m.xds}, Monitoring: m.monitoring, GatewayAPI: c.gatewayAPI})
	m.gateway = m.startGatewayOn(t, c.machine, c.pod, m.http)
	return m
}

// upstream starts what is behind the gateway.
func (m *mesh) upstream(t *testing.T) {
	t.Helper()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "upstream") }))
	t.Cleanup(upstream.Close)
	m.upstreamPort = portOf(strings.TrimPrefix(upstream.URL, "http://"))
}

// startGateway starts the Envoy of one of the gateway's pods, and waits until
// it serves at an address.
func (m *mesh) startGateway(t *testing.T, pod, address string) *envoytest.Envoy {
	t.Helper()
	return m.startGatewayOn(t, "", pod, address)
}

func (m *mesh) startGatewayOn(t *testing.T, machine, pod, address string) *envoytest.Envoy {
	t.Helper()
	e := kubetest.StartRouter(t, kubetest.RouterConfig{XDS: m.istiod.GRPC, Name: pod, Namespace: "gw-ns", IP: "127.0.0.9", Labels: m.labels, Machine: machine})
	envoytest.Eventually(t, 30*time.Second, pod+" serves", func() bool { return request(http.DefaultTransport, "http://"+address+"/") == nil })
	return e
}

func (m *mesh) startControl(t *testing.T, args ...string) *process {
	t.Helper()
	if !m.services {
		args = append(args, "--node", m.nodeListen)
	}
	p := start(t, append([]string{"control", "--kubeconfig", m.cluster.Kubeconfig, "--policy", m.policy, "--data", m.dataDir, "--xds", m.xds, "--debug", m.debug,
		"--orca-port", portOf(m.nodeORCA), "--istiod", "http://" + m.monitoring}, args...)...)
	p.waitFor("control plane started")
	return p
}

// The production path: a gateway of Istio's starts mirroring because the
// control plane is a source of istiod's, and follows the policy.
func TestIstio(t *testing.T) {
	m := startMesh(t)
	m.follows(t, meshPolicy, "gw-ns/gw")
}

// follows shows the whole path: the attack is registered, each edit of the
// policy is in effect within a second and touches no listener, and what Envoy
// acknowledged is known. The policy's text must be last in its file.
func (m *mesh) follows(t *testing.T, policy, gateway string) {
	t.Helper()
	if status, body := get(t, "http://"+m.http+"/etc/passwd"); status != http.StatusOK || body != "upstream" {
		t.Errorf("the user got %d %s", status, body)
	}
	m.effect(t, true, func() { get(t, "http://"+m.http+"/warm") })
	get(t, "http://"+m.http+"/etc/passwd")
	m.attack(t, "the attack through Istio's gateway", func(a attackRow) bool { return a.Type == "path-traversal" && a.Gateway == gateway })

	listeners := m.gateway.Stat("listener_manager.listener_modified")
	for _, step := range []struct {
		name, spec string
		mirrored   bool
	}{
		{"off", strings.Replace(policy, "spec:", "spec:\n  mode: \"Off\"", 1), false},
		{"on", policy, true},
		{"excluded", policy + "  exclude: [{paths: [{value: /internal}]}]\n", false},
	} {
		took := m.edit(t, strings.Replace(m.policies, policy, step.spec, 1), step.mirrored)
		t.Logf("%s: in effect after %v", step.name, took.Round(time.Millisecond))
		if took > time.Second {
			t.Errorf("%s: took %v", step.name, took)
		}
	}
	// The loop is closed: what istiod and Envoy did with it is known.
	envoytest.Eventually(t, 20*time.Second, "the gateway's acknowledgement is read back", func() bool {
		var state struct {
			Delivery struct {
				Gateways []struct{ Gateway, Stage string }
			}
		}
		getJSON(t, "http://"+m.debug+"/debug/policyz", &state)
		g := state.Delivery.Gateways
		return len(g) == 1 && g[0].Gateway == gateway && g[0].Stage == "acknowledged"
	})
	if n := m.gateway.Stat("listener_manager.listener_modified"); n != listeners {
		t.Errorf("policy edits modified listeners %d times", n-listeners)
	}
}

// edit rewrites the policies, and gives the time until what is internal is
// mirrored, or is not, as wanted.
func (m *mesh) edit(t *testing.T, policies string, mirrored bool) time.Duration {
	t.Helper()
	mustWrite(t, m.policy, policies)
	return m.effect(t, mirrored, func() { get(t, "http://"+m.http+"/internal/probe") })
}

// resumes waits until mirroring goes on, and makes sure that no user noticed
// what happened.
func (m *mesh) resumes(t *testing.T, l *load, what string) {
	t.Helper()
	before := m.mirrored(t)
	envoytest.Eventually(t, 20*time.Second, "mirroring goes on after "+what, func() bool { return m.mirrored(t) > before+20 })
	if _, errs := l.cut(); len(errs) > 0 {
		t.Errorf("%s: %d users' requests failed, such as %v", what, len(errs), errs[0])
	}
}

// Control plane, node and istiod are restarted in turn under steady load: no
// user's request fails, and mirroring resumes by itself.
func TestIstioRestarts(t *testing.T) {
	m := startMesh(t)
	l := startLoad("http://"+m.http+"/api", 50, 4)
	defer l.end()
	m.resumes(t, l, "the start")
	m.control.stop(syscall.SIGKILL)
	m.control = m.startControl(t)
	m.resumes(t, l, "a restart of the control plane")
	m.node.stop(syscall.SIGKILL)
	m.node = start(t, m.nodeArgs()...)
	m.node.waitFor("node started")
	m.resumes(t, l, "a restart of the node")
	m.istiod.Stop(syscall.SIGKILL)
	m.resumes(t, l, "the end of istiod")

	reconnects := m.gateway.Stat("cluster.xds-grpc.upstream_cx_total")
	m.istiod.Restart(t)
	envoytest.Eventually(t, time.Minute, "the gateway reconnects", func() bool { // Envoy waits longer each time
		return m.gateway.Stat("cluster.xds-grpc.upstream_cx_total") > reconnects && m.gateway.Stat("control_plane.connected_state") == 1
	})
	m.resumes(t, l, "a restart of istiod")
	for _, mode := range []string{"Off", "Monitor"} { // all of the load is mirrored, or nothing
		took := m.edit(t, strings.Replace(meshPolicy, "spec:", "spec:\n  mode: \""+mode+"\"", 1), mode == "Monitor")
		t.Logf("through the new istiod, %s: in effect after %v", mode, took.Round(time.Millisecond))
		if took > time.Second {
			t.Errorf("%s: took %v", mode, took)
		}
	}
	m.resumes(t, l, "an edit")
}

// istioctl's overlay registers the control plane: what it generates is applied
// to the API, and its mesh config starts an istiod that takes our resources, over
// TLS.
func TestOverlayRegisters(t *testing.T) {
	const host = "periscope-control.periscope-system.svc"
	istioctl := kubetest.Binary(t, "istioctl")
	r := newRig(t)
	c := kubetest.Start(t)
	ca := newAuthority(t)
	cmd := exec.Command(istioctl, "manifest", "generate", "-f", "../../deploy/istio/periscope.yaml")
	cmd.Env = append(os.Environ(), "KUBECONFIG=/dev/null")
	manifest, err := cmd.Output()
	if err != nil {
		t.Fatalf("istioctl manifest generate: %v", err)
	}
	c.Namespace(t, "istio-system")
	c.Apply(t, string(manifest))
	if !regexp.MustCompile(`name: DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES\n\s+value: "?periscope-system"?\n`).Match(manifest) {
		t.Error("istiod would not let the control plane read back")
	}
	c.Apply(t, fmt.Sprintf("{apiVersion: v1, kind: Secret, metadata: {name: periscope-ca, namespace: istio-system}, stringData: {ca.crt: %q}}", ca.pem))
	var config struct {
		Data struct{ Mesh string } `json:"data"`
	}
	c.Get(t, "/api/v1/namespaces/istio-system/configmaps/istio", &config)
	if !strings.Contains(config.Data.Mesh, "xds://"+host+":15051") {
		t.Fatalf("the mesh config does not name the control plane:\n%s", config.Data.Mesh)
	}
	dir := t.TempDir()
	policy, cert, key := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "xds.crt"), filepath.Join(dir, "xds.key")
	mustWrite(t, policy, meshPolicy)
	// Nobody knows the service's name here: the address stands in for it.
	_, _, certPEM, keyPEM := ca.sign(&x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{host}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	mustWrite(t, cert, certPEM)
	mustWrite(t, key, keyPEM)
	control := start(t, "control", "--kubeconfig", c.Kubeconfig, "--policy", policy, "--data", r.dataDir, "--xds", r.xds, "--debug", r.debug, "--xds-tls-cert", cert, "--xds-tls-key", key)
	control.waitFor("control plane started")
	kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: c, MeshConfigRaw: strings.ReplaceAll(config.Data.Mesh, host+":15051", r.xds)})
	var clients struct {
		Clients []struct{ ConnectionID string } `json:"clients"`
	}
	envoytest.Eventually(t, 5*time.Second, "istiod is connected", func() bool {
		getJSON(t, "http://"+r.debug+"/debug/connections", &clients)
		return len(clients.Clients) > 0
	})
}

// istiod needs its sources to start: a control plane whose policy is broken and
// whose Kubernetes API is away serves what it accepted last.
func TestIstiodStartsWithLastPlan(t *testing.T) {
	m := startMesh(t)
	get(t, "http://"+m.http+"/etc/passwd")
	m.control.stop(syscall.SIGTERM)
	mustWrite(t, m.policy, "spec: [")
	control := start(t, "control", "--kubeconfig", unreachable(t), "--policy", m.policy, "--data", m.dataDir, "--xds", m.xds, "--debug", m.debug, "--node", m.nodeListen)
	control.waitFor("control plane started")
	m.istiod.Stop(syscall.SIGTERM)
	again := kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: m.cluster, Name: "istiod-1", Sources: []string{"xds://" + m.xds}})
	envoytest.Eventually(t, 20*time.Second, "the new istiod has our filters", func() bool {
		_, body := get(t, "http://"+again.Monitoring+"/debug/configz")
		return strings.Contains(body, "periscope-gw-settings") && strings.Contains(body, "periscope-gw-plugin")
	})
}

// unreachable is a kubeconfig of an API server that is away.
func unreachable(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	mustWrite(t, file, fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: away, cluster: {server: "https://%s"}}]
users: [{name: nobody, user: {token: x}}]
contexts: [{name: away, context: {cluster: away, user: nobody}}]
current-context: away
`, envoytest.FreeAddr(t)))
	return file
}
