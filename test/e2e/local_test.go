package e2e

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/test/netnstest"
)

// machine is a host with a gateway's pod and a node.
type machine struct {
	t       *testing.T // until whose end the node runs
	name    string
	pod     string
	front   string // of the gateway
	address string // of the node
	admin   string
	args    []string
	node    *process
	load    *load
}

func (m *machine) start() {
	m.t.Helper()
	m.node = start(m.t, m.args...)
	m.node.waitFor("node started")
}

// arrived is how many of a gateway's exchanges came to the node; 0 while it is
// away.
func (m *machine) arrived(t *testing.T) float64 {
	t.Helper()
	select {
	case <-m.node.done:
		return 0
	default:
		return metric(t, m.admin, `periscope_ingest_events_total{outcome="accepted"}`)
	}
}

// Each of a gateway's two pods mirrors to the node on its host alone, by either
// transport. When that is killed, exchanges come to the other one within seconds,
// and no user notices; when it is back, so are they.
func TestIstioLocalNodes(t *testing.T) {
	if !netnstest.Isolate(t) { // the API takes no endpoint on loopback
		return
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	machines := []*machine{{t: t, name: "host-a", pod: "gw-0", address: netnstest.Address}, {t: t, name: "host-b", pod: "gw-1", address: netnstest.Second}}
	m := startMeshOf(t, meshConfig{services: true, machine: "host-a", pod: "gw-0", labels: map[string]string{"istio": "gw", "app": "gw"}, policies: meshPolicy,
		objects: func(namespace, port, upstreamPort string) string {
			out := kubetest.WebGateway(namespace, "gw", port, upstreamPort) + fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: gw, namespace: gw-ns}
spec: {selector: {istio: gw}, ports: [{name: http, port: %s, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: periscope-node, namespace: gw-ns}
spec: {ports: [{name: mirror, port: 5050}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: periscope-node-1, namespace: gw-ns, labels: {kubernetes.io/service-name: periscope-node}}
addressType: IPv4
ports: [{name: mirror, port: 5050}]
endpoints: [{addresses: [%s], nodeName: host-a}, {addresses: [%s], nodeName: host-b}]
`, port, netnstest.Address, netnstest.Second)
			machines[0].front, machines[1].front = "127.0.0.1:"+port, envoytest.FreeAddr(t)
			for _, h := range machines {
				pod := gatewayPod(h.pod, portOf(h.front))
				out += "---" + strings.Replace(pod, "spec: {", "spec: {nodeName: "+h.name+", ", 1)
			}
			return out
		}})
	for _, h := range machines {
		h.admin = envoytest.FreeAddr(t)
		h.args = []string{"node", "--insecure-listen", net.JoinHostPort(h.address, "5050"), "--node-admin", h.admin, "--node-orca", envoytest.FreeAddr(t),
			"--control", m.xds, "--data", t.TempDir(), "--name", h.name}
		h.start()
	}
	m.startGatewayOn(t, "host-b", "gw-1", machines[1].front)
	for _, transport := range []string{"Lua", "ExtProc"} {
		t.Run(transport, func(t *testing.T) {
			mustWrite(t, m.policy, meshPolicy+"  transport: "+transport+"\n")
			for _, h := range machines {
				h.load = startLoad("http://"+h.front+"/api", 50, 4)
				m.follow(t, machines, h)
				h.load.end()
			}
		})
	}
}

// follow makes sure of one gateway, under load.
func (m *mesh) follow(t *testing.T, machines []*machine, own *machine) {
	t.Helper()
	other := machines[0]
	if other == own {
		other = machines[1]
	}
	// reaches waits until so many exchanges in turn come to one node.
	reaches := func(what string, h, not *machine) {
		t.Helper()
		start := time.Now()
		before, elsewhere := h.arrived(t), not.arrived(t)
		envoytest.Eventually(t, 30*time.Second, what, func() bool {
			if n := not.arrived(t); n != elsewhere {
				before, elsewhere = h.arrived(t), n
			}
			return h.arrived(t) >= before+50
		})
		t.Logf("%s: %s: after %v", own.name, what, time.Since(start).Round(time.Millisecond))
	}
	reaches("its own node has all", own, other)
	own.node.stop(syscall.SIGKILL)
	reaches("the other one stands in", other, own)
	own.start()
	reaches("its own node has all again", own, other)
	if took, errs := own.load.cut(); len(errs) > 0 || len(took) == 0 {
		t.Errorf("%s: %d of %d users' requests failed, such as %v", own.name, len(errs), len(took), errs)
	}
}
