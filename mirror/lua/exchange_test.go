package lua_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
)

// node records what the plugin sends, over h2c as gateways speak it.
type node struct {
	t       *testing.T
	addr    string
	mu      sync.Mutex
	headers []event.Header
	events  []event.Event
	mixed   []string // batches whose events are not of their header's revision, "rev of POLICY"
}

func startNode(t *testing.T) *node {
	n := &node{t: t}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.addr = l.Addr().String()
	s := &http.Server{Handler: n, Protocols: protocols}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return n
}

func (n *node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	b, err := event.Decode(body, event.DefaultLimits())
	if err != nil || len(b.Rejected) > 0 {
		n.t.Errorf("the plugin's batch is refused: %v %+v", err, b)
		return
	}
	if r.Header.Get("x-forwarded-for") != "" || r.Header.Get("traceparent") != "" {
		n.t.Errorf("the mirror call carries the user's headers: %v", r.Header)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.headers = append(n.headers, b.Header)
	n.events = append(n.events, b.Events...)
	for _, e := range b.Events {
		if of, ok := strings.CutPrefix(b.Header.PolicyRev, "rev of "); ok && of != e.Policy {
			n.mixed = append(n.mixed, of+" has "+e.Policy)
		}
	}
}

// take waits for so many events and forgets them.
func (n *node) take(count int) []event.Event {
	n.t.Helper()
	var out []event.Event
	envoytest.Eventually(n.t, 5*time.Second, fmt.Sprintf("%d events at the node", count), func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.events) < count {
			return false
		}
		out, n.events = n.events, nil
		return true
	})
	if len(out) != count {
		n.t.Fatalf("%d events, want %d", len(out), count)
	}
	return out
}

func (n *node) lastHeader() event.Header {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.headers[len(n.headers)-1]
}

func settings(change func(*mirror.Settings)) mirror.Settings {
	s := mirror.Settings{
		Gateway: "default/gateway", PolicyID: "default/default", PolicyRev: "r1", SharePPM: 1e6, Mode: policy.ModeMonitor,
		Request:  policy.BodyLimit{MaxBytes: 4096, ContentTypes: []string{"*/*"}},
		Response: policy.BodyLimit{MaxBytes: 2048, ContentTypes: []string{"application/json", "text/*"}},
		Mask:     policy.Mask{Headers: []string{"authorization"}},
	}
	if change != nil {
		change(&s)
	}
	return s
}

// gateway starts an Envoy with the plugin before an upstream.
func gateway(t *testing.T, s mirror.Settings, nodeAddr string, upstream http.Handler) (addr string, e *envoytest.Envoy) {
	t.Helper()
	up := httptest.NewServer(upstream)
	t.Cleanup(up.Close)
	addr = envoytest.FreeAddr(t)
	b := staticEnvoy(addr, strings.TrimPrefix(up.URL, "http://"), settingsFilter("1", s.Encode()), luaFilter(lua.Embedded().Code))
	static := b["static_resources"].(map[string]any)
	mirrorCluster := cluster("periscope_mirror", nodeAddr, true)
	static["clusters"] = append(static["clusters"].([]any), mirrorCluster)
	return addr, envoytest.Start(t, b)
}

// Without a settings filter, as where Istio carries the plugin inline, it goes
// by the settings at its own end, the mirror cluster's name among them; settings
// that come with a request go before them.
func TestEmbeddedSettings(t *testing.T) {
	for name, tc := range map[string]struct {
		filters func(embedded mirror.Settings) []map[string]any
		cluster string
		want    string // policy
	}{
		"alone": {
			filters: func(s mirror.Settings) []map[string]any {
				return []map[string]any{luaFilter(lua.Embedded().Code + s.EncodeLua())}
			},
			cluster: "outbound|5050||nodes.example", want: "default/embedded",
		},
		"behind settings": {
			filters: func(s mirror.Settings) []map[string]any {
				before := settings(func(s *mirror.Settings) { s.PolicyID = "default/sent" })
				return []map[string]any{settingsFilter("1", before.Encode()), luaFilter(lua.Embedded().Code + s.EncodeLua())}
			},
			cluster: "periscope_mirror", want: "default/sent",
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t)
			embedded := settings(func(s *mirror.Settings) {
				s.PolicyID, s.Cluster = "default/embedded", "outbound|5050||nodes.example"
				s.Exclude = []policy.Match{{Hosts: []string{`a"\b`}}}
			})
			addr := envoytest.FreeAddr(t)
			b := staticEnvoy(addr, "", tc.filters(embedded)...)
			static := b["static_resources"].(map[string]any)
			static["clusters"] = []any{cluster(tc.cluster, n.addr, true)}
			envoytest.Start(t, b)
			for range 2 {
				req, err := http.NewRequest("GET", "http://"+addr+"/", nil)
				if err != nil {
					t.Fatal(err)
				}
				do(t, req)
				if got := n.take(1)[0]; got.Policy != tc.want {
					t.Errorf("policy %q, want %q", got.Policy, tc.want)
				}
			}
			if h := n.lastHeader(); h.PolicyRev != "r1" || h.Gateway != "default/gateway" || h.Counters["errors"] != 0 {
				t.Errorf("header %+v", h)
			}
		})
	}
}

