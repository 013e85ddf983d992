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

// Compile makes the plan. Policies must be valid and come in order of
// precedence, the strongest first (policy/source orders them by age): the
// first that targets a gateway governs it, the others' attachments say so.
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
	plan.Revision = digest(plan)
	return plan
}

// attach gives p the gateways that it targets and nobody stronger governs.
func attach(p *policy.MirrorPolicy, revision string, gateways []GatewayPlan, services []NodeService) Attachment {
	a := Attachment{Policy: p.ID()}
	endpoints, found := resolve(p, services)
	if !found {
		a.Problems = append(a.Problems, fmt.Sprintf("spec.nodes: no service %q with port %d is known; nothing is mirrored until it is", p.Spec.Nodes.Service, p.Spec.Nodes.Port))
	}
	matched := make([]bool, max(1, len(p.Spec.TargetRefs)))
	for i := range gateways {
		g := &gateways[i]
		if !targets(p, g.Gateway, matched) {
			continue
		}
		if g.Policy != "" {
			a.Problems = append(a.Problems, fmt.Sprintf("gateway %s is governed by the older policy %s", g.Gateway.ID(), g.Policy))
			continue
		}
		g.Policy, g.Endpoints, g.Settings = p.ID(), endpoints, settings(p, g.Gateway, revision)
		a.Gateways = append(a.Gateways, g.Gateway.ID())
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
	return slices.Contains(g.Targets, Target{Group: ref.Group, Namespace: namespace, Name: ref.Name})
}

func resolve(p *policy.MirrorPolicy, services []NodeService) ([]Endpoint, bool) {
	namespace, name := p.NodeService()
	for _, s := range services {
		if s.StandIn || s.Name == name && s.Namespace == namespace && (s.Port == 0 || s.Port == p.Spec.Nodes.Port) {
			return s.Endpoints, true
		}
	}
	return nil, false
}

func settings(p *policy.MirrorPolicy, g Gateway, revision string) Settings {
	return Settings{
		Gateway:   g.ID(),
		PolicyID:  p.ID(),
		PolicyRev: revision,
		SharePPM:  int(math.Round(p.Spec.Sampling.Percent * 1e4)),
		Mode:      p.Spec.Mode,
		Match:     p.Spec.Match,
		Exclude:   p.Spec.Exclude,
		Always:    p.Spec.Sampling.Always,
		Request:   p.Spec.Body.Request,
		Response:  p.Spec.Body.Response,
		Mask:      p.Spec.Mask,
	}
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
