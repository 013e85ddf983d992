package detect

import (
	"log/slog"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/prometheus/client_golang/prometheus"
)

// newEngine is an engine for one test.
func newEngine(t testing.TB) *Engine {
	t.Helper()
	e, err := New(Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// exchangeOf builds an event from a request's text, as HTTP/1.1 writes it but
// with \n, and an optional response.
func exchangeOf(request, response string) *event.Event {
	e := &event.Event{N: 1, Policy: "default/p", SharePPM: 1_000_000, Source: "192.0.2.7:40000", Protocol: "HTTP/1.1"}
	head, body, _ := strings.Cut(request, "\n\n")
	lines := strings.Split(head, "\n")
	method, rest, _ := strings.Cut(lines[0], " ")
	add := func(m *event.Message, name, value string) {
		m.Headers = append(m.Headers, event.Field{Name: []byte(name), Value: []byte(value)})
	}
	add(&e.Request, ":method", method)
	add(&e.Request, ":path", strings.TrimSuffix(rest, " HTTP/1.1"))
	add(&e.Request, ":scheme", "https")
	authority := "api.example"
	var fields []string
	for _, l := range lines[1:] {
		if v, ok := strings.CutPrefix(l, "Host: "); ok {
			authority = v
			continue
		}
		fields = append(fields, l)
	}
	add(&e.Request, ":authority", authority)
	for _, l := range fields {
		n, v, _ := strings.Cut(l, ": ")
		add(&e.Request, strings.ToLower(n), v)
	}
	e.Request.Body, e.Request.BodyBytes = []byte(body), uint64(len(body))
	if response == "" {
		e.Flags |= event.FlagNoResponse
		return e
	}
	head, body, _ = strings.Cut(response, "\n\n")
	lines = strings.Split(head, "\n")
	add(&e.Response, ":status", lines[0])
	for _, l := range lines[1:] {
		n, v, _ := strings.Cut(l, ": ")
		add(&e.Response, strings.ToLower(n), v)
	}
	e.Response.Body, e.Response.BodyBytes = []byte(body), uint64(len(body))
	return e
}

// browser are the headers of an ordinary client.
const browser = "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\nAccept: */*\nAccept-Encoding: gzip, br"

func get(target string, headers ...string) *event.Event {
	return exchangeOf(strings.Join(append([]string{"GET " + target, browser}, headers...), "\n"), "")
}

func post(contentType, body string, headers ...string) *event.Event {
	head := []string{"POST /api/v1/things", browser, "Content-Type: " + contentType, "Content-Length: " + strconv.Itoa(len(body))}
	return exchangeOf(strings.Join(append(head, headers...), "\n")+"\n\n"+body, "")
}

func inspect(t testing.TB, e *Engine, ev *event.Event, change ...func(*Input)) Result {
	t.Helper()
	x := &Input{
		Event: ev, Gateway: "gw", VM: "vm1", Received: time.Unix(1700000000, 0),
		Policy: Policy{ID: "default/p", Rev: "7", Tenant: "shop", Application: "front", Paranoia: 1},
	}
	for _, c := range change {
		c(x)
	}
	res, err := e.Inspect(x)
	if err != nil {
		t.Fatal(err)
	}
	return res
}
