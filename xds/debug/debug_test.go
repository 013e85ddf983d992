package debug

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/xds"
)

var at = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func fixture(t *testing.T, change ...func(*Config)) *Pages {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "periscope_test", Help: "For tests."}))
	c := Config{
		Logger:   slog.New(slog.DiscardHandler),
		Policies: func() any { return map[string]any{"accepted": []string{"default/a"}} },
		Configs: func() []Object {
			return []Object{{Kind: "MirrorPolicy", APIVersion: "periscope.dev/v1alpha1",
				Metadata: Metadata{Name: "a", Namespace: "default", ResourceVersion: "1", CreationTimestamp: at}, Spec: map[string]any{"mode": "Monitor"}}}
		},
		Connections: func() []xds.Connection {
			return []xds.Connection{
				{ID: "gateway~default/gw-1", Node: "gateway~default/gw", Cluster: "default/gw", Version: "1.40.0", Address: "127.0.0.1:1", Protocol: "delta",
					Key: "gateway/default/gw", ConnectedAt: at, Types: map[string]xds.TypeState{
						"type.googleapis.com/envoy.config.listener.v3.Listener":         {Sent: "v1", Acked: "v1", SentAt: at},
						"type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig": {Sent: "v2", Acked: "v1", SentAt: at, LastError: "no Lua"},
					}},
				{ID: "x-2", Node: "x", Address: "127.0.0.1:2", Protocol: "sotw", Held: "no role", ConnectedAt: at, Types: map[string]xds.TypeState{}},
			}
		},
		Plan:     func() any { return map[string]string{"revision": "abc"} },
		Info:     func() any { return map[string]string{"insecure": "<script>alert(1)</script>"} },
		Version:  map[string]string{"version": "0.1.0"},
		Gatherer: registry,
	}
	for _, ch := range change {
		ch(&c)
	}
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func ask(h http.Handler, method, target, host, remote string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	r.Host, r.RemoteAddr = host, remote
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func get(h http.Handler, target string) *httptest.ResponseRecorder {
	return ask(h, http.MethodGet, target, "127.0.0.1:15080", "127.0.0.1:1234")
}

func TestPages(t *testing.T) {
	h := fixture(t)
	for target, want := range map[string]string{
		"/debug/list":    `["adsz","configz","connections","planz","policyz","push_status","syncz"]`,
		"/debug/policyz": `{"accepted":["default/a"]}`,
		"/debug/configz": `[{"kind":"MirrorPolicy","apiVersion":"periscope.dev/v1alpha1","metadata":{"name":"a","namespace":"default","resourceVersion":"1","creationTimestamp":"2026-01-02T03:04:05Z"},"spec":{"mode":"Monitor"}}]`,
		"/debug/planz":   `{"revision":"abc"}`,
		"/debug/syncz": `[{"cluster_id":"default/gw","proxy":"gateway~default/gw","proxy_type":"gateway","istio_version":"1.40.0",` +
			`"listener_sent":"v1","listener_acked":"v1","extensionconfig_sent":"v2","extensionconfig_acked":"v1","resources":{` +
			`"type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig":{"sent":"v2","acked":"v1","sentTime":"2026-01-02T03:04:05Z","lastError":"no Lua"},` +
			`"type.googleapis.com/envoy.config.listener.v3.Listener":{"sent":"v1","acked":"v1","sentTime":"2026-01-02T03:04:05Z"}}}]`,
		"/version": `{"version":"0.1.0"}`,
	} {
		t.Run(target, func(t *testing.T) {
			w := get(h, target)
			if w.Code != 200 || w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("status %d, %s", w.Code, w.Header().Get("Content-Type"))
			}
			if d := cmp.Diff(want, strings.TrimSpace(w.Body.String())); d != "" {
				t.Error(d)
			}
			pretty := get(h, target+"?pretty").Body.String()
			if !strings.Contains(pretty, "\n  ") {
				t.Errorf("not indented: %s", pretty)
			}
		})
	}
}

