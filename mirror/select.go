package mirror

import "github.com/periscope-mesh/periscope/policy"

// Selector tells which of a gateway's policies governs an exchange, as the
// plugin does.
type Selector struct {
	policies []governor
}

type governor struct {
	settings      Settings
	match         policy.Spec
	exclude       policy.Spec
	hosts, except hostSet
}

// NewSelector makes the selector of a gateway's settings.
func NewSelector(s Settings) *Selector {
	out := &Selector{}
	for _, p := range append([]Settings{s}, s.Next...) {
		p.Next = nil
		g := governor{settings: p, match: policy.Spec{Match: p.Match}, exclude: policy.Spec{Exclude: p.Exclude}, except: newHostSet(p.Except)}
		if p.Hosts != nil {
			g.hosts = newHostSet(p.Hosts)
		}
		out.policies = append(out.policies, g)
	}
	return out
}

// Select gives the settings that govern an exchange, and whether they exclude
// it; nil: none do. They are shared: don't change them.
func (s *Selector) Select(host, path string) (governs *Settings, excluded bool) {
	clean := policy.CleanHost(host)
	for i := range s.policies {
		g := &s.policies[i]
		if g.hosts != nil {
			if c := g.hosts.closest(clean); c < 0 || g.except.closest(clean) > c {
				continue
			}
		}
		if policy.Selects(&g.match, host, path) {
			return &g.settings, !policy.Selects(&g.exclude, host, path)
		}
	}
	return nil, false
}

// Policies gives the settings of each policy, by precedence.
func (s *Selector) Policies() []*Settings {
	out := make([]*Settings, len(s.policies))
	for i := range s.policies {
		out[i] = &s.policies[i].settings
	}
	return out
}
