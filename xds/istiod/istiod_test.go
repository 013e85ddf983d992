package istiod

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func open(t testing.TB, file string) []byte {
	t.Helper()
	raw, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// What a real istiod said is understood.
func TestDecodeRecorded(t *testing.T) {
	good := Key("EnvoyFilter", "ingress", "good")
	versions, err := decodeConfig(bytes.NewReader(open(t, "configz.json")), map[string]Resource{good: {Version: "g2"}, "EnvoyFilter/ingress/invalid": {}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{good: "g2"}, versions); diff != "" {
		t.Error(diff)
	}
	for file, refused := range map[string]bool{"syncz.json": false, "syncz-refused.json": true} {
		proxies, err := decodeSync(bytes.NewReader(open(t, file)))
		if err != nil {
			t.Fatal(err)
		}
		e := proxies["gw-0.ingress"][TypeCluster]
		if e.Sent == "" || e.SentAt.IsZero() || (e.Acked == e.Sent) == refused || (e.Error != "") != refused {
			t.Errorf("%s: %+v", file, e)
		}
	}
}

func TestDecodeSync(t *testing.T) {
	got, err := decodeSync(strings.NewReader(`[
		{"proxy":"side.ns","proxy_type":"sidecar","resources":{}},
		{"proxy":"old.ns","cluster_sent":"c2","cluster_acked":"c1","listener_sent":"l","listener_acked":"l"},
		{"proxy":"gw.ns","proxy_type":"router","resources":{"t":{"sent":"new","sentTime":"2026-11-01T12:00:01Z"}}},
		{"proxy":"gw.ns","proxy_type":"router","resources":{"t":{"sent":"old","sentTime":"2026-11-01T12:00:00Z"}}},
		{"proxy":""}]`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Proxy{
		"old.ns": {TypeCluster: {Sent: "c2", Acked: "c1"}, TypeListener: {Sent: "l", Acked: "l"}, TypeExtensionConfig: {}},
		"gw.ns":  {"t": {Sent: "new", SentAt: epoch.Add(time.Second)}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{``, `{}`, `[`, `[1]`, `[{"proxy":1}]`, `<html>`} {
		if _, err := decodeSync(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is decoded", bad)
		}
	}
	if got, err := decodeSync(strings.NewReader("null")); err != nil || got == nil {
		t.Error(got, err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, file := range []string{"configz.json", "syncz.json", "syncz-refused.json"} {
		f.Add(open(f, file))
	}
	f.Add([]byte(`[{"proxy":"a","resources":{"t":{"sentTime":"x"}}}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		proxies, err := decodeSync(bytes.NewReader(raw))
		if err == nil && proxies == nil {
			t.Error("neither proxies nor an error")
		}
		for _, p := range proxies {
			for _, e := range p {
				if len(p) > maxTypes || len(e.Error) > maxReasonBytes {
					t.Error("unbounded")
				}
			}
		}
		if _, err := decodeConfig(bytes.NewReader(raw), map[string]Resource{key: {}}); err == nil && len(raw) == 0 {
			t.Error("nothing is decoded")
		}
	})
}

// fake is an istiod's monitoring port.
type fake struct {
	mu           sync.Mutex
	status       int
	config, sync string
	asked        []string
	tokens       []string
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, r.URL.Path)
	f.tokens = append(f.tokens, r.Header.Get("Authorization"))
	if f.status != http.StatusOK {
		w.Header().Set("Location", "http://127.0.0.1:1/elsewhere")
		w.WriteHeader(f.status)
		return
	}
	body := f.config
	if r.URL.Path == "/debug/syncz" {
		body = f.sync
	}
	_, _ = io.WriteString(w, body)
}

func (f *fake) set(status int, config, sync string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status, f.config, f.sync = status, config, sync
}

func configz(version string) string {
	return fmt.Sprintf(`[{"kind":"EnvoyFilter","metadata":{"name":"ef","namespace":"ns","resourceVersion":%q},"spec":{}}]`, version)
}

func syncz(sent, acked string) string {
	return fmt.Sprintf(`[{"proxy":"gw-0.ns","proxy_type":"router","resources":{%q:{"sent":%q,"acked":%q,"sentTime":%q}}}]`,
		TypeCluster, sent, acked, time.Now().Format(time.RFC3339Nano))
}

func servedNow(version string) Served {
	return Served{
		Resources: map[string]Resource{key: {Version: version, Since: time.Now(), Types: []string{TypeCluster}}},
		Gateways:  []Gateway{{ID: "ns/gw", Namespace: "ns", Pods: []string{"gw-0"}, Resources: []string{key}}},
	}
}

func TestPoller(t *testing.T) {
	f := &fake{}
	f.set(http.StatusOK, configz("v1"), syncz("n1", "n1"))
	server := httptest.NewServer(f)
	defer server.Close()
	states := make(chan State, 1000)
	n := 0
	served := servedNow("v2")
	p := start(t, Config{
		Endpoints: func() ([]string, error) { return []string{server.URL, server.URL}, nil },
		Served:    func() Served { return served },
		Token:     func() (string, error) { n++; return fmt.Sprintf("token-%d\n", n), nil },
		Interval:  20 * time.Millisecond,
		Changed:   func(s State) { states <- s },
	})
	await := func(stage Stage, reason string) {
		t.Helper()
		deadline := time.After(20 * time.Second)
		for {
			select {
			case s := <-states:
				if g := s.Gateways[0]; g.Stage == stage && strings.Contains(g.Reason, reason) {
					if len(s.Istiods) != 1 {
						t.Errorf("istiods %v", s.Istiods)
					}
					return
				}
			case <-deadline:
				t.Fatalf("waiting for %s: %+v", stage, p.State())
			}
		}
	}
	await(Pending, "version v1, not yet v2")
	f.set(http.StatusOK, configz("v2"), syncz("n1", "n1"))
	await(Accepted, "no Cluster since")
	f.set(http.StatusOK, configz("v2"), syncz("n2", "n1"))
	await(Pushed, "")
	f.set(http.StatusOK, configz("v2"), syncz("n2", "n2"))
	await(Acknowledged, "")
	for status, reason := range map[int]string{401: "identity", 403: "DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES", 404: "monitoring port", 500: "HTTP 500", 302: "HTTP 302"} {
		f.set(status, "", "")
		await(Unknown, reason)
	}
	f.set(http.StatusOK, `{"not": "a list"}`, syncz("n2", "n2"))
	await(Unknown, "not a JSON array")
	f.set(http.StatusOK, configz("v2"), syncz("n2", "n2"))
	await(Acknowledged, "") // what was known before the trouble still holds

	f.mu.Lock()
	defer f.mu.Unlock()
	if f.asked[0] != "/debug/syncz" || f.asked[1] != "/debug/configz" {
		t.Errorf("asked for %v", f.asked[:2])
	}
	if f.tokens[0] != "Bearer token-1" || f.tokens[1] != "Bearer token-2" {
		t.Errorf("tokens %v", f.tokens[:2])
	}
}

// Refresh brings a reading forward, and calling it all the time puts none off.
func TestRefresh(t *testing.T) {
	f := &fake{}
	f.set(http.StatusOK, configz("v2"), syncz("n1", "n1"))
	server := httptest.NewServer(f)
	defer server.Close()
	states := make(chan State, 10)
	p := start(t, Config{
		Endpoints: func() ([]string, error) { return []string{server.URL}, nil }, Served: func() Served { return Served{} },
		Interval: time.Hour, Changed: func(s State) { states <- s },
	})
	<-states // nothing is served: settled, and the next reading is an hour away
	server.CloseClientConnections()
	f.set(http.StatusTeapot, "", "")
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(20 * time.Second); ; {
		select {
		case <-tick.C:
			p.Refresh()
		case s := <-states:
			if s.Istiods[0].Problem == "" {
				t.Errorf("%+v", s)
			}
			return
		case <-deadline:
			t.Fatal("no reading")
		}
	}
}

// What is unreachable, too large or without a token is unknown, with the reason.
func TestProblems(t *testing.T) {
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		chunk := bytes.Repeat([]byte(" "), 1<<20)
		for r.Context().Err() == nil {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	defer endless.Close()
	for name, c := range map[string]struct {
		url    string
		token  func() (string, error)
		reason string
	}{
		"unreachable": {closed.URL, nil, "connection refused"},
		"endless":     {endless.URL, nil, "larger than 1 MiB"},
		"no address":  {"http://bad host", nil, "istiod's address"},
		"no token":    {closed.URL, func() (string, error) { return "", errors.New("no such file") }, "read the token for istiod: no such file"},
		"empty token": {closed.URL, func() (string, error) { return "", nil }, "0 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			registry := prometheus.NewRegistry()
			p, err := New(Config{Endpoints: func() ([]string, error) { return []string{c.url}, nil }, Served: func() Served { return servedNow("v") },
				Token: c.token, Logger: slog.New(slog.DiscardHandler), Registerer: registry})
			if err != nil {
				t.Fatal(err)
			}
			p.maxBody = 1 << 20
			defer p.client.CloseIdleConnections()
			s, _ := p.poll(t.Context())
			if g := s.Gateways[0]; g.Stage != Unknown || !strings.Contains(g.Reason, c.reason) {
				t.Errorf("got %+v", g)
			}
			if n := testutil.ToFloat64(p.metrics.reads.WithLabelValues(readOK)); n != 0 {
				t.Errorf("%v reads are ok", n)
			}
		})
	}
}

// What keeps istiods from being known is told, once, and those known are asked.
func TestNotAllKnown(t *testing.T) {
	f := &fake{}
	f.set(http.StatusOK, configz("v1"), syncz("n1", "n1"))
	server := httptest.NewServer(f)
	defer server.Close()
	var logs strings.Builder
	p, err := New(Config{Endpoints: func() ([]string, error) { return []string{server.URL}, errors.New("pods is forbidden") },
		Served: func() Served {
			s := servedNow("v1")
			s.Gateways[0].Pods = append(s.Gateways[0].Pods, "elsewhere")
			return s
		}, Logger: slog.New(slog.NewTextHandler(&logs, nil)), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.client.CloseIdleConnections()
	for range 2 {
		s, _ := p.poll(t.Context())
		if g := s.Gateways[0]; g.Stage != Unknown || g.Pod != "elsewhere" || !strings.Contains(g.Reason, "pods is forbidden") {
			t.Errorf("got %+v", g)
		}
		if s.Problem != "pods is forbidden" || len(s.Istiods) != 1 || s.Istiods[0].Problem != "" {
			t.Errorf("got %q, %v", s.Problem, s.Istiods)
		}
	}
	if n := strings.Count(logs.String(), "not every istiod is known"); n != 1 {
		t.Errorf("told %d times: %s", n, logs.String())
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("made without what it needs")
	}
}