func do(t *testing.T, req *http.Request) (*http.Response, []byte) {
	t.Helper()
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, body
}

func header(fields []event.Field, name string) []string {
	var out []string
	for _, f := range fields {
		if string(f.Name) == name {
			out = append(out, string(f.Value))
		}
	}
	return out
}

func noise(n int) []byte {
	rng := rand.New(rand.NewPCG(uint64(n), 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func TestExchangeIsCopiedExactly(t *testing.T) {
	n := startNode(t)
	addr, e := gateway(t, settings(nil), n.addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Add("Set-Cookie", "a=1")
		w.Header().Add("Set-Cookie", "b=2")
		w.Header().Set("Content-Type", r.Header.Get("X-Type"))
		w.WriteHeader(201)
		_, _ = w.Write(noise(len(r.Header.Get("X-Size")) * 512))
	}))
	for _, tc := range []struct {
		name         string
		method       string
		body         []byte
		chunked      bool
		responseType string
		responseUnit int // × 512 bytes
		flags        event.Flags
		responseCopy int
	}{
		{name: "GET", method: "GET", responseType: "application/json", responseUnit: 1, responseCopy: 512},
		{name: "HEAD", method: "HEAD", responseType: "application/json", responseUnit: 0},
		{name: "empty POST", method: "POST", body: []byte{}, responseType: "text/plain", responseUnit: 0},
		{name: "binary POST", method: "POST", body: noise(1000), responseType: "application/json; charset=utf-8", responseUnit: 2, responseCopy: 1024},
		{name: "at the limit", method: "PUT", body: noise(4096), responseType: "text/html", responseUnit: 4, responseCopy: 2048},
		{name: "over the limit", method: "POST", body: noise(5000), responseType: "text/html", responseUnit: 6, flags: event.FlagRequestCut | event.FlagResponseCut, responseCopy: 2048},
		{name: "1 MiB chunked", method: "POST", body: noise(1 << 20), chunked: true, responseType: "text/html", responseUnit: 1, flags: event.FlagRequestCut, responseCopy: 512},
		{name: "other type", method: "GET", responseType: "image/png", responseUnit: 3, flags: event.FlagResponseSkip},
		{name: "event stream", method: "GET", responseType: "text/event-stream", responseUnit: 3, flags: event.FlagStream},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var body io.Reader
			if tc.body != nil {
				body = bytes.NewReader(tc.body)
			}
			if tc.chunked {
				body = struct{ io.Reader }{body}
			}
			req := httptest.NewRequest(tc.method, "http://"+addr+"/items/%2e%2e/x?q=%00%ff&q=2", body)
			req.RequestURI = ""
			if tc.body == nil {
				req.Body = nil
			}
			if tc.chunked {
				req.ContentLength = -1
			}
			req.Header = http.Header{"X-Dup": {"one", "two"}, "X-Bytes": {"\xc3\xa9\xff"}, "Authorization": {"Bearer secret"}, "X-Type": {tc.responseType}, "X-Size": {strings.Repeat("x", tc.responseUnit)}}
			res, got := do(t, req)
			if res.StatusCode != 201 || tc.method != "HEAD" && len(got) != tc.responseUnit*512 {
				t.Fatalf("user got %d with %d bytes", res.StatusCode, len(got))
			}
			ev := n.take(1)[0]
			for name, want := range map[string][]string{
				":method": {tc.method}, ":path": {"/items/%2e%2e/x?q=%00%ff&q=2"}, ":authority": {addr}, ":scheme": {"http"},
				"x-dup": {"one", "two"}, "x-bytes": {"\xc3\xa9\xff"}, "authorization": {"***"},
			} {
				if h := header(ev.Request.Headers, name); fmt.Sprint(h) != fmt.Sprint(want) {
					t.Errorf("request header %s: %q, want %q", name, h, want)
				}
			}
			if h := header(ev.Response.Headers, "set-cookie"); fmt.Sprint(h) != "[a=1 b=2]" {
				t.Errorf("set-cookie %q", h)
			}
			if h := header(ev.Response.Headers, ":status"); fmt.Sprint(h) != "[201]" {
				t.Errorf("status %q", h)
			}
			if want := tc.body[:min(len(tc.body), 4096)]; !bytes.Equal(ev.Request.Body, want) || ev.Request.BodyBytes != uint64(len(tc.body)) {
				t.Errorf("request body: %d of %d bytes, want %d of %d", len(ev.Request.Body), ev.Request.BodyBytes, len(want), len(tc.body))
			}
			if want := noise(tc.responseUnit * 512)[:tc.responseCopy]; !bytes.Equal(ev.Response.Body, want) {
				t.Errorf("response body: %d bytes, want %d", len(ev.Response.Body), len(want))
			}
			if tc.flags&event.FlagStream == 0 && tc.method != "HEAD" && ev.Response.BodyBytes != uint64(tc.responseUnit*512) {
				t.Errorf("response length %d, want %d", ev.Response.BodyBytes, tc.responseUnit*512)
			}
			if ev.Flags != tc.flags|event.FlagMasked {
				t.Errorf("flags %b, want %b", ev.Flags, tc.flags|event.FlagMasked)
			}
			if !strings.HasPrefix(ev.Source, "127.0.0.1:") || ev.Local != addr || ev.Protocol != "HTTP/1.1" || ev.Route != "default" || ev.Policy != "default/default" || ev.SharePPM != 1e6 {
				t.Errorf("facts: %+v", ev)
			}
			if age := time.Since(time.UnixMicro(int64(ev.StartUS))); age < -time.Second || age > time.Minute {
				t.Errorf("started %v ago", age)
			}
		})
	}
	h := n.lastHeader()
	if h.Gateway != "default/gateway" || h.Plugin != lua.Embedded().Name() || h.PolicyRev != "r1" || len(h.VM) != 16 || h.Counters[event.CounterSeen] != 9 || h.Counters[event.CounterErrors] != 0 {
		t.Errorf("header %+v", h)
	}
	for name, want := range h.Counters {
		if got := e.Stat("http.ingress.lua.periscope." + name); got != int(want) {
			t.Errorf("Envoy's own counter %s is %d, that of the batch %d", name, got, want)
		}
	}
}

