package conformance

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/xds"
)

const (
	faultRate    = 300 // exchanges a second
	faultClients = 24
	faultFor     = 2 * time.Second
	slowness     = 5 * time.Second // who waits for a slow node, waits that long
)

// faultyNode is a node, or none, that does what none should.
type faultyNode struct {
	name string
	addr func(t *testing.T, r *rig) string // "": no node at all
	// cluster changes the mirror cluster.
	cluster func(t *testing.T, c *cluster.Cluster)
	// counter of Envoy's that tells of the fault; streams is that by ExtProc, ""
	// where the fault means nothing to who awaits no answer and, without a node,
	// opens no stream.
	counter, streams string
}

func faultyNodes() []faultyNode {
	alive := func(_ *testing.T, r *rig) string { return r.node.addr }
	answering := func(f http.HandlerFunc) func(*testing.T, *rig) string {
		return func(t *testing.T, _ *rig) string { return serveH2C(t, f) }
	}
	return []faultyNode{
		{name: "alive", addr: alive, counter: "upstream_rq_2xx", streams: "upstream_rq_2xx"},
		{name: "slow (5 s)", addr: answering(func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(slowness):
			case <-r.Context().Done():
			}
			w.WriteHeader(http.StatusAccepted)
		}), counter: "upstream_rq_timeout"},
		{name: "stalled", addr: raw(func(net.Conn) {}), counter: "upstream_rq_timeout", streams: "http2.keepalive_timeout"},
		{name: "dead", addr: func(*testing.T, *rig) string { return "192.0.2.1:9" }, counter: "upstream_cx_connect_fail", streams: "upstream_cx_connect_fail"},
		{name: "refusing", addr: func(t *testing.T, _ *rig) string { return envoytest.FreeAddr(t) }, counter: "upstream_cx_connect_fail", streams: "upstream_cx_connect_fail"},
		{name: "none", addr: func(*testing.T, *rig) string { return "" }, counter: "upstream_cx_none_healthy"},
		{name: "answers 503", addr: answering(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusServiceUnavailable)
		}), counter: "upstream_rq_5xx"},
		{name: "answers without reading", addr: answering(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }), counter: "upstream_rq_2xx", streams: "upstream_rq_2xx"},
		{name: "answers garbage", addr: raw(func(c net.Conn) { _, _ = c.Write(noise(4096)) }), counter: "upstream_cx_protocol_error", streams: "upstream_cx_protocol_error"},
		{name: "hangs up", addr: raw(func(c net.Conn) { c.Close() }), counter: "upstream_cx_destroy_remote", streams: "upstream_cx_destroy_remote"},
		{name: "TLS broken", addr: alive, cluster: func(t *testing.T, c *cluster.Cluster) {
			c.TransportSocket = &core.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: pack(t, &tlsv3.UpstreamTlsContext{})}}
		}, counter: "upstream_cx_connect_fail"},
		{name: "DNS gone", addr: alive, cluster: func(_ *testing.T, c *cluster.Cluster) {
			c.EdsClusterConfig = nil
			c.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STRICT_DNS}
			c.LoadAssignment = assignment(c.Name, address("nodes.invalid:5050"))
		}, counter: "upstream_cx_none_healthy", streams: "upstream_cx_none_healthy"},
		{name: "alive again", addr: alive, counter: "upstream_rq_2xx", streams: "upstream_rq_2xx"},
	}
}

// TestNodeFaults: whatever becomes of the node, no user's exchange fails, none
// waits, and Envoy counts it.
func TestNodeFaults(t *testing.T) {
	for _, tr := range []transport{transports[0], extProc} {
		t.Run(tr.name, func(t *testing.T) { runFaults(t, newRig(t, tr, "http")) })
	}
}

