package accesslog_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/node/accesslog"
	"github.com/periscope-mesh/periscope/node/detect"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// waitMS is how long the plugin here waits for a response; 30 s in its source.
const waitMS = 400

// rig is a real Envoy, with the filters and logs of a gateway, before an
// upstream, and a node that is complete up to its ring.
type rig struct {
	t     *testing.T
	front string
	envoy *envoytest.Envoy
	ring  *ingest.Ring
	reg   *prometheus.Registry
	hold  time.Duration // how long events are on their way to the node
}

type object = map[string]any

// asObject writes a message as Envoy's configuration has it.
func asObject(t *testing.T, m proto.Message) object {
	t.Helper()
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var out object
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// startNode gives a node's address.
func startNode(t *testing.T, r *rig) string {
	t.Helper()
	r.ring, r.reg = ingest.NewRing(4096, 64<<20), prometheus.NewRegistry()
	log, err := accesslog.New(accesslog.Config{Ring: r.ring, Authenticator: ingest.Trusting{}, Registerer: r.reg})
	if err != nil {
		t.Fatal(err)
	}
	events, err := ingest.New(ingest.Config{Ring: r.ring, Joiner: log, Authenticator: ingest.Trusting{}, Registerer: r.reg})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var queue sync.Mutex
	s := ingest.Server(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == accesslog.Path {
			log.ServeHTTP(w, q)
			return
		}
		arrived := time.Now()
		queue.Lock() // so that they keep their order
		defer queue.Unlock()
		time.Sleep(time.Until(arrived.Add(r.hold)))
		events.ServeHTTP(w, q)
	}), slog.New(slog.DiscardHandler))
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return l.Addr().String()
}

func serveUpstream(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/reset":
		panic(http.ErrAbortHandler)
	case "/half":
		w.Header().Set("Content-Length", "10")
		_, _ = w.Write([]byte("abc"))
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	case "/slow", "/timeout":
		select {
		case <-r.Context().Done():
		case <-time.After(5 * time.Second):
		}
	}
	_, _ = io.Copy(io.Discard, r.Body)
}

func socketOf(addr string) object {
	host, port, _ := net.SplitHostPort(addr)
	return object{"socket_address": object{"address": host, "port_value": json.Number(port)}}
}

