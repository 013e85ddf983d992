package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/test/netnstest"
)

var updateDocs = flag.Bool("update", false, "rewrite the outputs in docs/istioctl.md")

const (
	istioctlPage  = "../../docs/istioctl.md"
	maxShownLines = 24  // of a long output in the page
	maxShownRunes = 140 // of a long line
	proxyDump     = "dump.json"
)

// istioctl is a real istioctl without a cluster, in a directory of its own.
type istioctl struct {
	t    *testing.T
	path string
	dir  string
	env  []string
}

func newIstioctl(t *testing.T) *istioctl {
	dir := t.TempDir()
	return &istioctl{t: t, path: kubetest.Binary(t, "istioctl"), dir: dir,
		env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "KUBECONFIG=/dev/null", "TZ=UTC"}}
}

// run gives both outputs; without a revision istioctl would ask Kubernetes.
func (i *istioctl) run(args ...string) (out string, ok bool) {
	i.t.Helper()
	ctx, cancel := context.WithTimeout(i.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, i.path, args...)
	cmd.Dir, cmd.Env = i.dir, i.env
	raw, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		i.t.Fatalf("istioctl %v: %v", args, err)
	}
	if ctx.Err() != nil {
		i.t.Fatalf("istioctl %v hangs: %s", args, raw)
	}
	return string(raw), err == nil
}

// synced waits until a control plane's gateway has acknowledged everything, and
// its nodes have said what they read.
func synced(t *testing.T, debug string) {
	t.Helper()
	envoytest.Eventually(t, 20*time.Second, "the gateway has acknowledged everything", func() bool {
		var list []struct {
			Type      string `json:"proxy_type"`
			Resources map[string]struct{ Sent, Acked string }
		}
		getJSON(t, "http://"+debug+"/debug/syncz", &list)
		var nodes []struct{ WireVersions []int }
		getJSON(t, "http://"+debug+"/debug/nodez", &nodes)
		for _, n := range nodes {
			if len(n.WireVersions) == 0 {
				return false
			}
		}
		for _, s := range list {
			for _, r := range s.Resources {
				if r.Sent == "" || r.Sent != r.Acked {
					return false
				}
			}
			if s.Type == "gateway" {
				return len(s.Resources) == 5
			}
		}
		return false
	})
}

// keepDump writes Envoy's own dump to where istioctl runs.
func (i *istioctl) keepDump(admin string) {
	i.t.Helper()
	status, body := get(i.t, "http://"+admin+"/config_dump")
	if status != http.StatusOK {
		i.t.Fatalf("Envoy's dump: %d", status)
	}
	mustWrite(i.t, filepath.Join(i.dir, proxyDump), body)
}

func compact(t *testing.T, text string) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Compact(&out, []byte(text)); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return out.String()
}

// What istioctl shows of each page is what HTTP shows.
func TestIstioctl(t *testing.T) {
	i := newIstioctl(t)
	t.Setenv("POD_NAME", "periscope-0")
	r := newRig(t).up(t)
	synced(t, r.debug)
	var bootstrap struct {
		Admin struct {
			Address struct {
				Socket struct {
					Address string `json:"address"`
					Port    int    `json:"port_value"`
				} `json:"socket_address"`
			} `json:"address"`
		} `json:"admin"`
	}
	if err := json.Unmarshal([]byte(mustRead(t, filepath.Join(r.dataDir, "envoy.json"))), &bootstrap); err != nil {
		t.Fatal(err)
	}
	admin := bootstrap.Admin.Address.Socket
	i.keepDump(net.JoinHostPort(admin.Address, fmt.Sprint(admin.Port)))
	flags := []string{"-r", "default", "--xds-address", r.xds, "--plaintext"}
	var names []string
	getJSON(t, "http://"+r.debug+"/debug/list", &names)
	if len(names) < 16 {
		t.Errorf("few pages: %v", names)
	}
	for _, name := range append(names, "list", "adsz?proxyID=gateway.default") {
		t.Run(name, func(t *testing.T) {
			switch name {
			case "config_dump", "ecdsz", "edsz":
				name += "?proxyID=gateway.default"
			}
			difference := ""
			for range 3 { // what nodes tell may change in between
				out, ok := i.run(append([]string{"x", "internal-debug", name}, flags...)...)
				_, want := get(t, "http://"+r.debug+"/debug/"+name)
				if difference = cmp.Diff(compact(t, want), compact(t, out)); ok && difference == "" {
					return
				}
			}
			t.Errorf("they differ: %s", difference)
		})
	}
	t.Run("page", func(t *testing.T) {
		checkPage(t, i, false, strings.NewReplacer(r.replacements()...), []string{"ISTIOCTL_XDS_ADDRESS=" + r.xds, "ISTIOCTL_PLAINTEXT=true"})
	})
	t.Run("without a certificate authority", func(t *testing.T) {
		if out, ok := i.run("proxy-status", "-r", "default", "--xds-address", r.xds, "--cert-dir", "none"); ok {
			t.Errorf("certificates that are not there: %s", out)
		}
	})
}

