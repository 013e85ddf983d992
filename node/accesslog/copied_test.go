package accesslog_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/test/envoytest"
)

// late is longer than an entry takes to the node.
const late = 200 * time.Millisecond

// How an exchange ended that the plugin has copied comes to its event.
func TestCopied(t *testing.T) {
	r := &rig{hold: late}
	start(t, r, startNode(t, r), mirror.Everything)
	get := func(path string) string { return "GET " + path + " HTTP/1.1\r\n" + host + "\r\n" }
	get2 := func(path string) string { return frames(func(f *http2.Framer) { requestFor(f, 1, path, true) }) }
	for _, tc := range []struct {
		name, data    string
		stay          time.Duration
		status        string // empty: the plugin saw none
		flags, detail string
	}{
		{"abort before the response", get("/slow"), 50 * time.Millisecond, "", "DC", "downstream_remote_disconnect"},
		{"abort in the request", "POST /x HTTP/1.1\r\n" + host + "Content-Length: 9\r\n\r\nabc", 50 * time.Millisecond, "", "DC", "downstream_remote_disconnect"},
		{"response that ends early", get("/half"), 2 * late, "200", "UPE", "upstream_reset_after_response_started{protocol_error}"},
		{"chunks", "POST /x HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n", 2 * late, "400", "DPE", "http1.codec_error"},
		{"upstream resets", get("/reset"), 2 * late, "503", "UC", "upstream_reset_before_response_started{connection_termination}"},
		{"upstream is late", get("/timeout"), 2 * late, "504", "UT", "response_timeout"},
		{"upstream refuses", get("/dead"), 2 * late, "503", "UF", "upstream_reset_before_response_started{remote_connection_failure"},
		{"body that stops", "POST /x HTTP/1.1\r\n" + host + "Content-Length: 9\r\n\r\nabc", 2 * time.Second, "408", "SI", "stream_idle_timeout"},
		{"no upstream", get("/none"), 2 * late, "503", "UH", "no_healthy_upstream"},
		{"no route", "GET /x HTTP/1.1\r\nHost: b\r\n\r\n", 2 * late, "404", "NR", "route_not_found"},
		{"h2, abort before the response", get2("/slow"), 50 * time.Millisecond, "", "DC", "downstream_remote_disconnect"},
		{"h2, reset", frames(func(f *http2.Framer) { request(f, false); _ = f.WriteRSTStream(1, http2.ErrCodeCancel) }), 2 * late, "", "DR", "http2.remote_reset"},
		{"h2, length", frames(func(f *http2.Framer) {
			request(f, false, "content-length", "3")
			_ = f.WriteData(1, true, []byte("abcdef"))
		}), 2 * late, "", "DPE", "http2.remote_reset"},
		{"h2, response that ends early", get2("/half"), 2 * late, "200", "UPE", "upstream_reset_after_response_started{protocol_error}"},
		{"h2, upstream resets", get2("/reset"), 2 * late, "503", "UC", "upstream_reset_before_response_started{connection_termination}"},
		{"h2, upstream is late", get2("/timeout"), 2 * late, "504", "UT", "response_timeout"},
		{"h2, upstream refuses", get2("/dead"), 2 * late, "503", "UF", "upstream_reset_before_response_started{remote_connection_failure"},
		{"h2, no upstream", get2("/none"), 2 * late, "503", "UH", "no_healthy_upstream"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := entries(t, r.reg)
			r.stay(tc.data, tc.stay)
			// The plugin gives up on it with the first exchange after its wait.
			for deadline := time.Now().Add(waitMS*time.Millisecond + 100*time.Millisecond); r.ring.Len() == 0 && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			if got := r.send(get("/ok"), time.Second); !strings.Contains(got, "200") {
				t.Fatalf("after it: %q", got)
			}
			var x ingest.Exchange
			for of := map[bool]bool{}; !of[true] || !of[false]; {
				next, ok := r.next()
				if !ok {
					t.Fatalf("no event; %v", entries(t, r.reg))
				}
				defer next.Done()
				after := header(next.Event.Request.Headers, ":path") == "/ok"
				if of[after] = true; !after {
					x = next
				}
			}
			e := x.Event
			if header(e.Response.Headers, ":status") != tc.status || (e.Flags&event.FlagNoResponse != 0) != (tc.status == "") || e.Flags&event.FlagLogOnly != 0 {
				t.Errorf("event %+v, response %s", e, e.Response.Headers)
			}
			if after := entries(t, r.reg); after["joined"] != before["joined"]+1 || e.ResponseFlags != tc.flags || !strings.HasPrefix(e.ResponseDetails, tc.detail) {
				t.Errorf("results %v, flags %q, details %q", after, e.ResponseFlags, e.ResponseDetails)
			}
			if e.EndUS > 5_000_000 {
				t.Errorf("it ended after %d µs", e.EndUS)
			}
		})
	}
	if got := entries(t, r.reg); len(got) != 1 {
		t.Errorf("entries %v", got)
	}
}

