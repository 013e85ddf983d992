package gateway

import (
	"cmp"
	"fmt"
	"net/netip"
	"path/filepath"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// The secrets of ControlTLS; with ".json", the files that say where they are.
const (
	controlAuthorities = "periscope_control_authorities"
	controlCertificate = "periscope_control_certificate"
)

// ControlTLS is how an Envoy reaches the control plane by TLS. Its paths are
// absolute, and of the host that Envoy runs on.
type ControlTLS struct {
	CAFile     string // authorities, PEM, that verify the control plane
	CertFile   string // the gateway's certificate chain, PEM; empty: it shows none
	KeyFile    string
	ServerName string // that the control plane's certificate must have; default: the address
	// SecretsDir has the files that Secrets makes. Envoy follows certificate
	// files only where it is told of them by such a file, not in a bootstrap.
	SecretsDir string
}

func (c *ControlTLS) socket(address string) (*core.TransportSocket, error) {
	name, ip := c.serverName(address)
	context := &tls.UpstreamTlsContext{CommonTlsContext: &tls.CommonTlsContext{
		AlpnProtocols: []string{"h2"},
		ValidationContextType: &tls.CommonTlsContext_ValidationContextSdsSecretConfig{
			ValidationContextSdsSecretConfig: c.secretConfig(controlAuthorities),
		},
	}}
	if !ip {
		context.Sni = name
	}
	if c.CertFile != "" {
		context.CommonTlsContext.TlsCertificateSdsSecretConfigs = []*tls.SdsSecretConfig{c.secretConfig(controlCertificate)}
	}
	return tlsSocket(context)
}

func (c *ControlTLS) serverName(address string) (name string, ip bool) {
	name = cmp.Or(c.ServerName, address)
	_, err := netip.ParseAddr(name)
	return name, err == nil
}

func (c *ControlTLS) secretConfig(name string) *tls.SdsSecretConfig {
	return &tls.SdsSecretConfig{Name: name, SdsConfig: &core.ConfigSource{
		ConfigSourceSpecifier: &core.ConfigSource_PathConfigSource{PathConfigSource: &core.PathConfigSource{Path: c.secretFile(name)}},
		ResourceApiVersion:    core.ApiVersion_V3,
	}}
}

func (c *ControlTLS) secretFile(name string) string {
	return filepath.Join(c.SecretsDir, name+".json")
}

// Secrets makes the files of the bootstrap's SecretsDir, by path. They name the
// files of certificates and keys, and have nothing of these in them. Envoy looks
// at a certificate file again when something is moved into its directory, as
// Kubernetes does with a secret; not when the file is written to.
func Secrets(c BootstrapConfig) (map[string][]byte, error) {
	if c.TLS == nil {
		return nil, nil
	}
	control, err := listenAddress(c.XDS)
	if err != nil {
		return nil, err
	}
	name, ip := c.TLS.serverName(control.Addr().String())
	secrets := []*tls.Secret{{Name: controlAuthorities, Type: &tls.Secret_ValidationContext{ValidationContext: validation(c.TLS.CAFile, name, ip)}}}
	if c.TLS.CertFile != "" {
		secrets = append(secrets, &tls.Secret{Name: controlCertificate, Type: &tls.Secret_TlsCertificate{
			TlsCertificate: &tls.TlsCertificate{CertificateChain: file(c.TLS.CertFile), PrivateKey: file(c.TLS.KeyFile)},
		}})
	}
	out := map[string][]byte{}
	for _, s := range secrets {
		if out[c.TLS.secretFile(s.GetName())], err = secretResponse(s); err != nil {
			return nil, fmt.Errorf("secret %s: %w", s.GetName(), err)
		}
	}
	return out, nil
}

// secretResponse is the form in which Envoy reads resources from a file.
func secretResponse(m proto.Message) ([]byte, error) {
	packed, err := pack(m)
	if err != nil {
		return nil, err
	}
	return marshalJSON(&discovery.DiscoveryResponse{Resources: []*anypb.Any{packed}})
}
