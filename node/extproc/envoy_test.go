package extproc_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/node/extproc"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/xdstest"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// rig is a real Envoy, configured by the control plane's own snapshot, between a
// client and an upstream, with a node's port behind it.
type rig struct {
	t            *testing.T
	config       gateway.Config
	plan         mirror.GatewayPlan
	server       *xds.Server
	xdsAddr      string
	envoy        *envoytest.Envoy
	client       *http.Client
	node         *http.Server
	nodeListener net.Listener
	registry     *prometheus.Registry

	mu     sync.Mutex
	known  map[string][]byte // settings by revision
	newest string
	events []taken
}

// taken is what a node hands on to analysis.
type taken struct {
	header  event.Header
	event   event.Event
	gateway string
}

func newRig(t *testing.T, upstream http.Handler, change func(*rig)) *rig {
	t.Helper()
	r := &rig{t: t, known: map[string][]byte{}, registry: prometheus.NewRegistry()}
	up := httptest.NewUnstartedServer(upstream)
	up.Config.Protocols = new(http.Protocols)
	up.Config.Protocols.SetHTTP1(true)
	up.Config.Protocols.SetUnencryptedHTTP2(true)
	up.Start()
	t.Cleanup(up.Close)
	r.serveNode()
	port := r.nodeListener.Addr().(*net.TCPAddr).Port
	gw := mirror.Gateway{Namespace: "default", Name: "gateway"}
	p := policy.Default()
	r.config = gateway.Config{HTTP: envoytest.FreeAddr(t), Upstream: up.URL, Plugin: lua.Embedded().Code}
	r.plan = mirror.GatewayPlan{Gateway: gw, Policy: p.ID(), Endpoints: []mirror.Endpoint{{Host: "127.0.0.1", Port: port}}, Settings: mirror.Settings{
		Gateway: gw.ID(), PolicyID: p.ID(), PolicyRev: "r1", Mode: policy.ModeMonitor, Transport: policy.TransportExtProc, SharePPM: mirror.Everything,
		Request: policy.BodyLimit{MaxBytes: 1 << 10, ContentTypes: []string{"*/*"}}, Response: policy.BodyLimit{MaxBytes: 1 << 10, ContentTypes: p.Spec.Body.Response.ContentTypes},
		Mask: p.Spec.Mask,
	}}
	if change != nil {
		change(r)
	}
	r.server, r.xdsAddr, _ = xdstest.Serve(t, "127.0.0.1:0")
	r.push()
	r.startEnvoy()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 1}
	t.Cleanup(transport.CloseIdleConnections)
	r.client = &http.Client{Transport: transport, Timeout: 20 * time.Second}
	envoytest.Eventually(t, 20*time.Second, "exchanges are mirrored", func() bool {
		res, err := r.client.Get(r.url("/warm"))
		if err != nil {
			return false
		}
		_ = res.Body.Close()
		return len(r.taken("/warm")) > 0 || r.plan.Settings.StreamPPM() < mirror.Everything
	})
	return r
}

func (r *rig) url(path string) string { return "http://" + r.config.HTTP + path }

func (r *rig) serveNode() {
	r.t.Helper()
	ring := ingest.NewRing(4096, 64<<20)
	batches, err := ingest.New(ingest.Config{Ring: ring, Authenticator: ingest.Trusting{}})
	if err != nil {
		r.t.Fatal(err)
	}
	streams, err := extproc.New(extproc.Config{
		Settings: func(_, revision string) (string, []byte, bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			if raw, ok := r.known[revision]; ok {
				return revision, raw, true
			}
			return r.newest, r.known[r.newest], r.newest != ""
		},
		Queue:        func(b *event.Batch, g string, at time.Time, size int) { batches.Queue(b, g, at, size) },
		Authenticate: ingest.Trusting{}.Authenticate, Registerer: r.registry, MaxWait: 3 * time.Second,
	})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			x, ok := ring.Pop(ctx)
			if !ok {
				return
			}
			r.mu.Lock()
			r.events = append(r.events, taken{*x.Header, *x.Event, x.Gateway})
			r.mu.Unlock()
			x.Done()
		}
	}()
	mux := http.NewServeMux()
	mux.Handle("/", batches)
	mux.Handle(extproc.Path, streams)
	if r.nodeListener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		r.t.Fatal(err)
	}
	r.node = ingest.Server(mux, slog.New(slog.DiscardHandler))
	go func() { _ = r.node.Serve(r.nodeListener) }()
	r.t.Cleanup(func() { _ = r.node.Close(); cancel(); <-done })
}