// replacements put the default ports in place of the test's.
func (r *rig) replacements() []string {
	var out []string
	for addr, standard := range map[string]string{r.http: "8080", r.https: "8443", r.console: "8090", r.xds: "15051", r.debug: "15080", r.nodeListen: "5050", r.nodeAdmin: "9090", r.nodeORCA: "9091"} {
		_, port, _ := net.SplitHostPort(addr)
		out = append(out, addr, "127.0.0.1:"+standard, `"Port": `+port, `"Port": `+standard, `"port_value": `+port, `"port_value": `+standard)
	}
	return append(out, r.dataDir, "/var/lib/periscope")
}

// What differs from run to run.
var variable = []struct {
	pattern *regexp.Regexp
	put     string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "2026-01-02T03:04:05Z"},
	{regexp.MustCompile(`\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d UTC`), "Fri, 02 Jan 2026 03:04:05 UTC"},
	{regexp.MustCompile(`\((\d+(ms|s|m))+\)`), "(3s)"},
	{regexp.MustCompile(`\b[0-9a-f]{16}\b`), "0123456789abcdef"},
	{regexp.MustCompile(`\b[0-9a-f]{12}\b`), "0123456789ab"},
	{regexp.MustCompile(`("address": "127\.0\.0\.1):\d+"`), `$1:40000"`}, // of a client
}

// normal makes an output the same in each run.
func normal(out string, ports *strings.Replacer) string {
	out = ports.Replace(out)
	for _, v := range variable {
		out = v.pattern.ReplaceAllString(out, v.put)
	}
	lines := strings.Split(strings.TrimRight(out, "\n"), "\n")
	for n, line := range lines {
		lines[n] = strings.TrimRight(line, " ")
		if r := []rune(line); len(r) > maxShownRunes {
			lines[n] = string(r[:maxShownRunes]) + "…"
		}
	}
	if len(lines) > maxShownLines {
		lines = append(lines[:maxShownLines], "…")
	}
	return strings.Join(lines, "\n")
}

// checkPage runs the page's commands, those with certificates or the others,
// and compares, or with -update rewrites, what they print.
func checkPage(t *testing.T, i *istioctl, certificates bool, ports *strings.Replacer, env []string, rewrite ...string) {
	t.Helper()
	env = append(env, i.env...)
	i = &istioctl{t: t, path: i.path, dir: i.dir, env: env}
	page, ran := mustRead(t, istioctlPage), 0
	block := regexp.MustCompile("(?s)```console\n\\$ istioctl ([^\n]*)\n.*?```\n")
	got := block.ReplaceAllStringFunc(page, func(was string) string {
		command := block.FindStringSubmatch(was)[1]
		if strings.Contains(command, "--cert-dir") != certificates {
			return was
		}
		ran++
		args := strings.NewReplacer(append([]string{"'", ""}, rewrite...)...).Replace(command)
		out, _ := i.run(strings.Fields(args)...)
		return "```console\n$ istioctl " + command + "\n" + normal(out, ports) + "\n```\n"
	})
	if ran == 0 {
		t.Error("the page has no such commands")
	}
	if *updateDocs {
		mustWrite(t, istioctlPage, got)
		return
	}
	if d := cmp.Diff(page, got); d != "" {
		t.Errorf("docs/istioctl.md is not what istioctl prints (go test ./test/e2e -run Istioctl -update): %s", d)
	}
}

// authority issues certificates for both sides.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.cert, a.key, a.pem, _ = a.sign(template)
	return a
}

func (a *authority) sign(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string, string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
}

