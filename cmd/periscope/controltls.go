package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/xds/certs"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

// controlTLSFlags say how a node or an Envoy reaches the control plane by TLS.
type controlTLSFlags struct {
	ca         string
	cert       string
	key        string
	serverName string
}

func (f *controlTLSFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.ca, "control-ca", "", "authorities, PEM, that verify the control plane, which is reached by TLS then; default: plain text, to loopback alone")
	flags.StringVar(&f.cert, "control-cert", "", "certificate chain, PEM, to show the control plane; with --xds-tls-client-ca it asks for one")
	flags.StringVar(&f.key, "control-key", "", "private key of --control-cert, PEM")
	flags.StringVar(&f.serverName, "control-server-name", "", "name that the control plane's certificate must be valid for; default: the host of its address")
}

// check judges the flags together; addressFlag is that of the control plane's
// address. Plain text is for loopback: elsewhere anybody on the way could take
// a control plane's part, or read what it sends.
func (f *controlTLSFlags) check(addressFlag, address string) error {
	host, _, err := net.SplitHostPort(address)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %q is not host:port", addressFlag, address)
	case f.cert != "" && f.key == "":
		return errors.New("--control-key: the private key of --control-cert is needed")
	case f.cert == "" && f.key != "":
		return errors.New("--control-cert: the certificate of --control-key is needed")
	case f.ca != "":
		return nil
	case f.cert != "" || f.serverName != "":
		return errors.New("--control-ca: the authorities that verify the control plane are needed for TLS")
	case !localweb.Loopback(host):
		return fmt.Errorf("%s: %q is not a loopback address, and plain text is only for those: name the authorities that verify the control plane with --control-ca", addressFlag, host)
	}
	return nil
}

// open loads a node's side; nil: plain text.
func (f *controlTLSFlags) open(logger *slog.Logger) (*certs.Client, error) {
	if f.ca == "" {
		return nil, nil
	}
	c, err := certs.NewClient(certs.ClientConfig{
		CAFile: f.ca, CertFile: f.cert, KeyFile: f.key, ServerName: f.serverName, CAFlag: "--control-ca", Logger: logger})
	if err != nil {
		return nil, fmt.Errorf("--control-ca, --control-cert, --control-key: %w", err)
	}
	return c, nil
}

// envoy is an Envoy's side; nil: plain text. Its paths are made absolute: Envoy
// runs in a directory of its own.
func (f *controlTLSFlags) envoy(secretsDir string) (*gateway.ControlTLS, error) {
	if f.ca == "" {
		return nil, nil
	}
	if secretsDir == "" {
		return nil, errors.New("--sds-dir: with --control-ca a directory is needed for the files by which Envoy follows its certificates")
	}
	c := &gateway.ControlTLS{CAFile: f.ca, CertFile: f.cert, KeyFile: f.key, ServerName: f.serverName, SecretsDir: secretsDir}
	for _, path := range []*string{&c.CAFile, &c.CertFile, &c.KeyFile, &c.SecretsDir} {
		if *path == "" {
			continue
		}
		var err error
		if *path, err = filepath.Abs(*path); err != nil {
			return nil, fmt.Errorf("absolute path: %w", err)
		}
	}
	return c, nil
}