// start runs Envoy; node is the address of a node, share the policy's, in parts
// per million.
func start(t *testing.T, r *rig, node string, share int) {
	t.Helper()
	up := httptest.NewServer(http.HandlerFunc(serveUpstream))
	t.Cleanup(up.Close)
	r.t, r.front = t, envoytest.FreeAddr(t)
	settings, err := gateway.SettingsExtension(mirror.Settings{
		Gateway: "ns/gw", PolicyID: "ns/policy", PolicyRev: "r1", SharePPM: share, Mode: policy.ModeMonitor,
		Response: policy.BodyLimit{MaxBytes: 4096, ContentTypes: []string{"*/*"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	plugin, err := gateway.PluginExtension(strings.Replace(lua.Embedded().Code, "MAX_WAIT_MS = 30000", "MAX_WAIT_MS = "+strconv.Itoa(waitMS), 1))
	if err != nil {
		t.Fatal(err)
	}
	logs, err := gateway.AccessLogs("ns/gw")
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(node)
	n, _ := strconv.Atoi(port)
	cluster, err := gateway.FixedMirrorCluster([]mirror.Endpoint{{Host: host, Port: n}}, policy.TransportLua)
	if err != nil {
		t.Fatal(err)
	}
	static := func(name string, endpoints ...string) object {
		var list []any
		for _, e := range endpoints {
			list = append(list, object{"endpoint": object{"address": socketOf(e)}})
		}
		return object{"name": name, "type": "STATIC", "connect_timeout": "0.25s",
			"load_assignment": object{"cluster_name": name, "endpoints": []any{object{"lb_endpoints": list}}}}
	}
	route := func(prefix, cluster, timeout string) object {
		return object{"match": object{"prefix": prefix}, "route": object{"cluster": cluster, "timeout": timeout}}
	}
	r.envoy = envoytest.Start(t, object{
		"node": object{"id": "test", "cluster": "test"},
		"static_resources": object{
			"listeners": []any{object{"name": "http", "address": socketOf(r.front), "filter_chains": []any{object{"filters": []any{object{
				"name": "hcm", "typed_config": object{
					"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
					"stat_prefix": "http", "use_remote_address": true, "generate_request_id": false,
					"request_headers_timeout": "0.5s", "stream_idle_timeout": "1s", "normalize_path": true,
					"access_log": []any{asObject(t, logs[0]), asObject(t, logs[1])},
					"http_filters": []any{
						object{"name": "settings", "typed_config": asObject(t, settings.GetTypedConfig())},
						object{"name": "plugin", "typed_config": asObject(t, plugin.GetTypedConfig())},
						object{"name": "router", "typed_config": object{"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}},
					},
					"route_config": object{"virtual_hosts": []any{object{"name": "v", "domains": []any{"a"}, "routes": []any{
						route("/dead", "dead", "0s"), route("/none", "none", "0s"), route("/timeout", "upstream", "0.1s"), route("/", "upstream", "0s"),
					}}}},
				}}}}}}},
			"clusters": []any{asObject(t, cluster), static("upstream", strings.TrimPrefix(up.URL, "http://")), static("dead", "127.0.0.1:1"), static("none")},
		},
	})
}

// send writes bytes to the gateway, and gives the first line of the answer; it
// goes away after so long.
func (r *rig) send(data string, stay time.Duration) string {
	r.t.Helper()
	c, err := net.Dial("tcp", r.front)
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(stay))
	_, _ = io.WriteString(c, data)
	line, _ := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line)
}

// next gives the next exchange at the node.
func (r *rig) next() (ingest.Exchange, bool) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
	defer cancel()
	return r.ring.Pop(ctx)
}

func header(fields []event.Field, name string) string {
	for _, f := range fields {
		if string(f.Name) == name {
			return string(f.Value)
		}
	}
	return ""
}

const host = "Host: a\r\n"

// frames writes HTTP/2 frames behind the preface.
func frames(send func(*http2.Framer)) string {
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&b, nil)
	_ = f.WriteSettings()
	send(f)
	return b.String()
}

// block encodes header lines as literals, without HPACK's tables.
func block(lines ...string) []byte {
	var out []byte
	for i := 0; i < len(lines); i += 2 {
		out = append(append(append(append(out, 0, byte(len(lines[i]))), lines[i]...), byte(len(lines[i+1]))), lines[i+1]...)
	}
	return out
}

func request(f *http2.Framer, end bool, more ...string) { requestFor(f, 1, "/h2", end, more...) }

func requestFor(f *http2.Framer, stream uint32, path string, end bool, more ...string) {
	lines := append([]string{":method", "GET", ":scheme", "http", ":path", path, ":authority", "a"}, more...)
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block(lines...), EndStream: end, EndHeaders: true})
}

