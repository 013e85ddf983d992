// Package gateway turns a gateway's part of the plan into Envoy resources, for
// gateways that we serve directly, and makes the bootstrap of such a gateway.
//
// It never touches the user's exchange: routes, hosts, paths and headers go
// through as they are. It never carries a private key: certificates travel as
// file names. Code and settings are two resources that never mix, so that a
// change of settings doesn't rebuild the Lua machines, unless copies begin or
// end, and neither of them changes a listener.
//
// Package xds/mcp, which puts the same filters and cluster into Istio's words, and
// the commands may import it; it imports xds and mirror.
package gateway

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
)

// Names of resources. The plugin knows MirrorCluster and the metadata
// namespaces; statistics are found by the others.
const (
	MirrorCluster   = "periscope_mirror"
	UpstreamCluster = "upstream"
	PluginFilter    = "periscope.mirror"
	SettingsFilter  = "periscope.settings"
	HTTPListener    = "http"
	HTTPSListener   = "https"

	// Metadata namespaces of the settings filter: the plugin reads the settings
	// only when their digest, "r", is new. "on" is there if it may copy anything.
	revisionNamespace = "periscope.rev"
	settingsNamespace = "periscope.settings"
	sharesNamespace   = "periscope.share" // load control's, which change far more often

	// IdleCode stands for the plugin's while nothing is to be copied, with Idle
	// for its build: Lua without functions, which Envoy doesn't enter for a
	// request. The settings' filter stays as it is.
	IdleCode = "-- nothing is mirrored until the plugin comes\n"
	Idle     = "idle"

	routeConfig = "default"
	statPrefix  = "periscope"
)

// Config is what doesn't follow from policies.
type Config struct {
	HTTP  string // "host:port" to listen on; empty: no such listener
	HTTPS string // "host:port" to listen on; empty: no such listener

	// Files with the certificate chain and the key of the HTTPS listener, as
	// Envoy sees them.
	CertFile, KeyFile string

	// Upstream is the server behind the gateway: http or https, a host and
	// perhaps a port, no path.
	Upstream string
	// UpstreamCAFile verifies an https upstream; empty: it isn't verified.
	UpstreamCAFile string

	Plugin string // the plugin's Lua code
}

// Validate reports all faults of the configuration.
func (c Config) Validate() error {
	var faults []error
	if c.HTTP == "" && c.HTTPS == "" {
		faults = append(faults, errors.New("no listener: state an HTTP or an HTTPS address"))
	}
	for _, l := range []struct{ what, hostport string }{{"HTTP", c.HTTP}, {"HTTPS", c.HTTPS}} {
		if l.hostport == "" {
			continue
		}
		if _, err := listenAddress(l.hostport); err != nil {
			faults = append(faults, fmt.Errorf("%s listener: %w", l.what, err))
		}
	}
	if c.HTTPS != "" && (c.CertFile == "" || c.KeyFile == "") {
		faults = append(faults, errors.New("HTTPS listener: a certificate file and a key file are needed"))
	}
	if _, err := parseUpstream(c.Upstream); err != nil {
		faults = append(faults, err)
	}
	return errors.Join(faults...)
}

// Snapshot makes everything the gateway is served.
func Snapshot(c Config, plan mirror.GatewayPlan) (*xds.Snapshot, error) {
	return new(Maker).Snapshot(c, plan)
}

// maxBases is how many combinations of a configuration and nodes a Maker keeps;
// with one more it begins anew.
const maxBases = 64

// Maker makes the snapshots of many gateways. What they have in common, the
// plugin above all, is marshalled and held once. The zero value is ready; it is
// for one goroutine at a time.
type Maker struct {
	bases map[base]*xds.Snapshot
}

// base is what all but the settings follows from.
type base struct {
	config  Config
	nodes   string
	machine string
}

// Snapshot is the function of that name; the result is the same.
func (m *Maker) Snapshot(c Config, plan mirror.GatewayPlan) (*xds.Snapshot, error) {
	s, err := m.snapshot(c, plan)
	if err != nil {
		return nil, fmt.Errorf("gateway %s: %w", plan.Gateway.ID(), err)
	}
	return s, nil
}

func (m *Maker) snapshot(c Config, plan mirror.GatewayPlan) (*xds.Snapshot, error) {
	if !plan.Settings.Copies() {
		c.Plugin = IdleCode
	}
	s, err := m.base(c, plan.Endpoints, machine(plan))
	if err != nil {
		return nil, err
	}
	if plan.Settings.Transport == policy.TransportExtProc {
		return streaming(s, plan)
	}
	settings, err := SettingsExtension(plan.Settings)
	if err != nil {
		return nil, err
	}
	return s.With(resource.ExtensionConfigType, xds.Message{Name: SettingsFilter, Message: settings})
}