func runFaults(t *testing.T, r *rig) {
	var table strings.Builder
	fmt.Fprintf(&table, "\n%-24s %6s %6s %10s %10s %10s %9s  %s\n", "node", "users", "errors", "p50", "p99", "max", "heap MiB", "counted")
	for _, n := range faultyNodes() {
		counter := n.counter
		if r.transport.kind == policy.TransportExtProc {
			if counter = n.streams; counter == "" {
				continue
			}
		}
		r.become(t, n)
		// Counters of a changed cluster begin anew.
		before := r.envoy.Stat("cluster.periscope_mirror." + counter)
		took, errs := r.load(t)
		counted := 0
		for end := time.Now().Add(faultFor); counted <= 0 && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			counted = r.envoy.Stat("cluster.periscope_mirror."+counter) - before
		}
		p50 := quantile(took, 0.5)
		fmt.Fprintf(&table, "%-24s %6d %6d %10v %10v %10v %9d  %d %s\n", n.name, len(took), len(errs), p50.Round(time.Microsecond), quantile(took, 0.99).Round(time.Microsecond),
			quantile(took, 1).Round(time.Microsecond), r.envoy.Stat("server.memory_allocated")>>20, counted, counter)
		if len(errs) > 0 {
			t.Errorf("%s: %d of %d users had errors, such as %v", n.name, len(errs), len(took), errs[0])
		}
		if counted <= 0 {
			t.Errorf("%s: %s did not move", n.name, counter)
		}
		if p50 > slowness/2 {
			t.Errorf("%s: the median exchange takes %v", n.name, p50)
		}
	}
	t.Log(table.String())
	if n := r.luaErrors(); n != 0 {
		t.Errorf("%d Lua errors", n)
	}
	for vm, c := range r.node.counters() {
		if c["errors"] != 0 {
			t.Errorf("VM %s: %v", vm, c)
		}
	}
}

// become has the gateway mirror to a node.
func (r *rig) become(t *testing.T, n faultyNode) {
	t.Helper()
	r.plan.Endpoints = nil
	if addr := n.addr(t, r); addr != "" {
		r.plan.Endpoints = []mirror.Endpoint{endpointOf(addr)}
	}
	r.last = nil
	if n.cluster != nil {
		r.last = func(s *xds.Snapshot) *xds.Snapshot {
			return r.changeMirror(s, func(c *cluster.Cluster) { n.cluster(t, c) })
		}
	}
	r.push()
	want := r.server.Snapshots()[xds.GatewayKey(r.plan.Gateway.ID())]
	envoytest.Eventually(t, 10*time.Second, "the gateway has its node", func() bool {
		for _, c := range r.server.Connections() {
			if c.Types[resource.ClusterType].Acked != want.Version(resource.ClusterType) {
				return false
			}
			// A cluster of other kind asks for no endpoints.
			if n.cluster == nil && c.Types[resource.EndpointType].Acked != want.Version(resource.EndpointType) {
				return false
			}
		}
		return r.envoy.Stat("cluster_manager.warming_clusters") == 0
	})
}

// load sends exchanges at a steady rate, whatever becomes of them, and gives how
// long each took from when it was due.
func (r *rig) load(t *testing.T) (took []time.Duration, errs []error) {
	t.Helper()
	var mu sync.Mutex
	var wait sync.WaitGroup
	due := make(chan time.Time, faultRate*10)
	total := int(faultFor.Seconds() * faultRate)
	body := noise(2000)
	for range faultClients {
		wait.Go(func() {
			c := &client{r: r}
			defer c.close()
			for at := range due {
				x := (&exchange{method: "POST", body: [][]byte{body}, script: reply(200, [][]byte{body})}).defaults()
				tr, err := c.do(x, h11, "load")
				if err == nil && (Get(tr.got.Head, ":status") != "200" || string(tr.got.Body) != string(body) || tr.got.End != End) {
					err = fmt.Errorf("status %q, %d bytes, %s", Get(tr.got.Head, ":status"), len(tr.got.Body), tr.got.End)
				}
				mu.Lock()
				took = append(took, time.Since(at))
				if err != nil {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	began := time.Now()
	for i := range total {
		at := began.Add(time.Duration(i) * time.Second / faultRate)
		time.Sleep(time.Until(at))
		due <- at
	}
	close(due)
	wait.Wait()
	return took, errs
}

// serveH2C serves HTTP/2 in plain text until the test ends.
func serveH2C(t *testing.T, h http.Handler) string {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: protocols}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return l.Addr().String()
}

// raw serves connections by f, never reading; they stay open until the test ends.
func raw(f func(net.Conn)) func(*testing.T, *rig) string {
	return func(t *testing.T, _ *rig) string {
		t.Helper()
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var conns []net.Conn
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				conns = append(conns, c)
				f(c)
			}
		}()
		t.Cleanup(func() {
			l.Close()
			<-done
			for _, c := range conns {
				c.Close()
			}
		})
		return l.Addr().String()
	}
}