// push serves what follows from the plan, and has the node know its settings.
func (r *rig) push() {
	r.t.Helper()
	raw, err := json.Marshal(r.plan.Settings)
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	r.newest = r.plan.Settings.Revision()
	r.known[r.newest] = raw
	r.mu.Unlock()
	s, err := gateway.Snapshot(r.config, r.plan)
	if err != nil {
		r.t.Fatal(err)
	}
	r.server.SetSnapshot(xds.GatewayKey(r.plan.Gateway.ID()), s)
}

func (r *rig) startEnvoy() {
	r.t.Helper()
	boot, err := gateway.Bootstrap(gateway.BootstrapConfig{Gateway: r.plan.Gateway, XDS: r.xdsAddr, Admin: "127.0.0.1:1"})
	if err != nil {
		r.t.Fatal(err)
	}
	var b map[string]any
	if err := json.Unmarshal(boot, &b); err != nil {
		r.t.Fatal(err)
	}
	r.envoy = envoytest.Start(r.t, b)
}

// taken gives the events of a path.
func (r *rig) taken(path string) (out []taken) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if value(e.event.Request.Headers, ":path") == path {
			out = append(out, e)
		}
	}
	return out
}

// one waits for the one event of a path.
func (r *rig) one(path string) event.Event {
	r.t.Helper()
	envoytest.Eventually(r.t, 10*time.Second, "the event of "+path, func() bool { return len(r.taken(path)) > 0 })
	all := r.taken(path)
	if len(all) != 1 {
		r.t.Fatalf("%d events of %s", len(all), path)
	}
	return all[0].event
}

// stats reads Envoy's counters and gauges.
func (r *rig) stats(filter string) map[string]int64 {
	r.t.Helper()
	res, err := http.Get("http://" + r.envoy.Admin + "/stats?filter=" + filter)
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	raw, _ := io.ReadAll(res.Body)
	out := map[string]int64{}
	for line := range strings.Lines(string(raw)) {
		name, v, _ := strings.Cut(strings.TrimSpace(line), ": ")
		var n int64
		if _, err := fmt.Sscan(v, &n); err == nil {
			out[name] = n
		}
	}
	return out
}

func value(fields []event.Field, name string) string {
	for _, f := range fields {
		if string(f.Name) == name {
			return string(f.Value)
		}
	}
	return ""
}

func text(fields []event.Field) string {
	var b strings.Builder
	for _, f := range fields {
		fmt.Fprintf(&b, "%s: %q\n", f.Name, f.Value)
	}
	return b.String()
}

// comparable is what is the same by both transports.
func comparable(e event.Event) event.Event {
	e.N, e.StartUS, e.HeadersUS, e.EndUS, e.RequestEndUS, e.Source = 0, 0, 0, 0, 0, ""
	// Lua doesn't know Envoy's own account, and where a masked header stood is not
	// told by ext_proc.
	e.ResponseFlags, e.ResponseDetails = "", ""
	e.Flags &^= event.FlagResponseOpen
	e.Request.Headers = slices.DeleteFunc(e.Request.Headers, func(f event.Field) bool { return string(f.Name) == "authorization" })
	e.Response.Headers = slices.DeleteFunc(e.Response.Headers, func(f event.Field) bool { return string(f.Name) == "date" || string(f.Name) == "x-secret" })
	for _, list := range []*[]event.Field{&e.Request.Headers, &e.Request.Trailers, &e.Response.Headers, &e.Response.Trailers} {
		if len(*list) == 0 {
			*list = nil
		}
	}
	return e
}

// show writes an event for comparison.
func show(e event.Event) string {
	var b strings.Builder
	for _, m := range []*event.Message{&e.Request, &e.Response} {
		fmt.Fprintf(&b, "%sbody %d %q\ntrailers\n%s\n", text(m.Headers), m.BodyBytes, m.Body, text(m.Trailers))
	}
	e.Request, e.Response = event.Message{}, event.Message{}
	fmt.Fprintf(&b, "%+v\n", e)
	return b.String()
}

