package mirror

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/periscope-mesh/periscope/policy"
)

const (
	// maxPolicies may govern one gateway, and maxSettingsBytes be what they say
	// together: the gateway copies that with each request, and goes through it.
	maxPolicies      = 32
	maxSettingsBytes = 256 << 10
)

// Compile makes the plan. Policies must be valid and come in order of
// precedence, the strongest first (policy/source orders them by age): of those
// that target a gateway the first that matches an exchange governs it. Where a
// policy is limited to a part of a gateway, see limit, others may have the rest.
// Nothing here fails; what can't be done is a problem of an attachment.
func Compile(policies []policy.MirrorPolicy, t Topology) Plan {
	gateways := slices.Clone(t.Gateways)
	slices.SortFunc(gateways, func(a, b Gateway) int { return cmp.Compare(a.ID(), b.ID()) })
	plan := Plan{Gateways: make([]GatewayPlan, len(gateways))}
	for i, g := range gateways {
		plan.Gateways[i].Gateway = g
		plan.Gateways[i].Settings = Settings{Gateway: g.ID(), Mode: policy.ModeOff}
	}
	for i := range policies {
		p := &policies[i]
		n := nodePolicy(p)
		plan.Nodes = append(plan.Nodes, n)
		plan.Attachments = append(plan.Attachments, attach(p, n.Revision, plan.Gateways, t.Nodes))
	}
	slices.SortFunc(plan.Nodes, func(a, b NodePolicy) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(plan.Attachments, func(a, b Attachment) int { return cmp.Compare(a.Policy, b.Policy) })
	preferLocal(&plan)
	plan.Revision = digest(plan)
	return plan
}

// attach gives p its part of the gateways that it targets.
func attach(p *policy.MirrorPolicy, revision string, gateways []GatewayPlan, services []NodeService) Attachment {
	a := Attachment{Policy: p.ID()}
	service, endpoints, found := resolve(p, services)
	switch {
	case !found:
		a.Problems = append(a.Problems, fmt.Sprintf("spec.nodes: no service %q with port %d is known; nothing is mirrored until it is", p.Spec.Nodes.Service, p.Spec.Nodes.Port))
	case len(endpoints) == 0:
		a.Problems = append(a.Problems, fmt.Sprintf("spec.nodes: service %q has no endpoint that is ready; nothing is mirrored until it has", p.Spec.Nodes.Service))
	}
	matched := make([]bool, max(1, len(p.Spec.TargetRefs)))
	for i := range gateways {
		g := &gateways[i]
		if !targets(p, g.Gateway, matched) {
			continue
		}
		s := settings(p, g.Gateway, revision)
		var problem string
		if s.Hosts, s.Except, problem = limit(p, g.Gateway); problem != "" {
			a.Problems = append(a.Problems, problem)
			continue
		}
		if s.Hosts != nil && !found {
			continue // it would keep others of the gateway from their nodes
		}
		problems, ok := g.add(s, service, endpoints)
		a.Problems = append(a.Problems, problems...)
		if ok {
			a.Gateways = append(a.Gateways, g.Gateway.ID())
		}
	}
	for i, ok := range matched {
		switch {
		case ok:
		case len(p.Spec.TargetRefs) > 0:
			ref := p.Spec.TargetRefs[i]
			a.Problems = append(a.Problems, fmt.Sprintf("spec.targetRefs[%d]: no %s %q of %s in namespace %s", i, ref.Kind, ref.Name, ref.Group, p.Metadata.Namespace))
		case p.Spec.Selector != nil:
			a.Problems = append(a.Problems, fmt.Sprintf("spec.selector: no gateway in namespace %s carries these labels", p.Metadata.Namespace))
		default:
			a.Problems = append(a.Problems, fmt.Sprintf("no gateway in namespace %s", p.Metadata.Namespace))
		}
	}
	return a
}

// add puts s behind the gateway's other policies, if there is room for it and
// something left for it to govern. Problems are also what it governs less than
// it matches.
func (g *GatewayPlan) add(s Settings, service string, endpoints []Endpoint) (problems []string, ok bool) {
	id, older := g.Gateway.ID(), g.Policies()
	next := s
	if len(older) > 0 {
		next = g.Settings
		next.Next = append(older[1:len(older):len(older)], s)
	}
	switch { // what is cheap to tell first: there may be many policies
	case len(older) > 0 && service != g.Nodes:
		return []string{fmt.Sprintf("gateway %s mirrors to the nodes of the older policy %s: name the same spec.nodes", id, g.Policy)}, false
	case len(older) > 0 && s.Transport != g.Settings.Transport:
		return []string{fmt.Sprintf("gateway %s mirrors by the transport %s of the older policy %s: write the same spec.transport", id, cmp.Or(g.Settings.Transport, policy.TransportLua), g.Policy)}, false
	case len(older) == maxPolicies:
		return []string{fmt.Sprintf("gateway %s has %d older policies, and takes no more", id, maxPolicies)}, false
	case (len(older) > 0 || s.Hosts != nil) && len(next.Encode()) > maxSettingsBytes:
		return []string{fmt.Sprintf("gateway %s takes no more than %d bytes of settings: the policy and the %d older ones say more", id, maxSettingsBytes, len(older))}, false
	}
	by, some := taken(older, s)
	if by != "" {
		return []string{fmt.Sprintf("gateway %s is governed by the older policy %s", id, by)}, false
	}
	if len(older) == 0 {
		g.Policy, g.Nodes, g.Endpoints = s.PolicyID, service, endpoints
	}
	g.Settings = next
	for _, line := range some {
		problems = append(problems, fmt.Sprintf("gateway %s: %s", id, line))
	}
	return problems, true
}

// targets tells whether p wants g, and marks the targetRefs that led to it (or
// the one mark of a policy without any).
func targets(p *policy.MirrorPolicy, g Gateway, matched []bool) bool {
	if g.StandIn {
		for i := range matched {
			matched[i] = true
		}
		return true
	}
	if len(p.Spec.TargetRefs) > 0 {
		hit := false
		for i, ref := range p.Spec.TargetRefs {
			if implements(g, ref, p.Metadata.Namespace) {
				matched[i], hit = true, true
			}
		}
		return hit
	}
	if g.Namespace != p.Metadata.Namespace {
		return false
	}
	if s := p.Spec.Selector; s != nil {
		for k, v := range s.MatchLabels {
			if g.Labels[k] != v {
				return false
			}
		}
	}
	matched[0] = true
	return true
}

// implements tells whether g is the workload behind a Gateway resource.
func implements(g Gateway, ref policy.TargetRef, namespace string) bool {
	if len(g.Targets) == 0 {
		return g.Namespace == namespace && g.Name == ref.Name
	}
	return slices.ContainsFunc(g.Targets, func(t Target) bool { return t.is(ref, namespace) })
}

// resolve gives p's node service and its endpoints; no name for a stand-in.
func resolve(p *policy.MirrorPolicy, services []NodeService) (service string, endpoints []Endpoint, found bool) {
	namespace, name := p.NodeService()
	service = fmt.Sprintf("%s/%s:%d", namespace, name, p.Spec.Nodes.Port)
	for _, s := range services {
		if s.StandIn {
			return "", s.Endpoints, true
		}
		if s.Name == name && s.Namespace == namespace && (s.Port == 0 || s.Port == p.Spec.Nodes.Port) {
			return service, s.Endpoints, true
		}
	}
	return service, nil, false
}

func settings(p *policy.MirrorPolicy, g Gateway, revision string) Settings {
	s := Settings{
		Gateway:   g.ID(),
		PolicyID:  p.ID(),
		PolicyRev: revision,
		SharePPM:  int(math.Round(p.Spec.Sampling.Percent * 1e4)),
		MinPPM:    int(math.Round(p.Spec.Sampling.Adaptive.MinPercent * 1e4)),
		ByPod:     g.Selector != nil,
		Mode:      p.Spec.Mode,
		Match:     p.Spec.Match,
		Exclude:   p.Spec.Exclude,
		Always:    p.Spec.Sampling.Always,
		Session:   p.Spec.Sampling.Session,
		Request:   p.Spec.Body.Request,
		Response:  p.Spec.Body.Response,
		Mask:      p.Spec.Mask,
	}
	if p.Spec.Transport != policy.TransportLua {
		s.Transport = p.Spec.Transport
	}
	return s
}

// policyRevision is of what gateways and nodes do by p, whichever gateways
// those are: another policy's edit must leave it as it is, for each new
// revision is a push to the gateways.
func policyRevision(p *policy.MirrorPolicy, n NodePolicy) string {
	s := settings(p, Gateway{}, "")
	s.Gateway = ""
	return digest(struct {
		Node     NodePolicy
		Settings Settings
	}{n, s})
}

func nodePolicy(p *policy.MirrorPolicy) NodePolicy {
	n := NodePolicy{
		ID:          p.ID(),
		Tenant:      p.Spec.Tenant,
		Application: p.Spec.Application,
		Mode:        p.Spec.Mode,
		Paranoia:    p.Spec.Detection.Paranoia,
		Exclusions:  p.Spec.Detection.Exclusions,
	}
	n.Revision = policyRevision(p, n)
	return n
}

// digest is of a value that doesn't hold its own revision yet. JSON of these
// types cannot fail: no channels, no functions, no infinities (policy refuses
// them).
func digest(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("mirror: marshal %T: %v", v, err))
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:6])
}
