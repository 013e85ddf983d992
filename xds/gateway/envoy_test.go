package gateway

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/logtest"
	"github.com/periscope-mesh/periscope/test/xdstest"
	"github.com/periscope-mesh/periscope/xds"
)

const goodPlugin = `
local made = 0
function envoy_on_request(h)
  local md = h:streamInfo():dynamicMetadata()
  local r = md:get("periscope.rev")
  made = made + 1
  md:set("test", "r", r and r.r or "none")
  md:set("test", "made", made)
end
function envoy_on_response(h)
  local t = h:streamInfo():dynamicMetadata():get("test")
  h:headers():add("x-plugin", "%s")
  h:headers():add("x-rev", t.r)
  h:headers():add("x-made", tostring(t.made))
end
`

func plugin(version string) string { return fmt.Sprintf(goodPlugin, version) }

// rig is a real Envoy with our bootstrap between a client and an upstream.
type rig struct {
	t        *testing.T
	config   Config
	plan     mirror.GatewayPlan
	server   *xds.Server
	xdsAddr  string
	admin    string
	http     string
	https    string
	upstream *httptest.Server
	client   *http.Client
	last     atomic.Pointer[http.Request]
	log      *logtest.Buffer

	stopServing func()
}

// newRig prepares everything but Envoy; change its config and plan before start.
func newRig(t *testing.T) *rig {
	t.Helper()
	envoytest.Path(t)
	r := &rig{t: t, admin: envoytest.FreeAddr(t), http: envoytest.FreeAddr(t), https: envoytest.FreeAddr(t), log: &logtest.Buffer{}}
	r.upstream = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.last.Store(req.Clone(context.Background()))
		if strings.HasPrefix(req.URL.Path, "/slow/") {
			time.Sleep(time.Second)
		}
		w.Header().Set("Server", "upstream/1")
		fmt.Fprintf(w, "%s %s", req.Method, req.RequestURI)
	}))
	t.Cleanup(r.upstream.Close)
	cert, key := selfSigned(t)
	r.config = Config{
		HTTP: r.http, HTTPS: r.https, CertFile: cert, KeyFile: key,
		Upstream: r.upstream.URL, Plugin: plugin("one"),
	}
	gw := mirror.Gateway{Namespace: "default", Name: "gateway"}
	r.plan = mirror.GatewayPlan{Gateway: gw, Settings: mirror.Settings{Gateway: gw.ID(), Mode: policy.ModeMonitor, SharePPM: 1_000_000}}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 1,
	}
	t.Cleanup(transport.CloseIdleConnections)
	r.client = &http.Client{Transport: transport, Timeout: 10 * time.Second}

	r.serve(envoytest.FreeAddr(t))
	return r
}

// serve starts a control plane, which knows nothing of an earlier one.
func (r *rig) serve(address string) {
	r.t.Helper()
	r.server, r.xdsAddr, r.stopServing = xdstest.Serve(r.t, address)
}

// push serves what follows from config and plan now.
func (r *rig) push() {
	r.t.Helper()
	s, err := Snapshot(r.config, r.plan)
	if err != nil {
		r.t.Fatal(err)
	}
	r.server.SetSnapshot(xds.GatewayKey(r.plan.Gateway.ID()), s)
}

// start runs Envoy with our bootstrap, over the incremental protocol or not.
func (r *rig) start(protocol string) {
	r.t.Helper()
	r.push()
	boot, err := Bootstrap(BootstrapConfig{Gateway: r.plan.Gateway, XDS: r.xdsAddr, Admin: r.admin})
	if err != nil {
		r.t.Fatal(err)
	}
	if protocol == "sotw" {
		boot = bytes.Replace(boot, []byte("DELTA_GRPC"), []byte("GRPC"), 1)
	}
	file := filepath.Join(r.t.TempDir(), "bootstrap.json")
	if err := os.WriteFile(file, boot, 0o600); err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(envoytest.Path(r.t), "-c", file, "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart")
	cmd.Stdout, cmd.Stderr = r.log, r.log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if r.t.Failed() {
			r.t.Logf("envoy log:\n%s", r.log)
		}
	})
}

// until polls a condition, for at most 20 seconds.
func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			r.t.Fatalf("not within 20s: %s", what)
		}
	}
}

type answer struct {
	status int
	body   string
	header http.Header
	proto  string
	reused bool
}