// streaming puts the ext_proc filter in the plugin's place.
func streaming(s *xds.Snapshot, plan mirror.GatewayPlan) (*xds.Snapshot, error) {
	stream, err := StreamExtension(plan)
	if err != nil {
		return nil, err
	}
	settings, err := SettingsExtension(plan.Settings)
	if err != nil {
		return nil, err
	}
	m, err := servedMirrorCluster(policy.TransportExtProc, machine(plan))
	if err != nil {
		return nil, err
	}
	if s, err = s.With(resource.ClusterType, xds.Message{Name: MirrorCluster, Message: m}); err != nil {
		return nil, err
	}
	return s.With(resource.ExtensionConfigType, xds.Message{Name: SettingsFilter, Message: settings}, xds.Message{Name: PluginFilter, Message: stream})
}

// machine is the one whose nodes the gateway prefers; empty: none. All of its
// processes are served alike, so they have to share one.
func machine(plan mirror.GatewayPlan) string {
	if len(plan.Gateway.Machines) == 1 {
		return plan.Gateway.Machines[0]
	}
	return ""
}

// base is what gateways with these nodes have in common; most of it they have
// in common with all others too.
func (m *Maker) base(c Config, nodes []mirror.Endpoint, machine string) (*xds.Snapshot, error) {
	key := base{c, fmt.Sprint(nodes), machine}
	if s := m.bases[key]; s != nil {
		return s, nil
	}
	s, err := m.makeBase(c, nodes, machine)
	if err != nil {
		return nil, err
	}
	if len(m.bases) >= maxBases || m.bases == nil {
		m.bases = map[base]*xds.Snapshot{}
	}
	m.bases[key] = s
	return s, nil
}

func (m *Maker) makeBase(c Config, nodes []mirror.Endpoint, machine string) (*xds.Snapshot, error) {
	if len(nodes) == 0 {
		return common(c)
	}
	if err := checkEndpoints(nodes); err != nil {
		return nil, err
	}
	s, err := m.base(c, nil, "")
	if err != nil {
		return nil, err
	}
	if machine != "" {
		local, err := servedMirrorCluster(policy.TransportLua, machine)
		if err != nil {
			return nil, err
		}
		if s, err = s.With(resource.ClusterType, xds.Message{Name: MirrorCluster, Message: local}); err != nil {
			return nil, err
		}
	}
	return s.With(resource.EndpointType, xds.Message{Name: MirrorCluster, Message: nodeAssignment(machine, nodes)})
}

// common is a snapshot without settings and nodes.
func common(c Config) (*xds.Snapshot, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	up, err := parseUpstream(c.Upstream)
	if err != nil {
		return nil, err
	}
	listeners, err := listeners(c)
	if err != nil {
		return nil, err
	}
	clusters, err := clusters(c, up)
	if err != nil {
		return nil, err
	}
	plugin, err := sharedPlugin(c.Plugin)
	if err != nil {
		return nil, err
	}
	return xds.NewSnapshot(map[string][]xds.Message{
		resource.ListenerType:        listeners,
		resource.RouteType:           {{Name: routeConfig, Message: routes()}},
		resource.ClusterType:         clusters,
		resource.EndpointType:        endpoints(up),
		resource.ExtensionConfigType: {{Name: PluginFilter, Message: plugin}},
	})
}

// upstream is the parsed upstream URL.
type upstream struct {
	tls  bool
	host string
	ip   bool // host is an address, not a name
	port uint32
}

func parseUpstream(raw string) (upstream, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return upstream{}, fmt.Errorf("upstream: %w", err)
	}
	fault := func(hint string) error {
		return fmt.Errorf("upstream %q: %s; write it as http://host:port or https://host:port", u.Redacted(), hint)
	}
	up := upstream{host: u.Hostname(), port: 80}
	switch {
	case u.Scheme == "https":
		up.tls, up.port = true, 443
	case u.Scheme != "http":
		return upstream{}, fault("the scheme is neither http nor https")
	}
	switch {
	case up.host == "":
		return upstream{}, fault("it has no host")
	case u.User != nil:
		return upstream{}, fault("it carries credentials, which would not be sent")
	case u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		return upstream{}, fault("it has a path, a query or a fragment, which would not be used")
	}
	if p := u.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return upstream{}, fault("the port isn't in 1 to 65535")
		}
		up.port = uint32(n)
	}
	if addr, err := netip.ParseAddr(up.host); err == nil {
		if addr.Zone() != "" {
			return upstream{}, fault("an address with a zone can't be used")
		}
		up.ip = true
	}
	return up, nil
}

// listenAddress parses the "host:port" of a listener. Envoy binds addresses
// only, so the one name that everybody knows is put as its address.
func listenAddress(hostport string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: write it as host:port", hostport)
	}
	switch host {
	case "":
		host = "0.0.0.0"
	case "localhost":
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %q: the host must be an IP address or localhost", hostport)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return netip.AddrPort{}, fmt.Errorf("address %q: the port isn't in 1 to 65535", hostport)
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// digest identifies a text: 16 hex digits of its SHA-256.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}
