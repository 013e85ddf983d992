package topology

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	labelselection "k8s.io/apimachinery/pkg/selection"
	coreinformers "k8s.io/client-go/informers/core/v1"
	discoveryinformers "k8s.io/client-go/informers/discovery/v1"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/tools/cache"

	istioinformers "istio.io/client-go/pkg/informers/externalversions/networking/v1"
	gatewayinformers "sigs.k8s.io/gateway-api/pkg/client/informers/externalversions/apis/v1"
)

// Names of the sources, for logs and metrics.
const (
	sourceIstio      = "istio_gateways"
	sourceGatewayAPI = "api_gateways"
	sourcePods       = "pods"
	sourceServices   = "services"
	sourceSlices     = "endpoint_slices"
	sourceMachines   = "gateway_pods"
)

// strikes is how often in turn the API must deny a kind before what is known of
// it is given up: a server that starts may not know its kinds yet.
const strikes = 2

const (
	discoverTimeout = 10 * time.Second
	retryDiscover   = time.Second // after an error
)

// sources are the informers that a topology is made of. They belong to one
// goroutine, but for the informers' own.
type sources struct {
	w    *Watcher
	kind map[string]*kind

	refs   []ServiceRef // whose slices are watched, by next if there is one
	slices *source
	next   *source // takes over once it is synced

	machines machines
}

// kind is a source that the API may lack.
type kind struct {
	group string // and version
	name  string // plural
	start func(*sources) (cache.SharedIndexInformer, error)

	known  bool      // the API has said whether it has the kind
	denied int       // times in turn that it has said no
	probed bool      // since the last tick
	retry  time.Time // not to be asked for before
	source *source
}

// source is a running informer.
type source struct {
	informer cache.SharedIndexInformer
	synced   func() bool
	whole    bool // of machines: it was synced before fill read it
	cancel   context.CancelFunc
	done     sync.WaitGroup
}

func (w *Watcher) newSources() *sources {
	return &sources{w: w, machines: machines{}, kind: map[string]*kind{
		sourceIstio: {group: "networking.istio.io/v1", name: "gateways", start: func(s *sources) (cache.SharedIndexInformer, error) {
			return istioinformers.NewGatewayInformer(s.w.clients.Istio, metav1.NamespaceAll, 0, nil), nil
		}},
		sourceGatewayAPI: {group: "gateway.networking.k8s.io/v1", name: "gateways", start: func(s *sources) (cache.SharedIndexInformer, error) {
			return gatewayinformers.NewGatewayInformer(s.w.clients.GatewayAPI, metav1.NamespaceAll, 0, nil), nil
		}},
		sourcePods: {start: func(s *sources) (cache.SharedIndexInformer, error) {
			return metadatainformer.NewFilteredMetadataInformer(s.w.clients.Metadata, schema.GroupVersionResource{Version: "v1", Resource: "pods"},
				metav1.NamespaceAll, 0, nil, livePods).Informer(), nil
		}},
		sourceServices: {start: func(s *sources) (cache.SharedIndexInformer, error) {
			return coreinformers.NewServiceInformer(s.w.clients.Kubernetes, metav1.NamespaceAll, 0, nil), nil
		}},
	}}
}

// livePods leaves out, in the server, pods that have ended: only metadata comes
// here, so their phase could not be told.
func livePods(o *metav1.ListOptions) {
	o.FieldSelector = "status.phase!=Succeeded,status.phase!=Failed"
}

// probe has every kind's presence looked at again.
func (s *sources) probe() {
	for _, k := range s.kind {
		k.probed = false
	}
}

// adjust starts informers of kinds that have come, and ends those of kinds that
// are gone, and of services that are no longer wanted.
func (s *sources) adjust(ctx context.Context, refs []ServiceRef) {
	for name, k := range s.kind {
		if k.group == "" {
			k.known = true
			if k.source == nil {
				k.source = s.start(ctx, name, k.start)
			}
			continue
		}
		if !k.probed && !time.Now().Before(k.retry) {
			s.discover(ctx, name, k)
		}
	}
	s.adjustSlices(ctx, refs)
}

