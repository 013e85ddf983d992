package istiod

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Stage is how far a resource, or a gateway's configuration, has come.
type Stage string

const (
	Refused      Stage = "refused"      // by istiod's store or by Envoy: the reason says
	Unknown      Stage = "unknown"      // nobody that we may ask can tell
	Pending      Stage = "pending"      // served; istiod doesn't have it yet
	Accepted     Stage = "accepted"     // istiod has it
	Pushed       Stage = "pushed"       // istiod has sent it to Envoy
	Acknowledged Stage = "acknowledged" // Envoy has it in force
)

// rank orders stages: of several, the lowest is that of the whole.
func (s Stage) rank() int {
	return slices.Index([]Stage{Refused, Unknown, Pending, Accepted, Pushed, Acknowledged}, s)
}

const (
	// patience is how long istiod may be without a version that we serve
	// before it counts as refused: it never says that it refuses one.
	patience = 10 * time.Second
	// settle is how long an istiod must have had a version, with nothing left
	// to acknowledge, before pushes that it made before we looked count. It
	// delays a push by 10 s at most.
	settle = 30 * time.Second
	// hearsay is how old a push must be before istiod's word of an error counts
	// against it: the error may be of an earlier push, until Envoy replies.
	hearsay = skew + 3*time.Second
	// skew is how far istiod's clock may seem to be off: its Date header has
	// whole seconds.
	skew = 2 * time.Second

	maxReasonBytes = 1 << 10
)

// The types that an EnvoyFilter may change.
const (
	TypeListener        = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeCluster         = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	TypeRoute           = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	TypeEndpoint        = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	TypeExtensionConfig = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
)

// Served is what istiods are served, and for which gateways.
type Served struct {
	Serial    uint64              // of this state of it, for State
	Resources map[string]Resource // by Key
	Gateways  []Gateway
}

// Key names a resource: "EnvoyFilter/namespace/name".
func Key(kind, namespace, name string) string { return kind + "/" + namespace + "/" + name }

// Resource is one that istiods are served.
type Resource struct {
	Version string    // its metadata's
	Since   time.Time // when this version was served first; zero: long ago
	// Types are the type URLs of the xDS resources that it changes; by default
	// listeners, clusters and extension configs.
	Types []string
}

// Gateway is a workload and the resources that are for it.
type Gateway struct {
	ID        string // "namespace/name"
	Policy    string // that governs it
	Namespace string // its pods'
	Pods      []string
	Resources []string // keys of Served.Resources
}

// Reading is what one istiod said. It is never changed once made.
type Reading struct {
	Istiod string    // its base URL
	At     time.Time // when it was asked
	Ahead  time.Duration

	// ConfigProblem and SyncProblem say why the one or the other isn't known.
	ConfigProblem, SyncProblem string

	Held    map[string]Held  // our resources in its store, by key
	Proxies map[string]Proxy // gateways connected to it, by "pod.namespace"
}

// Held is a resource as an istiod's store has it.
type Held struct {
	Version string
	Since   time.Time // when this version was first seen there
	// Arrived tells that the istiod was seen without it before; otherwise it
	// may have had it, and pushed it, long before we looked.
	Arrived bool
	// Before is what proxies had been sent when they can't have had it yet.
	Before map[string]Proxy
}

// Proxy is what a gateway was sent and what it replied, by type URL.
type Proxy map[string]Exchange

// Exchange is the newest push of one type to one proxy.
type Exchange struct {
	Sent   string // nonce
	Acked  string // nonce last acknowledged
	SentAt time.Time
	Error  string // Envoy's, of this push or one before, until it acknowledges one
}

// Status says how far something has come.
type Status struct {
	Resource string `json:"resource,omitempty"` // key: one resource at one istiod
	Gateway  string `json:"gateway,omitempty"`
	Policy   string `json:"policy,omitempty"`
	Pod      string `json:"pod,omitempty"`    // one of the gateway's
	Istiod   string `json:"istiod,omitempty"` // that told
	Stage    Stage  `json:"stage"`
	Reason   string `json:"reason,omitempty"`
}

