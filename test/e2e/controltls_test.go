package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// printBootstrap is what periscope bootstrap prints.
func printBootstrap(t *testing.T, args ...string) map[string]any {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, append([]string{"bootstrap"}, args...)...).Output()
	if err != nil {
		t.Fatal(err)
	}
	var bootstrap map[string]any
	if err := json.Unmarshal(out, &bootstrap); err != nil {
		t.Fatal(err)
	}
	return bootstrap
}

// secured is a control plane on TLS that asks for certificates, and where they
// are.
type secured struct {
	*rig
	server    *authority // of the control plane's certificate
	dir       string
	upstream  string
	clientCA  string // file
	serverCA  string // file
	nodeFiles clientFiles
	envoy     clientFiles
}

// clientFiles is a client's pair, in a directory of its own.
type clientFiles struct{ dir, cert, key string }

func newSecured(t *testing.T) *secured {
	s := &secured{rig: newRig(t), server: newAuthority(t), dir: t.TempDir()}
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "upstream") }))
	t.Cleanup(upstream.Close)
	s.upstream = upstream.URL
	s.clientCA, s.serverCA = filepath.Join(s.dir, "clients.crt"), filepath.Join(s.dir, "server-ca.crt")
	mustWrite(t, s.serverCA, s.server.pem)
	cert, key := s.server.issue(100, net.IPv4(127, 0, 0, 1))
	mustWrite(t, s.file("xds.crt"), cert)
	mustWrite(t, s.file("xds.key"), key)
	for name, files := range map[string]*clientFiles{"node": &s.nodeFiles, "envoy": &s.envoy} {
		*files = clientFiles{s.file(name), s.file(name, "tls.crt"), s.file(name, "tls.key")}
		if err := os.Mkdir(files.dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *secured) file(names ...string) string {
	return filepath.Join(append([]string{s.dir}, names...)...)
}

func (s *secured) startControl(t *testing.T) *process {
	t.Helper()
	p := start(t, "control", "--upstream", s.upstream, "--http", s.http, "--https", "", "--data", s.dataDir, "--debug", s.debug, "--node", s.nodeListen, "--orca-port", portOf(s.nodeORCA),
		"--xds", s.xds, "--xds-tls-cert", s.file("xds.crt"), "--xds-tls-key", s.file("xds.key"), "--xds-tls-client-ca", s.clientCA)
	p.waitFor("control plane started")
	return p
}

// startOther starts another node beside the rig's, and gives its admin address.
func (s *secured) startOther(t *testing.T, args ...string) (*process, string) {
	t.Helper()
	admin := envoytest.FreeAddr(t)
	return start(t, append([]string{"node", "--node-listen", envoytest.FreeAddr(t), "--node-admin", admin, "--node-orca", "127.0.0.1:0", "--control", s.xds, "--data", t.TempDir()}, args...)...), admin
}

// move puts content in place as whoever renews certificates does.
func move(t *testing.T, path, content string) {
	t.Helper()
	mustWrite(t, path+".new", content)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// renew gives a client a pair of an authority's.
func (f clientFiles) renew(t *testing.T, a *authority, serial int64) {
	t.Helper()
	cert, key := a.issue(serial)
	move(t, f.key, key)
	move(t, f.cert, cert)
}

func (f clientFiles) flags(ca string) []string {
	return []string{"--control-ca", ca, "--control-cert", f.cert, "--control-key", f.key}
}

func connected(t *testing.T, admin string) bool {
	t.Helper()
	return metric(t, admin, "periscope_node_policy_connected") == 1
}

// Our own clients of a control plane on TLS: who has a certificate is served,
// who has none is told why not, and renewed certificates are used.
func TestControlTLS(t *testing.T) {
	s := newSecured(t)
	clients := newAuthority(t)
	mustWrite(t, s.clientCA, clients.pem)
	s.nodeFiles.renew(t, clients, 200)
	s.envoy.renew(t, clients, 300)
	control := s.startControl(t)
	node := start(t, append(s.nodeArgs(), s.nodeFiles.flags(s.serverCA)...)...)
	node.waitFor("policies applied")
	view := start(t, "console", "--console", s.console, "--data", s.dataDir)
	view.waitFor("console started")
	envoytest.Start(t, printBootstrap(t, append([]string{"--xds", s.xds, "--control-server-name", "control.example", "--sds-dir", s.dir}, s.envoy.flags(s.serverCA)...)...))
	synced(t, s.debug)

	t.Run("served", func(t *testing.T) {
		if status, body := get(t, "http://"+s.nodeAdmin+"/ready"); status != http.StatusOK {
			t.Errorf("the node is not ready: %s", body)
		}
		if status, body := get(t, "http://"+s.http+"/etc/passwd"); status != http.StatusOK || body != "upstream" {
			t.Errorf("the user got %d %s", status, body)
		}
		s.attack(t, "the attack", func(a attackRow) bool { return a.Type == "path-traversal" && a.Gateway == "default/gateway" })
	})
	t.Run("node without a certificate", func(t *testing.T) {
		other, admin := s.startOther(t, "--name", "bare", "--control-ca", s.serverCA)
		unready(t, other, admin, "--control-cert")
		control.waitFor("xds client refused")
		if n := strings.Count(control.output(), "node=node~bare"); n != 1 {
			t.Errorf("the control plane logs it %d times", n)
		}
		if metric(t, s.debug, `periscope_xds_refused_total{reason="certificate"}`) < 1 {
			t.Error("it is not counted")
		}
	})
	t.Run("gateway without a certificate", func(t *testing.T) {
		log := refusedEnvoy(t, printBootstrap(t, "--xds", s.xds, "--sds-dir", t.TempDir(), "--control-ca", s.serverCA, "--admin", envoytest.FreeAddr(t)))
		envoytest.Eventually(t, 20*time.Second, "Envoy says why", func() bool {
			raw, _ := os.ReadFile(log)
			return strings.Contains(string(raw), "have to show a client certificate")
		})
	})
	t.Run("another authority's control plane", func(t *testing.T) {
		other, admin := s.startOther(t, s.nodeFiles.flags(s.clientCA)...)
		reason := "with --control-ca " + s.clientCA + ": x509: certificate signed by unknown authority"
		unready(t, other, admin, reason)
	})
	t.Run("plain text", func(t *testing.T) {
		other, admin := s.startOther(t)
		other.waitFor("policy stream ended")
		if connected(t, admin) {
			t.Error("plain text is spoken")
		}
	})
	t.Run("renewed", func(t *testing.T) { s.renewed(t, control, node) })
}

// unready waits for a node's stream of policies to fail, which is not the only
// stream that says why, and has /ready tell the reason.
func unready(t *testing.T, node *process, admin, reason string) {
	t.Helper()
	node.waitFor("policy stream ended")
	if status, body := get(t, "http://"+admin+"/ready"); status != http.StatusServiceUnavailable || !strings.Contains(body, reason) {
		t.Errorf("/ready: %d %s", status, body)
	}
}

// renewed has the control plane trust another authority alone, and the running
// node and Envoy get certificates of that.
func (s *secured) renewed(t *testing.T, control, node *process) {
	next := newAuthority(t)
	move(t, s.clientCA, next.pem)
	s.envoy.renew(t, next, 301) // to be used when it connects again
	control.stop(syscall.SIGTERM)
	s.startControl(t)
	node.waitFor("remote error: tls: ")
	if connected(t, s.nodeAdmin) {
		t.Error("the old certificate is good")
	}
	s.nodeFiles.renew(t, next, 201)
	envoytest.Eventually(t, 20*time.Second, "the node is connected again", func() bool { return connected(t, s.nodeAdmin) })
	synced(t, s.debug)
	if n := metric(t, s.debug, `periscope_xds_refused_total{reason="certificate"}`); n != 0 {
		t.Logf("%v clients without a certificate came meanwhile", n)
	}
}

// refusedEnvoy starts an Envoy that won't become ready, and gives its log.
func refusedEnvoy(t *testing.T, bootstrap map[string]any) (log string) {
	t.Helper()
	raw, err := json.Marshal(bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config, log := filepath.Join(dir, "envoy.json"), filepath.Join(dir, "envoy.log")
	mustWrite(t, config, string(raw))
	cmd := exec.Command(envoytest.Path(t), "-c", config, "--concurrency", "1", "-l", "warning", "--disable-hot-restart", "--log-path", log)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			raw, _ := os.ReadFile(log)
			t.Logf("Envoy's log:\n%s", raw)
		}
	})
	return log
}

