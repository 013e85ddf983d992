package localweb_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/periscope-mesh/periscope/localweb"
)

func TestGuard(t *testing.T) {
	h := localweb.Guard(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }), "console.example")
	for _, tc := range []struct {
		method, host string
		want         int
	}{
		{"GET", "localhost", 204},
		{"GET", "LOCALHOST:8090", 204},
		{"HEAD", "127.0.0.1:8090", 204},
		{"GET", "127.8.9.1", 204},
		{"GET", "[::1]:8090", 204},
		{"GET", "[::1]", 204},
		{"GET", "console.example:443", 204},
		{"GET", "evil.example", 421},
		{"GET", "localhost.evil.example", 421},
		{"GET", "10.0.0.1:8090", 421},
		{"GET", "", 421},
		{"POST", "localhost", 405},
	} {
		r := httptest.NewRequest(tc.method, "/", nil)
		r.Host = tc.host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tc.want {
			t.Errorf("%s with Host %q: %d, want %d", tc.method, tc.host, w.Code, tc.want)
		}
	}
}

func TestRequireLoopback(t *testing.T) {
	for addr, ok := range map[string]bool{"127.0.0.1:1": true, "localhost:1": true, "[::1]:1": true, ":1": false, "0.0.0.0:1": false, "x": false} {
		if err := localweb.RequireLoopback("--debug", addr); (err == nil) != ok {
			t.Errorf("%s: %v", addr, err)
		}
	}
}
