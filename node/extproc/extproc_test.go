package extproc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/extproc"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
)

// bench is a node's port without a gateway.
type bench struct {
	t        *testing.T
	addr     string
	api      extprocv3.ExternalProcessorClient
	handler  *extproc.Handler
	registry *prometheus.Registry

	mu     sync.Mutex
	events []taken
	sizes  []int
}

func newBench(t *testing.T, settings mirror.Settings, change func(*extproc.Config)) *bench {
	t.Helper()
	raw, err := json.Marshal(settings)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, registry: prometheus.NewRegistry()}
	c := extproc.Config{
		Settings: func(gateway, _ string) (string, []byte, bool) { return "r", raw, gateway == "ns/gw" },
		Queue: func(batch *event.Batch, gateway string, _ time.Time, size int) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.events = append(b.events, taken{batch.Header, batch.Events[0], gateway})
			b.sizes = append(b.sizes, size)
		},
		Authenticate: func(_ *http.Request, claim string) (string, error) {
			if claim == "" {
				return "", errors.New("who is it?")
			}
			return claim, nil
		},
		Registerer: b.registry,
	}
	if change != nil {
		change(&c)
	}
	if b.handler, err = extproc.New(c); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := ingest.Server(b.handler, slog.New(slog.DiscardHandler))
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	b.addr = l.Addr().String()
	conn, err := grpc.NewClient("passthrough:///"+b.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	b.api = extprocv3.NewExternalProcessorClient(conn)
	return b
}

func (b *bench) taken() []taken {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]taken{}, b.events...)
}

// counts are the handler's counters that are not 0.
func (b *bench) counts() map[string]int {
	b.t.Helper()
	families, err := b.registry.Gather()
	if err != nil {
		b.t.Fatal(err)
	}
	out := map[string]int{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "periscope_extproc_")
			for _, l := range m.GetLabel() {
				name = l.GetValue()
			}
			if v := int(m.GetCounter().GetValue() + m.GetGauge().GetValue()); v != 0 {
				out[name] += v
			}
		}
	}
	return out
}

func (b *bench) expect(want map[string]int) {
	b.t.Helper()
	envoytest.Eventually(b.t, 5*time.Second, fmt.Sprintf("counts are %v", want), func() bool {
		got := b.counts()
		return fmt.Sprint(got) == fmt.Sprint(want)
	})
}

type stream = grpc.BidiStreamingClient[extprocv3.ProcessingRequest, extprocv3.ProcessingResponse]

func (b *bench) open(ctx context.Context, gateway string, more ...string) stream {
	b.t.Helper()
	s, err := b.api.Process(metadata.AppendToOutgoingContext(ctx, append([]string{"periscope-gateway", gateway}, more...)...))
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

func headers(lines ...string) *extprocv3.HttpHeaders {
	h := &extprocv3.HttpHeaders{Headers: &core.HeaderMap{}}
	for i := 0; i < len(lines); i += 2 {
		h.Headers.Headers = append(h.Headers.Headers, &core.HeaderValue{Key: lines[i], RawValue: []byte(lines[i+1])})
	}
	return h
}

func request(h *extprocv3.HttpHeaders, attributes map[string]any) *extprocv3.ProcessingRequest {
	m := &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: h}}
	if s, _ := structpb.NewStruct(attributes); len(attributes) > 0 {
		m.Attributes = map[string]*structpb.Struct{"envoy.filters.http.ext_proc": s}
	}
	return m
}

func get(path string) *extprocv3.ProcessingRequest {
	h := headers(":authority", "shop.example", ":path", path, ":method", "GET", ":scheme", "http")
	h.EndOfStream = true
	return request(h, nil)
}

func response(end bool, lines ...string) *extprocv3.ProcessingRequest {
	h := headers(lines...)
	h.EndOfStream = end
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: h}}
}

func chunk(body string, end bool) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{ResponseBody: &extprocv3.HttpBody{Body: []byte(body), EndOfStream: end}}}
}