// upstream answers as a path asks.
func upstream(w http.ResponseWriter, req *http.Request) {
	switch req.URL.Path {
	case "/upgrade":
		conn, buf, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = buf.Flush()
		_, _ = io.Copy(conn, buf) // echo
		return
	case "/slow":
		time.Sleep(500 * time.Millisecond)
		w.Header().Set("Content-Type", "text/plain")
	case "/long":
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprint(w, "the beginning, ")
		_ = http.NewResponseController(w).Flush()
		time.Sleep(2500 * time.Millisecond)
		fmt.Fprint(w, "the end")
		return
	case "/trickle":
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprint(w, "the beginning")
		_ = http.NewResponseController(w).Flush()
		<-req.Context().Done()
		return
	default:
		w.Header().Set("Content-Type", "application/json")
	}
	body, _ := io.ReadAll(req.Body)
	fmt.Fprintf(w, "%s %d ", req.URL.Path, len(body))
}

func (r *rig) do(client *http.Client, req *http.Request) string {
	r.t.Helper()
	res, err := client.Do(req)
	if err != nil {
		r.t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	return fmt.Sprintf("%d %d", res.StatusCode, len(b))
}

// upgrade opens a WebSocket's connection and has a text echoed.
func (r *rig) upgrade(path string) net.Conn {
	r.t.Helper()
	conn, err := net.Dial("tcp", r.config.HTTP)
	if err != nil {
		r.t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: shop.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", path)
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		r.t.Fatalf("upgrade: %v %v", res, err)
	}
	return conn
}

func (r *rig) echo(conn net.Conn, text string) {
	r.t.Helper()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	got := make([]byte, len(text))
	if _, err := io.WriteString(conn, text); err != nil {
		r.t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		r.t.Fatalf("echoed %q, %v", got, err)
	}
}

// The same is masked by both transports: the plugin's masks, and the node's.
func TestEnvoySameMasks(t *testing.T) {
	t.Parallel()
	// What comes goes back as it came, so that both directions are masked.
	echo := func(w http.ResponseWriter, req *http.Request) {
		for _, name := range []string{"Content-Type", "Content-Encoding"} {
			w.Header()[name] = req.Header[name] // nil: none
		}
		w.Header()["Set-Cookie"] = []string{"session=secret; Path=/; HttpOnly", "other=1"}
		w.Header().Set("Location", "/next?access_token=secret&x=1#token=secret")
		w.Header().Set("X-Secret", "secret")
		body, _ := io.ReadAll(req.Body)
		_, _ = w.Write(body)
	}
	r := newRig(t, http.HandlerFunc(echo), func(r *rig) {
		r.plan.Settings.Response.ContentTypes = []string{"*/*"}
		r.plan.Settings.Mask = policy.Mask{
			Headers: []string{"authorization", "x-secret"}, Cookies: []string{"session"}, QueryParameters: []string{"access_token", "token"},
			FormFields: []string{"password"}, JSONPaths: []string{"$.user.password", "$.pin"}, Detectors: []policy.Detector{policy.DetectorCreditCard},
		}
	})
	const multipart = "--b\r\nContent-Disposition: form-data; name=\"password\"\r\n\r\nsecret\r\n--b\r\nContent-Disposition: form-data; name=\"q\"\r\n\r\nplain\r\n--b--\r\n"
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = z.Write([]byte(`{"password":"secret"}`))
	_ = z.Close()
	calls := []struct {
		name, kind, encoding, body string
		masked                     event.Flags // of the event
	}{
		{"headers", "", "", "", event.FlagMasked},
		{"json", "application/json", "", `{"user":{"password":"secret"},"pin":[1,"secret"],"plain":"x"}`, event.FlagMasked},
		{"card", "text/csv", "", "1;4111 1111 1111 1111;x", event.FlagMasked},
		{"form", "application/x-www-form-urlencoded", "", "user=a&p%61ssword=secret&user[password]=secret&q=1", event.FlagMasked},
		{"text", "text/plain", "", `password=secret`, event.FlagMasked},
		{"no type", "", "", `{"pin":"secret"}`, event.FlagMasked},
		{"multipart", "multipart/form-data; boundary=b", "", multipart, event.FlagMasked},
		{"multipart without boundary", "multipart/form-data", "", multipart, event.FlagMasked},
		{"cut", "application/json", "", `{"plain":"` + strings.Repeat("x", 1000) + `","pin":"` + strings.Repeat("secret", 100), event.FlagMasked | event.FlagRequestCut | event.FlagResponseCut},
		{"grown", "application/x-www-form-urlencoded", "", strings.Repeat("password=&", 102), event.FlagMasked | event.FlagRequestCut | event.FlagResponseCut},
		{"compressed", "application/json", "gzip", zipped.String(), event.FlagMasked | event.FlagRequestCut | event.FlagResponseCut},
		{"compressed, of another type", "image/svg+xml", "gzip", zipped.String(), event.FlagMasked},
		{"compressed, empty", "application/json", "gzip", "", event.FlagMasked},
		{"uncompressed", "application/json", "Identity", `{"pin":"secret"}`, event.FlagMasked},
	}
	exchange := func(i int) event.Event {
		c := calls[i]
		path := fmt.Sprintf("/%d;token=secret/x?access_token=secret&q=%d", i, i)
		req, _ := http.NewRequest(http.MethodPost, r.url(path), strings.NewReader(c.body))
		req.Header = http.Header{"Content-Type": {c.kind}, "Content-Encoding": {c.encoding}, "Authorization": {"Bearer secret"}, "Referer": {"https://a.example/?token=secret"}, "Cookie": {`a=1; session="secret"; b=2`}}
		maps.DeleteFunc(req.Header, func(_ string, v []string) bool { return v[0] == "" })
		r.do(r.client, req)
		return r.one(fmt.Sprintf("/%d;token=***/x?access_token=***&q=%d", i, i))
	}
	streamed := make([]event.Event, len(calls))
	for i, c := range calls {
		e := exchange(i)
		streamed[i] = e
		if e.Flags != c.masked {
			t.Errorf("%s: flags %b, want %b", c.name, e.Flags, c.masked)
		}
		if all := show(e); strings.Contains(all, "secret\"") || strings.Contains(all, "4111") || strings.Contains(all, "=secret") || strings.Contains(all, zipped.String()) && c.kind != "image/svg+xml" {
			t.Errorf("%s: something masked is in the event\n%s", c.name, all)
		}
	}
	r.change(policy.TransportLua)
	for i, c := range calls {
		if diff := gocmp.Diff(show(comparable(exchange(i))), show(comparable(streamed[i]))); diff != "" {
			t.Errorf("%s: -Lua +ext_proc\n%s", c.name, diff)
		}
	}
}

// change changes the transport and waits until it is in force; events of before
// are forgotten.
func (r *rig) change(to policy.Transport) {
	r.t.Helper()
	r.plan.Settings.Transport = to
	if to == policy.TransportLua {
		r.plan.Settings.Transport = ""
	}
	r.push()
	want := map[policy.Transport]string{policy.TransportLua: "0.", policy.TransportExtProc: extproc.Plugin}[to]
	envoytest.Eventually(r.t, 20*time.Second, "exchanges come by "+string(to), func() bool {
		res, err := r.client.Get(r.url("/change"))
		if err != nil {
			r.t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		for _, e := range r.taken("/change") {
			if strings.HasPrefix(e.header.Plugin, want) {
				r.mu.Lock()
				r.events = nil
				r.mu.Unlock()
				return true
			}
		}
		return false
	})
}

// stall has the node take nothing that comes, and gives what ends it.
func (r *rig) stall() (end func()) {
	r.t.Helper()
	port := envoytest.FreeAddr(r.t)
	l, err := net.Listen("tcp", port)
	if err != nil {
		r.t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
		}
	}()
	_, p, _ := net.SplitHostPort(port)
	n, _ := strconv.Atoi(p)
	before := r.plan.Endpoints
	r.plan.Endpoints = []mirror.Endpoint{{Host: "127.0.0.1", Port: n}}
	r.push()
	return func() {
		_ = l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			_ = c.Close()
		}
		r.plan.Endpoints = before
		r.push()
	}
}

