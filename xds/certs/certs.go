// Package certs gives a server its TLS certificate from files, and follows the
// files when they change, without a restart.
//
// It never serves without a certificate, and never gives a good one up for a
// broken one: then the last good one stays, and the fault is logged once. It
// never makes, sends or logs a private key.
//
// Any server of ours may import it; it imports nothing of ours.
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
type Certificates struct {
	config  Config
	current atomic.Pointer[tls.Config]
	// Of Run's goroutine, once it runs.
	seen   [sha256.Size]byte // content that was looked at last, good or bad
	faulty string            // the fault that was logged last
}

// New loads the files for the first time, when a fault is an error.
func New(c Config) (*Certificates, error) {
	if c.Logger == nil {
		return nil, errors.New("load TLS certificates: a logger is needed")
	}
	if c.CertFile == "" || c.KeyFile == "" {
		return nil, errors.New("load TLS certificates: a certificate file and a key file are needed, both")
	}
	s := &Certificates{config: c}
	s.config.Logger = c.Logger.With("component", "certs")
	files, err := s.read()
	if err != nil {
		return nil, fmt.Errorf("load TLS certificates: %w", err)
	}
	t, err := parse(files)
	if err != nil {
		return nil, fmt.Errorf("load TLS certificates: %w", err)
	}
	s.seen = files.digest()
	s.current.Store(t)
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

// Run follows the files until ctx ends. Call it once.
func (s *Certificates) Run(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.reload()
		}
	}
}

// reload looks at content, not at times: files that are links to links, as
// Kubernetes mounts secrets, have misleading ones.
func (s *Certificates) reload() {
	files, err := s.read()
	if err == nil {
		digest := files.digest()
		if digest == s.seen {
			return
		}
		s.seen = digest
		var t *tls.Config
		if t, err = parse(files); err == nil {
			s.current.Store(t)
			s.faulty = ""
			s.config.Logger.Info("TLS certificate reloaded", "file", s.config.CertFile, "not_after", t.Certificates[0].Leaf.NotAfter)
			return
		}
	} else {
		s.seen = [sha256.Size]byte{} // should the same files come back, that is news
	}
	if err.Error() != s.faulty {
		s.faulty = err.Error()
		s.config.Logger.Error("TLS certificate not reloaded; the one before stays in use", "error", err)
	}
}

// pemFiles is the files' content.
type pemFiles struct{ cert, key, clientCA []byte }

func (f pemFiles) digest() [sha256.Size]byte {
	h := sha256.New()
	for _, part := range [][]byte{f.cert, f.key, f.clientCA} {
		fmt.Fprintf(h, "%d:", len(part))
		h.Write(part)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func (s *Certificates) read() (f pemFiles, err error) {
	for _, file := range []struct {
		path string
		into *[]byte
	}{{s.config.CertFile, &f.cert}, {s.config.KeyFile, &f.key}, {s.config.ClientCAFile, &f.clientCA}} {
		if file.path == "" {
			continue
		}
		if *file.into, err = readFile(file.path); err != nil {
			return pemFiles{}, err
		}
	}
	return f, nil
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

func parse(f pemFiles) (*tls.Config, error) {
	pair, err := tls.X509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, fmt.Errorf("certificate and key: %w", err)
	}
	t := &tls.Config{
		Certificates: []tls.Certificate{pair},
		MinVersion:   tls.VersionTLS12, // Envoy's default maximum as a client
		NextProtos:   []string{"h2"},

		SessionTicketsDisabled: true,
	}
	if f.clientCA == nil {
		return t, nil
	}
	if t.ClientCAs, err = parsePool(f.clientCA); err != nil {
		return nil, fmt.Errorf("client authorities: %w", err)
	}
	t.ClientAuth = tls.VerifyClientCertIfGiven
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