func TestDecisions(t *testing.T) {
	for name, tc := range map[string]struct {
		change   func(*mirror.Settings)
		path     string
		mirrored bool
	}{
		"off": {func(s *mirror.Settings) { s.Mode = policy.ModeOff }, "/a", false},
		"excluded": {func(s *mirror.Settings) {
			s.Exclude = []policy.Match{{Paths: []policy.PathMatch{{Type: policy.PathExact, Value: "/a"}}}}
		}, "/a", false},
		"not matched": {func(s *mirror.Settings) { s.Match = []policy.Match{{Hosts: []string{"shop.example"}}} }, "/a", false},
		"sampled out": {func(s *mirror.Settings) { s.SharePPM = 0 }, "/a", false},
		"always":      {func(s *mirror.Settings) { s.SharePPM = 0; s.Always = []policy.Class{policy.ClassSuspicious} }, "/etc/passwd", true},
	} {
		t.Run(name, func(t *testing.T) {
			n := startNode(t)
			addr, e := gateway(t, settings(tc.change), n.addr, http.NotFoundHandler())
			req, _ := http.NewRequest("GET", "http://"+addr+tc.path, nil)
			if res, _ := do(t, req); res.StatusCode != 404 {
				t.Fatalf("user got %d", res.StatusCode)
			}
			if tc.mirrored {
				if ev := n.take(1)[0]; ev.SharePPM != 1e6 || ev.Class != "Suspicious" {
					t.Errorf("class %q, share %d", ev.Class, ev.SharePPM)
				}
				return
			}
			// Nothing is sent for what is not mirrored: the counters travel with
			// the next batch.
			if calls := e.Stat("cluster.periscope_mirror.upstream_rq_total"); calls != 0 {
				t.Errorf("%d calls to the node", calls)
			}
		})
	}
}

