package policy

import (
	"cmp"
	"fmt"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

// Bounds on what the control plane may send: far above any real plan's, and
// low enough that eight sets fit into memory.
const (
	maxSetBytes    = 16 << 20
	maxPolicies    = 10_000
	maxExclusions  = 1_000 // a policy
	maxNameBytes   = 512   // ids, tenants, applications, revisions
	maxTargetBytes = 512
	maxGateways    = 10_000
)

// decodeSet parses and checks a set; one unfit policy makes the whole unfit, so
// that a revision is never half known.
func decodeSet(raw []byte) (*revision, error) {
	if len(raw) > maxSetBytes {
		return nil, fmt.Errorf("the set has %d bytes, more than %d", len(raw), maxSetBytes)
	}
	set := &nodev1.NodePolicySet{}
	if err := proto.Unmarshal(raw, set); err != nil {
		return nil, fmt.Errorf("not a NodePolicySet: %w", err)
	}
	if err := checkName("revision", set.GetRevision(), true); err != nil {
		return nil, err
	}
	if n := len(set.GetPolicies()); n > maxPolicies {
		return nil, fmt.Errorf("the set has %d policies, more than %d", n, maxPolicies)
	}
	r := &revision{name: set.GetRevision(), policies: make(map[string]Policy, len(set.GetPolicies()))}
	for i, m := range set.GetPolicies() {
		p, err := decodePolicy(m)
		if err != nil {
			return nil, fmt.Errorf("policy %d: %w", i, err)
		}
		p.Revision = cmp.Or(p.Revision, r.name)
		if _, ok := r.policies[p.ID]; ok {
			return nil, fmt.Errorf("policy %d: another one has the id %q", i, p.ID)
		}
		r.policies[p.ID] = p
	}
	return r, r.takeGateways(set.GetGateways())
}

func (r *revision) takeGateways(list []*nodev1.GatewaySettings) error {
	if n := len(list); n > maxGateways {
		return fmt.Errorf("the set has settings of %d gateways, more than %d", n, maxGateways)
	}
	r.gateways = make(map[string]Settings, len(list))
	for i, g := range list {
		if err := checkName("gateway", g.GetGateway(), true); err != nil {
			return fmt.Errorf("gateway %d: %w", i, err)
		}
		if err := checkName("revision", g.GetRevision(), true); err != nil {
			return fmt.Errorf("gateway %d: %w", i, err)
		}
		if len(g.GetSettings()) == 0 {
			return fmt.Errorf("gateway %d: it has no settings", i)
		}
		if _, ok := r.gateways[g.GetGateway()]; ok {
			return fmt.Errorf("gateway %d: another one has the id %q", i, g.GetGateway())
		}
		r.gateways[g.GetGateway()] = Settings{Revision: g.GetRevision(), Encoded: g.GetSettings()}
	}
	return nil
}

func decodePolicy(m *nodev1.NodePolicy) (Policy, error) {
	p := Policy{ID: m.GetId(), Revision: m.GetRevision(), Tenant: m.GetTenant(), Application: m.GetApplication(), Paranoia: int(m.GetParanoia())}
	if err := checkName("id", p.ID, true); err != nil {
		return p, err
	}
	if err := checkName("policy's revision", p.Revision, false); err != nil {
		return p, err
	}
	if err := checkName("tenant", p.Tenant, false); err != nil {
		return p, err
	}
	if err := checkName("application", p.Application, false); err != nil {
		return p, err
	}
	switch m.GetMode() {
	case nodev1.Mode_MODE_OFF:
		p.Mode = ModeOff
	case nodev1.Mode_MODE_MONITOR:
		p.Mode = ModeMonitor
	case nodev1.Mode_MODE_ENFORCE:
		p.Mode = ModeEnforce
	default:
		return p, fmt.Errorf("%q: unknown mode %d", p.ID, m.GetMode())
	}
	if p.Paranoia < 1 || p.Paranoia > 4 {
		return p, fmt.Errorf("%q: paranoia %d isn't in 1 to 4", p.ID, p.Paranoia)
	}
	if n := len(m.GetExclusions()); n > maxExclusions {
		return p, fmt.Errorf("%q: %d exclusions, more than %d", p.ID, n, maxExclusions)
	}
	for _, e := range m.GetExclusions() {
		if e.GetRuleId() <= 0 {
			return p, fmt.Errorf("%q: excluded rule id %d isn't positive", p.ID, e.GetRuleId())
		}
		if len(e.GetTarget()) > maxTargetBytes {
			return p, fmt.Errorf("%q: an exclusion's target is longer than %d bytes", p.ID, maxTargetBytes)
		}
		p.Exclusions = append(p.Exclusions, Exclusion{RuleID: int(e.GetRuleId()), Target: e.GetTarget()})
	}
	return p, nil
}

func checkName(what, s string, required bool) error {
	switch {
	case required && s == "":
		return fmt.Errorf("the %s is empty", what)
	case len(s) > maxNameBytes:
		return fmt.Errorf("the %s is longer than %d bytes", what, maxNameBytes)
	case !utf8.ValidString(s):
		return fmt.Errorf("the %s isn't UTF-8", what)
	}
	return nil
}