// What Envoy refuses before any filter is an event of its own.
func TestUnseen(t *testing.T) {
	r := &rig{}
	start(t, r, startNode(t, r), mirror.Everything)
	engine, err := detect.New(detect.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = engine.Close() })
	for _, tc := range []struct {
		name, data    string
		status        string // empty: the client gets none
		flags, detail string
		path          string
	}{
		{"method", "GE@T /x HTTP/1.1\r\n" + host + "\r\n", "400", "DPE", "http1.codec_error", ""},
		{"not HTTP", "\x16\x03\x01nothing\r\n\r\n", "400", "DPE", "http1.codec_error", ""},
		{"bytes of the path", "GET /\xff\xfe HTTP/1.1\r\n" + host + "\r\n", "400", "DPE", "http1.codec_error", ""},
		{"NUL in a header", "GET /x HTTP/1.1\r\n" + host + "X: a\x00b\r\n\r\n", "400", "DPE", "http1.invalid_characters", ""},
		{"name of a header", "GET /x HTTP/1.1\r\n" + host + "X y: a\r\n\r\n", "400", "DPE", "http1.codec_error", ""},
		{"large headers", "GET /x HTTP/1.1\r\n" + host + "X: " + strings.Repeat("a", 70000) + "\r\n\r\n", "431", "DPE", "http1.headers_too_large", ""},
		{"many headers", "GET /x HTTP/1.1\r\n" + host + strings.Repeat("X: a\r\n", 150) + "\r\n", "431", "DPE", "http1.too_many_headers", ""},
		{"length and chunks", "POST /x HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400", "DPE", "http1.content_length_and_chunked_not_allowed", ""},
		{"two lengths", "POST /x HTTP/1.1\r\n" + host + "Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd", "400", "DPE", "http1.codec_error", ""},
		{"transfer encoding", "POST /x HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "501", "DPE", "http1.invalid_transfer_encoding", ""},
		{"HTTP/1.0", "GET /x HTTP/1.0\r\n\r\n", "426", "DPE", "low_version", ""},
		{"target", "GET http:///x HTTP/1.1\r\n" + host + "\r\n", "400", "DPE", "http1.invalid_url", ""},
		{"no host", "GET /x?q=%27%20or%201=1-- HTTP/1.1\r\nUser-Agent: \xff\xfe\r\nReferer: http://r\r\n\r\n", "400", "", "missing_host_header", "/x?q=%27%20or%201=1--"},
		{"path that can't be normalised", "GET /%00x HTTP/1.1\r\n" + host + "\r\n", "400", "", "path_normalization_failed", "/%00x"},
		{"upgrade", "GET /x HTTP/1.1\r\n" + host + "Connection: upgrade\r\nUpgrade: other\r\n\r\n", "403", "", "upgrade_failed", "/x"},
		{"headers that do not end", "GET /x HTTP/1.1\r\n" + host + "X: ", "408", "", "request_header_timeout", ""},
		{"headers that the client leaves", "GET /x HTTP/1.1\r\n" + host + "X: ", "", "DC", "downstream_remote_disconnect", ""},
		{"h2, no path", frames(func(f *http2.Framer) {
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block(":method", "GET", ":scheme", "http", ":authority", "a"), EndStream: true, EndHeaders: true})
		}), "", "DPE", "http2.violation.of.messaging.rule", ""},
		{"h2, many headers", frames(func(f *http2.Framer) { request(f, true, slices.Repeat([]string{"x", "y"}, 150)...) }), "", "DR", "http2.too_many_headers", ""},
		{"h2, capital letter", frames(func(f *http2.Framer) { request(f, true, "X-Up", "a") }), "", "DPE", "http2.invalid.header.field", ""},
		{"h2, line break", frames(func(f *http2.Framer) { request(f, true, "x", "a\r\nb: c") }), "", "DPE", "http2.invalid.header.field", ""},
		{"h2, connection header", frames(func(f *http2.Framer) { request(f, true, "connection", "close") }), "", "DPE", "http2.invalid.header.field", ""},
		{"h2, HPACK", frames(func(f *http2.Framer) {
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: bytes.Repeat([]byte{0xff}, 6), EndStream: true, EndHeaders: true})
		}), "", "DPE", "codec_error", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stay := 2 * time.Second
			if tc.flags == "DC" {
				stay = 50 * time.Millisecond
			}
			answer := r.send(tc.data, stay)
			if tc.status != "" && !strings.Contains(answer, tc.status) {
				t.Errorf("the client got %q", answer)
			}
			x, ok := r.next()
			if !ok {
				t.Fatal("no event")
			}
			defer x.Done()
			e := x.Event
			if x.Gateway != "ns/gw" || e.Flags&event.FlagLogOnly == 0 || (e.Flags&event.FlagNoResponse != 0) != (tc.status == "") ||
				header(e.Response.Headers, ":status") != tc.status || e.ResponseFlags != tc.flags || !strings.HasPrefix(e.ResponseDetails, tc.detail) ||
				header(e.Request.Headers, ":path") != tc.path {
				t.Errorf("event %+v, request %s, response %s", e, e.Request.Headers, e.Response.Headers)
			}
			if host, _, err := net.SplitHostPort(e.Source); err != nil || host != "127.0.0.1" {
				t.Errorf("client %q", e.Source)
			}
			if at := time.UnixMicro(int64(e.StartUS)); time.Since(at) > time.Minute || time.Until(at) > time.Minute {
				t.Errorf("it started at %v", at)
			}
			res, err := engine.Inspect(&detect.Input{Event: e, Gateway: x.Gateway, VM: x.Header.VM, Received: x.Received})
			if attack := strings.Contains(tc.path, "%27"); err != nil || attack != (len(res.Hits) > 0) {
				t.Errorf("inspected: %d hits, %v", len(res.Hits), err)
			}
			if tc.name == "no host" && (header(e.Request.Headers, "user-agent") != "\xff\xfe" || header(e.Request.Headers, "referer") != "http://r") {
				t.Errorf("headers %s", e.Request.Headers)
			}
		})
	}
	// For these Envoy has no request to log, and counts them as errors of the
	// connection alone.
	for name, data := range map[string]string{
		"body of no request": frames(func(f *http2.Framer) { _ = f.WriteData(1, true, []byte("x")) }),
		"frame too large":    frames(func(f *http2.Framer) { _ = f.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 20000)) }),
		"settings cut":       frames(func(f *http2.Framer) { _ = f.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 5)) }),
		"preface":            "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n" + strings.Repeat("x", 100),
	} {
		before := r.envoy.Stat("http.http.downstream_cx_protocol_error")
		r.send(data, time.Second)
		envoytest.Eventually(t, 5*time.Second, "Envoy counts "+name, func() bool {
			return r.envoy.Stat("http.http.downstream_cx_protocol_error") == before+1
		})
	}
	got := entries(t, r.reg)
	if len(got) != 1 || got["event"] != 23 || r.ring.Len() != 0 {
		t.Errorf("entries %v, %d in the ring", got, r.ring.Len())
	}
}

