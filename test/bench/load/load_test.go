package load

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const want = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"

// serve answers every request on every connection with what answer gives.
func serve(t *testing.T, answer func(c net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				br := bufio.NewReader(c)
				for {
					if _, err := http.ReadRequest(br); err != nil {
						return
					}
					answer(c)
				}
			}()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return ln.Addr().String()
}

func text(parts ...string) func(net.Conn) {
	return func(c net.Conn) {
		for _, p := range parts {
			fmt.Fprint(c, p)
		}
	}
}

func request() Request {
	return Request{Raw: []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), BodyBytes: 5}
}

func dial(t *testing.T, addr string, conns int) *Client {
	t.Helper()
	c, err := Dial(Config{Addr: addr, Conns: conns})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestSaturate(t *testing.T) {
	c := dial(t, serve(t, text(want)), 4)
	res := c.Saturate(t.Context(), request(), 50*time.Millisecond)
	if res.Errors != 0 || res.Requests < 4 || res.Elapsed < 50*time.Millisecond {
		t.Errorf("got %d answers, %d errors (%v) in %v", res.Requests, res.Errors, res.FirstError, res.Elapsed)
	}
}

func TestExchange(t *testing.T) {
	for _, tc := range []struct {
		name  string
		parts []string
		err   string
	}{
		{"whole", []string{want}, ""},
		{"head in two parts", []string{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r", "\nhello"}, ""},
		{"body in two parts", []string{"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe", "llo"}, ""},
		{"other status", []string{"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\nhello"}, "status line"},
		{"other length", []string{"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello!"}, "content-length"},
		{"no length", []string{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"}, "no content-length"},
		{"too long", []string{"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello!"}, "longer than it says"},
		{"endless head", []string{"HTTP/1.1 200 OK\r\nx: " + strings.Repeat("a", 80<<10)}, "too long"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, serve(t, text(tc.parts...)), 1)
			err := c.conns[0].exchange(request())
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("got error %v, want %q", err, tc.err)
			}
		})
	}
}

func TestFaultsAreCountedAndBounded(t *testing.T) {
	c := dial(t, serve(t, text("HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n")), 2)
	res := c.Saturate(t.Context(), request(), time.Minute)
	if res.Requests != 0 || res.Errors != 2*maxFaults || res.FirstError == nil {
		t.Errorf("got %d answers, %d errors, first %v; want 0, %d and one", res.Requests, res.Errors, res.FirstError, 2*maxFaults)
	}
	paced, err := c.Paced(t.Context(), request(), make([]time.Duration, 100))
	if err != nil {
		t.Fatal(err)
	}
	if paced.Requests != 0 || paced.Errors != 100 {
		t.Errorf("got %d answers, %d errors; want every request of the schedule to be an error", paced.Requests, paced.Errors)
	}
}

func TestPacedCountsFromWhenARequestWasDue(t *testing.T) {
	const pause = 60 * time.Millisecond
	stalled := make(chan struct{})
	c := dial(t, serve(t, func(conn net.Conn) {
		<-stalled
		fmt.Fprint(conn, want)
	}), 1)
	time.AfterFunc(pause, func() { close(stalled) })
	res, err := c.Paced(t.Context(), request(), []time.Duration{0, time.Millisecond, 2 * time.Millisecond})
	if err != nil || res.Errors != 0 || len(res.Latencies) != 3 {
		t.Fatalf("got %+v, %v", res, err)
	}
	for i, l := range res.Latencies {
		// The later two were held up by the first, and must say so.
		if l < pause-3*time.Millisecond {
			t.Errorf("request %d: latency %v hides the stall of %v", i, l, pause)
		}
	}
}

func TestPacedEndsWithItsContext(t *testing.T) {
	c := dial(t, serve(t, text(want)), 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Paced(ctx, request(), []time.Duration{time.Millisecond, 2 * time.Millisecond, time.Hour}); err != nil {
		t.Fatal(err)
	}
}

func TestConnectionsFromSeveralAddresses(t *testing.T) {
	seen := make(chan string, 2)
	addr := serve(t, func(c net.Conn) {
		seen <- c.RemoteAddr().(*net.TCPAddr).IP.String()
		fmt.Fprint(c, want)
	})
	c, err := Dial(Config{Addr: addr, Conns: 2, From: func(i int) net.IP { return net.IPv4(127, 0, 1, byte(i)) }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i, k := range c.conns {
		if err := k.exchange(request()); err != nil {
			t.Fatal(err)
		}
		if got, want := <-seen, fmt.Sprintf("127.0.1.%d", i); got != want {
			t.Errorf("connection %d comes from %s, want %s", i, got, want)
		}
	}
}

func TestDialNobody(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if _, err := Dial(Config{Addr: ln.Addr().String(), Conns: 1}); err == nil {
		t.Error("no error")
	}
}

func TestPoisson(t *testing.T) {
	got := Poisson(1, 1000, 10*time.Second)
	if len(got) < 9500 || len(got) > 10500 {
		t.Errorf("%d arrivals in 10 s at 1000/s", len(got))
	}
	for i := 1; i < len(got); i++ {
		if got[i] < got[i-1] {
			t.Fatalf("arrival %d before its predecessor", i)
		}
	}
	if again := Poisson(1, 1000, 10*time.Second); len(again) != len(got) || again[0] != got[0] {
		t.Error("the same seed gives other arrivals")
	}
}
