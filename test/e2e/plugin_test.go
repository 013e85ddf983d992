package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
)

// build writes another build of the plugin: ours by another version, with more
// at its end.
func build(t *testing.T, version, more string) (file string, b lua.Build) {
	t.Helper()
	own := lua.Embedded()
	code := strings.Replace(own.Code, fmt.Sprintf("local VERSION = %q", own.Version), fmt.Sprintf("local VERSION = %q", version), 1) + more
	b, err := lua.Read(code)
	if err != nil || b.Version != version {
		t.Fatalf("build %s: %s, %v", version, b.Name(), err)
	}
	file = filepath.Join(t.TempDir(), version+".lua")
	mustWrite(t, file, code)
	return file, b
}

// Builds that are broken, each in its own way.
const (
	brokenSyntax = "\nfunction envoy_on_request(\n"
	brokenAtLoad = "\nlocal none = nil\nnone.field = 1\n"
	// It loads, and fails with each request where nobody but the plugin sees it.
	brokenAtWork = `
local begin_as_before = envoy_on_request
function envoy_on_request(h)
  failed(h, "broken at work")
  return begin_as_before(h)
end
`
	// It loads, and its every request ends in an error that Envoy alone sees.
	brokenSilent = "\nfunction envoy_on_request(h) error('broken in silence') end\n"
)

// pluginz is the page of that name.
type pluginz struct {
	Rollout struct {
		Target, Stable         struct{ Name string }
		Phase, Reason, Problem string
		Failed                 map[string]string
		Gateways               []struct {
			Gateway, Build, Delivery, Reason string
			Heard                            []struct {
				Plugin       string
				Seen, Errors uint64
			}
		}
	}
	Proxies []struct {
		State     string
		LastError string
		Running   struct{ Version, Digest string }
	}
}

func (r *rig) pluginz(t *testing.T) (p pluginz) {
	t.Helper()
	getJSON(t, "http://"+r.debug+"/debug/pluginz", &p)
	return p
}

// runs gives the gateways that are to run a build and, as far as nodes hear, do.
func (p pluginz) runs(b lua.Build) (ids []string) {
	for _, g := range p.Rollout.Gateways {
		for _, h := range g.Heard {
			if g.Build == b.Name() && h.Plugin == b.Name() && h.Seen > 0 {
				ids = append(ids, g.Gateway)
			}
		}
	}
	return ids
}

func (r *rig) untilRollout(t *testing.T, what string, ok func(pluginz) bool) (p pluginz) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("%+v", p)
		}
	}()
	envoytest.Eventually(t, time.Minute, what, func() bool {
		p = r.pluginz(t)
		return ok(p)
	})
	return p
}

// pluginRig is a gateway that we serve directly, with a node, under load.
type pluginRig struct {
	*rig
	control  *process
	envoy    *envoytest.Envoy
	upstream string
}

func (r *pluginRig) restart(t *testing.T, args ...string) {
	t.Helper()
	if r.control != nil {
		r.control.stop(syscall.SIGTERM)
	}
	r.control = start(t, append([]string{"control", "--upstream", r.upstream, "--xds", r.xds, "--debug", r.debug, "--http", r.http, "--https", "", "--data", r.dataDir,
		"--node", r.nodeListen, "--envoy", envoytest.Path(t), "--plugin-soak", "2s"}, args...)...)
	r.control.waitFor("control plane started")
}