// send sends messages, as long as the node takes them, and gives the stream's end.
func send(s stream, messages ...*extprocv3.ProcessingRequest) error {
	for _, m := range messages {
		if s.Send(m) != nil {
			break
		}
	}
	_, err := s.Recv()
	return err
}

func settings() mirror.Settings {
	return mirror.Settings{
		Gateway: "ns/gw", PolicyID: "ns/a", PolicyRev: "ra", Mode: policy.ModeMonitor, Transport: policy.TransportExtProc, SharePPM: mirror.Everything,
		Request: policy.BodyLimit{MaxBytes: 1 << 20, ContentTypes: []string{"*/*"}}, Response: policy.BodyLimit{MaxBytes: 1 << 20, ContentTypes: []string{"text/*"}},
		Mask: policy.Mask{Headers: []string{"authorization"}},
	}
}

// Each stream ends in an event or a counted reason.
func TestOutcomes(t *testing.T) {
	s := settings()
	s.Match = []policy.Match{{Hosts: []string{"shop.example"}}}
	s.Exclude = []policy.Match{{Paths: []policy.PathMatch{{Type: policy.PathPrefix, Value: "/healthz"}}}}
	off := settings()
	off.PolicyID, off.Mode, off.Match = "ns/off", policy.ModeOff, []policy.Match{{Hosts: []string{"off.example"}}}
	none := settings()
	none.PolicyID, none.SharePPM, none.Match = "ns/none", 0, []policy.Match{{Hosts: []string{"none.example"}}}
	s.Next = []mirror.Settings{off, none}
	b := newBench(t, s, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	host := func(h string) *extprocv3.ProcessingRequest {
		return request(headers(":authority", h, ":path", "/"), nil)
	}
	for _, tc := range []struct {
		gateway string
		first   *extprocv3.ProcessingRequest
		code    string
	}{
		{"ns/gw", host("off.example:80"), "EOF"},
		{"ns/gw", host("none.example"), "EOF"},
		{"ns/gw", host("other.example"), "EOF"},
		{"ns/gw", get("/healthz/x"), "EOF"},
		{"ns/unknown", get("/"), "EOF"},
		{"", get("/"), "Unauthenticated"},
		{"ns/gw", response(true, ":status", "400"), "EOF"},
		{"ns/gw", chunk("a body before any header", true), "InvalidArgument"},
		{"ns/gw", &extprocv3.ProcessingRequest{}, "InvalidArgument"},
	} {
		if err := send(b.open(ctx, tc.gateway), tc.first); !strings.Contains(err.Error(), tc.code) {
			t.Errorf("%s %v: %v, want %s", tc.gateway, tc.first, err, tc.code)
		}
	}
	if err := send(b.open(ctx, "ns/gw"), get("/x"), response(false, ":status", "200", "content-type", "text/plain"), chunk("a", false), chunk("b", true)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	early := b.open(ctx, "ns/gw")
	_ = early.CloseSend()
	if _, err := early.Recv(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	b.expect(map[string]int{"seen": 11, "off": 1, "sampled_out": 1, "excluded": 2, "no_settings": 1, "no_request": 1, "unauthorized": 1, "malformed": 2, "mirrored": 1, "aborted": 1})
	if got := b.handler.Gateways(); len(got) != 2 || got[0].Gateway != "ns/gw" || got[0].Seen != 9 || got[0].Errors != 2 {
		t.Errorf("gateways: %+v", got)
	}
	e := b.taken()[0]
	if string(e.event.Response.Body) != "ab" || e.event.Flags != 0 || e.event.Policy != "ns/a" || e.header.PolicyRev != "ra" || e.gateway != "ns/gw" || e.event.SharePPM != mirror.Everything {
		t.Errorf("event %+v of %+v", e.event, e.header)
	}
}

// A policy that wants less than the gateway sends for another gets no more.
func TestShareOfOneAmongSeveral(t *testing.T) {
	s := settings()
	s.SharePPM = 100_000
	b := newBench(t, s, nil)
	const calls = 1000
	for range calls {
		if err := send(b.open(t.Context(), "ns/gw", "periscope-share", "500000"), get("/x"), response(true, ":status", "204")); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	if n := len(b.taken()); n < 140 || n > 260 {
		t.Errorf("%d of %d, want one in five", n, calls)
	}
	if got := b.taken()[0].event.SharePPM; got != 100_000 {
		t.Errorf("share of the event is %d", got)
	}
}

// A node that doesn't know all of the settings takes nothing: what it doesn't
// know may be a mask.
func TestUnknownSettings(t *testing.T) {
	b := newBench(t, settings(), func(c *extproc.Config) {
		c.Settings = func(string, string) (string, []byte, bool) {
			return "r", []byte(`{"Mode":"Monitor","SharePPM":1000000,"Mask":{"cookies":["session"]},"Cookies":1}`), true
		}
	})
	for range 2 {
		if err := send(b.open(t.Context(), "ns/gw"), get("/x")); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	b.expect(map[string]int{"seen": 2, "no_settings": 2})
}

// Times are of when messages came, from the first on.
func TestTimes(t *testing.T) {
	var calls atomic.Int64
	b := newBench(t, settings(), func(c *extproc.Config) {
		from := time.Now()
		c.Now = func() time.Time { return from.Add(time.Duration(calls.Add(1)) * time.Millisecond) }
	})
	first := request(headers(":authority", "a", ":path", "/", ":method", "POST"), nil)
	body := &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{RequestBody: &extprocv3.HttpBody{Body: []byte("x"), EndOfStream: true}}}
	if err := send(b.open(t.Context(), "ns/gw"), first, body, response(false, ":status", "200", "content-type", "text/plain"), chunk("a", false), chunk("b", true)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if e := b.taken()[0].event; e.RequestEndUS != 1000 || e.HeadersUS != 2000 || e.EndUS != 4000 {
		t.Errorf("request's end, response's header and end after %d, %d, %d µs", e.RequestEndUS, e.HeadersUS, e.EndUS)
	}
}

// What is masked is hidden, or told to have been there.
func TestMasks(t *testing.T) {
	b := newBench(t, settings(), nil)
	first := request(headers(":authority", "a", ":path", "/", "authorization", "Basic x", "x", "1"), nil)
	if err := send(b.open(t.Context(), "ns/gw"), first, response(true, ":status", "204", "authorization", "y")); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	first = request(headers(":authority", "a", ":path", "/", "x", "1"), map[string]any{`"authorization" in request.headers`: true, `"other" in request.headers`: false})
	if err := send(b.open(t.Context(), "ns/gw"), first, response(true, ":status", "204")); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	all := b.taken()
	for i, want := range []string{
		":authority: \"a\"\n:path: \"/\"\nauthorization: \"***\"\nx: \"1\"\n",
		":authority: \"a\"\n:path: \"/\"\nx: \"1\"\nauthorization: \"***\"\n",
	} {
		if got := text(all[i].event.Request.Headers); got != want || all[i].event.Flags&event.FlagMasked == 0 {
			t.Errorf("flags %b, headers\n%swant\n%s", all[i].event.Flags, got, want)
		}
	}
	if got := value(all[0].event.Response.Headers, "authorization"); got != "***" {
		t.Errorf("the response's is %q", got)
	}
}

// Where a policy withholds the headers that tell what a body is, a body is
// masked as any that it might be, or not copied.
func TestMaskedTypes(t *testing.T) {
	s := settings()
	s.Mask = policy.Mask{Headers: []string{"content-type", "content-encoding"}, FormFields: []string{"password"}}
	const multipart = "--b\r\nContent-Disposition: form-data; name=password\r\n\r\nsecret\r\n--b--"
	b := newBench(t, s, nil)
	for i, tc := range []struct{ withheld, body, want string }{
		{"content-type", multipart, "--b\r\nContent-Disposition: form-data; name=password\r\n\r\n***"},
		{"content-encoding", "compressed", ""},
		{"x-other", "not compressed", "not compressed"},
	} {
		first := request(headers(":authority", "a", ":path", "/"), map[string]any{fmt.Sprintf("%q in request.headers", tc.withheld): true})
		body := &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{RequestBody: &extprocv3.HttpBody{Body: []byte(tc.body), EndOfStream: true}}}
		if err := send(b.open(t.Context(), "ns/gw"), first, body, response(true, ":status", "204")); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if e := b.taken()[i].event; string(e.Request.Body) != tc.want || e.Flags&event.FlagMasked == 0 {
			t.Errorf("%s: body %q, flags %b", tc.withheld, e.Request.Body, e.Flags)
		}
	}
}

// A text that is no UTF-8, which a user may have sent as the server's name, costs
// no exchange.
func TestBytesThatAreNoText(t *testing.T) {
	b := newBench(t, settings(), nil)
	first, err := proto.Marshal(request(headers(":authority", "a", ":path", "/\x00\xff"), map[string]any{"connection.requested_server_name": "XX"}))
	if err != nil {
		t.Fatal(err)
	}
	first = bytes.Replace(first, []byte("XX"), []byte("\xff\xfe"), 1)
	last, err := proto.Marshal(response(true, ":status", "204"))
	if err != nil {
		t.Fatal(err)
	}
	if status := b.raw(frame(first), frame(last)); status != "0" {
		t.Errorf("gRPC status %q", status)
	}
	if got := b.taken(); len(got) != 1 || got[0].event.SNI != "\xff\xfe" || value(got[0].event.Request.Headers, ":path") != "/\x00\xff" {
		t.Errorf("events %+v", got)
	}
}

func frame(m []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m))), m...)
}