// stay writes bytes to the gateway, and reads what comes for so long.
func (r *rig) stay(data string, long time.Duration) {
	r.t.Helper()
	c, err := net.Dial("tcp", r.front)
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(long))
	_, _ = io.WriteString(c, data)
	_, _ = io.Copy(io.Discard, c)
}

// take gives the next exchanges' flags by path, in the order of their numbers.
func (r *rig) take(count int) [][2]string {
	r.t.Helper()
	var out [][2]string
	first := uint64(0)
	list := map[uint64][2]string{}
	for range count {
		x, ok := r.next()
		if !ok {
			r.t.Fatalf("%d events of %d; %v", len(list), count, entries(r.t, r.reg))
		}
		x.Done()
		if first == 0 || x.Event.N < first {
			first = x.Event.N
		}
		list[x.Event.N] = [2]string{header(x.Event.Request.Headers, ":path"), x.Event.ResponseFlags}
	}
	for n := range uint64(count) {
		out = append(out, list[first+n])
	}
	return out
}

// Of a connection's exchanges in a row each has its own end, asked for one after
// the other or all at once.
func TestCopiedOnOneConnection(t *testing.T) {
	want := [][2]string{{"/dead", "UF"}, {"/timeout", "UT"}, {"/none", "UH"}, {"/ok", ""}, {"/timeout", "UT"}, {"/reset", "UC"}, {"/ok", ""}, {"/slow", "DC"}}
	for _, pipelined := range []bool{false, true} {
		t.Run(fmt.Sprintf("pipelined %v", pipelined), func(t *testing.T) {
			r := &rig{hold: late}
			start(t, r, startNode(t, r), mirror.Everything)
			c, err := net.Dial("tcp", r.front)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			in := bufio.NewReader(c)
			answer := func() {
				t.Helper()
				res, err := http.ReadResponse(in, nil)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
			for i, x := range want {
				_, _ = io.WriteString(c, "GET "+x[0]+" HTTP/1.1\r\n"+host+"\r\n")
				if !pipelined && i < len(want)-1 {
					answer()
				}
			}
			for range len(want) - 1 {
				if pipelined {
					answer()
				}
			}
			time.Sleep(50 * time.Millisecond) // Envoy has begun with the last one
			_ = c.Close()
			time.Sleep(waitMS * time.Millisecond)
			r.send("GET /end HTTP/1.1\r\n"+host+"\r\n", time.Second)
			got := r.take(len(want) + 1)
			for i, x := range append(want, [2]string{"/end", ""}) {
				if got[i] != x {
					t.Errorf("exchange %d: %v, want %v", i, got[i], x)
				}
			}
			if got := entries(t, r.reg); len(got) != 1 || got["joined"] != 6 {
				t.Errorf("entries %v", got)
			}
		})
	}
}

// The same with many in each ms, and by HTTP/2 with all of them open at once.
func TestCopiedInAFlood(t *testing.T) {
	r := &rig{hold: late}
	start(t, r, startNode(t, r), mirror.Everything)
	check := func(what string, count int) {
		t.Helper()
		for i, x := range r.take(count) {
			if want := map[string]string{"/none": "UH", "/ok": ""}[x[0]]; x[1] != want {
				t.Errorf("%s, exchange %d: %v", what, i, x)
			}
		}
	}
	// They stay for long: Envoy may have little CPU time beside other tests.
	r.stay(strings.Repeat("GET /none HTTP/1.1\r\n"+host+"\r\nGET /ok HTTP/1.1\r\n"+host+"\r\n", 15), 10*late)
	check("HTTP/1.1", 30)
	r.stay(frames(func(f *http2.Framer) {
		for i := range uint32(14) { // numbers with every last digit are flagged
			requestFor(f, 6*i+1, "/none", true)
			requestFor(f, 6*i+3, "/none", true)
			requestFor(f, 6*i+5, "/ok", true)
		}
	}), 10*late)
	check("HTTP/2", 42)
	if got := entries(t, r.reg); len(got) != 1 || got["joined"] != 15+28 {
		t.Errorf("entries %v", got)
	}
}

// The event of an answer of Envoy's own goes to the node at once, on an idle
// gateway: before the entry, which is then late.
func TestLate(t *testing.T) {
	r := &rig{}
	start(t, r, startNode(t, r), mirror.Everything)
	r.send("GET /none HTTP/1.1\r\n"+host+"\r\n", time.Second)
	r.stay(frames(func(f *http2.Framer) { requestFor(f, 1, "/none", true) }), late)
	for _, x := range r.take(2) {
		if x != [2]string{"/none", ""} {
			t.Errorf("%v", x)
		}
	}
	envoytest.Eventually(t, 5*time.Second, "the entries have come", func() bool { return entries(t, r.reg)["joined_late"] == 2 })
}

// What the share leaves out is logged, and has no event.
func TestLeftOut(t *testing.T) {
	r := &rig{}
	start(t, r, startNode(t, r), 1)
	r.stay(frames(func(f *http2.Framer) { requestFor(f, 1, "/none", true) }), late)
	envoytest.Eventually(t, 5*time.Second, "the entry has come", func() bool { return entries(t, r.reg)["unmatched"] == 1 })
	if n := r.ring.Len(); n != 0 {
		t.Errorf("%d events", n)
	}
}
