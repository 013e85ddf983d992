package conformance

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/xdstest"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// bodyLimit of the rig's policy, either way.
const bodyLimit = 64 << 10

// The last policy takes all that there is, but for what keeps batches moving; the
// one before takes bodies of few kinds.
const policyText = `
apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: some, namespace: default}
spec:
  mode: Monitor
  match: [{paths: [{type: PathPrefix, value: /some}, {type: PathPrefix, value: /h2/some}]}]
  mask: {headers: [x-secret]}
  body:
    request:  {maxBytes: 64Ki, contentTypes: ["*/*"]}
    response: {maxBytes: 64Ki, contentTypes: [application/json]}
---
apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: all, namespace: default}
spec:
  mode: Monitor
  exclude: [{paths: [{type: PathPrefix, value: /nudge}]}]
  mask: {headers: [x-secret]}
  body:
    request:  {maxBytes: 64Ki, contentTypes: ["*/*"]}
    response: {maxBytes: 64Ki, contentTypes: ["*/*"]}
`

// transport is a way of exchanges from Envoy to the node, which all cases hold for.
type transport struct {
	name string
	kind policy.Transport // default Lua
	// plugin makes the code that gateways are served; nil: as it is.
	plugin func(code string) string
	// wait is how long an exchange is waited for: by the plugin for its end, by
	// Envoy for the node to take what is left of it. ExtProc, 0: as it is.
	wait time.Duration
}

// How long to wait: cases of aborts needn't take half a minute each, others
// are not to be given up on a slow machine.
const (
	shortWait = time.Second
	longWait  = 30 * time.Second
)

func (tr transport) waits(d time.Duration) transport { tr.wait = d; return tr }

func (tr transport) code(t testing.TB) string {
	code := waits(t, lua.Embedded().Code, tr.wait)
	if tr.plugin != nil {
		code = tr.plugin(code)
	}
	return code
}

var maxWaitLine = regexp.MustCompile(`(?m)^local MAX_WAIT_MS = [0-9]+`)

func waits(t testing.TB, code string, d time.Duration) string {
	t.Helper()
	if !maxWaitLine.MatchString(code) {
		t.Fatal("the plugin has no line local MAX_WAIT_MS = N, which tests change")
	}
	return maxWaitLine.ReplaceAllString(code, fmt.Sprintf("local MAX_WAIT_MS = %d", cmp.Or(d, shortWait).Milliseconds()))
}

// rig is a client's and an upstream's view of a real Envoy that runs the plugin,
// beside the events that a real node took from it.
type rig struct {
	t         testing.TB
	transport transport
	envoy     *envoytest.Envoy
	server    *xds.Server
	xdsAddr   string
	config    gateway.Config
	plan      mirror.GatewayPlan
	listeners []listenerKind
	addr      map[string]string // by listener
	keys      *keys
	up        *upstream
	node      *node
	quiet     func() // ends nudges
	// last changes the snapshot before it is served.
	last func(*xds.Snapshot) *xds.Snapshot
}

// newRig starts one with these listeners; none: with all.
func newRig(t testing.TB, tr transport, listeners ...string) *rig {
	t.Helper()
	r := prepare(t, tr, policyText, listeners...)
	r.start()
	return r
}

// prepare makes a rig whose Envoy isn't started yet.
func prepare(t testing.TB, tr transport, policyText string, listeners ...string) *rig {
	t.Helper()
	envoytest.Path(t)
	r := &rig{t: t, transport: tr, addr: map[string]string{}, keys: newKeys(t), up: newUpstream(t), node: newNode(t)}
	for _, l := range listenerKinds {
		if len(listeners) == 0 || slices.Contains(listeners, l.name) {
			r.listeners = append(r.listeners, l)
			r.addr[l.name] = envoytest.FreeAddr(t)
		}
	}
	r.config = gateway.Config{
		HTTP: r.addr["http"], HTTPS: r.addr["https"], CertFile: r.keys.certFile, KeyFile: r.keys.keyFile,
		Upstream: "http://" + r.up.addr, Plugin: tr.code(t),
	}
	if r.config.HTTPS == "" { // our snapshot's, which extend makes others from
		r.config.HTTPS = envoytest.FreeAddr(t)
	}
	r.plan = compile(t, policyText, tr.kind, r.node.addr)
	return r
}

