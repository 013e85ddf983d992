package e2e

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
)

// Without Lua: attacks come by ext_proc too, every exchange is accounted for, and
// the transport changes with the policy, live.
func TestTransportExtProc(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.yaml")
	policy := func(transport string) string {
		return fmt.Sprintf(`apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: public}
spec:
  transport: %s
  exclude: [{paths: [{type: Exact, value: /healthz}]}]
`, transport)
	}
	mustWrite(t, file, policy("ExtProc"))
	r := newRig(t).up(t, "--policy", file)
	get(t, "http://"+r.http+"/healthz")
	send(t, http.DefaultClient, http.MethodPost, "http://"+r.http+"/first", "application/json", `{"file":"../../../etc/passwd"}`, nil)
	a := r.attack(t, "path traversal in a body", func(a attackRow) bool { return a.Path == "/first" })
	if a.Gateway != "default/gateway" || a.Client != "127.0.0.1" || a.Location.Place != "json" || a.Status != 404 {
		t.Errorf("the attack: %+v", a)
	}
	var ledger struct {
		Steps []struct {
			Step       string
			Count      int
			Became     map[string]int
			Difference int
		}
	}
	envoytest.Eventually(t, 5*time.Second, "the ledger has both exchanges", func() bool {
		getJSON(t, "http://"+r.debug+"/debug/ledgerz", &ledger)
		return len(ledger.Steps) == 7 && ledger.Steps[0].Count == 2
	})
	if s := ledger.Steps[0]; s.Step != "exchanges streamed by gateways" || s.Became["mirrored"] != 1 || s.Became["excluded"] != 1 || s.Difference != 0 || ledger.Steps[3].Difference != 0 {
		t.Errorf("ledger: %+v", ledger)
	}
	var heard struct {
		Gateways []struct {
			Gateway, Plugin string
			Running         bool
			Seen, Errors    int
		}
	}
	shows := func(plugin string) {
		t.Helper()
		envoytest.Eventually(t, 15*time.Second, "the Gateways page shows "+plugin, func() bool {
			getJSON(t, "http://"+r.console+"/api/v1/gateways", &heard)
			return len(heard.Gateways) > 0 && heard.Gateways[0].Running && strings.HasPrefix(heard.Gateways[0].Plugin, plugin)
		})
	}
	shows("ExtProc")
	p := r.pluginz(t)
	if len(p.Rollout.Gateways) != 0 || p.Rollout.Phase != "complete" || len(p.Proxies) != 1 || p.Proxies[0].Running.Version != "ExtProc" {
		t.Errorf("pluginz: %+v", p)
	}

	var shares []struct{ Gateway, Carrier, Resource string }
	getJSON(t, "http://"+r.debug+"/debug/sharez", &shares)
	if len(shares) != 1 || shares[0].Resource != "periscope.mirror" {
		t.Errorf("sharez: %+v", shares)
	}

	for i, transport := range []string{"Lua", "ExtProc"} {
		mustWrite(t, file, policy(transport))
		envoytest.Eventually(t, 5*time.Second, "the gateway has "+transport, func() bool {
			p := r.pluginz(t)
			return len(p.Proxies) == 1 && (p.Proxies[0].Running.Version == "ExtProc") == (transport == "ExtProc") && len(p.Rollout.Gateways) == 1-i
		})
		// Its settings, of another filter, may come some milliseconds later.
		r.effect(t, true, func() { get(t, "http://"+r.http+"/warm") })
		path := "/by-" + strings.ToLower(transport)
		send(t, http.DefaultClient, http.MethodPost, "http://"+r.http+path, "application/json", `{"file":"../../../etc/passwd"}`, nil)
		r.attack(t, "path traversal by "+transport, func(a attackRow) bool { return a.Path == path })
		shows(map[string]string{"Lua": "0.", "ExtProc": "ExtProc"}[transport])
	}
}

// The same through istiod: ext_proc in a gateway of Istio's follows the policy,
// and no listener changes with the transport.
func TestIstioExtProc(t *testing.T) {
	const streams = meshPolicy + "  transport: ExtProc\n"
	m := startMeshOf(t, meshConfig{pod: "gw-0", labels: map[string]string{"istio": "gw", "app": "gw"}, policies: streams,
		objects: func(namespace, port, upstreamPort string) string {
			return kubetest.WebGateway(namespace, "gw", port, upstreamPort) + "---" + gatewayPod("gw-0", port)
		}})
	m.follows(t, streams, "gw-ns/gw")
	listeners, streamed := m.gateway.Stat("listener_manager.listener_modified"), metric(t, m.nodeAdmin, `periscope_extproc_exchanges_total{outcome="mirrored"}`)
	if streamed == 0 {
		t.Error("nothing came by ext_proc")
	}
	m.edit(t, meshPolicy, true)
	envoytest.Eventually(t, 10*time.Second, "exchanges come by the plugin", func() bool {
		get(t, "http://"+m.http+"/by-lua")
		return metric(t, m.nodeAdmin, `periscope_gateway_exchanges_total{outcome="mirrored"}`) > 0
	})
	if n := m.gateway.Stat("listener_manager.listener_modified"); n != listeners {
		t.Errorf("the transport's change modified listeners %d times", n-listeners)
	}
}