func (r *rig) get(url string) (answer, error) {
	var a answer
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { a.reused = i.Reused }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(context.Background(), trace), http.MethodGet, url, nil)
	if err != nil {
		return a, err
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	a.status, a.body, a.header, a.proto = resp.StatusCode, string(body), resp.Header, resp.Proto
	return a, err
}

func (r *rig) mustGet(url string) answer {
	r.t.Helper()
	a, err := r.get(url)
	if err != nil || a.status != http.StatusOK {
		r.t.Fatalf("GET %s: status %d, %v", url, a.status, err)
	}
	return a
}

func (r *rig) awaitTraffic() {
	r.t.Helper()
	r.until("both listeners answer", func() bool {
		a, err := r.get("http://" + r.http + "/")
		b, err2 := r.get("https://" + r.https + "/")
		return err == nil && err2 == nil && a.status == 200 && b.status == 200
	})
}

// stats reads Envoy's counters and gauges.
func (r *rig) stats() map[string]int64 {
	r.t.Helper()
	resp, err := http.Get("http://" + r.admin + "/stats?format=json")
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	var doc struct {
		Stats []struct {
			Name  string          `json:"name"`
			Value json.RawMessage `json:"value"`
		} `json:"stats"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil {
		r.t.Fatal(err)
	}
	out := map[string]int64{}
	for _, s := range doc.Stats {
		if n, err := strconv.ParseInt(string(s.Value), 10, 64); err == nil {
			out[s.Name] = n
		}
	}
	return out
}

func (r *rig) ecds() xds.TypeState {
	for _, c := range r.server.Connections() {
		for typeURL, state := range c.Types {
			if strings.HasSuffix(typeURL, "TypedExtensionConfig") {
				return state
			}
		}
	}
	return xds.TypeState{}
}

func eachProtocol(t *testing.T, f func(t *testing.T, protocol string)) {
	for _, p := range []string{"delta", "sotw"} {
		t.Run(p, func(t *testing.T) { t.Parallel(); f(t, p) })
	}
}

const reloads = "extension_config_discovery.http_filter."

// listenerStats are those which a change of a listener would move.
func listenerStats(s map[string]int64) map[string]int64 {
	out := map[string]int64{}
	for name, v := range s {
		if strings.HasPrefix(name, "listener_manager.") && !strings.Contains(name, "lds.") ||
			name == "listener_manager.lds.config_reload" || strings.HasSuffix(name, PluginFilter+".config_reload") ||
			strings.HasSuffix(name, ".downstream_cx_destroy") && !strings.Contains(name, "admin.") || strings.HasSuffix(name, ".rds.default.config_reload") {
			out[name] = v
		}
	}
	return out
}

func TestEnvoySettingsChange(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		r := newRig(t)
		r.start(protocol)
		r.awaitTraffic()

		a := r.mustGet("http://" + r.http + "/a//b/../%2e%2e/c?q=%27%20or%201=1")
		if want := "GET /a//b/../%2e%2e/c?q=%27%20or%201=1"; a.body != want {
			t.Errorf("upstream saw %q, want %q", a.body, want)
		}
		if got := a.header.Get("Server"); got != "upstream/1" {
			t.Errorf("server header is %q, want the upstream's", got)
		}
		for name := range r.last.Load().Header {
			if strings.HasPrefix(name, "X-Envoy") || name == "X-Request-Id" {
				t.Errorf("upstream was sent %s", name)
			}
		}
		b := r.mustGet("https://" + r.https + "/x")
		if b.proto != "HTTP/2.0" || b.header.Get("x-plugin") != "one" {
			t.Errorf("over TLS: protocol %s, plugin %q", b.proto, b.header.Get("x-plugin"))
		}
		rev := func() string { return digest(r.plan.Settings.Encode()) }
		if got := a.header.Get("x-rev"); got != rev() {
			t.Errorf("plugin read revision %q, want %q", got, rev())
		}

		r.mustGet("http://" + r.http + "/")
		before := r.stats()
		made, _ := strconv.Atoi(r.mustGet("http://" + r.http + "/").header.Get("x-made"))
		for i, ppm := range []int{1, 1_000_000, 1} {
			r.plan.Settings.SharePPM = ppm
			from := time.Now()
			r.push()
			r.until("settings are in force", func() bool {
				a := r.mustGet("http://" + r.http + "/")
				if !a.reused {
					t.Error("a connection was closed")
				}
				n, _ := strconv.Atoi(a.header.Get("x-made"))
				if n <= made {
					t.Errorf("the Lua machine was rebuilt: its counter went from %d to %d", made, n)
				}
				made = n
				return a.header.Get("x-rev") == rev()
			})
			t.Logf("change %d in force after %v", i, time.Since(from))
		}
		after := r.stats()
		if len(listenerStats(before)) < 6 {
			t.Errorf("too few statistics found: %v", listenerStats(before))
		}
		for name, v := range listenerStats(before) {
			if after[name] != v {
				t.Errorf("%s went from %d to %d", name, v, after[name])
			}
		}
		if name := reloads + SettingsFilter + ".config_reload"; after[name]-before[name] != 3 {
			t.Errorf("%s went from %d to %d, want 3 more", name, before[name], after[name])
		}
	})
}

func TestEnvoyBadPluginFirst(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		r := newRig(t)
		r.config.Plugin = "function envoy_on_request(h) this is no Lua"
		r.start(protocol)
		r.awaitTraffic()
		a := r.mustGet("http://" + r.http + "/x")
		if a.header.Get("x-plugin") != "" || a.body != "GET /x" {
			t.Errorf("answer %q by plugin %q", a.body, a.header.Get("x-plugin"))
		}
		r.until("the rejection is visible", func() bool { return len(r.ecds().Rejected) == 1 })
		if s := r.ecds(); s.Rejected[0].Name != PluginFilter || !strings.Contains(s.LastError, "no Lua") && !strings.Contains(s.LastError, "'is'") {
			t.Errorf("rejection is %+v", s.Rejected)
		}
		// It isn't sent again and again.
		pushed := r.ecds().Nonce
		r.mustGet("http://" + r.http + "/x")
		if got := r.ecds().Nonce; got != pushed {
			t.Errorf("pushed again: nonce %s, then %s", pushed, got)
		}
		// A good one takes over.
		r.config.Plugin = plugin("two")
		r.push()
		r.until("the good plugin is in force", func() bool {
			return r.mustGet("http://"+r.http+"/x").header.Get("x-plugin") == "two"
		})
		r.until("the rejection is gone", func() bool { s := r.ecds(); return len(s.Rejected) == 0 && s.Acked == s.Sent })
	})
}

func TestEnvoyBadPluginLater(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		r := newRig(t)
		r.start(protocol)
		r.awaitTraffic()
		r.until("the plugin is in force", func() bool {
			return r.mustGet("http://"+r.http+"/").header.Get("x-plugin") == "one"
		})
		// Bad code and new settings at once: the settings must not be lost.
		r.config.Plugin = "this is no Lua"
		r.plan.Settings.SharePPM = 5
		r.push()
		r.until("the rejection is visible", func() bool { return len(r.ecds().Rejected) == 1 })
		r.until("the settings are in force under the old plugin", func() bool {
			a := r.mustGet("http://" + r.http + "/")
			if a.header.Get("x-plugin") != "one" {
				t.Fatalf("plugin is %q", a.header.Get("x-plugin"))
			}
			return a.header.Get("x-rev") == digest(r.plan.Settings.Encode())
		})
		if s := r.ecds(); s.Acked == s.Sent || s.LastError == "" {
			t.Errorf("state looks in order: %+v", s)
		}
	})
}

// TestEnvoyControlPlaneRestart: a new control plane with the same plan changes
// nothing at a gateway, and the next change reaches it.
func TestEnvoyControlPlaneRestart(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		r := newRig(t)
		r.start(protocol)
		r.awaitTraffic()
		r.mustGet("http://" + r.http + "/")
		before := r.stats()
		r.stopServing()
		r.mustGet("http://" + r.http + "/")
		r.serve(r.xdsAddr)
		r.push()
		r.until("the gateway is back", func() bool { return r.ecds().Nonce != "" || len(r.server.Connections()) > 0 })
		r.plan.Settings.SharePPM = 7
		r.push()
		r.until("new settings are in force", func() bool {
			return r.mustGet("http://"+r.http+"/").header.Get("x-rev") == digest(r.plan.Settings.Encode())
		})
		after := r.stats()
		for name, v := range listenerStats(before) {
			if after[name] != v {
				t.Errorf("%s went from %d to %d", name, v, after[name])
			}
		}
		if n := after["cluster_manager.cluster_modified"]; n != 0 {
			t.Errorf("%d clusters were modified", n)
		}
	})
}

// TestEnvoyClusterChange changes a cluster whose endpoints stay as they are.
func TestEnvoyClusterChange(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		r := newRig(t)
		r.start(protocol)
		r.awaitTraffic()
		up, err := parseUpstream(r.config.Upstream)
		if err != nil {
			t.Fatal(err)
		}
		changed, err := clusters(r.config, up)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range changed {
			c.Message.(*cluster.Cluster).ConnectTimeout = durationpb.New(time.Second)
		}
		s, err := Snapshot(r.config, r.plan)
		if err != nil {
			t.Fatal(err)
		}
		if s, err = s.With(resource.ClusterType, changed...); err != nil {
			t.Fatal(err)
		}
		if s, err = s.With(resource.EndpointType, endpoints(up)...); err != nil {
			t.Fatal(err)
		}
		from := time.Now()
		r.server.SetSnapshot(xds.GatewayKey(r.plan.Gateway.ID()), s)
		r.until("clusters are modified and warm", func() bool {
			r.mustGet("http://" + r.http + "/")
			st := r.stats()
			return st["cluster_manager.cluster_modified"] == 2 && st["cluster_manager.warming_clusters"] == 0
		})

		if d := time.Since(from); d > 3*time.Second {
			t.Errorf("warming took %v", d)
		}
	})
}

// mirroring sends each request's path to the node, and nothing else.
const mirroring = `
function envoy_on_request(h)
  h:httpCall("periscope_mirror", {[":method"]="POST", [":path"]="/v1/events", [":authority"]="n"}, h:headers():get(":path"), 1000, true)
end
`

// TestEnvoyMirrorCluster: nodes come and go without a listener, a cluster or a
// user noticing, and the only node isn't taken out when it fails.
func TestEnvoyMirrorCluster(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	var protocol atomic.Value
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	failing := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		calls.Add(1)
		protocol.Store(req.Proto)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	failing.Config.Protocols = protocols
	failing.Start()
	defer failing.Close()

	r := newRig(t)
	r.config.Plugin = mirroring
	r.start("delta")
	r.awaitTraffic()
	for range 20 {
		r.mustGet("http://" + r.http + "/none")
	}
	addr := failing.Listener.Addr().(*net.TCPAddr)
	r.plan.Endpoints = []mirror.Endpoint{{Host: "127.0.0.1", Port: addr.Port}}
	r.push()
	r.until("the node is called", func() bool { r.mustGet("http://" + r.http + "/x"); return calls.Load() > 0 })
	if p := protocol.Load(); p != "HTTP/2.0" {
		t.Errorf("protocol is %v", p)
	}
	// Outlier detection needs five failures and looks once a second.
	for calls.Load() < 50 {
		r.mustGet("http://" + r.http + "/x")
	}
	stats := r.stats()
	for name, want := range map[string]int64{
		"cluster.periscope_mirror.outlier_detection.ejections_active": 0,
		"cluster.periscope_mirror.upstream_rq_retry":                  0,
		"cluster_manager.cluster_modified":                            0,
		"lua.periscope.errors":                                        0,
	} {
		if got, ok := stats[name]; got != want || !ok && !strings.HasPrefix(name, "lua.") {
			t.Errorf("%s is %d (there: %v), want %d", name, got, ok, want)
		}
	}
	if stats["cluster.periscope_mirror.outlier_detection.ejections_overflow"] == 0 {
		t.Errorf("outlier detection had nothing to refrain from")
	}
	r.plan.Endpoints = nil
	r.push()
	r.until("the node is gone", func() bool { return r.stats()["cluster.periscope_mirror.membership_total"] == 0 })
	r.mustGet("http://" + r.http + "/none")
}

// sink is a node that only counts its calls, and can be away or silent.
type sink struct {
	t      *testing.T
	addr   string
	server *http.Server
	calls  atomic.Int64
	silent atomic.Bool
}

func startSink(t *testing.T) *sink {
	t.Helper()
	s := &sink{t: t, addr: envoytest.FreeAddr(t)}
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *sink) start() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.server = &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		s.calls.Add(1)
		if s.silent.Load() {
			<-req.Context().Done()
		}
	})}
	s.server.Protocols.SetUnencryptedHTTP2(true)
	go func(server *http.Server) { _ = server.Serve(l) }(s.server)
}

func (s *sink) stop() { _ = s.server.Close() }

func (s *sink) endpoint(machine string) mirror.Endpoint {
	s.t.Helper()
	host, port, _ := net.SplitHostPort(s.addr)
	n, err := strconv.Atoi(port)
	if err != nil {
		s.t.Fatal(err)
	}
	return mirror.Endpoint{Host: host, Port: n, Machine: machine}
}

// A gateway goes to the node on its machine alone; while that is away or silent
// to the others, also if one of those is away too; and back. Users' requests,
// which the test makes all the time, succeed.
func TestEnvoyPrefersLocalNodes(t *testing.T) {
	t.Parallel()
	local, other, away := startSink(t), startSink(t), startSink(t)
	r := newRig(t)
	r.config.Plugin = mirroring
	r.plan.Gateway.Machines = []string{"host-a"}
	r.plan.Endpoints = []mirror.Endpoint{away.endpoint(""), local.endpoint("host-a"), other.endpoint("")}
	r.start("delta")
	r.awaitTraffic()
	// reaches waits until calls reach one node, and no other for a hundred of them.
	reaches := func(what string, node *sink) {
		t.Helper()
		start := time.Now()
		all := func() int64 { return local.calls.Load() + other.calls.Load() + away.calls.Load() }
		calls, elsewhere := node.calls.Load(), all()-node.calls.Load()
		r.until(what, func() bool {
			r.mustGet("http://" + r.http + "/x")
			if n := all() - node.calls.Load(); n != elsewhere {
				calls, elsewhere = node.calls.Load(), n
			}
			return node.calls.Load() >= calls+100
		})
		t.Logf("%s: %v", what, time.Since(start).Round(time.Millisecond))
	}
	reaches("the local node has all", local)
	if n := other.calls.Load() + away.calls.Load(); n > 0 {
		t.Errorf("%d calls to other machines", n)
	}
	away.stop()
	local.stop()
	reaches("another machine's node stands in", other)
	local.start()
	reaches("the local node is back", local)
	local.silent.Store(true)
	reaches("another machine's node stands in for a silent one", other)
	local.silent.Store(false)
	reaches("the local node speaks again", local)
}

// startNode takes what the gateway copies, and gives events by path.
func startNode(t *testing.T) (of func(path string) (event.Event, bool), port int) {
	ring := ingest.NewRing(1024, 1<<20)
	batches, err := ingest.New(ingest.Config{Ring: ring, Authenticator: ingest.Trusting{}})
	if err != nil {
		t.Fatal(err)
	}
	node := httptest.NewUnstartedServer(batches)
	node.Config.Protocols = new(http.Protocols)
	node.Config.Protocols.SetUnencryptedHTTP2(true)
	node.Start()
	t.Cleanup(node.Close)
	var mu sync.Mutex
	copied := map[string]event.Event{} // by path
	go func() {
		for {
			x, ok := ring.Pop(t.Context())
			if !ok {
				return
			}
			mu.Lock()
			for _, f := range x.Event.Request.Headers {
				if string(f.Name) == ":path" {
					copied[string(f.Value)] = *x.Event
				}
			}
			mu.Unlock()
			x.Done()
		}
	}()
	return func(path string) (event.Event, bool) {
		mu.Lock()
		defer mu.Unlock()
		e, ok := copied[path]
		return e, ok
	}, node.Listener.Addr().(*net.TCPAddr).Port
}

func is(of func(string) (event.Event, bool), path string) bool {
	_, ok := of(path)
	return ok
}

// TestEnvoyShares: load control's share moves without a listener, a connection or
// the plugin's Lua machine noticing; what a lower share leaves of sessions are
// among a higher one's, and each whole.
func TestEnvoyShares(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		of, port := startNode(t)
		r := newRig(t)
		r.config.Plugin = lua.Embedded().Code
		r.plan.Endpoints = []mirror.Endpoint{{Host: "127.0.0.1", Port: port}}
		s := &r.plan.Settings
		s.PolicyID, s.PolicyRev = "default/default", "0123456789ab"
		s.Session = policy.Session{Header: "x-session"}
		s.Always = []policy.Class{policy.ClassAuthentication}
		r.start(protocol)
		r.awaitTraffic()
		client := &http.Client{Transport: &http.Transport{}}
		defer client.CloseIdleConnections()
		n := 0
		share := func(ppm int) (sessions map[int]bool) {
			t.Helper()
			s.Shares = &mirror.Shares{Revision: strconv.Itoa(ppm), Default: []mirror.Share{{PPM: ppm, Priority: mirror.Everything}}, Pods: map[string][]mirror.Share{"elsewhere": {{PPM: 1}}}}
			r.push()
			r.until("the share is in force", func() bool {
				n++
				path := fmt.Sprintf("/login/%d", n) // spared
				get := func(path string) {
					if a := r.mustGet("http://" + r.http + path); n > 1 && !a.reused {
						t.Error("a connection was closed")
					}
				}
				get(path)
				sampled := fmt.Sprintf("/sampled/%d", n)
				for i := range 40 {
					get(fmt.Sprint(sampled, "/", i))
				}
				r.until("the one that is spared is copied", func() bool { return is(of, path) })
				e, _ := of(path)
				if e.SharePPM != mirror.Everything || e.Class != string(policy.ClassAuthentication) && ppm < mirror.Everything {
					return false
				}
				for i := range 40 {
					if e, ok := of(fmt.Sprint(sampled, "/", i)); ok {
						return e.SharePPM == uint64(ppm)
					}
				}
				return false
			})
			const of1 = 120
			n++
			for i := range of1 {
				for _, part := range []string{"a", "b"} {
					req, _ := http.NewRequest("GET", fmt.Sprintf("http://%s/part/%d/%d/%s", r.http, n, i, part), nil)
					req.Header.Set("x-session", fmt.Sprint("s", i))
					res, err := client.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					_, _ = io.Copy(io.Discard, res.Body)
					res.Body.Close()
				}
			}
			last := fmt.Sprintf("/login/end/%d", n)
			r.mustGet("http://" + r.http + last)
			r.until("the last one is copied", func() bool { return is(of, last) })
			sessions = map[int]bool{}
			for i := range of1 {
				a, b := is(of, fmt.Sprintf("/part/%d/%d/a", n, i)), is(of, fmt.Sprintf("/part/%d/%d/b", n, i))
				if a != b {
					t.Errorf("half of session %d is copied", i)
				}
				if a {
					sessions[i] = true
				}
			}
			return sessions
		}
		all := share(mirror.Everything)
		before := r.stats()
		half, tenth := share(500_000), share(100_000)
		if len(all) != 120 || len(half) < 35 || len(half) > 85 || len(tenth) < 1 || len(tenth) > 30 {
			t.Errorf("of 120 sessions: %d, %d at a half, %d at a tenth", len(all), len(half), len(tenth))
		}
		for i := range tenth {
			if !half[i] {
				t.Errorf("session %d is copied at a tenth, and not at a half", i)
			}
		}
		after := r.stats()
		for name, v := range listenerStats(before) {
			if after[name] != v {
				t.Errorf("%s went from %d to %d", name, v, after[name])
			}
		}
		if name := reloads + PluginFilter + ".config_reload"; after[name] != before[name] {
			t.Errorf("%s went from %d to %d", name, before[name], after[name])
		}
	})
}

// TestEnvoyIdle: a gateway ceases to copy, and begins again, without a listener, a
// connection or a user noticing. What was under way is copied to its end.
func TestEnvoyIdle(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol string) {
		of, port := startNode(t)
		r := newRig(t)
		r.config.Plugin = lua.Embedded().Code
		r.plan.Endpoints = []mirror.Endpoint{{Host: "127.0.0.1", Port: port}}
		s := &r.plan.Settings
		s.PolicyID, s.PolicyRev = "default/default", "r"
		s.Request, s.Response = policy.Default().Spec.Body.Request, policy.Default().Spec.Body.Response
		r.start(protocol)
		r.awaitTraffic()
		n := 0
		copies := func() {
			t.Helper()
			r.until("an exchange is copied", func() bool {
				n++
				path := fmt.Sprintf("/copied/%d", n)
				if a := r.mustGet("http://" + r.http + path); n > 1 && !a.reused {
					t.Error("a connection was closed")
				}
				time.Sleep(20 * time.Millisecond)
				_, ok := of(path)
				return ok
			})
		}
		copies()
		before := r.stats()
		plugins := reloads + PluginFilter + ".config_reload"
		change := func(what string, f func()) {
			t.Helper()
			was := r.stats()[plugins]
			f()
			r.push()
			r.until(what+" is in force", func() bool { return r.stats()[plugins] == was+1 })
		}
		for i, off := range []func(){func() { s.SharePPM = 0 }, func() { s.Mode = policy.ModeOff }} {
			held := fmt.Sprintf("/slow/%d", i)
			slow := make(chan error, 1)
			go func() {
				_, err := r.get("https://" + r.https + held)
				slow <- err
			}()
			r.until("a slow exchange is under way", func() bool { p := r.last.Load(); return p != nil && p.URL.Path == held })
			change("the end of copies", off)
			for k := range 50 {
				if a := r.mustGet(fmt.Sprintf("http://%s/idle/%d/%d", r.http, i, k)); !a.reused {
					t.Error("a connection was closed")
				}
			}
			if err := <-slow; err != nil {
				t.Error(err)
			}
			r.until("what was under way is copied", func() bool { _, ok := of(held); return ok })
			if e, _ := of(held); e.Flags != 0 || string(e.Response.Body) != "GET "+held {
				t.Errorf("what was under way: flags %b, body %q", e.Flags, e.Response.Body)
			}
			change("the beginning of copies", func() { s.SharePPM, s.Mode = mirror.Everything, policy.ModeMonitor })
			copies()
		}
		for i := range 2 {
			for k := range 50 {
				if path := fmt.Sprintf("/idle/%d/%d", i, k); is(of, path) {
					t.Errorf("%s is copied", path)
				}
			}
		}
		after := r.stats()
		for name, v := range listenerStats(before) {
			if name != plugins && after[name] != v {
				t.Errorf("%s went from %d to %d", name, v, after[name])
			}
		}
		if n := after["lua.periscope.errors"]; n != 0 {
			t.Errorf("%d errors of the plugin", n)
		}
	})
}

// TestEnvoyUpstreams tries the ways to name an upstream.
func TestEnvoyUpstreams(t *testing.T) {
	t.Parallel()
	hello := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { fmt.Fprint(w, req.Proto, " ", req.Host) })
	secure := httptest.NewUnstartedServer(hello)
	secure.EnableHTTP2 = true
	certFile, keyFile := selfSigned(t)
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	secure.StartTLS()
	defer secure.Close()
	securePort := secure.Listener.Addr().(*net.TCPAddr).Port

	r := newRig(t)
	r.start("delta")
	r.awaitTraffic()
	tests := []struct{ name, upstream, ca, want string }{
		{"TLS by address, proven", fmt.Sprintf("https://127.0.0.1:%d", securePort), certFile, "HTTP/2.0 " + r.http},
		{"TLS by name, proven", fmt.Sprintf("https://localhost:%d", securePort), certFile, "HTTP/2.0 " + r.http},
		{"TLS by name, unproven", fmt.Sprintf("https://localhost:%d", securePort), "", "HTTP/2.0 " + r.http},
	}
	if l, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		six := httptest.NewUnstartedServer(hello)
		six.Listener.Close()
		six.Listener = l
		six.Start()
		defer six.Close()
		tests = append(tests, struct{ name, upstream, ca, want string }{
			"localhost on IPv6 only", fmt.Sprintf("http://localhost:%d", l.Addr().(*net.TCPAddr).Port), "", "HTTP/1.1 " + r.http})
	}
	for _, tt := range tests {
		r.config.Upstream, r.config.UpstreamCAFile = tt.upstream, tt.ca
		r.push()
		r.until(tt.name, func() bool {
			a, err := r.get("http://" + r.http + "/")
			return err == nil && a.body == tt.want
		})
	}
	// A server that can't prove itself gets nothing.
	otherCA, _ := selfSigned(t)
	r.config.Upstream, r.config.UpstreamCAFile = fmt.Sprintf("https://127.0.0.1:%d", securePort), otherCA
	r.push()
	r.until("an impostor is refused", func() bool {
		a, err := r.get("http://" + r.http + "/")
		return err == nil && a.status == http.StatusServiceUnavailable
	})
}

func selfSigned(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for _, f := range []struct {
		name, kind string
		der        []byte
	}{{certFile, "CERTIFICATE", der}, {keyFile, "PRIVATE KEY", pkcs8}} {
		if err := os.WriteFile(f.name, pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}