// An istiod shows no certificate, and is answered all the same. On the same
// connection, nobody else is.
func TestIstiodNeedsNoCertificate(t *testing.T) {
	s := newSecured(t)
	mustWrite(t, s.clientCA, newAuthority(t).pem)
	mustWrite(t, filepath.Join(s.dataDir, "topology.json"), "{}") // known last
	start(t, "control", "--kubeconfig", unreachable(t), "--data", s.dataDir, "--debug", s.debug, "--xds", s.xds,
		"--xds-tls-cert", s.file("xds.crt"), "--xds-tls-key", s.file("xds.key"), "--xds-tls-client-ca", s.clientCA).waitFor("control plane started")
	pool := x509.NewCertPool()
	pool.AddCert(s.server.cert)
	conn, err := grpc.NewClient(s.xds, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := func(metadata map[string]any) error {
		m, err := structpb.NewStruct(metadata)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
		if err != nil {
			return err
		}
		_ = stream.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "client", Metadata: m}, TypeUrl: "networking.istio.io/v1alpha3/EnvoyFilter"}) // a fault is Recv's
		_, err = stream.Recv()
		return err
	}
	for name, tt := range map[string]struct {
		metadata map[string]any
		want     codes.Code
	}{
		"istiod":                     {map[string]any{"GENERATOR": "api"}, codes.OK},
		"node":                       {map[string]any{"role": "node"}, codes.Unauthenticated},
		"gateway":                    {map[string]any{"role": "gateway", "gateway": "default/gateway"}, codes.Unauthenticated},
		"node that calls itself one": {map[string]any{"role": "node", "GENERATOR": "api"}, codes.Unauthenticated},
	} {
		if err := ask(tt.metadata); status.Code(err) != tt.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}
