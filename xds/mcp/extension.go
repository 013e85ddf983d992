package mcp

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	extensions "istio.io/api/extensions/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	selector "istio.io/api/type/v1beta1"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

const (
	// maxInlineCodeBytes is what TrafficExtension's lua.inlineCode can hold.
	maxInlineCodeBytes = 64 << 10

	// nodesPort is the port that a gateway knows its nodes by; each has its own
	// behind it.
	nodesPort     = 5050
	nodesPortName = "http2-events"
	// nodesDomain ends the host name that a gateway knows its nodes by. Nobody
	// looks it up: .internal is for private use.
	nodesDomain = "periscope.internal"

	// hostnameLabel is the one that istiod gives a proxy, with the machine that it
	// runs on for a value.
	hostnameLabel = "kubernetes.io/hostname"
	elsewhere     = "elsewhere." + nodesDomain // no gateway's machine
)

// ownNamespace exports a resource to no other namespace.
func ownNamespace() []string { return []string{"."} }

// trafficExtension makes a gateway's: the plugin with its settings inline, and
// the nodes as a service of the mesh, from which istiod makes the cluster.
func (b *builder) trafficExtension(g mirror.GatewayPlan, nodes []mirror.Endpoint) ([]resource, error) {
	gw := g.Gateway
	nodesName := name(b.config.Prefix, gw.Name, "-nodes")
	host := nodesName + "." + gw.Namespace + "." + nodesDomain
	plugin := b.plugin(gw.ID())
	settings := g.Settings
	settings.Cluster = clusterName(host)
	code, err := inline(plugin, settings)
	if err != nil {
		return nil, err
	}
	notes := map[string]string{gatewayNote: clean(gw.ID())}
	return []resource{
		{
			kind: kind{"extensions.istio.io", "v1alpha1", "TrafficExtension"}, namespace: gw.Namespace, name: name(b.config.Prefix, gw.Name, "-plugin"),
			annotations: map[string]string{
				gatewayNote: clean(gw.ID()), pluginNote: clean(plugin.Version), policyNote: clean(g.PolicyIDs()), policyRevNote: revisions(g),
			},
			spec: &extensions.TrafficExtension{
				Selector: &selector.WorkloadSelector{MatchLabels: gw.Selector},
				// Before authentication, and before other extensions there: what is
				// refused is worth seeing too.
				Phase:    extensions.TrafficExtension_AUTHN,
				Priority: wrapperspb.Int32(math.MaxInt32),
				Match:    []*extensions.TrafficSelector{{Mode: selector.WorkloadMode_CLIENT}},
				FilterConfig: &extensions.TrafficExtension_Lua{Lua: &extensions.LuaConfig{
					InlineCode: code,
				}},
			},
		},
		{kind: kind{"networking.istio.io", "v1", "ServiceEntry"}, namespace: gw.Namespace, name: nodesName, annotations: notes, spec: serviceEntry(host, nodes)},
		{kind: kind{"networking.istio.io", "v1", "DestinationRule"}, namespace: gw.Namespace, name: nodesName, annotations: notes, spec: destinationRule(host, local(nodes))},
	}, nil
}

// clusterName is what istiod calls the cluster of a service entry's port.
func clusterName(host string) string { return fmt.Sprintf("outbound|%d||%s", nodesPort, host) }

func inline(p Plugin, s mirror.Settings) (string, error) {
	var b strings.Builder
	b.WriteString(p.Source)
	if !strings.HasSuffix(p.Source, "\n") {
		b.WriteByte('\n')
	}
	b.WriteString(s.EncodeLua())
	if b.Len() > maxInlineCodeBytes {
		return "", fmt.Errorf("the plugin (%d bytes) and its settings (%d) are more than the %d bytes of a TrafficExtension: use the form %s, or fewer matches and masks",
			len(p.Source), b.Len()-len(p.Source), maxInlineCodeBytes, FormEnvoyFilter)
	}
	return b.String(), nil
}

func serviceEntry(host string, nodes []mirror.Endpoint) *networking.ServiceEntry {
	out := &networking.ServiceEntry{
		Hosts:      []string{host},
		Location:   networking.ServiceEntry_MESH_EXTERNAL,
		Ports:      []*networking.ServicePort{{Number: nodesPort, Name: nodesPortName, Protocol: "HTTP2"}},
		Resolution: networking.ServiceEntry_STATIC,
		ExportTo:   ownNamespace(),
	}
	labelled := local(nodes)
	for _, n := range nodes {
		if _, err := netip.ParseAddr(n.Host); err != nil {
			out.Resolution = networking.ServiceEntry_DNS
		}
		entry := &networking.WorkloadEntry{
			Address: n.Host,
			Ports:   map[string]uint32{nodesPortName: uint32(n.Port)},
		}
		switch {
		case isMachineLabel(n.Machine):
			entry.Labels = map[string]string{hostnameLabel: n.Machine}
		case labelled: // without the label it would be near to a proxy that has none
			entry.Labels = map[string]string{hostnameLabel: elsewhere}
		}
		out.Endpoints = append(out.Endpoints, entry)
	}
	return out
}

// isMachineLabel tells a machine whose name fits into a label: Kubernetes' may be
// longer, and istiod would refuse all of the service.
func isMachineLabel(machine string) bool { return machine != "" && len(machine) <= maxLabelBytes }

// local tells whether gateways can prefer nodes for their machine.
func local(nodes []mirror.Endpoint) bool {
	return slices.ContainsFunc(nodes, func(n mirror.Endpoint) bool { return isMachineLabel(n.Machine) })
}

// destinationRule has the limits of the other form's cluster. With local, a
// gateway prefers the nodes of its machine.
func destinationRule(host string, local bool) *networking.DestinationRule {
	out := &networking.DestinationRule{
		Host: host,
		TrafficPolicy: &networking.TrafficPolicy{
			ConnectionPool: &networking.ConnectionPoolSettings{
				Tcp: &networking.ConnectionPoolSettings_TCPSettings{
					MaxConnections: gateway.MirrorMaxConnections,
					ConnectTimeout: durationpb.New(gateway.MirrorConnectTimeout),
				},
				Http: &networking.ConnectionPoolSettings_HTTPSettings{
					Http1MaxPendingRequests: gateway.MirrorMaxPending,
					Http2MaxRequests:        gateway.MirrorMaxRequests,
				},
			},
			OutlierDetection: &networking.OutlierDetection{
				Consecutive_5XxErrors: wrapperspb.UInt32(gateway.MirrorEjectAfter),
				Interval:              durationpb.New(gateway.MirrorEjectInterval),
				BaseEjectionTime:      durationpb.New(gateway.MirrorEjectTime),
				MaxEjectionPercent:    gateway.MirrorMaxEjectPercent,
			},
			Tls: &networking.ClientTLSSettings{Mode: networking.ClientTLSSettings_DISABLE},
		},
		ExportTo: ownNamespace(),
	}
	if local {
		out.TrafficPolicy.OutlierDetection.MaxEjectionPercent = gateway.MirrorLocalMaxEjectPercent
		out.TrafficPolicy.LoadBalancer = &networking.LoadBalancerSettings{
			LocalityLbSetting: &networking.LocalityLoadBalancerSetting{FailoverPriority: []string{hostnameLabel}},
		}
	}
	return out
}
