// Package policy is the MirrorPolicy: its model, strict parsing, defaults,
// validation and the reference semantics of its matching.
//
// It never reads files, never talks to anything and never looks at traffic:
// every function is pure. Package policy/source reads files and watches them.
//
// Anything may import it; it imports nothing of ours.
package policy

import (
	"strings"
	"time"
)

// APIVersion and Kind are the only ones a policy document may carry.
const (
	APIVersion = "periscope.dev/v1alpha1"
	Kind       = "MirrorPolicy"
)

// MirrorPolicy says what the gateways it targets mirror, how much of it, and
// how nodes analyse it. Names follow Gateway API conventions.
type MirrorPolicy struct {
	APIVersion string   `yaml:"apiVersion" json:"apiVersion"`
	Kind       string   `yaml:"kind" json:"kind"`
	Metadata   Metadata `yaml:"metadata" json:"metadata"`
	Spec       Spec     `yaml:"spec" json:"spec"`
}

// Metadata is the part of Kubernetes' ObjectMeta that a policy uses.
type Metadata struct {
	Name              string            `yaml:"name" json:"name"`
	Namespace         string            `yaml:"namespace" json:"namespace"` // default "default"
	Labels            map[string]string `yaml:"labels" json:"labels,omitempty"`
	Annotations       map[string]string `yaml:"annotations" json:"annotations,omitempty"`
	CreationTimestamp time.Time         `yaml:"creationTimestamp" json:"creationTimestamp,omitzero"` // the older of two policies for one gateway wins
}

// Spec is a policy's wish.
type Spec struct {
	Tenant      string      `yaml:"tenant" json:"tenant,omitempty"`
	TargetRefs  []TargetRef `yaml:"targetRefs" json:"targetRefs,omitempty"` // at most one of TargetRefs and Selector; neither: every gateway of the namespace
	Selector    *Selector   `yaml:"selector" json:"selector,omitempty"`
	Mode        Mode        `yaml:"mode" json:"mode"`
	Transport   Transport   `yaml:"transport" json:"transport"`
	Match       []Match     `yaml:"match" json:"match,omitempty"`     // none: everything; else any entry
	Exclude     []Match     `yaml:"exclude" json:"exclude,omitempty"` // wins over Match
	Sampling    Sampling    `yaml:"sampling" json:"sampling"`
	Body        Body        `yaml:"body" json:"body"`
	Mask        Mask        `yaml:"mask" json:"mask"`
	Application string      `yaml:"application" json:"application,omitempty"`
	Detection   Detection   `yaml:"detection" json:"detection"`
	Nodes       Nodes       `yaml:"nodes" json:"nodes"`
}

// TargetRef names a gateway in the policy's own namespace (GEP-713).
type TargetRef struct {
	Group string `yaml:"group" json:"group"` // gateway.networking.k8s.io (default) or networking.istio.io
	Kind  string `yaml:"kind" json:"kind"`   // Gateway (default)
	Name  string `yaml:"name" json:"name"`
}

// Selector picks gateway workloads by all of their labels.
type Selector struct {
	MatchLabels map[string]string `yaml:"matchLabels" json:"matchLabels"`
}

// Mode says whether exchanges are mirrored.
type Mode string

// Enforce is part of the model, but refused until blocking exists.
const (
	ModeOff     Mode = "Off"
	ModeMonitor Mode = "Monitor" // default
	ModeEnforce Mode = "Enforce"
)

// Transport is how copies leave the gateway.
type Transport string

const (
	TransportLua     Transport = "Lua"     // default: the plugin decides, cuts and masks in the gateway, and sends batches
	TransportExtProc Transport = "ExtProc" // Envoy's ext_proc filter streams each exchange; nodes decide, cut and mask
)

// Match holds when one of Hosts and one of Paths match; an empty list matches
// everything.
type Match struct {
	Hosts []string    `yaml:"hosts" json:"hosts,omitempty"` // exact, or "*.suffix" for one or more labels before it, as in Gateway API
	Paths []PathMatch `yaml:"paths" json:"paths,omitempty"`
}

// PathMatch compares the path without its query.
type PathMatch struct {
	Type  PathType `yaml:"type" json:"type"` // default PathPrefix
	Value string   `yaml:"value" json:"value"`
}

// PathType is Exact or PathPrefix; a prefix matches whole path elements, as in
// Gateway API: /api matches /api and /api/x, not /apix.
type PathType string

const (
	PathExact  PathType = "Exact"
	PathPrefix PathType = "PathPrefix"
)

// Sampling is the share of matching exchanges that is mirrored.
type Sampling struct {
	Percent  float64  `yaml:"percent" json:"percent"`   // 0 to 100, default 100
	Adaptive Adaptive `yaml:"adaptive" json:"adaptive"` // how far load control may lower it
	Always   []Class  `yaml:"always" json:"always,omitempty"`
	Session  Session  `yaml:"session" json:"session,omitzero"`
}