// Verdict is what follows from readings.
type Verdict struct {
	Resources []Status `json:"resources"` // of each resource at each istiod
	Pods      []Status `json:"pods"`      // of each gateway's pod, at the istiod that it is connected to
	Gateways  []Status `json:"gateways"`  // each as far as the last of its pods
}

// Judge says how far what is served has come. Nothing counts as done without
// evidence: a push counts only if it was made after istiod had the resource,
// an acknowledgement only if it is of the last push of each type concerned,
// and what can't be read is unknown. unlisted says why there may be istiods
// without a reading; empty: there are none.
func Judge(served Served, readings []Reading, unlisted string) Verdict {
	j := judge{served: served, unlisted: unlisted, readings: slices.Clone(readings), held: map[string][]Status{}}
	slices.SortFunc(j.readings, func(a, b Reading) int { return cmp.Compare(a.Istiod, b.Istiod) })
	var v Verdict
	for _, key := range slices.Sorted(maps.Keys(served.Resources)) {
		for i := range j.readings {
			s := resource(key, served.Resources[key], &j.readings[i])
			j.held[key] = append(j.held[key], s)
			v.Resources = append(v.Resources, s)
		}
	}
	gateways := slices.Clone(served.Gateways)
	slices.SortFunc(gateways, func(a, b Gateway) int { return cmp.Compare(a.ID, b.ID) })
	for i := range gateways {
		g := &gateways[i]
		if len(g.Resources) == 0 {
			continue // nothing is for it
		}
		pods := j.pods(g)
		v.Pods = append(v.Pods, pods...)
		v.Gateways = append(v.Gateways, j.gateway(g, pods))
	}
	return v
}

type judge struct {
	served   Served
	readings []Reading
	unlisted string
	held     map[string][]Status // a resource's, one for each reading
}

// resource compares one resource with one istiod's store.
func resource(key string, want Resource, r *Reading) Status {
	s := Status{Resource: key, Istiod: r.Istiod}
	have, ok := r.Held[key]
	late := r.At.Sub(want.Since) >= patience
	switch {
	case r.ConfigProblem != "":
		s.Stage, s.Reason = Unknown, r.ConfigProblem
	case ok && have.Version == want.Version:
		s.Stage = Accepted
	case !late && ok:
		s.Stage, s.Reason = Pending, fmt.Sprintf("istiod has version %s, not yet %s", clip(have.Version), want.Version)
	case !late:
		s.Stage, s.Reason = Pending, "istiod doesn't have it yet"
	case ok:
		s.Stage, s.Reason = Refused, fmt.Sprintf("istiod keeps version %s, not %s: it finds the new one invalid (its log says why), or takes nothing from us", clip(have.Version), want.Version)
	default:
		s.Stage, s.Reason = Refused, "istiod doesn't have it: it finds it invalid (its log says why), or takes nothing from us"
	}
	return s
}

// pods tells of each pod what the istiod says that it is connected to. During
// a reconnect two may claim it: the one that has sent it more recently counts.
func (j *judge) pods(g *Gateway) []Status {
	out := make([]Status, 0, len(g.Pods))
	for _, pod := range slices.Sorted(slices.Values(g.Pods)) {
		s := Status{Gateway: g.ID, Policy: g.Policy, Pod: pod, Stage: Unknown}
		id := pod + "." + g.Namespace
		best := -1
		var newest time.Time
		for i := range j.readings {
			p, ok := j.readings[i].Proxies[id]
			if !ok {
				continue
			}
			if at := p.newest(); best < 0 || at.After(newest) {
				best, newest = i, at
			}
		}
		if best < 0 {
			s.Reason = j.absent()
			out = append(out, s)
			continue
		}
		s.Istiod = j.readings[best].Istiod
		s.Stage, s.Reason = j.pod(g, id, best)
		out = append(out, s)
	}
	return out
}

func (p Proxy) newest() (at time.Time) {
	for _, e := range p {
		if e.SentAt.After(at) {
			at = e.SentAt
		}
	}
	return at
}

