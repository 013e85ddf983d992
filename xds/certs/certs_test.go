package certs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/test/logtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// issue makes a self-signed certificate for 127.0.0.1, for either side.
func issue(t *testing.T, name string) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

// files is a directory with a pair and client authorities.
type files struct {
	t   *testing.T
	dir string
	log *logtest.Buffer
}

func newFiles(t *testing.T) *files { return &files{t, t.TempDir(), &logtest.Buffer{}} }

func (f *files) write(name string, content []byte) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), content, 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *files) config() Config {
	return Config{CertFile: filepath.Join(f.dir, "crt"), KeyFile: filepath.Join(f.dir, "key"), ClientCAFile: filepath.Join(f.dir, "ca"),
		Logger: slog.New(slog.NewTextHandler(f.log, nil))}
}

// handshake tells the server's name, and whether it verified the client.
func handshake(t *testing.T, s *Certificates, client *tls.Config) (name string, verified bool, err error) {
	t.Helper()
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	client.InsecureSkipVerify = true // the test looks at the name itself
	server := tls.Server(there, s.ServerConfig())
	done := make(chan error, 1)
	go func() { done <- server.Handshake() }()
	c := tls.Client(here, client)
	clientErr := c.Handshake()
	if clientErr == nil {
		// A server that refuses a client's certificate says so afterwards.
		go func() { _, _ = c.Read(make([]byte, 1)) }()
	} else {
		here.Close()
	}
	if err := <-done; err != nil {
		return "", false, err
	}
	if clientErr != nil {
		return "", false, clientErr
	}
	return c.ConnectionState().PeerCertificates[0].Subject.CommonName, len(server.ConnectionState().VerifiedChains) > 0, nil
}

func TestReload(t *testing.T) {
	f := newFiles(t)
	cert, key := issue(t, "one")
	f.write("crt", cert)
	f.write("key", key)
	f.write("ca", cert)
	s, err := New(f.config())
	if err != nil {
		t.Fatal(err)
	}
	serves := func(want string) {
		t.Helper()
		if name, _, err := handshake(t, s, &tls.Config{}); err != nil || name != want {
			t.Errorf("the server is %q (%v), want %q", name, err, want)
		}
	}
	serves("one")
	s.reload()
	cert2, key2 := issue(t, "two")
	for range 3 { // half a change: the key does not fit
		f.write("crt", cert2)
		s.reload()
	}
	serves("one")
	if n := f.log.Count("not reloaded"); n != 1 {
		t.Errorf("the fault is logged %d times", n)
	}
	f.write("key", key2)
	s.reload()
	serves("two")
	if f.log.Count("certificate reloaded") != 1 {
		t.Error("the reload is not logged")
	}
	for _, break_ := range []func(){
		func() { f.write("crt", nil) },
		func() { f.write("crt", bytes.Repeat([]byte("x"), maxFileBytes+1)) },
		func() { f.write("crt", cert2); f.write("ca", []byte("none")) },
		func() { os.Remove(filepath.Join(f.dir, "ca")) },
	} {
		break_()
		s.reload()
		s.reload()
		serves("two")
	}
	if n := f.log.Count("not reloaded"); n != 5 {
		t.Errorf("faults are logged %d times", n)
	}
	f.write("ca", cert2) // all is well again
	s.reload()
	serves("two")
	if f.log.Count("certificate reloaded") != 2 {
		t.Error("recovery is not logged")
	}
	if strings.Contains(f.log.String(), "PRIVATE") {
		t.Error("a key is logged")
	}
}