// A node that takes nothing holds a user's large body no longer than it takes
// Envoy to find that out, and no small one at all.
func TestEnvoyStalledNode(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(upstream), nil)
	end := r.stall()
	defer end()
	envoytest.Eventually(t, 10*time.Second, "the gateway has the node that takes nothing", func() bool {
		return r.stats("cluster.periscope_mirror.membership_change$")["cluster.periscope_mirror.membership_change"] > 1
	})
	for _, tc := range []struct {
		bytes int
		most  time.Duration
	}{{1000, time.Second}, {100_000, time.Second}, {50_000_000, 10 * time.Second}} {
		req, _ := http.NewRequest(http.MethodPost, r.url("/stall"), bytes.NewReader(make([]byte, tc.bytes)))
		from := time.Now()
		if got := r.do(r.client, req); !strings.HasPrefix(got, "200 ") {
			t.Errorf("%d bytes: %s", tc.bytes, got)
		}
		took := time.Since(from)
		t.Logf("%d bytes took %v", tc.bytes, took)
		if took > tc.most {
			t.Errorf("%d bytes took %v, more than %v", tc.bytes, took, tc.most)
		}
	}
}

// Envoy's own answers, and its account of them.
func TestEnvoyNoUpstream(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(upstream), func(r *rig) { r.config.Upstream = "http://127.0.0.1:1" })
	req, _ := http.NewRequest(http.MethodGet, r.url("/refused"), nil)
	if got := r.do(r.client, req); !strings.HasPrefix(got, "503 ") {
		t.Fatal(got)
	}
	e := r.one("/refused")
	if value(e.Response.Headers, ":status") != "503" || e.ResponseFlags != "UF" || !strings.HasPrefix(e.ResponseDetails, "upstream_reset_before_response_started{") {
		t.Errorf("event of Envoy's own answer:\n%s", show(e))
	}
}

