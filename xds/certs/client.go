package certs

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"google.golang.org/grpc/credentials"
)

// ClientConfig is what NewClient needs.
type ClientConfig struct {
	CAFile     string // authorities, PEM, that the server's certificate is verified with
	CertFile   string // the client's certificate chain, PEM; empty: it shows none
	KeyFile    string // its private key, PEM
	ServerName string // that the server's certificate must have; empty: the address's host
	CAFlag     string // what CAFile was given by, as errors tell it
	Logger     *slog.Logger
}

// Client is a client's side of TLS, as its files have it now. Its methods may
// be called from several goroutines.
type Client struct {
	follower
	config ClientConfig
}

// NewClient loads the files for the first time, when a fault is an error.
func NewClient(c ClientConfig) (*Client, error) {
	switch {
	case c.CAFile == "":
		return nil, errors.New("load TLS certificates: a file with the server's authorities is needed")
	case (c.CertFile == "") != (c.KeyFile == ""):
		return nil, errors.New("load TLS certificates: a certificate file and a key file are needed, both or neither")
	}
	client := &Client{follower{certFile: c.CertFile, keyFile: c.KeyFile, caFile: c.CAFile, logger: c.Logger}, c}
	client.adapt = func(t *tls.Config, authorities *x509.CertPool) { t.RootCAs = authorities }
	if err := client.load(); err != nil {
		return nil, err
	}
	return client, nil
}

// Credentials are a gRPC client's: each new connection uses what is current
// then. Connections that are open stay as they are.
func (c *Client) Credentials() credentials.TransportCredentials {
	return clientCredentials{credentials.NewTLS(c.current.Load()), c}
}

// clientCredentials are gRPC's own in all but the handshake.
type clientCredentials struct {
	credentials.TransportCredentials
	client *Client
}

func (c clientCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config := c.client.config
	conn, info, err := credentials.NewTLS(c.client.current.Load()).ClientHandshake(ctx, cmp.Or(config.ServerName, authority), raw)
	if unverified := new(tls.CertificateVerificationError); errors.As(err, &unverified) {
		err = fmt.Errorf("verify the server's certificate with %s %s: %w", config.CAFlag, config.CAFile, unverified.Err)
	}
	return conn, info, err
}

func (c clientCredentials) Clone() credentials.TransportCredentials { return c }