// absent says why nothing is known of a pod.
func (j *judge) absent() string {
	var silent []string
	for _, r := range j.readings {
		if r.SyncProblem != "" {
			silent = append(silent, r.Istiod+": "+r.SyncProblem)
		}
	}
	switch {
	case j.unlisted != "":
		return clip("not every istiod is known: " + j.unlisted)
	case len(j.readings) == 0:
		return "no istiod is known to ask"
	case len(silent) > 0:
		return clip("it may be connected to an istiod that doesn't tell: " + strings.Join(silent, "; "))
	}
	return "it is connected to none of the istiods that were asked"
}

// pod is as far as the least advanced of the gateway's resources.
func (j *judge) pod(g *Gateway, id string, reading int) (Stage, string) {
	r := &j.readings[reading]
	stage, reason := Acknowledged, ""
	for _, key := range g.Resources {
		got, why := Unknown, "nothing of that name is served"
		if want, ok := j.served.Resources[key]; ok {
			got, why = j.held[key][reading].Stage, j.held[key][reading].Reason
			if got == Accepted {
				got, why = push(want, r, r.Held[key], id)
			}
		}
		if got.rank() < stage.rank() {
			stage, reason = got, ""
			if why != "" {
				reason = clip(key + ": " + why)
			}
		}
	}
	return stage, reason
}

// push tells how far a resource that istiod has came at one proxy.
func push(want Resource, r *Reading, have Held, id string) (Stage, string) {
	types := want.Types
	if len(types) == 0 {
		types = []string{TypeListener, TypeCluster, TypeExtensionConfig}
	}
	stage, reason := Acknowledged, ""
	for _, typeURL := range types {
		e := r.Proxies[id][typeURL]
		got, why := Pushed, ""
		switch {
		case e.Sent == "":
			got, why = Accepted, "istiod has sent the gateway no "+short(typeURL)+" yet"
		case !carries(e, want, r, have, have.Before[id][typeURL]):
			got, why = Accepted, "istiod has sent the gateway no "+short(typeURL)+" since it has this version"
		case e.Acked == e.Sent:
			got = Acknowledged
		case e.Error != "" && r.At.Add(r.Ahead).Sub(e.SentAt) < hearsay:
			why = "Envoy refused this " + short(typeURL) + " or the one before: " + e.Error
		case e.Error != "":
			got, why = Refused, "Envoy refuses "+short(typeURL)+": "+e.Error
		}
		if got.rank() < stage.rank() {
			stage, reason = got, why
		}
	}
	return stage, reason
}

// carries tells whether a push was made when istiod had the version.
func carries(e Exchange, want Resource, r *Reading, have Held, before Exchange) bool {
	if e.Sent == before.Sent { // made before, as far as we know
		return !have.Arrived && r.At.Sub(have.Since) >= settle
	}
	return want.Since.IsZero() || e.SentAt.IsZero() || !e.SentAt.Before(want.Since.Add(r.Ahead-skew))
}

// gateway is as far as the least advanced of its pods.
func (j *judge) gateway(g *Gateway, pods []Status) Status {
	s := Status{Gateway: g.ID, Policy: g.Policy, Stage: Acknowledged}
	for _, p := range pods {
		if p.Stage.rank() < s.Stage.rank() {
			s.Stage, s.Istiod, s.Pod, s.Reason = p.Stage, p.Istiod, p.Pod, p.Reason
		}
	}
	if len(pods) > 0 {
		return s
	}
	if j.unlisted != "" || len(j.readings) == 0 {
		s.Stage, s.Reason = Unknown, j.absent()
		return s
	}
	s.Stage, s.Reason = Accepted, "the gateway has no pods"
	for _, key := range g.Resources {
		statuses := j.held[key]
		if len(statuses) == 0 {
			s.Stage, s.Reason = Unknown, clip(key+": nothing of that name is served")
		}
		for _, h := range statuses {
			if h.Stage.rank() < s.Stage.rank() {
				s.Stage, s.Istiod, s.Reason = h.Stage, h.Istiod, clip(key+": "+h.Reason)
			}
		}
	}
	return s
}

func short(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

func clip(s string) string {
	if len(s) > maxReasonBytes {
		s = s[:maxReasonBytes-3] + "..."
	}
	return strings.ToValidUTF8(s, "")
}
