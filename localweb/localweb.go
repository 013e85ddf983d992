// Package localweb guards HTTP servers that only loopback reaches and that
// have no authentication of their own.
//
// It never authenticates anybody: it keeps other web sites' pages from using a
// user's browser to read such a server. Any package that serves pages may
// import it; it imports nothing of ours.
package localweb

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// Guard answers 421 to requests whose Host is neither loopback's name or
// address nor one of hosts: a page whose author made his own name resolve to
// loopback would send them (DNS rebinding). It answers 405 to methods other
// than GET and HEAD.
func Guard(next http.Handler, hosts ...string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		switch {
		case !Loopback(hostname(r.Host)) && !slices.Contains(hosts, hostname(r.Host)):
			http.Error(w, "this server answers for localhost, not for the name in the request", http.StatusMisdirectedRequest)
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD", http.StatusMethodNotAllowed)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// Loopback tells whether host is a name or an address of this host alone.
func Loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// RequireLoopback refuses addresses that others can reach, naming the flag
// they were given by.
func RequireLoopback(flag, addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%s: %q is not host:port", flag, addr)
	}
	if !Loopback(host) {
		return fmt.Errorf("%s: %q is not a loopback address; this server has no authentication, so put an authenticating proxy before it", flag, host)
	}
	return nil
}

func hostname(hostport string) string {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	return strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
}
