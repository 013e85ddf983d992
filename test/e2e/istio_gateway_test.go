package e2e

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
)

// balancer asks gateways in turn. One that refuses the connection or cuts it
// before the answer's end is passed over for the next, as by a load balancer
// that checks health; an answer counts, whatever it says.
type balancer struct {
	transport    *http.Transport
	urls         []string
	turn, passed atomic.Int64
}

func (b *balancer) ask() error {
	var err error
	turn := int(b.turn.Add(1))
	for i := range b.urls {
		if err = request(b.transport, b.urls[(turn+i)%len(b.urls)]); !cut(err) {
			return err
		}
		b.passed.Add(1)
	}
	return err
}

// cut tells an error that the end of the server's process makes.
func cut(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// second starts another pod of the gateway, on a port of its own, and gives its
// address: a Service leads the Gateway's port to each pod's own.
func (m *mesh) second(t *testing.T) (*envoytest.Envoy, string) {
	t.Helper()
	address := envoytest.FreeAddr(t)
	_, gatewayPort, _ := net.SplitHostPort(m.http)
	_, port, _ := net.SplitHostPort(address)
	m.cluster.Apply(t, gatewayPod("gw-1", port)+`---
apiVersion: v1
kind: Service
metadata: {name: gw, namespace: gw-ns}
spec: {selector: {istio: gw}, ports: [{name: http, port: `+gatewayPort+`, targetPort: web}]}
`)
	envoytest.Eventually(t, 10*time.Second, "istiod knows the Service", func() bool {
		_, known := get(t, "http://"+m.monitoring+"/debug/registryz")
		return strings.Contains(known, "gw.gw-ns.svc")
	})
	return m.startGateway(t, "gw-1", address), address
}

// One of a gateway's two Envoys is killed under steady load, and comes back,
// with the control plane there and then without it. Every request that reached
// a living one succeeds; the new one has our filters from its first
// configuration on, and mirrors.
func TestGatewayRestarts(t *testing.T) {
	m := startMesh(t)
	_, second := m.second(t)
	transport := &http.Transport{MaxIdleConnsPerHost: 4}
	t.Cleanup(transport.CloseIdleConnections)
	b := &balancer{transport: transport, urls: []string{"http://" + m.http + "/api", "http://" + second + "/api"}}
	l := startLoadOf(50, 4, b.ask)
	defer l.end()
	m.resumes(t, l, "the start")
	if n := b.passed.Load(); n > 0 {
		t.Errorf("%d requests were passed on, with both gateways alive", n)
	}
	restart := func(what string) {
		t.Helper()
		m.gateway.Kill()
		passed := b.passed.Load()
		envoytest.Eventually(t, 10*time.Second, "the load passes over the dead gateway", func() bool { return b.passed.Load() > passed })
		m.resumes(t, l, "the end of a gateway, "+what)
		m.gateway = m.startGateway(t, m.pod, m.http)
		back := b.passed.Load()
		m.resumes(t, l, "a restart of a gateway, "+what)
		if n := b.passed.Load() - back; n > 4 { // of each client, the one on its way
			t.Errorf("%s: %d requests were passed on after the gateway's return", what, n)
		}
		path := "/" + strings.ReplaceAll(what, " ", "-") + "/etc/passwd"
		get(t, "http://"+m.http+path)
		m.attack(t, "an attack through the new gateway, "+what, func(a attackRow) bool { return a.Path == path && a.Gateway == "gw-ns/gw" })
		for _, filter := range []string{"settings", "mirror"} {
			if n := m.gateway.Stat("extension_config_discovery.http_filter.periscope." + filter + ".config_reload"); n != 1 {
				t.Errorf("%s: %s was loaded %d times", what, filter, n)
			}
		}
		if n := m.gateway.Stat("listener_manager.listener_modified"); n != 0 {
			t.Errorf("%s: the listener was modified %d times", what, n)
		}
	}
	restart("control plane alive")
	m.control.stop(syscall.SIGKILL)
	restart("control plane dead")
}

// firstAnswer is how long a gateway takes from its start to its first answer.
// Then it is ended.
func (m *mesh) firstAnswer(t *testing.T, namespace, name, address string) time.Duration {
	t.Helper()
	start, answered := time.Now(), make(chan time.Duration, 1)
	go func() {
		for transport := (&http.Transport{DisableKeepAlives: true}); request(transport, "http://"+address+"/") != nil; {
			if time.Since(start) > 30*time.Second {
				break
			}
			<-time.After(time.Millisecond)
		}
		answered <- time.Since(start)
	}()
	e := kubetest.StartRouter(t, kubetest.RouterConfig{XDS: m.istiod.GRPC, Name: name + "-0", Namespace: namespace, IP: "127.0.0.9", Labels: map[string]string{"istio": name, "app": name}})
	took := <-answered
	e.Kill()
	return took
}

// settingsLost is what a control plane makes for the gateway named half, but
// for the settings: the listener asks for them, and istiod has none.
func settingsLost(t *testing.T, m *mesh) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, "render", "--policy", m.policy, "--gateway", "half-ns/half", "--target", "gw-ns/web", "--selector", "istio=half", "--node", m.nodeListen).Output()
	if err != nil {
		t.Fatalf("render: %v", err)
	}
	var kept []string
	for _, object := range strings.Split(string(out), "\n---\n") {
		if !strings.Contains(object, "name: periscope-half-settings") {
			kept = append(kept, object)
		}
	}
	if len(kept) != 1 {
		t.Fatalf("%d objects are left of\n%s", len(kept), out)
	}
	return kept[0]
}

// startMargin is for a noisy machine.
const startMargin = 150 * time.Millisecond

// A gateway that starts serves no later with our filters than without; nor with
// the control plane dead, nor when istiod lacks what a filter asks for.
func TestGatewayStart(t *testing.T) {
	m := startMesh(t)
	kinds := []struct{ name, namespace, gateway, address string }{
		{"without our filters", "plain-ns", "plain", envoytest.FreeAddr(t)},
		{"with them", "gw-ns", "gw", m.http},
		{"without their settings", "half-ns", "half", envoytest.FreeAddr(t)},
	}
	for _, k := range []int{0, 2} {
		m.cluster.Namespace(t, kinds[k].namespace)
		_, port, _ := net.SplitHostPort(kinds[k].address)
		m.cluster.Apply(t, kubetest.WebGateway(kinds[k].namespace, kinds[k].gateway, port, m.upstreamPort))
	}
	m.cluster.Apply(t, settingsLost(t, m))
	m.gateway.Kill()

	took := map[string][]time.Duration{}
	rounds := func(what string) {
		for range 5 {
			for _, k := range kinds {
				took[k.name+what] = append(took[k.name+what], m.firstAnswer(t, k.namespace, k.gateway, k.address))
			}
		}
		// The least of each: what the machine's other work adds differs from start
		// to start, a wait of ours would not.
		without := slices.Min(took[kinds[0].name+what])
		for _, k := range kinds {
			all := slices.Sorted(slices.Values(took[k.name+what]))
			t.Logf("%s%s: first answer after %v (median; %v to %v)", k.name, what, all[len(all)/2], all[0], all[len(all)-1])
			if all[0] > without+startMargin {
				t.Errorf("%s%s: first answer after %v at best, without our filters %v", k.name, what, all[0], without)
			}
		}
	}
	rounds(", control plane alive")
	m.control.stop(syscall.SIGKILL)
	rounds(", control plane dead")
}