// What the plugin can know all about is not logged; nor is anything, however it
// ends, where nothing is copied.
func TestNothingLogged(t *testing.T) {
	for _, share := range []int{mirror.Everything, 0} {
		t.Run(fmt.Sprint(share), func(t *testing.T) {
			r := &rig{}
			start(t, r, startNode(t, r), share)
			for range 20 {
				if got := r.send("GET /x HTTP/1.1\r\n"+host+"\r\n", time.Second); !strings.Contains(got, "200") {
					t.Fatal(got)
				}
			}
			if share == 0 {
				r.send("GET /none HTTP/1.1\r\n"+host+"\r\n", time.Second)
				r.send("GET /slow HTTP/1.1\r\n"+host+"\r\n", 50*time.Millisecond)
			}
			// This one is, and comes after whatever else would be.
			r.send("GE@T /x HTTP/1.1\r\n\r\n", time.Second)
			envoytest.Eventually(t, 5*time.Second, "the refused request comes", func() bool { return entries(t, r.reg)["event"] == 1 })
			if got := entries(t, r.reg); len(got) != 1 {
				t.Errorf("entries %v", got)
			}
			envoytest.Eventually(t, 5*time.Second, "Envoy has written one entry", func() bool {
				return r.envoy.Stat("access_logs.open_telemetry_access_log.periscope.logs_written") == 1
			})
		})
	}
}

// flood sends so many requests that Envoy refuses, over connections of their own.
func (r *rig) flood(count int) {
	r.t.Helper()
	var wg sync.WaitGroup
	work := make(chan struct{}, count)
	for range count {
		work <- struct{}{}
	}
	close(work)
	for range 8 {
		wg.Go(func() {
			for range work {
				r.send("GE@T /x HTTP/1.1\r\n\r\n", time.Second)
			}
		})
	}
	wg.Wait()
}

// A node that is gone, or takes nothing in, costs users nothing and Envoy no
// memory to speak of: what it can't send it drops, and counts.
func TestBadNode(t *testing.T) {
	for name, node := range map[string]func(t *testing.T) string{
		"gone": func(t *testing.T) string { return envoytest.FreeAddr(t) },
		"stalled": func(t *testing.T) string {
			l, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts: the kernel does, and reads nothing
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = l.Close() })
			return l.Addr().String()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := &rig{}
			start(t, r, node(t), mirror.Everything)
			r.flood(200)
			before := r.memory()
			r.flood(2000)
			for range 50 {
				if got := r.send("GET /x HTTP/1.1\r\n"+host+"\r\n", time.Second); !strings.Contains(got, "200") {
					t.Fatalf("a user got %q", got)
				}
			}
			if grown := r.memory() - before; grown > 8<<20 {
				t.Errorf("Envoy holds %d bytes more", grown)
			}
			envoytest.Eventually(t, 10*time.Second, "all entries are dropped and counted, and no call is left", func() bool {
				return r.envoy.Stat("access_logs.open_telemetry_access_log.periscope.logs_dropped") == 2200 && r.envoy.Stat("cluster.periscope_mirror.upstream_rq_active") == 0
			})
		})
	}
}

// memory is what Envoy has allocated, in bytes.
func (r *rig) memory() int {
	r.t.Helper()
	res, err := http.Get("http://" + r.envoy.Admin + "/memory")
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	var m struct {
		Allocated int `json:"allocated,string"`
	}
	if err := json.NewDecoder(res.Body).Decode(&m); err != nil {
		r.t.Fatal(err)
	}
	return m.Allocated
}