// A new build reaches the gateway; one that does not load is never sent; forced
// through, it fails alone and is rolled back, as is one that fails at work. No
// user's request fails, and mirroring goes on.
func TestPluginRollout(t *testing.T) {
	r := &pluginRig{rig: newRig(t)}
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "upstream") }))
	t.Cleanup(up.Close)
	r.upstream = up.URL
	r.restart(t)
	node := start(t, r.nodeArgs()...)
	node.waitFor("node started")
	raw, err := exec.Command(program, "bootstrap", "--xds", r.xds, "--gateway", "default/gateway").Output()
	if err != nil {
		t.Fatal(err)
	}
	var bootstrap map[string]any
	if err := json.Unmarshal(raw, &bootstrap); err != nil {
		t.Fatal(err)
	}
	r.envoy = envoytest.Start(t, bootstrap, "--component-log-level", "lua:off")
	l := startLoad("http://"+r.http+"/api", 50, 2)
	defer l.end()
	const gateway = "default/gateway"
	first := lua.Embedded()
	r.untilRollout(t, "the gateway runs the build of the binary", func(p pluginz) bool {
		return p.Rollout.Phase == "complete" && slices.Equal(p.runs(first), []string{gateway})
	})
	if _, errs := l.cut(); len(errs) > 0 {
		t.Errorf("at the start %d users' requests failed, such as %v", len(errs), errs[0])
	}
	listeners := r.envoy.Stat("listener_manager.listener_modified")

	second, good := build(t, "0.1.1", "")
	r.restart(t, "--plugin", second)
	r.untilRollout(t, "the gateway runs another build", func(p pluginz) bool {
		return p.Rollout.Phase == "complete" && p.Rollout.Stable.Name == good.Name() && slices.Equal(p.runs(good), []string{gateway}) &&
			len(p.Proxies) == 1 && p.Proxies[0].Running.Version == "0.1.1" && p.Proxies[0].Running.Digest == good.Digest
	})

	for name, more := range map[string]string{"syntax": brokenSyntax, "at load": brokenAtLoad} {
		file, bad := build(t, "0.2.0", more)
		r.restart(t, "--plugin", file)
		p := r.untilRollout(t, name+": the build is refused before it is sent", func(p pluginz) bool { return p.Rollout.Problem != "" })
		if !strings.Contains(p.Rollout.Problem, "script load error") || !strings.Contains(p.Rollout.Problem, file) || p.Rollout.Target.Name != good.Name() {
			t.Errorf("%s: %+v", name, p.Rollout)
		}
		if _, dump := get(t, "http://"+r.envoy.Admin+"/config_dump"); strings.Contains(dump, bad.Digest) {
			t.Errorf("%s: the gateway was sent %s", name, bad.Name())
		}
	}

	for _, tc := range []struct{ name, more, reason string }{
		{"syntax", brokenSyntax, "script load error"},
		{"at work", brokenAtWork, "errors of the plugin"},
		{"in silence", brokenSilent, "nothing came from it"},
	} {
		file, bad := build(t, "0.3.0", tc.more)
		r.restart(t, "--plugin", file, "--plugin-unchecked")
		p := r.untilRollout(t, tc.name+": forced through, the build is rolled back", func(p pluginz) bool { return p.Rollout.Phase == "rolled back" })
		if !strings.Contains(p.Rollout.Failed[bad.Name()], tc.reason) || p.Rollout.Gateways[0].Build != good.Name() {
			t.Errorf("%s: %+v", tc.name, p.Rollout)
		}
		before := r.mirrored(t)
		envoytest.Eventually(t, 20*time.Second, tc.name+": mirroring goes on", func() bool { return r.mirrored(t) > before+20 })
		r.untilRollout(t, tc.name+": the gateway runs the build before", func(p pluginz) bool {
			return len(p.Proxies) == 1 && p.Proxies[0].State == "SYNCED" && p.Proxies[0].Running.Digest == good.Digest
		})
		// A restart tries it no more.
		r.restart(t, "--plugin", file, "--plugin-unchecked")
		if p := r.pluginz(t); p.Rollout.Phase != "rolled back" || p.Rollout.Gateways[0].Build != good.Name() {
			t.Errorf("%s, after a restart: %+v", tc.name, p.Rollout)
		}
		if !strings.Contains(r.control.output(), "plugin stays rolled back") {
			t.Errorf("%s: the log does not say so:\n%s", tc.name, r.control.output())
		}
	}

	if _, errs := l.cut(); len(errs) > 0 {
		t.Errorf("%d users' requests failed, such as %v", len(errs), errs[0])
	}
	if n := r.envoy.Stat("listener_manager.listener_modified"); n != listeners {
		t.Errorf("listeners were modified %d times", n-listeners)
	}
}

// A build that writes what the connected node does not read is held back.
func TestPluginNewerThanNode(t *testing.T) {
	r := newRig(t).up(t)
	get(t, "http://"+r.http+"/")
	r.stop(syscall.SIGTERM)
	file, b := build(t, "9.0.0", "")
	mustWrite(t, file, strings.Replace(b.Code, fmt.Sprintf("\nlocal WIRE = %d\n", event.Version), "\nlocal WIRE = 99\n", 1))
	control := start(t, "control", "--upstream", "http://127.0.0.1:9", "--xds", r.xds, "--debug", r.debug, "--http", r.http, "--https", "", "--data", r.dataDir, "--node", r.nodeListen,
		"--plugin", file, "--envoy", envoytest.Path(t))
	control.waitFor("control plane started")
	node := start(t, append(r.nodeArgs(), "--name", "old-node")...)
	node.waitFor("node started")
	r.untilRollout(t, "the build is held back", func(p pluginz) bool {
		return p.Rollout.Phase == "held" && strings.Contains(p.Rollout.Reason, fmt.Sprintf("writes wire version 99, and node old-node reads %v: update it first", event.Versions()))
	})
}