func TestConnectionsPage(t *testing.T) {
	var got struct {
		Total   int `json:"totalClients"`
		Clients []struct {
			ID   string `json:"connectionId"`
			Held string `json:"held"`
		} `json:"clients"`
	}
	if err := json.Unmarshal(get(fixture(t), "/debug/connections").Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Total != 2 || got.Clients[0].ID != "gateway~default/gw-1" || got.Clients[1].Held != "no role" {
		t.Errorf("got %+v", got)
	}
}

func TestEmptyLists(t *testing.T) {
	h := fixture(t, func(c *Config) {
		c.Configs = func() []Object { return nil }
		c.Connections = func() []xds.Connection { return nil }
	})
	for target, want := range map[string]string{"/debug/configz": "[]", "/debug/syncz": "[]", "/debug/connections": `{"totalClients":0,"clients":[]}`} {
		if got := strings.TrimSpace(get(h, target).Body.String()); got != want {
			t.Errorf("%s: %s", target, got)
		}
	}
}

func TestUnknownPage(t *testing.T) {
	h := fixture(t, func(c *Config) { c.Plan = nil })
	for _, target := range []string{"/debug/nosuch", "/debug/planz", "/debug/configz/x"} {
		w := get(h, target)
		if w.Code != 404 || !strings.Contains(w.Body.String(), "Known pages: adsz, configz, connections, policyz, push_status, syncz, list") {
			t.Errorf("%s: %d %s", target, w.Code, w.Body)
		}
	}
	if w := get(h, "/elsewhere"); w.Code != 404 {
		t.Errorf("status %d", w.Code)
	}
}

func TestIndex(t *testing.T) {
	h := fixture(t, func(c *Config) { c.Ready = func() error { return errors.New("no <plan> yet") } })
	for _, target := range []string{"/debug", "/debug/"} {
		w := get(h, target)
		body := w.Body.String()
		if w.Code != 200 || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/html") {
			t.Fatalf("%s: status %d", target, w.Code)
		}
		for _, want := range []string{`href="/debug/policyz?pretty"`, `href="/metrics"`, "no &lt;plan&gt; yet", "insecure", "configuration objects, as istiod shows them"} {
			if !strings.Contains(body, want) {
				t.Errorf("%s lacks %s", target, want)
			}
		}
		style, _, _ := strings.Cut(body[strings.Index(body, "<style>")+len("<style>"):], "</style>")
		sum := sha256.Sum256([]byte(style))
		if want := "style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(w.Header().Get("Content-Security-Policy"), want) {
			t.Errorf("the style is not allowed: want %s in %s", want, w.Header().Get("Content-Security-Policy"))
		}
		if strings.Contains(body, "<script") || strings.Contains(body, "style=") || !strings.Contains(w.Header().Get("Content-Security-Policy"), "default-src 'none'") {
			t.Errorf("unsafe page: %s", body)
		}
	}
}

func TestReady(t *testing.T) {
	var fault error
	h := fixture(t, func(c *Config) { c.Ready = func() error { return fault } })
	if w := get(h, "/ready"); w.Code != 200 {
		t.Errorf("status %d", w.Code)
	}
	fault = errors.New("no plan")
	if w := get(h, "/ready"); w.Code != 503 || !strings.Contains(w.Body.String(), "no plan") {
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
	if w := get(fixture(t), "/ready"); w.Code != 200 {
		t.Errorf("status %d", w.Code)
	}
}

func TestMetricsPage(t *testing.T) {
	if w := get(fixture(t), "/metrics"); w.Code != 200 || !strings.Contains(w.Body.String(), "periscope_test 0") {
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
}

func TestGuard(t *testing.T) {
	h := fixture(t)
	for _, tt := range []struct {
		method, host, remote string
		want                 int
	}{
		{"GET", "localhost:15080", "127.0.0.1:1", 200},
		{"GET", "LOCALHOST", "127.0.0.1:1", 200},
		{"GET", "127.0.0.1:15080", "[::1]:1", 200},
		{"GET", "[::1]:15080", "[::1]:1", 200},
		{"GET", "[::1]", "[::1]:1", 200},
		{"GET", "10.0.0.1:15080", "[::ffff:127.0.0.1]:1", 421},
		{"GET", "evil.example:15080", "127.0.0.1:1", 421},
		{"GET", "localhost.evil.example", "127.0.0.1:1", 421},
		{"GET", "127.0.0.1.evil.example", "[::1]:1", 421},
		{"GET", "evil.example", "[::ffff:127.0.0.1]:1", 421},
		{"GET", "evil.example", "nonsense", 421},
		{"GET", "", "127.0.0.1:1", 421},
		{"GET", "control.periscope.svc:15080", "10.1.2.3:1", 421},
		{"HEAD", "localhost", "127.0.0.1:1", 200},
		{"POST", "localhost", "127.0.0.1:1", 405},
		{"DELETE", "localhost", "127.0.0.1:1", 405},
	} {
		for _, target := range []string{"/debug/list", "/metrics", "/version", "/ready", "/debug"} {
			if w := ask(h, tt.method, target, tt.host, tt.remote); w.Code != tt.want {
				t.Errorf("%s %s, host %q, from %s: %d, want %d", tt.method, target, tt.host, tt.remote, w.Code, tt.want)
			}
		}
	}
}

func TestUnwritablePage(t *testing.T) {
	h := fixture(t, func(c *Config) {
		c.Plan = func() any { return func() {} }
		c.Info = c.Plan
	})
	for _, target := range []string{"/debug/planz", "/debug"} {
		if w := get(h, target); w.Code != 500 {
			t.Errorf("%s: status %d", target, w.Code)
		}
	}
}

func TestNewFaults(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no error without a logger")
	}
}
