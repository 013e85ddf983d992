// Package certs gives an end of a TLS connection its certificate and the
// authorities that it trusts from files, and follows the files when they
// change, without a restart.
//
// It never serves without a certificate, never trusts without authorities, and
// never gives good files up for broken ones: then the last good ones stay in
// use, and the fault is logged once. It never makes, sends or logs a private
// key.
//
// Any server or client of ours may import it; it imports nothing of ours.
package certs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

const (
	maxFileBytes = 1 << 20
	interval     = time.Second // between looks at the files
)

// Config is what New needs.
type Config struct {
	CertFile string // the server's certificate chain, PEM
	KeyFile  string // its private key, PEM
	// ClientCAFile has the authorities, PEM, that clients' certificates are
	// verified with. A client need not have one; one that doesn't verify ends
	// the connection. Empty: none is asked for.
	ClientCAFile string
	Logger       *slog.Logger
}

// Certificates are a server's, as its files have them now. Its methods may be
// called from several goroutines.
type Certificates struct{ follower }

// New loads the files for the first time, when a fault is an error.
func New(c Config) (*Certificates, error) {
	if c.CertFile == "" || c.KeyFile == "" {
		return nil, errors.New("load TLS certificates: a certificate file and a key file are needed, both")
	}
	s := &Certificates{follower{certFile: c.CertFile, keyFile: c.KeyFile, caFile: c.ClientCAFile, logger: c.Logger}}
	s.adapt = func(t *tls.Config, authorities *x509.CertPool) {
		t.NextProtos = []string{"h2"}
		if authorities != nil {
			t.ClientCAs, t.ClientAuth = authorities, tls.VerifyClientCertIfGiven
		}
	}
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

// ServerConfig is a server's TLS configuration: each handshake uses what is
// current then. Connections that are open stay as they are.
func (s *Certificates) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// A session resumed would outlive the authorities that vouched for it.
		SessionTicketsDisabled: true,
		GetConfigForClient:     func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.current.Load(), nil },
	}
}

// follower keeps what follows from the files.
type follower struct {
	certFile, keyFile, caFile string // any of them may be empty
	adapt                     func(*tls.Config, *x509.CertPool)
	logger                    *slog.Logger
	current                   atomic.Pointer[tls.Config]
	// Of Run's goroutine, once it runs.
	seen   [sha256.Size]byte // content that was looked at last, good or bad
	faulty string            // the fault that was logged last
}

// load reads the files for the first time.
func (f *follower) load() error {
	if f.logger == nil {
		return errors.New("load TLS certificates: a logger is needed")
	}
	f.logger = f.logger.With("component", "certs")
	files, err := f.read()
	if err != nil {
		return fmt.Errorf("load TLS certificates: %w", err)
	}
	t, err := f.parse(files)
	if err != nil {
		return fmt.Errorf("load TLS certificates: %w", err)
	}
	f.seen = files.digest()
	f.current.Store(t)
	return nil
}

// Run follows the files until ctx ends. Call it once.
func (f *follower) Run(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f.reload()
		}
	}
}

// reload looks at content, not at times: files that are links to links, as
// Kubernetes mounts secrets, have misleading ones.
func (f *follower) reload() {
	files, err := f.read()
	if err == nil {
		digest := files.digest()
		if digest == f.seen {
			return
		}
		f.seen = digest
		var t *tls.Config
		if t, err = f.parse(files); err == nil {
			f.current.Store(t)
			f.faulty = ""
			f.logReload(t)
			return
		}
	} else {
		f.seen = [sha256.Size]byte{} // should the same files come back, that is news
	}
	if err.Error() != f.faulty {
		f.faulty = err.Error()
		f.logger.Error("TLS certificate not reloaded; the one before stays in use", "error", err)
	}
}

func (f *follower) logReload(t *tls.Config) {
	if len(t.Certificates) == 0 { // a client that has none
		f.logger.Info("TLS authorities reloaded", "file", f.caFile)
		return
	}
	f.logger.Info("TLS certificate reloaded", "file", f.certFile, "not_after", t.Certificates[0].Leaf.NotAfter)
}

// pemFiles is the files' content.
type pemFiles struct{ cert, key, ca []byte }

func (p pemFiles) digest() [sha256.Size]byte {
	h := sha256.New()
	for _, part := range [][]byte{p.cert, p.key, p.ca} {
		fmt.Fprintf(h, "%d:", len(part))
		h.Write(part)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func (f *follower) read() (p pemFiles, err error) {
	for _, file := range []struct {
		path string
		into *[]byte
	}{{f.certFile, &p.cert}, {f.keyFile, &p.key}, {f.caFile, &p.ca}} {
		if file.path == "" {
			continue
		}
		if *file.into, err = readFile(file.path); err != nil {
			return pemFiles{}, err
		}
	}
	return p, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(raw) > maxFileBytes {
		return nil, fmt.Errorf("read %s: it is longer than %d bytes", path, maxFileBytes)
	}
	return raw, nil
}

func (f *follower) parse(p pemFiles) (*tls.Config, error) {
	t := &tls.Config{
		MinVersion:             tls.VersionTLS12, // Envoy's default maximum as a client
		SessionTicketsDisabled: true,
	}
	if f.certFile != "" {
		pair, err := tls.X509KeyPair(p.cert, p.key)
		if err != nil {
			return nil, fmt.Errorf("certificate %s and key %s: %w", f.certFile, f.keyFile, err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	var authorities *x509.CertPool
	if f.caFile != "" {
		var err error
		if authorities, err = parsePool(p.ca); err != nil {
			return nil, fmt.Errorf("authorities in %s: %w", f.caFile, err)
		}
	}
	f.adapt(t, authorities)
	return t, nil
}

// parsePool is strict: AppendCertsFromPEM would leave out what it can't read.
func parsePool(raw []byte) (*x509.CertPool, error) {
	pool, found := x509.NewCertPool(), false
	for rest := bytes.TrimSpace(raw); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, errors.New("not PEM")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block is %q, not a CERTIFICATE", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		pool.AddCert(cert)
		found = true
	}
	if !found {
		return nil, errors.New("no certificate in it")
	}
	return pool, nil
}
