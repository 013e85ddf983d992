// Package mcp turns a plan into Istio resources for gateways that Istio serves:
// as a snapshot that istiod takes by MCP-over-xDS, and as the same objects in
// YAML for those who apply them by other means. It also tells istiod from the
// other clients of the xDS server.
//
// It never mixes code and settings in one resource of its default form, so that
// an edit of a policy changes one small resource of the gateways which that
// policy governs, and the code of those that begin or cease to copy: no listener
// is touched, and nothing of another gateway changes by a byte. It never uses a label or annotation of
// istio.io: istiod would push each new version of such a resource, even if
// nothing in it was new. It never tells what became of a resource: istiod
// acknowledges whatever it is sent.
//
// The commands and packages that read back istiod's state may import it; it
// imports xds, xds/gateway, mirror and policy.
package mcp

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
)

// Form is which of Istio's resources carry the plugin.
type Form string

const (
	// FormEnvoyFilter sends code and settings by ECDS, apart: a change of
	// either touches no listener, and code that doesn't load fails alone.
	FormEnvoyFilter Form = "EnvoyFilter"
	// FormTrafficExtension puts code and settings into the listener, by Istio's
	// own API for extensions (1.30 and later): each change of a policy closes
	// connections. For policies that hardly ever change.
	FormTrafficExtension Form = "TrafficExtension"
)

// DefaultPrefix begins the name of everything that is ours in a cluster.
const DefaultPrefix = "periscope-"

// Labels and annotations. None may hold "istio.io".
const (
	managedByLabel   = "app.kubernetes.io/managed-by"
	managedBy        = "periscope"
	gatewayNote      = "periscope.dev/gateway"
	pluginNote       = "periscope.dev/plugin"
	policyNote       = "periscope.dev/policy"
	policyRevNote    = "periscope.dev/policy-revision"
	revisionLabel    = "istio.io/rev" // of gateways' pods; Istio's injector sets it
	createdAtSeconds = 1_767_225_600  // 2026-01-01T00:00:00Z
)

// Plugin is one build of the plugin.
type Plugin struct {
	Source  string // Lua
	Version string // empty: not stated
}

// Config is what doesn't follow from policies.
type Config struct {
	Form   Form   // default FormEnvoyFilter
	Prefix string // of names, default DefaultPrefix

	// Revision leaves out gateways whose pods' label istio.io/rev names another
	// revision of Istio. Empty: all are in. That is always right, for an istiod
	// uses only what is for its own gateways; it is the one right thing where
	// pods are labelled with a revision's tag.
	Revision string

	Plugin Plugin
	// Plugins of single gateways, by id: those that a roll-out treats apart.
	Plugins map[string]Plugin
}

// GatewayError is why a gateway can't be supplied.
type GatewayError struct {
	Gateway string // id
	Err     error
}

func (e *GatewayError) Error() string { return fmt.Sprintf("gateway %s: %v", e.Gateway, e.Err) }

func (e *GatewayError) Unwrap() error { return e.Err }

// kind is a kind of Istio resource.
type kind struct{ group, version, name string }

func (k kind) apiVersion() string { return k.group + "/" + k.version }

// typeURL is istiod's own kind of type URL.
func (k kind) typeURL() string { return k.apiVersion() + "/" + k.name }

// Types lists the types that istiod subscribes to as a config source, in its
// order. It isn't ready before each of them but the first has been answered.
func Types() []string {
	return []string{
		"core/v1alpha1/MeshConfig",
		"security.istio.io/v1/AuthorizationPolicy",
		"networking.istio.io/v1/DestinationRule",
		"networking.istio.io/v1alpha3/EnvoyFilter",
		"networking.istio.io/v1/Gateway",
		"security.istio.io/v1/PeerAuthentication",
		"networking.istio.io/v1beta1/ProxyConfig",
		"security.istio.io/v1/RequestAuthentication",
		"networking.istio.io/v1/ServiceEntry",
		"networking.istio.io/v1/Sidecar",
		"telemetry.istio.io/v1/Telemetry",
		"extensions.istio.io/v1alpha1/TrafficExtension",
		"networking.istio.io/v1/VirtualService",
		"extensions.istio.io/v1alpha1/WasmPlugin",
		"networking.istio.io/v1/WorkloadEntry",
		"networking.istio.io/v1/WorkloadGroup",
	}
}

// resource is one Istio resource, before it takes either shape. Its spec may be
// shared with others: it is never changed.
type resource struct {
	kind        kind
	namespace   string
	name        string
	annotations map[string]string
	spec        proto.Message
}

// id tells it from all others.
func (r resource) id() string { return r.kind.name + " " + r.namespace + "/" + r.name }