// Each of a gateway's policies has its own hosts, and batches of its own.
func TestSeveralPolicies(t *testing.T) {
	n := startNode(t)
	hosts := func(id string, list ...string) mirror.Settings {
		return settings(func(s *mirror.Settings) { s.PolicyID, s.PolicyRev, s.Hosts = id, "rev of "+id, list })
	}
	s := hosts("shop/p", "shop.example")
	bank, off := hosts("bank/p", "bank.example", "*.bank.example"), hosts("off/p", "off.example")
	bank.Mask.Headers, bank.Except = []string{"x-secret"}, []string{"not.bank.example"}
	off.Mode = policy.ModeOff
	s.Next = []mirror.Settings{off, bank}
	addr, e := gateway(t, s, n.addr, http.NotFoundHandler())
	want := map[string]string{"shop.example": "shop/p", "bank.example": "bank/p", "a.bank.example:443": "bank/p"}
	const rounds = 200
	var wait sync.WaitGroup
	for range 4 {
		wait.Go(func() {
			for i := range rounds / 4 {
				for _, host := range []string{"shop.example", "bank.example", "off.example", "not.bank.example", "a.bank.example:443", "other.example"} {
					req, _ := http.NewRequest("GET", fmt.Sprintf("http://%s/%d", addr, i), nil)
					req.Host = host
					req.Header.Set("X-Secret", "s")
					if res, err := http.DefaultTransport.RoundTrip(req); err != nil {
						t.Error(err)
					} else {
						res.Body.Close()
					}
				}
			}
		})
	}
	wait.Wait()
	events := n.take(3 * rounds)
	count := map[string]int{}
	for _, ev := range events {
		host := header(ev.Request.Headers, ":authority")[0]
		if ev.Policy != want[host] {
			t.Fatalf("%s is governed by %q", host, ev.Policy)
		}
		if masked := header(ev.Request.Headers, "x-secret")[0] == "***"; masked != (ev.Policy == "bank/p") {
			t.Fatalf("%s of %s: masked: %v", host, ev.Policy, masked)
		}
		count[ev.Policy]++
	}
	if count["shop/p"] != rounds || count["bank/p"] != 2*rounds {
		t.Errorf("events %v", count)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	// All is mirrored, so each policy wants as many as were, of which there may be
	// more by now.
	told, vms := map[string]uint64{}, map[string]event.Header{}
	for _, h := range n.headers {
		if h.Eligible < h.Mirrored || h.Priority != 0 || h.PolicyRev != "rev of "+h.Policy {
			t.Errorf("header %+v", h)
		}
		if h.Seq > vms[h.VM+h.Policy].Seq {
			vms[h.VM+h.Policy] = h
		}
	}
	for _, h := range vms {
		told[h.Policy] += h.Mirrored
	}
	if told["shop/p"] != rounds || told["bank/p"] != 2*rounds || len(told) != 2 {
		t.Errorf("told %v", told)
	}
	for _, p := range n.mixed {
		t.Errorf("a batch has events of another policy than its header's: %s", p)
	}
	last := n.headers[len(n.headers)-1].Counters
	if last[event.CounterErrors] != 0 || last[event.CounterLostBatches] != 0 {
		t.Errorf("counters %v", last)
	}
	if n := e.Stat("http.ingress.lua.periscope.errors"); n != 0 {
		t.Errorf("%d Lua errors", n)
	}
}

func TestSamplingShare(t *testing.T) {
	n := startNode(t)
	addr, e := gateway(t, settings(func(s *mirror.Settings) { s.SharePPM = 250_000 }), n.addr, http.NotFoundHandler())
	const total = 2000
	for range total {
		req, _ := http.NewRequest("GET", "http://"+addr+"/", nil)
		do(t, req)
	}
	var events []event.Event
	envoytest.Eventually(t, 5*time.Second, "every batch that Envoy sent", func() bool {
		sent := e.Stat("cluster.periscope_mirror.upstream_rq_total")
		n.mu.Lock()
		defer n.mu.Unlock()
		events = n.events
		return len(events) > 0 && len(n.headers) == sent
	})
	if got := len(events); got < total/5 || got > total*3/10 {
		t.Errorf("mirrored %d of %d at 25 %%", got, total)
	}
	if events[0].SharePPM != 250_000 {
		t.Errorf("share %d", events[0].SharePPM)
	}
}

// What a policy wants is told whatever its share, what sampling spares apart.
func TestDemand(t *testing.T) {
	n := startNode(t)
	addr, _ := gateway(t, settings(func(s *mirror.Settings) {
		s.SharePPM, s.Always = 100_000, []policy.Class{policy.ClassSuspicious}
		s.Exclude = []policy.Match{{Paths: []policy.PathMatch{{Type: policy.PathExact, Value: "/excluded"}}}}
	}), n.addr, http.NotFoundHandler())
	const rounds = 200
	for range rounds {
		for _, path := range []string{"/a", "/b", "/c", "/excluded", "/etc/passwd"} {
			req, _ := http.NewRequest("GET", "http://"+addr+path, nil)
			do(t, req)
		}
	}
	last := map[string]event.Header{}
	envoytest.Eventually(t, 5*time.Second, "all of the spared", func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		var priority uint64
		for _, h := range n.headers {
			if h.Seq > last[h.VM].Seq {
				last[h.VM] = h
			}
		}
		for _, h := range last {
			priority += h.Priority
		}
		return priority == rounds
	})
	var eligible, seen, mirrored uint64
	for _, h := range last {
		eligible, mirrored, seen = eligible+h.Eligible, mirrored+h.Mirrored, seen+h.Counters[event.CounterSeen]-h.Counters[event.CounterExcluded]
	}
	// Each worker's last batch is one of the last round's, and tells all before.
	if eligible != seen || eligible < 4*rounds-10 || eligible > 4*rounds {
		t.Errorf("%d exchanges are wanted of %d", eligible, seen)
	}
	if mirrored < rounds*11/10 || mirrored > rounds*16/10 {
		t.Errorf("%d are mirrored", mirrored)
	}
}

