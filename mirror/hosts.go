package mirror

import (
	"fmt"
	"slices"

	"github.com/periscope-mesh/periscope/policy"
)

// maxExcept bounds the hosts of others that a limited policy leaves alone.
const maxExcept = 1024

// hostSet is of hosts in the form of policy.Match.Hosts.
type hostSet map[string]struct{}

func newHostSet(hosts []string) hostSet {
	s := make(hostSet, len(hosts))
	for _, h := range hosts {
		s[h] = struct{}{}
	}
	return s
}

func (s hostSet) has(host string) bool {
	_, ok := s[host]
	return ok
}

// covers tells whether some member stands for every host that host stands for.
func (s hostSet) covers(host string) bool { return s.closest(host) >= 0 }

// closest tells how closely the closest of the members that cover host names it,
// as the plugin does: the length of what is fixed, one more for a name without
// wildcard; -1 if none covers it.
func (s hostSet) closest(host string) int {
	switch {
	case !s.has(host):
	case host[0] == '*':
		return len(host) - 1
	default:
		return len(host) + 1
	}
	for i := range len(host) {
		if host[i] == '.' && s.has("*"+host[i:]) {
			return len(host) - i
		}
	}
	if s.has("*") {
		return 0
	}
	return -1
}

// overlap gives what a and b have in common.
func overlap(a, b []string) []string {
	inA, inB := newHostSet(a), newHostSet(b)
	var out []string
	for _, h := range a {
		if inB.covers(h) {
			out = append(out, h)
		}
	}
	for _, h := range b {
		if inA.covers(h) && !inA.has(h) {
			out = append(out, h)
		}
	}
	return out
}

// limit says to which hosts of g's traffic p is limited, but for those in
// except; hosts is nil where it is not. Whoever targets Gateways that share
// their workload with others must leave the others' traffic alone, and that is
// what Gateways tell apart: hosts. A host that another namespace's Gateway names
// more closely is that one's, as it is for Istio's routes.
//
// Who owns the workload, by its namespace, may have all of its traffic, and so
// may who names every Gateway there is of it.
func limit(p *policy.MirrorPolicy, g Gateway) (hosts, except []string, problem string) {
	if g.StandIn || len(p.Spec.TargetRefs) == 0 {
		return nil, nil, ""
	}
	owner := p.Metadata.Namespace == g.Namespace
	var named, foreign []string
	for _, t := range g.Targets {
		switch {
		case slices.ContainsFunc(p.Spec.TargetRefs, func(ref policy.TargetRef) bool { return t.is(ref, p.Metadata.Namespace) }):
			named, hosts = append(named, t.Name), append(hosts, t.Hosts...)
		case t.Namespace != p.Metadata.Namespace:
			foreign = append(foreign, t.Hosts...)
		}
	}
	other := slices.IndexFunc(g.Targets, func(t Target) bool {
		return t.Namespace != p.Metadata.Namespace || !slices.Contains(named, t.Name)
	})
	if other < 0 || owner && slices.Contains(hosts, "*") {
		return nil, nil, ""
	}
	slices.Sort(hosts)
	hosts = slices.Compact(hosts)
	gateway := fmt.Sprintf("Gateway %s/%s", p.Metadata.Namespace, named[0])
	sharer := fmt.Sprintf("Gateway %s/%s", g.Targets[other].Namespace, g.Targets[other].Name)
	switch {
	case len(hosts) == 0:
		return nil, nil, fmt.Sprintf("gateway %s: %s has no host that could be told from those of %s, which shares its pods; give it the hosts that it is for", g.ID(), gateway, sharer)
	case hosts[0] == "*":
		return nil, nil, fmt.Sprintf("gateway %s: %s takes every host and shares its pods with others, such as %s; give it the hosts that it is for, or put the policy into namespace %s",
			g.ID(), gateway, sharer, g.Namespace)
	case !owner:
		except = within(foreign, hosts)
	}
	switch s := (Settings{Match: p.Spec.Match, Hosts: hosts, Except: except}); {
	case len(except) > maxExcept:
		return nil, nil, fmt.Sprintf("gateway %s: the hosts of %s stand for %d of other namespaces' Gateways, more than %d; give it narrower ones", g.ID(), gateway, len(except), maxExcept)
	case len(s.reach(false)) == 0:
		return nil, nil, fmt.Sprintf("gateway %s: spec.match has no host of %s, which shares its pods with %s; its hosts are %s", g.ID(), gateway, sharer, someOf(hosts))
	}
	return hosts, except, ""
}

// within gives those of some hosts that a wildcard of others stands for.
func within(hosts, others []string) []string {
	set := newHostSet(others)
	slices.Sort(hosts)
	return slices.DeleteFunc(slices.Compact(hosts), func(h string) bool { return set.has(h) || !set.covers(h) })
}

// hostsOf gives the hosts that match holds for: for some paths, or for any.
func hostsOf(match []policy.Match, anyPath bool) []string {
	if len(match) == 0 {
		return []string{"*"}
	}
	var out []string
	for _, m := range match {
		switch {
		case anyPath && len(m.Paths) > 0 && !slices.Contains(m.Paths, policy.PathMatch{Type: policy.PathPrefix, Value: "/"}):
		case len(m.Hosts) == 0:
			return []string{"*"}
		default:
			out = append(out, m.Hosts...)
		}
	}
	return out
}

// reach gives the hosts that s may govern.
func (s Settings) reach(anyPath bool) []string {
	out := hostsOf(s.Match, anyPath)
	if s.Hosts != nil {
		out = overlap(out, s.Hosts)
	}
	return slices.DeleteFunc(out, s.leaves())
}

// leaves tells the hosts that s leaves to others, who name them more closely.
func (s Settings) leaves() func(host string) bool {
	hosts, except := newHostSet(s.Hosts), newHostSet(s.Except)
	return func(host string) bool { return except.closest(host) > hosts.closest(host) }
}

// taken tells which hosts of s the older policies of its gateway govern already,
// whatever the path: the policy that has the last of them, or a line for each
// that has some.
func taken(older []Settings, s Settings) (by string, some []string) {
	wanted, left, leaves := s.reach(false), s.reach(false), s.leaves()
	for _, o := range older {
		hosts := o.reach(true)
		has, lacks, torn := newHostSet(hosts), o.leaves(), newHostSet(wildcards(o.Except))
		left = slices.DeleteFunc(left, func(h string) bool { return has.covers(h) && !lacks(h) && !torn.has(h) })
		if len(left) == 0 {
			return o.PolicyID, nil
		}
		common := slices.DeleteFunc(overlap(wanted, hosts), func(h string) bool { return lacks(h) || leaves(h) })
		if len(common) > 0 {
			some = append(some, fmt.Sprintf("the older policy %s governs %s", o.PolicyID, someOf(common)))
		}
	}
	return "", some
}

// wildcards gives those that stand for one of hosts, among others.
func wildcards(hosts []string) []string {
	var out []string
	for _, h := range hosts {
		out = append(out, "*")
		for i := range len(h) {
			if h[i] == '.' {
				out = append(out, "*"+h[i:])
			}
		}
	}
	return out
}

// someOf names a few hosts.
func someOf(hosts []string) string {
	slices.Sort(hosts)
	const few = 3
	if len(hosts) <= few {
		return fmt.Sprint(hosts)
	}
	return fmt.Sprintf("%v and %d more", hosts[:few], len(hosts)-few)
}