// raw sends bytes and gives the gRPC status.
func (b *bench) raw(parts ...[]byte) string {
	b.t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	req, err := http.NewRequest(http.MethodPost, "http://"+b.addr+extproc.Path, bytes.NewReader(bytes.Join(parts, nil)))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Periscope-Gateway", "ns/gw")
	res, err := transport.RoundTrip(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.Header.Get("Grpc-Status")
}

// What is no message of ext_proc is refused, and no claim of a size is believed.
func TestMalformed(t *testing.T) {
	b := newBench(t, settings(), nil)
	first, err := proto.Marshal(get("/x"))
	if err != nil {
		t.Fatal(err)
	}
	huge := []byte{0, 0xff, 0xff, 0xff, 0xff}
	for i, tc := range []struct {
		parts [][]byte
		want  string
	}{
		{[][]byte{frame([]byte("no protobuf"))}, "3"},
		{[][]byte{frame(first[:len(first)-1])}, "3"},
		{[][]byte{{1}, frame(first)[1:]}, "3"}, // compressed
		{[][]byte{huge}, "3"},
		{[][]byte{{0, 0, 0x30, 0, 0}, first}, "0"},                  // cut off
		{[][]byte{frame(first), frame([]byte("no protobuf"))}, "3"}, // what came before is kept
	} {
		if got := b.raw(tc.parts...); got != tc.want {
			t.Errorf("case %d: gRPC status %q, want %s", i, got, tc.want)
		}
	}
	b.expect(map[string]int{"seen": 6, "malformed": 4, "aborted": 1, "mirrored": 1, "unfinished": 1})
	res, err := http.Get("http://" + b.addr + extproc.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusUnsupportedMediaType {
		t.Errorf("a request that isn't gRPC: %s", res.Status)
	}
}

// Streams and the memory of all copies are bounded, and all of it comes back.
func TestBounds(t *testing.T) {
	b := newBench(t, settings(), func(c *extproc.Config) { c.MaxStreams, c.MaxBytes = 3, 300_000 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	big := strings.Repeat("r", 100_000)
	var open []stream
	for range 3 {
		s := b.open(ctx, "ns/gw")
		for _, m := range []*extprocv3.ProcessingRequest{get("/x"), response(false, ":status", "200", "content-type", "text/plain"), chunk(big, false)} {
			if err := s.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		open = append(open, s)
	}
	// Two copies fit; the third is given up, and its stream ended.
	envoytest.Eventually(t, 5*time.Second, "a copy is given up", func() bool {
		c := b.counts()
		return c["evicted"] == 1 && c["held_bytes"] > 200_000 && c["open_exchanges"] == 2
	})
	open = append(open, b.open(ctx, "ns/gw"))
	envoytest.Eventually(t, 5*time.Second, "three streams are open", func() bool { return b.counts()["open_exchanges"] == 3 })
	if err := send(b.open(ctx, "ns/gw"), get("/x")); !strings.Contains(err.Error(), "ResourceExhausted") {
		t.Errorf("the fourth stream: %v", err)
	}
	for _, s := range open {
		_ = s.CloseSend()
	}
	b.expect(map[string]int{"seen": 5, "mirrored": 3, "aborted": 1, "busy": 1, "evicted": 1, "unfinished": 2})
	for _, e := range b.taken() {
		if e.event.Flags&event.FlagResponseOpen == 0 {
			t.Errorf("flags %b", e.event.Flags)
		}
	}
}

// An exchange that doesn't end is taken as it is after a while, and its stream
// ended; the port's own time limits cut none before.
func TestWait(t *testing.T) {
	t.Parallel()
	b := newBench(t, settings(), func(c *extproc.Config) { c.MaxWait = 11 * time.Second })
	from := time.Now()
	s := b.open(t.Context(), "ns/gw")
	if err := send(s, get("/x"), response(false, ":status", "200", "content-type", "text/plain"), chunk("so far", false)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if took := time.Since(from); took < 11*time.Second {
		t.Errorf("the stream was ended after %v", took)
	}
	b.expect(map[string]int{"seen": 1, "mirrored": 1, "unfinished": 1})
	if e := b.taken()[0].event; e.Flags != event.FlagResponseOpen || string(e.Response.Body) != "so far" {
		t.Errorf("flags %b, body %q", e.Flags, e.Response.Body)
	}
}

// guard discards every other exchange.
type guard struct{ n int }

func (g *guard) Discard(priority bool) (bool, float64) {
	g.n++
	return g.n%2 == 0, 2
}

// Each exchange that comes stands for those that Envoy chose it from; of several
// policies each has its share; and what the guard discards is counted.
func TestDemandAndGuard(t *testing.T) {
	a := settings()
	a.Match = []policy.Match{{Hosts: []string{"a.example"}}}
	b := settings()
	b.PolicyID, b.SharePPM = "ns/b", 500_000
	a.Next = []mirror.Settings{b}
	g := &guard{}
	bench := newBench(t, a, func(c *extproc.Config) { c.Guard = g })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	send := func(host, share, shares string) {
		t.Helper()
		ctx := metadata.NewOutgoingContext(ctx, metadata.Pairs("periscope-gateway", "ns/gw", "periscope-share", share, "periscope-shares", shares))
		stream, err := bench.api.Process(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := send(stream, request(headers(":authority", host, ":path", "/"), nil), response(true, ":status", "204")); !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	for range 4 {
		send("a.example", "250000", "250000,0")
		send("b.example", "250000", "250000,0")
	}
	send("b.example", "400000", "") // of a gateway that tells no more
	bench.expect(map[string]int{"seen": 9, "mirrored": 3, "discarded": 2, "sampled_out": 4})
	demands := bench.handler.Demands(time.Now().Add(-time.Hour))
	if len(demands) != 2 || demands[0].Eligible != 16 || demands[0].Received != 4 || demands[1].Policy != "ns/b" || demands[1].Eligible != 18 || demands[1].Received != 1 || demands[0].Gateway != "ns/gw" || demands[0].Heard < time.Hour-time.Minute {
		t.Errorf("demands %+v", demands)
	}
	for _, e := range bench.taken() {
		if want := map[string]uint64{"ns/a": 125_000, "ns/b": 200_000}[e.event.Policy]; e.event.SharePPM != want {
			t.Errorf("an event of %s stands for a share of %d", e.event.Policy, e.event.SharePPM)
		}
	}
	if n := bench.handler.Discarded(); n != 2 {
		t.Errorf("%d are discarded", n)
	}
}
