package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extproc "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/periscope-mesh/periscope/mirror/event"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs r until the test ends, and checks that it then returns.
func start(t *testing.T, r interface{ Run(context.Context) error }) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func url(port int) string { return fmt.Sprintf("http://127.0.0.1:%d/", port) }

func TestBackend(t *testing.T) {
	b, err := ListenBackend(1024)
	if err != nil {
		t.Fatal(err)
	}
	start(t, b)
	tr := &http.Transport{MaxConnsPerHost: 1}
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr}
	for i, n := range []int{0, 10, 100_000, 0} {
		resp, err := client.Post(url(b.Port()), "application/json", bytes.NewReader(make([]byte, n)))
		if err != nil {
			t.Fatal(err)
		}
		var body bytes.Buffer
		_, err = body.ReadFrom(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 || body.Len() != 1024 || !json.Valid(body.Bytes()) {
			t.Errorf("request %d: status %d, %d bytes, %v", i, resp.StatusCode, body.Len(), err)
		}
	}
	waitFor(t, func() bool { return b.Copies() == 4 && b.Open() == 0 })
}

// A request says in its target which of several answers it wants.
func TestBackendOfSeveralLengths(t *testing.T) {
	b, err := ListenBackend(16, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	start(t, b)
	tr := &http.Transport{MaxConnsPerHost: 1}
	defer tr.CloseIdleConnections()
	for query, want := range map[string]int64{"": 16, "?bytes=1048576": 1 << 20, "?bytes=16": 16, "?bytes=17": 16} {
		resp, err := (&http.Client{Transport: tr}).Get(url(b.Port()) + query)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || n != want {
			t.Errorf("%q: %d bytes, %v; want %d", query, n, err, want)
		}
	}
}

// Two requests that arrive as one packet are two requests.
func TestBackendPipelined(t *testing.T) {
	b, err := ListenBackend(0)
	if err != nil {
		t.Fatal(err)
	}
	start(t, b)
	c, err := net.Dial("tcp", strings.TrimPrefix(strings.TrimSuffix(url(b.Port()), "/"), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n")
	waitFor(t, func() bool { return b.Copies() == 2 })
}

func TestContentLength(t *testing.T) {
	for _, tc := range []struct {
		head string
		want int
		ok   bool
	}{
		{"GET / HTTP/1.1\r\nhost: a\r\n\r\n", 0, true},
		{"POST / HTTP/1.1\r\ncontent-length: 12\r\n\r\n", 12, true},
		{"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n", 0, false},
		{"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 0, false},
	} {
		if got, err := contentLength([]byte(tc.head)); got != tc.want || (err == nil) != tc.ok {
			t.Errorf("%q: got %d, %v", tc.head, got, err)
		}
	}
}

func TestJSON(t *testing.T) {
	for _, n := range []int{0, 5, 16, 100, 1024, 65536} {
		b := JSON(n)
		if len(b) != n || n >= 16 && !json.Valid(b) {
			t.Errorf("JSON(%d): %d bytes, %.40q", n, len(b), b)
		}
	}
}

func TestEvents(t *testing.T) {
	e, err := ListenEvents()
	if err != nil {
		t.Fatal(err)
	}
	start(t, e)
	tr := plainHTTP2()
	defer tr.CloseIdleConnections()
	post := func(b []byte) int {
		resp, err := (&http.Client{Transport: tr}).Post(url(e.Port()), event.ContentType, bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	batch := func(mirrored uint64, events int) []byte {
		b := event.AppendHeader(nil, &event.Header{Version: event.Version, VM: "a", Counters: map[string]uint64{event.CounterMirrored: mirrored}})
		for range events {
			b = event.Append(b, &event.Event{SharePPM: 1e6, Request: event.Message{Headers: []event.Field{{Name: []byte(":path"), Value: []byte("/")}}}})
		}
		return b
	}
	// Batches may overtake each other: the highest counter is the last one.
	for _, b := range [][]byte{batch(5, 2), batch(3, 3)} {
		if code := post(b); code != http.StatusOK {
			t.Errorf("status %d", code)
		}
	}
	if made, told := e.Expected(); e.Copies() != 5 || made != 5 || !told || e.Fault() != nil {
		t.Errorf("%d copies of %d, fault %v", e.Copies(), made, e.Fault())
	}
	if code := post([]byte("nonsense")); code != http.StatusBadRequest || e.Fault() == nil {
		t.Errorf("status %d, fault %v", code, e.Fault())
	}
}

func plainHTTP2() *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Transport{Protocols: protocols}
}

func TestFaulty(t *testing.T) {
	for _, tc := range []struct {
		fault Fault
		want  string // of the error, or the status
	}{
		{Slow, "deadline exceeded"},
		{Stalled, "deadline exceeded"},
		{Dead, "refused"},
		{Unavailable, "503"},
	} {
		t.Run(string(tc.fault), func(t *testing.T) {
			f, err := ListenFaulty(tc.fault)
			if err != nil {
				t.Fatal(err)
			}
			start(t, f)
			tr := plainHTTP2()
			defer tr.CloseIdleConnections()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, url(f.Port()), strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := tr.RoundTrip(req)
			got := fmt.Sprint(err)
			if err == nil {
				resp.Body.Close()
				got = resp.Status
			}
			if !strings.Contains(got, tc.want) {
				t.Errorf("got %s, want %s", got, tc.want)
			}
		})
	}
	if _, err := ListenFaulty("flaky"); err == nil {
		t.Error("an unknown fault is accepted")
	}
}

func TestProcessor(t *testing.T) {
	p, err := ListenProcessor()
	if err != nil {
		t.Fatal(err)
	}
	start(t, p)
	conn, err := grpc.NewClient(fmt.Sprintf("127.0.0.1:%d", p.Port()), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := extproc.NewExternalProcessorClient(conn).Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*extproc.ProcessingRequest{
		{Request: &extproc.ProcessingRequest_RequestHeaders{RequestHeaders: &extproc.HttpHeaders{Headers: &core.HeaderMap{}, EndOfStream: true}}},
		{Request: &extproc.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extproc.HttpHeaders{Headers: &core.HeaderMap{}}}},
		{Request: &extproc.ProcessingRequest_ResponseBody{ResponseBody: &extproc.HttpBody{Body: []byte("a"), EndOfStream: true}}},
	} {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, func() bool { return p.Copies() == 1 && p.Open() == 1 })
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return p.Open() == 0 })
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("not in time")
		case <-tick.C:
		}
	}
}