// issue makes a pair for control.example and addresses, with the serial number
// that tells it.
func (a *authority) issue(serial int64, ips ...net.IP) (cert, key string) {
	_, _, cert, key = a.sign(&x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "test"}, IPAddresses: ips, DNSNames: []string{"control.example"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	return cert, key
}

// tlsControl is a control plane that speaks TLS on all addresses, and an Envoy
// that takes its configuration so.
type tlsControl struct {
	authority                *authority
	dir, port, debug         string
	certFile, keyFile, caPEM string
}

func startTLSControl(t *testing.T, i *istioctl) *tlsControl {
	c := &tlsControl{authority: newAuthority(t), dir: t.TempDir(), debug: envoytest.FreeAddr(t)}
	c.certFile, c.keyFile, c.caPEM = filepath.Join(c.dir, "xds.crt"), filepath.Join(c.dir, "xds.key"), filepath.Join(c.dir, "ca.crt")
	mustWrite(t, c.caPEM, c.authority.pem)
	c.renew(t, 100)
	_, c.port, _ = net.SplitHostPort(envoytest.FreeAddr(t))
	p := start(t, "control", "--upstream", "http://127.0.0.1:9", "--http", envoytest.FreeAddr(t), "--https", "", "--data", c.dir, "--debug", c.debug,
		"--xds", "0.0.0.0:"+c.port, "--xds-tls-cert", c.certFile, "--xds-tls-key", c.keyFile, "--xds-tls-client-ca", c.caPEM)
	p.waitFor("control plane started")
	cert, key := c.authority.issue(200)
	pair := clientFiles{c.dir, filepath.Join(c.dir, "gateway.crt"), filepath.Join(c.dir, "gateway.key")}
	mustWrite(t, pair.cert, cert)
	mustWrite(t, pair.key, key)
	e := envoytest.Start(t, printBootstrap(t, append([]string{"--xds", "127.0.0.1:" + c.port, "--sds-dir", c.dir}, pair.flags(c.caPEM)...)...))
	synced(t, c.debug)
	i.keepDump(e.Admin)
	certs := filepath.Join(i.dir, "certs")
	if err := os.Mkdir(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"cert-chain.pem": cert, "key.pem": key, "root-cert.pem": c.authority.pem} {
		mustWrite(t, filepath.Join(certs, name), content)
	}
	return c
}

// renew puts another pair in place of the server's.
func (c *tlsControl) renew(t *testing.T, serial int64) {
	cert, key := c.authority.issue(serial, net.IPv4(127, 0, 0, 1), net.ParseIP(netnstest.Address))
	mustWrite(t, c.certFile, cert)
	mustWrite(t, c.keyFile, key)
}

// serving is the serial number of the certificate in use.
func (c *tlsControl) serving(t *testing.T) int64 {
	t.Helper()
	conn, err := tls.Dial("tcp", "127.0.0.1:"+c.port, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
}

// ask asks for the list of pages, without a certificate.
func (c *tlsControl) ask(t *testing.T, host string) error {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(c.authority.cert)
	conn, err := grpc.NewClient(net.JoinHostPort(host, c.port), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: "istio.io/debug", ResourceNames: []string{"list"}}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err = stream.Recv()
	return err
}

func TestIstioctlTLS(t *testing.T) {
	if !netnstest.Isolate(t) {
		return
	}
	i := newIstioctl(t)
	t.Setenv("POD_NAME", "periscope-0")
	c := startTLSControl(t, i)
	loopback := "127.0.0.1:" + c.port
	t.Run("page", func(t *testing.T) {
		checkPage(t, i, true, strings.NewReplacer(loopback, "control.example:15051", c.dir, "/var/lib/periscope"), nil, "control.example:15051", loopback)
	})
	t.Run("each page", func(t *testing.T) {
		var names []string
		getJSON(t, "http://"+c.debug+"/debug/list", &names)
		for _, name := range append(names, "list") {
			switch name {
			case "config_dump", "ecdsz", "edsz":
				name += "?proxyID=gateway.default"
			}
			out, ok := i.run("x", "internal-debug", name, "-r", "default", "--xds-address", loopback, "--cert-dir", "certs")
			_, want := get(t, "http://"+c.debug+"/debug/"+name)
			if d := cmp.Diff(compact(t, want), compact(t, out)); !ok || d != "" {
				t.Errorf("%s: %s", name, d)
			}
		}
	})
	t.Run("plain text", func(t *testing.T) {
		if out, ok := i.run("proxy-status", "-r", "default", "--xds-address", loopback, "--plaintext", "--timeout", "3s"); ok {
			t.Errorf("plain text is spoken: %s", out)
		}
	})
	t.Run("from elsewhere", func(t *testing.T) {
		if err := c.ask(t, "127.0.0.1"); err != nil {
			t.Errorf("from loopback, without a certificate: %v", err)
		}
		if err := c.ask(t, netnstest.Address); status.Code(err) != codes.PermissionDenied {
			t.Errorf("without a certificate: %v", err)
		}
		out, ok := i.run("x", "internal-debug", "--list", "-r", "default", "--xds-address", net.JoinHostPort(netnstest.Address, c.port), "--cert-dir", "certs")
		if !ok || !strings.Contains(out, `"syncz"`) {
			t.Errorf("with a certificate: %s", out)
		}
	})
	t.Run("renewed", func(t *testing.T) {
		if serial := c.serving(t); serial != 100 {
			t.Errorf("serves certificate %d", serial)
		}
		mustWrite(t, c.keyFile, "broken")
		c.renew(t, 101)
		envoytest.Eventually(t, 10*time.Second, "the new certificate is in use", func() bool { return c.serving(t) == 101 })
		if out, ok := i.run("proxy-status", "-r", "default", "--xds-address", loopback, "--cert-dir", "certs"); !ok || !strings.Contains(out, "gateway.default") {
			t.Errorf("afterwards: %s", out)
		}
	})
}
