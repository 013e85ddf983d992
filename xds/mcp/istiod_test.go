package mcp_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// collector is an analysis node that keeps the headers of batches, and access
// logs.
type collector struct {
	t       *testing.T
	addr    string
	stop    func() // and waits; start starts it again
	mu      sync.Mutex
	headers []event.Header
	logs    []*event.Log
}

func startCollector(t *testing.T) (*collector, mirror.Endpoint) {
	t.Helper()
	c := &collector{t: t, addr: envoytest.FreeAddr(t)}
	c.start()
	t.Cleanup(func() { c.stop() })
	host, port, _ := net.SplitHostPort(c.addr)
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return c, mirror.Endpoint{Host: host, Port: n}
}

func (c *collector) start() {
	c.t.Helper()
	l, err := net.Listen("tcp", c.addr)
	if err != nil {
		c.t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true) // and nothing else
	s := &http.Server{Handler: c, Protocols: protocols}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	c.stop = func() { _ = s.Close(); <-done }
}

// batches is how many came.
func (c *collector) batches() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.headers)
}

func (c *collector) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if r.URL.Path == event.LogPath {
		log, err := event.DecodeLog(body[5:], event.DefaultLimits()) // behind gRPC's head of a message
		if err != nil {
			c.t.Error(err)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.logs = append(c.logs, log)
		return
	}
	b, err := event.Decode(body, event.DefaultLimits())
	if err != nil || len(b.Events) == 0 {
		c.t.Errorf("batch of %d events: %v", len(b.Events), err)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.headers = append(c.headers, b.Header)
}

// last gives the header of the newest batch.
func (c *collector) last() event.Header {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.headers) == 0 {
		return event.Header{}
	}
	return c.headers[len(c.headers)-1]
}

// Both forms through a real istiod into a real Envoy: it mirrors, and an edit of
// a policy changes what each form's description says that it changes.
func TestRealIstiod(t *testing.T) {
	kubetest.Binary(t, "istiod")
	envoytest.Path(t)
	server, address := serve(t)
	node, endpoint := startCollector(t)
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "upstream") }))
	t.Cleanup(upstream.Close)
	compile := func(percent float64) mirror.Plan {
		return mirror.Compile([]policy.MirrorPolicy{policyFor("public", func(s *policy.Spec) { s.Sampling.Percent = percent })},
			mirror.Topology{Gateways: []mirror.Gateway{workload("public")}, Nodes: nodes(endpoint)})
	}
	publish := func(form mcp.Form, percent float64) (revision string) {
		p := compile(percent)
		server.SetSnapshot(mcp.Key(""), snapshot(t, config(form), p))
		return p.Nodes[0].Revision
	}
	revision := publish(mcp.FormEnvoyFilter, 100)

	cluster := kubetest.Start(t)
	cluster.InstallIstio(t)
	cluster.Namespace(t, "istio-ingress")
	front := envoytest.FreeAddr(t)
	_, port, _ := net.SplitHostPort(front)
	_, upstreamPort, _ := net.SplitHostPort(strings.TrimPrefix(upstream.URL, "http://"))
	cluster.Apply(t, kubetest.WebGateway("istio-ingress", "public", port, upstreamPort)+`---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: own, namespace: istio-ingress}
spec: {accessLogging: [{providers: [{name: envoy}]}]}
`)
	i := kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: cluster, Sources: []string{"xds://" + address}})
	gateway := kubetest.StartRouter(t, kubetest.RouterConfig{XDS: i.GRPC, Name: "public-0", Namespace: "istio-ingress", IP: "127.0.0.9", Labels: map[string]string{"istio": "public"}})

	client := &http.Client{Timeout: 5 * time.Second}
	t.Cleanup(client.CloseIdleConnections)
	ask := func() bool {
		res, err := client.Get("http://" + front + "/")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		return err == nil && string(body) == "upstream"
	}
	mirrors := func(what, revision string) event.Header {
		t.Helper()
		start := time.Now()
		envoytest.Eventually(t, 30*time.Second, what, func() bool { ask(); return node.last().PolicyRev == revision })
		h := node.last()
		t.Logf("%s after %v", what, time.Since(start).Round(time.Millisecond))
		if h.Gateway != "istio-ingress/public" || h.Counters["errors"] != 0 {
			t.Errorf("%s: %+v", what, h)
		}
		return h
	}

	before := mirrors("EnvoyFilter mirrors", revision)
	listeners, code := gateway.Stat("listener_manager.listener_modified"), gateway.Stat("extension_config_discovery.http_filter.periscope.mirror.config_reload")
	after := mirrors("an edit is in force", publish(mcp.FormEnvoyFilter, 99.9999))
	if after.VM != before.VM {
		t.Error("the edit rebuilt the Lua machine")
	}
	if n := gateway.Stat("listener_manager.listener_modified"); n != listeners {
		t.Error("the edit touched a listener")
	}
	if n := gateway.Stat("extension_config_discovery.http_filter.periscope.mirror.config_reload"); n != code || code == 0 {
		t.Errorf("the plugin was loaded %d times, then %d", code, n)
	}
	mirrors("the edit is taken back", publish(mcp.FormEnvoyFilter, 100))

	checkAccessLog(t, node, gateway, front)

	inline := publish(mcp.FormTrafficExtension, 99)
	mirrors("TrafficExtension mirrors", inline)
	// Dots stand for what would mean something else in a pattern.
	if gateway.Stat("cluster.outbound.5050..periscope-public-nodes.istio-ingress.periscope.internal..upstream_rq_total") == 0 {
		t.Error("no request went through the service entry's cluster")
	}
	mirrors("an edit inline is in force", publish(mcp.FormTrafficExtension, 98))
	if n := gateway.Stat("listener_manager.listener_modified"); n <= listeners {
		t.Error("the listener is as it was")
	}
}

// checkAccessLog tells whether what Envoy refuses comes to the node, and the
// user's own access log is there beside ours.
func checkAccessLog(t *testing.T, node *collector, gateway *envoytest.Envoy, front string) {
	t.Helper()
	c, err := net.Dial("tcp", front)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GE@T / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	envoytest.Eventually(t, 10*time.Second, "a refused request is logged", func() bool {
		node.mu.Lock()
		defer node.mu.Unlock()
		return len(node.logs) > 0
	})
	node.mu.Lock()
	defer node.mu.Unlock()
	if l := node.logs[0]; len(node.logs) != 1 || l.Gateway != "istio-ingress/public" || len(l.Entries) != 1 || l.Entries[0].ResponseFlags != "DPE" {
		t.Errorf("%d logs, the first %+v", len(node.logs), l)
	}
	res, err := http.Get("http://" + gateway.Admin + "/config_dump?resource=dynamic_listeners")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	dump, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if own, ours := strings.Count(string(dump), `"envoy.access_loggers.file"`), strings.Count(string(dump), `"envoy.access_loggers.open_telemetry"`); own == 0 || ours != 2 {
		t.Errorf("%d access logs of the user's, %d of ours", own, ours)
	}
}
