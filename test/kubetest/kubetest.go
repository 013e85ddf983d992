// Package kubetest runs a real Kubernetes API server, with etcd behind it, and
// real istiods, for tests.
//
// It never stands in for them: without the binaries, which make tools builds,
// a test is skipped with what to run, or fails where REQUIRE_REAL is set.
// Nothing schedules pods: gateways and nodes are ordinary processes. Only tests
// may import it.
package kubetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// Binary finds one of the tools: etcd, kube-apiserver, istiod, istioctl.
func Binary(t testing.TB, name string) string {
	t.Helper()
	cache := os.Getenv("PERISCOPE_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(dir, "periscope")
	}
	path := filepath.Join(cache, name, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if os.Getenv("REQUIRE_REAL") != "" {
		t.Fatalf("no %s at %s: run make tools", name, path)
	}
	t.Skipf("no %s at %s: run make tools", name, path)
	return ""
}

// Process is a child that ends with its test.
type Process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	mu   sync.Mutex
	log  bytes.Buffer
}

// Run starts a child; extra environment goes behind the test's own.
func Run(t testing.TB, name string, environment []string, path string, args ...string) *Process {
	t.Helper()
	p := &Process{name: name, cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), environment...)
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		p.Stop(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("%s, its last lines:\n%s", name, p.tail(60))
		}
	})
	return p
}

// Write takes the child's output.
func (p *Process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

// CPU is the time that the process has had so far, in user and kernel mode.
func (p *Process) CPU(t testing.TB) time.Duration {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // proc_pid_stat(5): 3 is the first, 14 and 15 are the times
	fields := strings.Fields(rest)
	var ticks time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond // sysconf(_SC_CLK_TCK) is 100 wherever Go runs
}

// Output is all that the child has printed.
func (p *Process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

func (p *Process) tail(lines int) string {
	all := strings.Split(strings.TrimSpace(p.Output()), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Ended tells whether the child has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// ExitCode waits for the child's end.
func (p *Process) ExitCode() int {
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

// Stop signals the child and waits for its end, ten seconds at most.
func (p *Process) Stop(sig syscall.Signal) {
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// await polls until ok, and fails at once if the child ends.
func (p *Process) await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	envoytest.Eventually(t, time.Minute, what, func() bool {
		if p.Ended() {
			t.Fatalf("%s ended:\n%s", p.name, p.tail(30))
		}
		return ok()
	})
}

// Cluster is a Kubernetes API.
type Cluster struct {
	URL        string
	Token      string // of a member of system:masters
	Kubeconfig string // file
	CAFile     string // verifies the API server
	client     *http.Client
}

// Start starts etcd and a kube-apiserver, in about five seconds.
func Start(t testing.TB) *Cluster {
	t.Helper()
	etcdPath, apiPath := Binary(t, "etcd"), Binary(t, "kube-apiserver")
	dir := t.TempDir()
	etcd := startEtcd(t, etcdPath, filepath.Join(dir, "etcd"))
	keyFile := filepath.Join(dir, "sa.key")
	writeKey(t, keyFile)
	c := &Cluster{Token: "kubetest-admin", Kubeconfig: filepath.Join(dir, "kubeconfig"), CAFile: filepath.Join(dir, "certs", "apiserver.crt")}
	tokens := filepath.Join(dir, "tokens.csv")
	writeFile(t, tokens, c.Token+`,admin,1,"system:masters"`+"\n")
	host, port, _ := net.SplitHostPort(envoytest.FreeAddr(t))
	c.URL = "https://" + net.JoinHostPort(host, port)
	api := Run(t, "kube-apiserver", nil, apiPath,
		"--etcd-servers="+etcd, "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+keyFile,
		"--service-account-signing-key-file="+keyFile, "--cert-dir="+filepath.Join(dir, "certs"), "--secure-port="+port, "--bind-address="+host, "--advertise-address=198.51.100.10", // a documentation address: loopback is refused, and there may be no other
		"--token-auth-file="+tokens, "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount")
	probe := &http.Client{Timeout: time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} //nolint:gosec // only asks whether it is up
	defer probe.CloseIdleConnections()
	api.await(t, "the API server is ready", func() bool {
		res, err := probe.Get(c.URL + "/readyz")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	c.connect(t)
	return c
}

func startEtcd(t testing.TB, path, data string) string {
	t.Helper()
	client, peer := "http://"+envoytest.FreeAddr(t), "http://"+envoytest.FreeAddr(t)
	p := Run(t, "etcd", nil, path, "--data-dir", data, "--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer, "--log-level", "warn", "--unsafe-no-fsync")
	p.await(t, "etcd is healthy", func() bool {
		res, err := http.Get(client + "/health")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	return client
}

func writeKey(t testing.TB, file string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
}

func writeFile(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// connect writes the kubeconfig and makes the client.
func (c *Cluster) connect(t testing.TB) {
	t.Helper()
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	c.client = &http.Client{Timeout: 30 * time.Second, Transport: transport}
	t.Cleanup(transport.CloseIdleConnections)
	c.WriteKubeconfig(t, c.Kubeconfig, c.Token)
}

// WriteKubeconfig writes a kubeconfig for whom a token stands for.
func (c *Cluster) WriteKubeconfig(t testing.TB, file, token string) {
	t.Helper()
	writeFile(t, file, fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, c.URL, c.CAFile, token))
}

// do sends a request to the API and gives status and body.
func (c *Cluster) do(ctx context.Context, method, path, contentType string, body []byte) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.URL+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+c.Token)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := c.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	out, err := io.ReadAll(res.Body)
	return res.StatusCode, out, err
}