func labels() map[string]string { return map[string]string{managedByLabel: managedBy} }

// Validate reports all faults of the configuration.
func (c Config) Validate() error {
	var faults []error
	switch c.Form {
	case "", FormEnvoyFilter, FormTrafficExtension:
	default:
		faults = append(faults, fmt.Errorf("form %q is neither %s nor %s", c.Form, FormEnvoyFilter, FormTrafficExtension))
	}
	if c.Prefix != "" && !isPrefix(c.Prefix) {
		faults = append(faults, fmt.Errorf("prefix %q: use at most %d of a-z, 0-9 and -, a letter first", c.Prefix, maxPrefixBytes))
	}
	if c.Plugin.Source == "" {
		faults = append(faults, errors.New("the plugin has no source"))
	}
	for _, id := range slices.Sorted(maps.Keys(c.Plugins)) {
		if c.Plugins[id].Source == "" {
			faults = append(faults, fmt.Errorf("the plugin of gateway %s has no source", id))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("istio resources: %w", err)
	}
	return nil
}

// message is the resource as MCP carries it. istiod ignores a resource whose
// version is as it was, and would take the time of a resource without one for
// 1970; the time is the same for all of them and for ever, as nothing but their
// content may make them differ.
func (r resource) message() (*mcpv1alpha1.Resource, error) {
	body := new(anypb.Any)
	if err := anypb.MarshalFrom(body, r.spec, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, err
	}
	m := &mcpv1alpha1.Resource{
		Metadata: &mcpv1alpha1.Metadata{
			Name:        r.namespace + "/" + r.name,
			CreateTime:  &timestamppb.Timestamp{Seconds: createdAtSeconds},
			Labels:      labels(),
			Annotations: r.annotations,
		},
		Body: body,
	}
	content, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	m.Metadata.Version = digest(content)
	return m, nil
}

// each has the resources of one gateway after the other made, in the plan's
// order; made gives their ids.
func (b *builder) each(plan mirror.Plan, made func(mirror.GatewayPlan) (ids []string, err error)) error {
	if err := b.config.Validate(); err != nil {
		return err
	}
	var faults []error
	owned := map[string]bool{}
	for _, g := range plan.Gateways {
		if !b.config.Supplies(g) {
			continue
		}
		ids, err := made(g)
		for _, id := range ids {
			if owned[id] && err == nil {
				err = fmt.Errorf("the name of %s is another gateway's", id)
			}
			owned[id] = true
		}
		if err != nil {
			faults = append(faults, &GatewayError{Gateway: g.Gateway.ID(), Err: err})
		}
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("istio resources: %w", err)
	}
	return nil
}

// revisions are those of a gateway's policies, in the order of their ids.
func revisions(g mirror.GatewayPlan) string {
	var out []string
	for _, s := range g.Policies() {
		out = append(out, s.PolicyRev)
	}
	return strings.Join(out, ", ")
}

// Supplies tells whether a gateway gets anything at all. Policies that copy
// nothing leave the filters in place, without the plugin's code: taking them
// away, and back, would change the listener, which ends connections. Where the
// code is in the listener anyway, nothing is left in place.
func (c Config) Supplies(g mirror.GatewayPlan) bool {
	if g.Policy == "" || len(g.Gateway.Selector) == 0 {
		return false
	}
	if c.Form == FormTrafficExtension && !g.Settings.Copies() {
		return false
	}
	rev := g.Gateway.Labels[revisionLabel]
	return c.Revision == "" || rev == "" || rev == c.Revision
}

// gateway makes one gateway's resources.
func (b *builder) gateway(g mirror.GatewayPlan) ([]resource, error) {
	if !isLabel(g.Gateway.Namespace) {
		return nil, fmt.Errorf("%q can't be a namespace", g.Gateway.Namespace)
	}
	if err := checkSelector(g.Gateway.Selector); err != nil {
		return nil, err
	}
	nodes, err := endpoints(g.Endpoints)
	if err != nil {
		return nil, err
	}
	if b.config.Form == FormTrafficExtension {
		if g.Settings.Transport == policy.TransportExtProc {
			return nil, fmt.Errorf("a TrafficExtension carries Lua only: transport %s takes the form %s", policy.TransportExtProc, FormEnvoyFilter)
		}
		return b.trafficExtension(g, nodes)
	}
	return b.envoyFilters(g, nodes)
}

// plugin is the build of the plugin that a gateway gets.
func (b *builder) plugin(gateway string) Plugin {
	if p, ok := b.config.Plugins[gateway]; ok {
		return p
	}
	return b.config.Plugin
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:8])
}

// clean makes a text fit for an annotation.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
}
