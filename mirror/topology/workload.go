package topology

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/periscope-mesh/periscope/mirror"
)

const maxNameBytes = 63

// group is a workload in the making.
type group struct {
	namespace  string
	pods       []int
	selections []*selection
}

// workloads groups the pods that Gateways stand for.
func (r *resolver) workloads() []mirror.Gateway {
	groups := r.groups()
	gateways := make([]mirror.Gateway, 0, len(groups))
	for _, g := range groups {
		if w, ok := r.workload(g); ok {
			gateways = append(gateways, w)
		}
	}
	nameApart(gateways)
	slices.SortFunc(gateways, func(a, b mirror.Gateway) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return gateways
}

// groups puts pods together that have the namespace and the Gateways in
// common, in the order of their first pods.
func (r *resolver) groups() []*group {
	of := make([][]*selection, len(r.pods))
	for _, s := range r.ordered {
		for _, p := range s.pods {
			of[p] = append(of[p], s)
		}
	}
	byKey := map[string]*group{}
	var out []*group
	var key []byte
	for p, selections := range of { // nothing for most pods of a cluster
		if len(selections) == 0 {
			continue
		}
		key = append(key[:0], r.pods[p].Namespace...)
		for _, s := range selections {
			key = fmt.Appendf(key, "\x00%d", s.id)
		}
		g := byKey[string(key)]
		if g == nil {
			g = &group{namespace: r.pods[p].Namespace, selections: selections}
			byKey[string(key)] = g
			out = append(out, g)
		}
		g.pods = append(g.pods, p)
	}
	return out
}

// workload makes a gateway of a group, if labels tell its pods from others.
func (r *resolver) workload(g *group) (mirror.Gateway, bool) {
	w := mirror.Gateway{Namespace: g.namespace, Labels: r.common(g)}
	for _, p := range g.pods {
		w.Pods = append(w.Pods, r.pods[p].Name)
		if m := r.pods[p].Machine; m != "" {
			w.Machines = append(w.Machines, m)
		}
	}
	slices.Sort(w.Machines)
	w.Machines = slices.Compact(w.Machines)
	for _, s := range g.selections {
		for _, c := range s.claims {
			w.Targets = append(w.Targets, c.target)
		}
	}
	slices.SortFunc(w.Targets, compareTargets)
	w.Targets = slices.CompactFunc(w.Targets, func(a, b mirror.Target) bool { return compareTargets(a, b) == 0 })
	selector, ok := r.selector(g, w.Labels)
	if !ok {
		for _, t := range w.Targets {
			r.problem(t, "no labels tell its pods in namespace %s (%s, %d in all) from those of other gateways: give them a label of their own",
				g.namespace, w.Pods[0], len(w.Pods))
		}
		return w, false
	}
	w.Selector = selector
	w.Name = r.name(g, w)
	return w, true
}

// selector gives labels that pick exactly the group's pods in its namespace:
// those that the Gateways select by, so that it stays as pods come and go, or
// with them all that the pods have in common.
func (r *resolver) selector(g *group, common map[string]string) (map[string]string, bool) {
	labels := map[string]string{}
	for _, s := range g.selections {
		maps.Copy(labels, s.labels)
	}
	if r.exact(g, labels) {
		return labels, true
	}
	for k, v := range common {
		if !volatile(k) {
			labels[k] = v
		}
	}
	return labels, r.exact(g, labels)
}

// exact tells whether labels, which hold those of the group's selections, pick
// its pods and no others of the namespace. Others could only be pods of those
// very selections.
func (r *resolver) exact(g *group, labels map[string]string) bool {
	among := g.selections[0].pods
	for _, s := range g.selections[1:] {
		if len(s.pods) < len(among) {
			among = s.pods
		}
	}
	n := 0
	for _, i := range among {
		if p := &r.pods[i]; p.Namespace == g.namespace && carries(p.Labels, labels) {
			n++
		}
	}
	return n == len(g.pods) // each of them carries the labels
}

// volatile labels change with each roll-out, or name one pod.
func volatile(key string) bool {
	switch key {
	case "pod-template-hash", "controller-revision-hash", "pod-template-generation",
		"statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index":
		return true
	}
	return false
}

// common gives the labels that all pods of a group carry.
func (r *resolver) common(g *group) map[string]string {
	labels := maps.Clone(r.pods[g.pods[0]].Labels)
	for _, p := range g.pods[1:] {
		maps.DeleteFunc(labels, func(k, v string) bool {
			have, ok := r.pods[p].Labels[k]
			return !ok || have != v
		})
	}
	return labels
}

// name gives what people call the workload, as far as labels tell. It doesn't
// depend on how many pods there are at the moment.
func (r *resolver) name(g *group, w mirror.Gateway) string {
	for _, k := range []string{gatewayNameLabel, "app", "istio", "app.kubernetes.io/name"} {
		if name := cleanName(w.Labels[k]); name != "" {
			return name
		}
	}
	for _, p := range g.pods {
		if name := cleanName(r.pods[p].Owner); name != "" {
			return name
		}
	}
	return cmp.Or(cleanName(w.Targets[0].Name), "gateway")
}

// cleanName makes a DNS label of a label's value: names of resources derive
// from it.
func cleanName(s string) string {
	out := []byte(clip(s, maxNameBytes))
	for i, c := range out {
		switch {
		case 'A' <= c && c <= 'Z':
			out[i] = c + 'a' - 'A'
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		default:
			out[i] = '-'
		}
	}
	return strings.Trim(string(out), "-")
}

// nameApart gives workloads of one namespace different names. Of several with
// the same, the one with the fewest Targets keeps it, and the others get a
// digest of their selector behind it, so that who comes late seldom renames
// who was there.
func nameApart(gateways []mirror.Gateway) {
	byID := map[string][]*mirror.Gateway{}
	for i := range gateways {
		g := &gateways[i]
		byID[g.ID()] = append(byID[g.ID()], g)
	}
	for _, same := range byID {
		slices.SortFunc(same, func(a, b *mirror.Gateway) int {
			return cmp.Or(cmp.Compare(len(a.Targets), len(b.Targets)), cmp.Compare(digest(a), digest(b)))
		})
		for _, g := range same[1:] {
			suffix := "-" + digest(g)
			g.Name = strings.TrimRight(g.Name[:min(len(g.Name), maxNameBytes-len(suffix))], "-") + suffix
		}
	}
}

// digest is of what tells a workload from others: its selector is its own.
func digest(g *mirror.Gateway) string {
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(g.Selector)) {
		fmt.Fprintf(h, "%d:%s%d:%s", len(k), k, len(g.Selector[k]), g.Selector[k])
	}
	return hex.EncodeToString(h.Sum(nil)[:4])
}