func TestMaskedBodies(t *testing.T) {
	n := startNode(t)
	addr, _ := gateway(t, settings(func(s *mirror.Settings) {
		s.Mask.JSONPaths = []string{"$.user.password"}
		s.Mask.Detectors = []policy.Detector{policy.DetectorCreditCard}
	}), n.addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.Copy(w, r.Body)
	}))
	const body = `{"user":{"password":"hunter2"},"pan":"4111 1111 1111 1111"}`
	req, _ := http.NewRequest("POST", "http://"+addr+"/?pan=4111111111111111", strings.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	if _, got := do(t, req); string(got) != body {
		t.Errorf("the user's answer was changed: %s", got)
	}
	ev := n.take(1)[0]
	const masked = `{"user":{"password":"***"},"pan":"**** **** **** ****"}`
	if string(ev.Request.Body) != masked || string(ev.Response.Body) != masked || header(ev.Request.Headers, ":path")[0] != "/?pan=****************" || ev.Flags&event.FlagMasked == 0 {
		t.Errorf("request %s, response %s, flags %b", ev.Request.Body, ev.Response.Body, ev.Flags)
	}
}

// A node that is not there costs nothing but the copies.
func TestNodeIsAway(t *testing.T) {
	addr, e := gateway(t, settings(nil), envoytest.FreeAddr(t), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }))
	for range 100 {
		req, _ := http.NewRequest("GET", "http://"+addr+"/", nil)
		if res, body := do(t, req); res.StatusCode != 200 || string(body) != "ok" {
			t.Fatalf("user got %d %s", res.StatusCode, body)
		}
	}
	if n := e.Stat("http.ingress.lua.periscope.errors"); n != 0 {
		t.Errorf("%d Lua errors", n)
	}
	if n := e.Stat("cluster.periscope_mirror.upstream_cx_connect_fail"); n == 0 {
		t.Error("no failed connection is counted")
	}
}

// A body that never ends passes through while its exchange stays open, and
// other exchanges' events are not held by it.
func TestStreamsAreNotHeld(t *testing.T) {
	n := startNode(t)
	release := make(chan struct{})
	addr, _ := gateway(t, settings(nil), n.addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		fmt.Fprint(w, "first")
		w.(http.Flusher).Flush()
		if r.URL.Path == "/slow" {
			<-release
		}
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+addr+"/slow", nil)
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "first" {
		t.Fatalf("the first chunk is held: %q %v", first, err)
	}
	other, _ := http.NewRequest("GET", "http://"+addr+"/other", nil)
	do(t, other)
	if ev := n.take(1)[0]; header(ev.Request.Headers, ":path")[0] != "/other" {
		t.Errorf("got %s", header(ev.Request.Headers, ":path"))
	}
	close(release)
	_, _ = io.Copy(io.Discard, res.Body)
	if ev := n.take(1)[0]; header(ev.Request.Headers, ":path")[0] != "/slow" || string(ev.Response.Body) != "first" {
		t.Errorf("got %s %q", header(ev.Request.Headers, ":path"), ev.Response.Body)
	}
}