// discover asks the API whether it has a kind. That it hasn't is a normal
// state: Istio or the Gateway API isn't installed.
func (s *sources) discover(ctx context.Context, name string, k *kind) {
	limited, cancel := context.WithTimeout(ctx, discoverTimeout)
	defer cancel()
	list, err := s.w.clients.Kubernetes.Discovery().ServerResourcesForGroupVersionWithContext(limited, k.group)
	switch {
	case err == nil && slices.ContainsFunc(list.APIResources, func(r metav1.APIResource) bool { return r.Name == k.name }):
		k.known, k.probed, k.denied = true, true, 0
		s.w.complain(name, nil)
		if k.source == nil {
			k.source = s.start(ctx, name, k.start)
		}
	case err == nil || apierrors.IsNotFound(err):
		if k.denied++; k.denied < strikes {
			return // asked again soon
		}
		if !k.known || k.source != nil {
			s.w.log.Info("kind is not installed", "source", name, "group", k.group)
		}
		k.known, k.probed = true, true
		s.w.complain(name, nil)
		k.source.stop()
		k.source = nil
	case ctx.Err() == nil:
		s.failed(name, fmt.Errorf("discover %s: %w", k.group, err))
		k.probed = k.known // what is known stands until the next tick
		k.retry = time.Now().Add(min(retryDiscover, s.w.rediscover))
	}
}

func (s *sources) failed(name string, err error) {
	s.w.metrics.errors.WithLabelValues(name).Inc()
	s.w.complain(name, err)
}

// adjustSlices watches the slices of the wanted services. Those watched before
// serve on until the new ones are known whole.
func (s *sources) adjustSlices(ctx context.Context, refs []ServiceRef) {
	if s.next != nil && s.next.synced() {
		s.slices.stop()
		s.slices, s.next = s.next, nil
	}
	if slices.Equal(refs, s.refs) {
		return
	}
	s.next.stop()
	s.next = nil
	if len(refs) == 0 {
		s.slices.stop()
		s.slices, s.refs = nil, nil
		return
	}
	started := s.start(ctx, sourceSlices, func(s *sources) (cache.SharedIndexInformer, error) {
		tweak, err := ofServices(refs)
		if err != nil {
			return nil, err
		}
		return discoveryinformers.NewFilteredEndpointSliceInformer(s.w.clients.Kubernetes, metav1.NamespaceAll, 0, nil, tweak), nil
	})
	if started == nil {
		return
	}
	s.refs = refs
	if s.slices == nil {
		s.slices = started
		return
	}
	s.next = started
}

// ofServices selects slices by their Services' names; namespaces are told apart
// later.
func ofServices(refs []ServiceRef) (func(*metav1.ListOptions), error) {
	names := make([]string, 0, len(refs))
	for _, r := range refs {
		names = append(names, r.Name)
	}
	slices.Sort(names)
	r, err := labels.NewRequirement(discoveryv1.LabelServiceName, labelselection.In, slices.Compact(names))
	if err != nil {
		return nil, fmt.Errorf("select endpoint slices: %w", err)
	}
	return func(o *metav1.ListOptions) { o.LabelSelector = r.String() }, nil
}

func (s *sources) start(ctx context.Context, name string, build func(*sources) (cache.SharedIndexInformer, error)) *source {
	informer, err := build(s)
	var handle cache.ResourceEventHandlerRegistration
	if err == nil {
		err = informer.SetTransform(trim)
	}
	if err == nil {
		err = informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
			if ctx.Err() == nil && !errors.Is(err, io.EOF) && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
				s.failed(name, err)
			}
		})
	}
	if err == nil {
		handle, err = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(any) { s.w.wake() },
			DeleteFunc: func(any) { s.w.wake() },
			UpdateFunc: func(before, after any) {
				if !alike(before, after) {
					s.w.wake()
				}
			},
		})
	}
	if err != nil {
		s.failed(name, err)
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	out := &source{informer: informer, synced: handle.HasSynced, cancel: cancel}
	out.done.Go(func() { informer.RunWithContext(ctx) })
	return out
}

// complete tells whether every source is known whole.
func (s *sources) complete() bool { return s.missing() == "" }

// missing names the sources that are not, and what is wrong with them.
func (s *sources) missing() string {
	var out []string
	add := func(name string) { out = append(out, s.named(name)) }
	for name, k := range s.kind {
		if !k.known || k.source != nil && !k.source.synced() {
			add(name)
		}
	}
	if s.slices != nil && !s.slices.synced() {
		add(sourceSlices)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// named is a source with what is wrong with it.
func (s *sources) named(name string) string {
	if c := s.w.complaint(name); c != "" {
		name += " (" + c + ")"
	}
	return name
}

// stop ends all informers and waits for them.
func (s *sources) stop() {
	for _, k := range s.kind {
		k.source.stop()
	}
	s.slices.stop()
	s.next.stop()
	for _, m := range s.machines {
		m.stop()
	}
}

func (s *source) stop() {
	if s != nil {
		s.cancel()
		s.done.Wait()
	}
}