func TestClientCertificates(t *testing.T) {
	f := newFiles(t)
	cert, key := issue(t, "server")
	trusted, trustedKey := issue(t, "client")
	f.write("crt", cert)
	f.write("key", key)
	f.write("ca", trusted)
	s, err := New(f.config())
	if err != nil {
		t.Fatal(err)
	}
	pair := func(cert, key []byte) *tls.Config {
		p, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		// Sent whatever authorities the server names.
		return &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &p, nil }}
	}
	if _, verified, err := handshake(t, s, pair(trusted, trustedKey)); err != nil || !verified {
		t.Errorf("a trusted client: %v %v", verified, err)
	}
	if _, verified, err := handshake(t, s, &tls.Config{}); err != nil || verified {
		t.Errorf("a client without: %v %v", verified, err)
	}
	if _, _, err := handshake(t, s, pair(issue(t, "other"))); err == nil {
		t.Error("a client that nobody vouches for is let in")
	}
	if _, _, err := handshake(t, s, &tls.Config{MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	c := f.config()
	c.ClientCAFile = ""
	if s, err = New(c); err != nil {
		t.Fatal(err)
	}
	if _, verified, err := handshake(t, s, pair(trusted, trustedKey)); err != nil || verified {
		t.Errorf("without authorities: %v %v", verified, err)
	}
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFiles(t)
		cert, key := issue(t, "one")
		f.write("crt", cert)
		f.write("key", key)
		f.write("ca", cert)
		s, err := New(f.config())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		cert, key = issue(t, "two")
		f.write("crt", cert)
		f.write("key", key)
		time.Sleep(interval + time.Millisecond) // of the bubble's clock
		synctest.Wait()
		if f.log.Count("certificate reloaded") != 1 {
			t.Error("not reloaded within a second")
		}
		cancel()
		<-done
	})
}