// start runs Envoy and waits until it mirrors.
func (r *rig) start() {
	r.t.Helper()
	t := r.t
	r.server, r.xdsAddr, _ = xdstest.Serve(t, "127.0.0.1:0")
	r.push()
	boot, err := gateway.Bootstrap(gateway.BootstrapConfig{Gateway: r.plan.Gateway, XDS: r.xdsAddr, Admin: "127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	var b map[string]any
	if err := json.Unmarshal(boot, &b); err != nil {
		t.Fatal(err)
	}
	r.envoy = envoytest.Start(t, b)
	r.await()
}

func compile(t testing.TB, policyText string, by policy.Transport, nodeAddr string) mirror.GatewayPlan {
	t.Helper()
	docs := policy.Parse("policy.yaml", []byte(policyText))
	var policies []policy.MirrorPolicy
	for _, d := range docs {
		if d.Policy == nil {
			t.Fatalf("policy: %+v", d)
		}
		p := *d.Policy
		p.Spec.Transport = cmp.Or(by, p.Spec.Transport)
		policies = append(policies, p)
	}
	plan := mirror.Compile(policies, mirror.Topology{
		Gateways: []mirror.Gateway{{Namespace: "default", Name: "gateway", StandIn: true}},
		Nodes:    []mirror.NodeService{{StandIn: true, Endpoints: []mirror.Endpoint{endpointOf(nodeAddr)}}},
	})
	if len(plan.Gateways) != 1 || len(plan.Gateways[0].Policies()) != len(docs) {
		t.Fatalf("plan: %+v", plan)
	}
	return plan.Gateways[0]
}

func endpointOf(addr string) mirror.Endpoint {
	host, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	return mirror.Endpoint{Host: host, Port: n}
}

// push serves what follows from config and plan now.
func (r *rig) push() {
	r.t.Helper()
	r.node.learn(r.t, r.plan.Settings)
	s, err := gateway.Snapshot(r.config, r.plan)
	if err != nil {
		r.t.Fatal(err)
	}
	s = r.extend(s)
	if r.last != nil {
		s = r.last(s)
	}
	r.server.SetSnapshot(xds.GatewayKey(r.plan.Gateway.ID()), s)
}

// swap has the gateway run other code, and gives why it refused to, or "".
func (r *rig) swap(code string) (refused string) {
	r.t.Helper()
	r.config.Plugin = code
	before := r.ecds().Nonce
	r.push()
	envoytest.Eventually(r.t, 10*time.Second, "the gateway's word on new code", func() bool {
		s := r.ecds()
		refused = s.LastError
		return s.Nonce != before && (s.Acked == s.Sent || refused != "")
	})
	return refused
}

func (r *rig) ecds() xds.TypeState {
	for _, c := range r.server.Connections() {
		if s, ok := c.Types[resource.ExtensionConfigType]; ok {
			return s
		}
	}
	return xds.TypeState{}
}

// await waits until listeners answer and the plugin is in force.
func (r *rig) await() {
	r.t.Helper()
	envoytest.Eventually(r.t, 20*time.Second, "listeners answer", func() bool {
		for _, l := range r.listeners {
			if l.udp {
				continue
			}
			c, err := net.DialTimeout("tcp", r.addr[l.name], time.Second)
			if err != nil {
				return false
			}
			c.Close()
		}
		return true
	})
	envoytest.Eventually(r.t, 20*time.Second, "the plugin is in force", func() bool { s := r.ecds(); return s.Sent != "" && s.Acked == s.Sent })
}

// nudges sends exchanges that are excluded to each listener, as each has a Lua
// machine of its own, until the test ends: a plugin without a timer needs some
// traffic to see that time has passed.
func (r *rig) nudges(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	for _, l := range r.listeners {
		if !l.bare {
			wait.Go(func() { r.nudge(ctx, l) })
		}
	}
	r.quiet = func() { cancel(); wait.Wait() }
	t.Cleanup(r.quiet)
}

func (r *rig) nudge(ctx context.Context, l listenerKind) {
	x := (&exchange{listener: l.name, path: "/nudge"}).defaults()
	open, stop := r.connect(l.name, l.udp)
	defer stop()
	for ctx.Err() == nil {
		if s, err := open(); err == nil {
			_ = s.SendHead(x.fields(map[bool]string{true: h3, false: h2}[l.udp], "nudge"), true)
			Receive(s)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// connect gives a way to open streams on one connection to a listener, made
// anew when it ends.
func (r *rig) connect(listener string, udp bool) (open func() (Stream, error), stop func()) {
	var two *H2
	var three *H3
	stop = func() {
		if two != nil {
			two.Close()
		}
		if three != nil {
			three.Close()
		}
		two, three = nil, nil
	}
	return func() (s Stream, err error) {
		if udp {
			if three == nil {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				if three, err = DialH3(ctx, r.addr[listener], r.tls(listener)); err != nil {
					return nil, err
				}
			}
			if s, err = three.Open(); err != nil {
				stop()
			}
			return s, err
		}
		if two == nil || two.Ended() {
			c, err := r.dial(listener, "h2")
			if err != nil {
				return nil, err
			}
			_ = c.SetDeadline(time.Time{})
			if two, err = NewH2Client(c); err != nil {
				return nil, err
			}
		}
		return two.Open(), nil
	}, stop
}

// luaErrors are those that Envoy counts: the plugin let them through.
func (r *rig) luaErrors() int {
	n := 0
	for _, l := range r.listeners {
		n += r.envoy.Stat("http." + l.name + ".lua.periscope.errors")
	}
	return n
}

// checkCounters asserts that each exchange that our filters saw has its outcome.
func (r *rig) checkCounters(t *testing.T) {
	t.Helper()
	if r.transport.kind == policy.TransportExtProc {
		r.checkStreams(t)
	} else {
		r.checkBatches(t)
	}
	for _, s := range r.node.strangers() {
		t.Errorf("an event of no exchange that was sent: %s", s)
	}
}

func (r *rig) checkBatches(t *testing.T) {
	t.Helper()
	for vm, c := range r.node.counters() {
		sum := c[event.CounterMirrored] + c[event.CounterOff] + c[event.CounterExcluded] + c[event.CounterSampled]
		// What is open when the last batch leaves has no outcome yet.
		if seen := c[event.CounterSeen]; sum > seen || seen-sum > 2 {
			t.Errorf("VM %s: %d exchanges seen, %d have an outcome: %v", vm, seen, sum, c)
		}
		if c[event.CounterErrors]+c[event.CounterLostBatches]+c[event.CounterEvicted] > 0 {
			t.Errorf("VM %s: %v", vm, c)
		}
	}
	if n := r.luaErrors(); n != 0 {
		t.Errorf("Envoy counts %d Lua errors", n)
	}
	if missing := r.node.gaps(); missing > 0 {
		stat := func(name string) int { return r.envoy.Stat("cluster.periscope_mirror." + name) }
		t.Errorf("%d batches did not arrive; overflow %d and %d, time-outs %d, 5xx %d", missing, stat("upstream_rq_pending_overflow"),
			stat("upstream_rq_active_overflow"), stat("upstream_rq_timeout"), stat("upstream_rq_5xx"))
	}
}

// checkStreams ends nudges, and waits until no stream is under way.
func (r *rig) checkStreams(t *testing.T) {
	t.Helper()
	if r.quiet != nil {
		r.quiet()
	}
	var started, seen, had int
	var counts map[string]int
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		started = 0
		for _, l := range r.listeners {
			if !l.bare {
				started += r.envoy.Stat("http." + l.name + ".ext_proc.periscope.streams_started")
			}
		}
		counts = r.node.streams()
		seen, had = counts[event.CounterSeen], counts[event.CounterMirrored]+counts[event.CounterExcluded]+counts["no_request"]
		if started == seen && seen == had {
			break
		}
	}
	if started != seen || seen != had {
		t.Errorf("Envoy began %d streams, %d came to the node, %d are mirrored, excluded or refused by Envoy's codec: %v", started, seen, had, counts)
	}
	for _, name := range []string{"upstream_rq_pending_overflow", "upstream_rq_active_overflow"} {
		if n := r.envoy.Stat("cluster.periscope_mirror." + name); n > 0 {
			t.Errorf("%s: %d", name, n)
		}
	}
}

func clip(s string) string {
	if len(s) > 300 {
		return s[:200] + fmt.Sprintf("… (%d bytes) …", len(s)) + s[len(s)-50:]
	}
	return s
}

func join(list []string) string { return strings.Join(list, "\n") }