// What a user breaks off is an event of what there was.
func TestEnvoyAborts(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(upstream), nil)
	abort := func(path, body string, after func(net.Conn)) event.Event {
		t.Helper()
		conn, err := net.Dial("tcp", r.config.HTTP)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 8\r\n\r\n%s", path, body)
		after(conn)
		_ = conn.Close()
		return r.one(path)
	}
	e := abort("/slow", "half", func(net.Conn) { time.Sleep(100 * time.Millisecond) })
	if want := event.FlagNoResponse | event.FlagRequestOpen; e.Flags != want || string(e.Request.Body) != "half" {
		t.Errorf("before the response: flags %b, want %b, body %q", e.Flags, want, e.Request.Body)
	}
	e = abort("/trickle", "complete", func(c net.Conn) {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		for got := ""; !strings.Contains(got, "the beginning"); {
			b := make([]byte, 1024)
			n, err := c.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			got += string(b[:n])
		}
	})
	if want := event.FlagResponseOpen; e.Flags != want || string(e.Response.Body) != "the beginning" {
		t.Errorf("amid the response: flags %b, want %b, body %q", e.Flags, want, e.Response.Body)
	}
}

// An exchange that takes longer than calls with batches may is whole.
func TestEnvoyLongExchange(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(upstream), nil)
	req, _ := http.NewRequest(http.MethodGet, r.url("/long"), nil)
	r.do(r.client, req)
	if e := r.one("/long"); e.Flags != 0 || string(e.Response.Body) != "the beginning, the end" {
		t.Errorf("flags %b, body %q", e.Flags, e.Response.Body)
	}
}

// A new share, and mode Off, take effect without a listener or a connection
// touched; what was under way is taken to its end.
func TestEnvoyShare(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(upstream), nil)
	untouched := r.untouched()
	slow := make(chan string, 1)
	go func() {
		req, _ := http.NewRequest(http.MethodGet, r.url("/slow"), nil)
		slow <- r.do(&http.Client{Timeout: 20 * time.Second}, req)
	}()
	envoytest.Eventually(t, 10*time.Second, "the slow one is under way", func() bool {
		return r.stats("ext_proc.periscope.streams_started$")["http.http.ext_proc.periscope.streams_started"] > 0 && r.open() == 1
	})
	const calls = 1000
	for _, tc := range []struct {
		share, least, most int
		mode               policy.Mode
	}{{300_000, 230, 370, policy.ModeMonitor}, {0, 0, 0, policy.ModeMonitor}, {mirror.Everything, 0, 0, policy.ModeOff}, {20_000, 2, 50, policy.ModeMonitor}, {mirror.Everything, calls, calls, policy.ModeMonitor}} {
		r.plan.Settings.SharePPM, r.plan.Settings.Mode = tc.share, tc.mode
		reload := r.stats("periscope.mirror.config_reload$")
		r.push()
		envoytest.Eventually(t, 10*time.Second, "the change is in force", func() bool {
			now := r.stats("periscope.mirror.config_reload$")
			return !maps.Equal(now, reload)
		})
		path := fmt.Sprintf("/share/%d/%s", tc.share, tc.mode)
		for range calls {
			req, _ := http.NewRequest(http.MethodGet, r.url(path), nil)
			r.do(r.client, req)
		}
		envoytest.Eventually(t, 10*time.Second, "no stream is open", func() bool { return r.open() == 0 })
		got := r.taken(path)
		t.Logf("share %d, mode %s: %d of %d", tc.share, tc.mode, len(got), calls)
		if len(got) < tc.least || len(got) > tc.most {
			t.Errorf("share %d, mode %s: %d of %d events", tc.share, tc.mode, len(got), calls)
		}
		if len(got) > 0 && got[0].event.SharePPM != uint64(tc.share) {
			t.Errorf("events carry the share %d, want %d", got[0].event.SharePPM, tc.share)
		}
	}
	<-slow
	if e := r.one("/slow"); e.Flags != 0 {
		t.Errorf("what was under way has flags %b", e.Flags)
	}
	untouched()
}