// Session is where requests name the session that they are part of: the
// exchanges of a session are mirrored or left out together. At most one is set.
// Without any, and for requests that don't name one, a trace (W3C Trace Context)
// counts as the session, and else each exchange stands for itself.
type Session struct {
	Cookie string `yaml:"cookie" json:"cookie,omitempty"` // case-sensitive
	Header string `yaml:"header" json:"header,omitempty"` // lower case
}

// Adaptive bounds load control.
type Adaptive struct {
	MinPercent float64 `yaml:"minPercent" json:"minPercent"` // 0 to Percent, default min(5, Percent)
}

// Class is a class of exchanges that sampling spares.
type Class string

const (
	ClassNewEndpoint    Class = "NewEndpoint"    // a method and path shape this gateway worker has not seen
	ClassAuthentication Class = "Authentication" // a path that speaks of login, tokens or passwords
	ClassSuspicious     Class = "Suspicious"     // a path or query with characters typical of attacks
)

// Body bounds what is copied of bodies. The true length always travels.
type Body struct {
	Request  BodyLimit `yaml:"request" json:"request"`
	Response BodyLimit `yaml:"response" json:"response"`
}

// BodyLimit is one direction's bound.
type BodyLimit struct {
	MaxBytes     Quantity `yaml:"maxBytes" json:"maxBytes"`         // 0 copies none; at most 1Mi; defaults 64Ki (request), 16Ki (response)
	ContentTypes []string `yaml:"contentTypes" json:"contentTypes"` // "type/subtype", "type/*" or "*/*"; default */* for requests; JSON, XML, form and text for responses
}

// Quantity is a number of bytes, written as a Kubernetes quantity: 65536,
// 64Ki, 1Mi, 64k.
type Quantity int64

// Mask names what is replaced at the gateway, before anything leaves it. Names
// match whatever their case, see package mirror/mask.
type Mask struct {
	Headers         []string   `yaml:"headers" json:"headers,omitempty"`                 // default authorization, proxy-authorization
	Cookies         []string   `yaml:"cookies" json:"cookies,omitempty"`                 // in cookie and set-cookie
	QueryParameters []string   `yaml:"queryParameters" json:"queryParameters,omitempty"` // default access_token (RFC 6750); of the path and of headers that hold URLs
	FormFields      []string   `yaml:"formFields" json:"formFields,omitempty"`           // of URL-encoded and multipart bodies
	JSONPaths       []string   `yaml:"jsonPaths" json:"jsonPaths,omitempty"`             // "$.a.b"; the last name is masked at any depth, never less
	Detectors       []Detector `yaml:"detectors" json:"detectors,omitempty"`
}

// JSONNames gives each JSON path's last name: masking goes by name, at any
// depth, so that a cut or malformed body cannot slip through.
func (m Mask) JSONNames() []string {
	var out []string
	for _, p := range m.JSONPaths {
		name := p[strings.LastIndexByte(p, '.')+1:]
		out = append(out, strings.TrimSuffix(name, "[*]"))
	}
	return out
}

// Detector finds sensitive values by their shape.
type Detector string

// DetectorCreditCard is 13 to 19 digits, with spaces or dashes, that satisfy
// the Luhn formula (ISO/IEC 7812-1).
const DetectorCreditCard Detector = "CreditCard"

// Detection is the node's part of a policy.
type Detection struct {
	Paranoia   int         `yaml:"paranoia" json:"paranoia"` // CRS paranoia level, 1 (default) to 4
	Exclusions []Exclusion `yaml:"exclusions" json:"exclusions,omitempty"`
}

// Exclusion silences one rule, for one target or for all.
type Exclusion struct {
	RuleID int    `yaml:"ruleId" json:"ruleId"`
	Target string `yaml:"target" json:"target,omitempty"` // "ARGS:q", "REQUEST_HEADERS:x-y", "REQUEST_COOKIES"; empty: every target
}

// Nodes names the analysis nodes' service.
type Nodes struct {
	Service string `yaml:"service" json:"service"` // default periscope-node; "name" or "name.namespace"
	Port    int    `yaml:"port" json:"port"`       // default 5050
}

// ID names the policy on the wire and in /debug: "namespace/name".
func (p *MirrorPolicy) ID() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

// NodeService names the service of the policy's analysis nodes: "name" is one
// of the policy's own namespace, "name.namespace" of any.
func (p *MirrorPolicy) NodeService() (namespace, name string) {
	name, namespace, qualified := strings.Cut(p.Spec.Nodes.Service, ".")
	if !qualified {
		namespace = p.Metadata.Namespace
	}
	return namespace, name
}