func TestNewFaults(t *testing.T) {
	f := newFiles(t)
	cert, key := issue(t, "one")
	_, other := issue(t, "two")
	f.write("crt", cert)
	f.write("key", key)
	f.write("ca", cert)
	f.write("other", other)
	f.write("empty", nil)
	f.write("mixed", append(append([]byte{}, cert...), key...))
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no logger":         {func(c *Config) { c.Logger = nil }, "logger"},
		"no key":            {func(c *Config) { c.KeyFile = "" }, "both"},
		"a missing file":    {func(c *Config) { c.CertFile += "x" }, "no such file"},
		"another's key":     {func(c *Config) { c.KeyFile = filepath.Join(f.dir, "other") }, "does not match"},
		"no authorities":    {func(c *Config) { c.ClientCAFile = filepath.Join(f.dir, "empty") }, "no certificate"},
		"a key among them":  {func(c *Config) { c.ClientCAFile = filepath.Join(f.dir, "mixed") }, "PRIVATE KEY"},
		"a directory as it": {func(c *Config) { c.ClientCAFile = f.dir }, "directory"},
	} {
		t.Run(name, func(t *testing.T) {
			c := f.config()
			tt.change(&c)
			if _, err := New(c); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// dial tells which certificate a server on loopback saw of a client; nil: none.
func dial(t *testing.T, c *Client, address string, server *tls.Config) (*x509.Certificate, error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // net.Pipe has no room for an alert
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	shown := make(chan []*x509.Certificate, 1)
	go func() {
		var certs []*x509.Certificate
		defer func() { shown <- certs }()
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		s := tls.Server(conn, server)
		if s.Handshake() == nil {
			certs = s.ConnectionState().PeerCertificates
		}
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	_, _, err = c.Credentials().Clone().ClientHandshake(t.Context(), address, raw)
	if certs := <-shown; err == nil && len(certs) > 0 {
		return certs[0], nil
	}
	return nil, err
}

// asking is a server that asks for a certificate, and its own, PEM.
func asking(t *testing.T) (cert []byte, config *tls.Config) {
	t.Helper()
	cert, key := issue(t, "server")
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert}
}

func TestClient(t *testing.T) {
	f := newFiles(t)
	server, config := asking(t)
	cert, key := issue(t, "one")
	f.write("crt", cert)
	f.write("key", key)
	f.write("ca", server)
	c, err := NewClient(f.clientConfig())
	if err != nil {
		t.Fatal(err)
	}
	shows := func(want string) {
		t.Helper()
		if shown, err := dial(t, c, "127.0.0.1:1", config); err != nil || shown.Subject.CommonName != want {
			t.Errorf("shown %v (%v), want %q", shown, err, want)
		}
	}
	shows("one")
	if _, err := dial(t, c, "127.0.0.2:1", config); err == nil || !strings.Contains(err.Error(), "--authorities "+f.config().ClientCAFile) || !strings.Contains(err.Error(), "127.0.0.2") {
		t.Errorf("by another address: %v", err)
	}
	// New files are used with the next connection, half a change is not.
	cert, key = issue(t, "two")
	f.write("crt", cert)
	c.reload()
	shows("one")
	f.write("key", key)
	c.reload()
	shows("two")
	other, _ := issue(t, "another authority")
	f.write("ca", other)
	c.reload()
	if _, err := dial(t, c, "127.0.0.1:1", config); err == nil || !strings.Contains(err.Error(), "verify the server's certificate with --authorities "+f.config().ClientCAFile) {
		t.Errorf("by another authority: %v", err)
	}
	f.write("ca", nil)
	c.reload()
	if _, err := dial(t, c, "127.0.0.1:1", config); err == nil {
		t.Error("without authorities, all are trusted")
	}
	if n := f.log.Count("not reloaded"); n != 2 {
		t.Errorf("faults are logged %d times", n)
	}
}

// TestClientName: the name that was asked for counts, not the address, and
// authorities are followed where there is no certificate.
func TestClientName(t *testing.T) {
	f := newFiles(t)
	server, config := asking(t)
	other, _ := issue(t, "another authority")
	f.write("ca", other)
	cc := f.clientConfig()
	cc.CertFile, cc.KeyFile, cc.ServerName = "", "", "127.0.0.1"
	c, err := NewClient(cc)
	if err != nil {
		t.Fatal(err)
	}
	f.write("ca", server)
	c.reload()
	if shown, err := dial(t, c, "control.example:1", config); err != nil || shown != nil {
		t.Errorf("shown %v, %v", shown, err)
	}
	if f.log.Count("authorities reloaded") != 1 {
		t.Error("the reload is not logged")
	}
}

func (f *files) clientConfig() ClientConfig {
	c := f.config()
	return ClientConfig{CAFile: c.ClientCAFile, CertFile: c.CertFile, KeyFile: c.KeyFile, CAFlag: "--authorities", Logger: c.Logger}
}

func TestNewClientFaults(t *testing.T) {
	f := newFiles(t)
	cert, key := issue(t, "one")
	f.write("crt", cert)
	f.write("key", key)
	f.write("ca", cert)
	for name, tt := range map[string]struct {
		change func(*ClientConfig)
		want   string
	}{
		"no logger":         {func(c *ClientConfig) { c.Logger = nil }, "logger"},
		"no authorities":    {func(c *ClientConfig) { c.CAFile = "" }, "authorities"},
		"no key":            {func(c *ClientConfig) { c.KeyFile = "" }, "both or neither"},
		"no certificate":    {func(c *ClientConfig) { c.CertFile = "" }, "both or neither"},
		"a missing file":    {func(c *ClientConfig) { c.CAFile += "x" }, "no such file"},
		"a key as that":     {func(c *ClientConfig) { c.CAFile = c.KeyFile }, "authorities in " + filepath.Join(f.dir, "key")},
		"keys in the wrong": {func(c *ClientConfig) { c.CertFile, c.KeyFile = c.KeyFile, c.CertFile }, "certificate " + filepath.Join(f.dir, "key")},
	} {
		t.Run(name, func(t *testing.T) {
			c := f.clientConfig()
			tt.change(&c)
			if _, err := NewClient(c); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func FuzzParsePool(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if pool, err := parsePool(raw); (pool == nil) == (err == nil) {
			t.Errorf("pool %v, error %v", pool, err)
		}
	})
}