// Through istiod: one gateway after the other; a build that Envoy refuses is
// isolated by ECDS at the first of them, istiod shows Envoy's words, and both
// gateways go on with the build before.
func TestIstioPluginRollout(t *testing.T) {
	m := startMesh(t)
	second := m.secondGateway(t)
	l := startLoad("http://"+m.http+"/api", 20, 2)
	defer l.end()
	other := startLoad("http://"+second.addr+"/api", 20, 2)
	defer other.end()
	ids := []string{"gw-ns/gw", "gw-ns/gw2"}
	own := lua.Embedded()
	m.untilRollout(t, "both gateways run the build of the binary", func(p pluginz) bool {
		return p.Rollout.Phase == "complete" && slices.Equal(p.runs(own), ids)
	})
	l.cut()
	other.cut()
	listeners := m.gateway.Stat("listener_manager.listener_modified") + second.envoy.Stat("listener_manager.listener_modified")

	file, good := build(t, "0.1.1", "")
	m.control.stop(syscall.SIGTERM)
	m.control = m.startControl(t, "--plugin", file, "--envoy", envoytest.Path(t), "--plugin-soak", "4s")
	m.untilRollout(t, "the canary runs the new build alone", func(p pluginz) bool {
		return p.Rollout.Phase == "rolling" && slices.Equal(p.runs(good), ids[:1]) && p.Rollout.Gateways[1].Build == own.Name()
	})
	m.untilRollout(t, "both gateways run the new build", func(p pluginz) bool {
		return p.Rollout.Phase == "complete" && slices.Equal(p.runs(good), ids)
	})

	file, bad := build(t, "0.2.0", brokenSyntax)
	m.control.stop(syscall.SIGTERM)
	m.control = m.startControl(t, "--plugin", file, "--plugin-unchecked", "--plugin-soak", "4s")
	seen := ""
	p := m.untilRollout(t, "the broken build is rolled back", func(p pluginz) bool {
		if _, sync := get(t, "http://"+m.monitoring+"/debug/syncz"); strings.Contains(sync, "script load error") {
			seen = sync
		}
		return p.Rollout.Phase == "rolled back"
	})
	if !strings.Contains(p.Rollout.Failed[bad.Name()], "gw-ns/gw: it is refused") || !strings.Contains(p.Rollout.Failed[bad.Name()], "script load error") {
		t.Errorf("failed: %v", p.Rollout.Failed)
	}
	if seen == "" {
		t.Error("istiod's /debug/syncz never showed Envoy's refusal")
	}
	if n := second.envoy.Stat("extension_config_discovery.http_filter.periscope.mirror.config_fail"); n != 0 {
		t.Errorf("the broken build came to the second gateway %d times", n)
	}
	m.untilRollout(t, "both gateways have acknowledged the build before", func(p pluginz) bool {
		return p.Rollout.Gateways[0].Delivery == "acknowledged" && p.Rollout.Gateways[1].Delivery == "acknowledged" &&
			p.Rollout.Gateways[0].Build == good.Name() && p.Rollout.Gateways[1].Build == good.Name()
	})
	before := m.mirrored(t)
	envoytest.Eventually(t, 20*time.Second, "mirroring goes on", func() bool { return m.mirrored(t) > before+40 })
	for what, l := range map[string]*load{"first": l, "second": other} {
		if _, errs := l.cut(); len(errs) > 0 {
			t.Errorf("%d users' requests of the %s gateway failed, such as %v", len(errs), what, errs[0])
		}
	}
	if n := m.gateway.Stat("listener_manager.listener_modified") + second.envoy.Stat("listener_manager.listener_modified"); n != listeners {
		t.Errorf("listeners were modified %d times", n-listeners)
	}
}

// secondGateway is another workload of the mesh, behind a Gateway of its own,
// under the same policy.
type secondGateway struct {
	addr  string
	envoy *envoytest.Envoy
}

func (m *mesh) secondGateway(t *testing.T) *secondGateway {
	t.Helper()
	s := &secondGateway{addr: envoytest.FreeAddr(t)}
	_, port, _ := strings.Cut(s.addr, ":")
	m.cluster.Apply(t, fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web2, namespace: gw-ns}
spec:
  selector: {istio: gw2}
  servers:
  - {port: {number: %s, name: http, protocol: HTTP}, bind: 127.0.0.1, hosts: ["*"]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo2, namespace: gw-ns}
spec:
  hosts: ["*"]
  gateways: [web2]
  http: [{route: [{destination: {host: echo.example, port: {number: 80}}}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: gw2-0, namespace: gw-ns, labels: {istio: gw2, app: gw2}}
spec: {containers: [{name: istio-proxy, image: none}]}
`, port))
	mustWrite(t, m.policy, meshPolicy[:strings.Index(meshPolicy, "  targetRefs")]+"  targetRefs:\n  - {group: networking.istio.io, kind: Gateway, name: web}\n  - {group: networking.istio.io, kind: Gateway, name: web2}\n")
	s.envoy = kubetest.StartRouter(t, kubetest.RouterConfig{XDS: m.istiod.GRPC, Name: "gw2-0", Namespace: "gw-ns", IP: "127.0.0.10", Labels: map[string]string{"istio": "gw2", "app": "gw2"}})
	envoytest.Eventually(t, 30*time.Second, "the second gateway serves", func() bool {
		res, err := http.Get("http://" + s.addr + "/")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return s
}