// open is how many exchanges are under way at the node.
func (r *rig) open() int {
	r.t.Helper()
	families, err := r.registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "periscope_extproc_open_exchanges" {
			return int(f.GetMetric()[0].GetGauge().GetValue())
		}
	}
	return -1
}

// untouched gives what checks that no listener was changed, and no connection
// lost, since.
func (r *rig) untouched() func() {
	const filter = "listener_manager.listener_(added|modified|removed|create_success|in_place_updated)$|lds.config_reload$|^http.http.downstream_cx_(destroy|total)$|http.http.downstream_rq_rx_reset$"
	before := r.stats(filter)
	if len(before) < 6 {
		r.t.Fatalf("statistics found: %v", before)
	}
	return func() {
		r.t.Helper()
		after := r.stats(filter)
		for name, v := range before {
			if strings.HasSuffix(name, "downstream_cx_total") || strings.HasSuffix(name, "downstream_cx_destroy") {
				continue // of those that the test opened and closed itself
			}
			if after[name] != v {
				r.t.Errorf("%s went from %d to %d", name, v, after[name])
			}
		}
		if n := r.stats("http.http.downstream_cx_drain_close$")["http.http.downstream_cx_drain_close"]; n != 0 {
			r.t.Errorf("%d connections were closed to drain", n)
		}
	}
}

// The transport changes live, back and forth, under load: no listener changes, no
// connection ends, no user sees a fault, and what was under way goes on.
func TestEnvoyTransportChange(t *testing.T) {
	t.Parallel()
	r := newRig(t, http.HandlerFunc(upstream), nil)
	untouched := r.untouched()
	conn := r.upgrade("/upgrade")
	defer conn.Close()
	stop, done := make(chan struct{}), make(chan int)
	load := &http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}
	defer load.CloseIdleConnections()
	go func() {
		n, reused := 0, true
		for {
			select {
			case <-stop:
				done <- n
				return
			default:
			}
			trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused || n == 0 }}
			req, _ := http.NewRequestWithContext(httptrace.WithClientTrace(context.Background(), trace), http.MethodPost, r.url("/load"), bytes.NewReader(make([]byte, 5000)))
			res, err := load.Do(req)
			if err != nil {
				t.Error(err)
				continue
			}
			b, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if err != nil || res.StatusCode != http.StatusOK || !strings.HasPrefix(string(b), "/load 5000") {
				t.Errorf("a user saw %d %q, %v", res.StatusCode, b, err)
			}
			if !reused {
				t.Error("a connection was lost")
			}
			n++
		}
	}()
	for range 3 {
		for _, to := range []policy.Transport{policy.TransportLua, policy.TransportExtProc} {
			r.change(to)
			r.echo(conn, "still there by "+string(to))
		}
	}
	close(stop)
	t.Logf("%d exchanges meanwhile", <-done)
	untouched()
}

// Envoy passes on whatever server name a user's TLS client sends, by both
// transports.
func TestEnvoyServerNames(t *testing.T) {
	t.Parallel()
	some := httptest.NewTLSServer(nil)
	defer some.Close()
	pair := some.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name, kind string, der []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	r := newRig(t, http.HandlerFunc(upstream), func(r *rig) {
		r.config.HTTPS, r.config.CertFile, r.config.KeyFile = envoytest.FreeAddr(t), file("cert", "CERTIFICATE", pair.Certificate[0]), file("key", "PRIVATE KEY", key)
	})
	for _, transport := range []policy.Transport{policy.TransportExtProc, policy.TransportLua} {
		if transport == policy.TransportLua {
			r.change(transport)
		}
		for _, name := range []string{"shop.example", "\xff\xfe.example", "a\x01b.example"} {
			named := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: name}, DisableKeepAlives: true}
			client := &http.Client{Transport: named, Timeout: 20 * time.Second}
			envoytest.Eventually(t, 10*time.Second, fmt.Sprintf("an event with the server name %q by %s", name, transport), func() bool {
				req, _ := http.NewRequest(http.MethodGet, "https://"+r.config.HTTPS+"/name", nil)
				r.do(client, req)
				return slices.ContainsFunc(r.taken("/name"), func(e taken) bool { return e.event.SNI == name && e.event.TLS == "TLSv1.3" })
			})
		}
	}
}
