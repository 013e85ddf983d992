package topology

import (
	"context"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/periscope-mesh/periscope/mirror"
)

// maxMachineSources bounds the watches of gateways' pods.
const maxMachineSources = 64

// machines are informers of gateways' pods, whole, by the labels that select
// them: metadata, which is all that is watched of a cluster's other pods, doesn't
// say where a pod runs.
type machines map[string]*source

// fill puts the machines of pods in, as far as they are known.
func (m machines) fill(pods []Pod) {
	known := map[ServiceRef]string{}
	for _, s := range m {
		s.whole = s.synced() // asked first: what comes now may be missed below
		for _, o := range s.informer.GetStore().List() {
			if p, ok := o.(*corev1.Pod); ok && p.Spec.NodeName != "" {
				known[ServiceRef{p.Namespace, p.Name}] = p.Spec.NodeName
			}
		}
	}
	for i, p := range pods {
		pods[i].Machine = known[ServiceRef{p.Namespace, p.Name}]
	}
}

// adjustMachines watches the pods of these gateways, and no others any more. It
// tells whether all of them were known when fill was last called.
func (s *sources) adjustMachines(ctx context.Context, gateways []mirror.Gateway) bool {
	wanted := podSelectors(gateways)
	var excess error
	if n := len(wanted); n > maxMachineSources {
		excess = fmt.Errorf("gateways' pods take %d selections; those beyond the first %d are not told which machine they run on", n, maxMachineSources)
		wanted = wanted[:maxMachineSources]
	}
	s.w.complain("gateway_pod_selections", excess)
	for selector, m := range s.machines {
		if !slices.Contains(wanted, selector) {
			m.stop()
			delete(s.machines, selector)
		}
	}
	all := true
	for _, selector := range wanted {
		m := s.machines[selector]
		if m == nil {
			if m = s.start(ctx, sourceMachines, podsOf(selector)); m == nil {
				continue // which has been told
			}
			s.machines[selector] = m
		}
		all = all && m.whole
	}
	return all
}

// podSelectors gives selections of pods, sorted, that have those of all gateways
// among them. The Gateways of the Gateway API have pods of their own each, and
// one label in common.
func podSelectors(gateways []mirror.Gateway) []string {
	out := map[string]bool{}
	for _, g := range gateways {
		if _, ok := g.Selector[gatewayNameLabel]; ok {
			out[gatewayNameLabel] = true
		} else {
			out[labels.FormatLabels(g.Selector)] = true
		}
	}
	return slices.Sorted(maps.Keys(out))
}

func podsOf(selector string) func(*sources) (cache.SharedIndexInformer, error) {
	return func(s *sources) (cache.SharedIndexInformer, error) {
		return coreinformers.NewFilteredPodInformer(s.w.clients.Kubernetes, metav1.NamespaceAll, 0, nil, func(o *metav1.ListOptions) {
			livePods(o)
			o.LabelSelector = selector
		}), nil
	}
}
