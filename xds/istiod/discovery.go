package istiod

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// What istioctl finds istiods by, too.
const (
	podSelector    = "app=istiod" // of every revision
	portAnnotation = "prometheus.io/port"
	defaultPort    = 15014
)

// Discovery finds the istiods of a cluster: the pods of one namespace that
// have istiod's label, are ready and are to stay.
type Discovery struct {
	client    kubernetes.Interface
	namespace string

	mu     sync.Mutex
	urls   []string // sorted; a value of it is never changed
	synced bool     // the API has shown every pod
	fault  error    // of the last request to the API
}

// NewDiscovery makes a Discovery, which asks nothing yet.
func NewDiscovery(client kubernetes.Interface, namespace string) (*Discovery, error) {
	if client == nil || namespace == "" {
		return nil, errors.New("make istiod discovery: a client and a namespace are needed")
	}
	return &Discovery{client: client, namespace: namespace}, nil
}

// Endpoints gives the base URLs of the istiods' monitoring ports, for
// Config.Endpoints. An error says why they may not be all there are, or not
// those there are now.
func (d *Discovery) Endpoints() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.fault != nil:
		return d.urls, fmt.Errorf("find istiods' pods in namespace %s: %w", d.namespace, d.fault)
	case !d.synced:
		return d.urls, fmt.Errorf("istiods' pods in namespace %s are not known yet", d.namespace)
	case len(d.urls) == 0:
		return nil, fmt.Errorf("no pod with label %s is ready in namespace %s", podSelector, d.namespace)
	}
	return d.urls, nil
}

// Run follows the API until the context ends, and then returns nil. It calls
// changed when Endpoints gives others, or begins or ceases to give an error.
func (d *Discovery) Run(ctx context.Context, changed func()) error {
	informer := cache.NewSharedIndexInformer(d.pods(changed), &corev1.Pod{}, 0, nil)
	// The default one logs past our logger; pods notes every error.
	err := informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {})
	if err != nil {
		return fmt.Errorf("follow istiods' pods: %w", err)
	}
	look := func() {
		d.change(changed, func() { d.urls = addresses(informer.GetStore().List()) })
	}
	handle, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { look() },
		UpdateFunc: func(any, any) { look() },
		DeleteFunc: func(any) { look() },
	})
	if err != nil {
		return fmt.Errorf("follow istiods' pods: %w", err)
	}
	var done sync.WaitGroup
	defer done.Wait()
	done.Go(func() { // there may be no pod, and so no event
		if cache.WaitForCacheSync(ctx.Done(), handle.HasSynced) {
			d.change(changed, func() { d.synced = true })
		}
	})
	informer.RunWithContext(ctx)
	return nil
}

// pods lists and watches, and notes how that goes.
func (d *Discovery) pods(changed func()) cache.ListerWatcher {
	pods := d.client.CoreV1().Pods(d.namespace)
	note := func(ctx context.Context, err error) {
		if ctx.Err() == nil {
			d.change(changed, func() { d.fault = err })
		}
	}
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = podSelector
			list, err := pods.List(ctx, o)
			note(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = podSelector
			w, err := pods.Watch(ctx, o)
			note(ctx, err)
			return w, err
		},
	}, d.client)
}

// change applies one, and tells of it if Endpoints' callers see it.
func (d *Discovery) change(changed func(), apply func()) {
	d.mu.Lock()
	urls, whole := d.urls, d.synced && d.fault == nil
	apply()
	same := slices.Equal(urls, d.urls) && whole == (d.synced && d.fault == nil)
	d.mu.Unlock()
	if !same {
		changed()
	}
}

func addresses(pods []any) []string {
	var out []string
	for _, o := range pods {
		if p, ok := o.(*corev1.Pod); ok && serves(p) {
			if u, ok := monitoring(p); ok {
				out = append(out, u)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// serves tells whether gateways may be connected to the pod, and stay so.
func serves(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning &&
		slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
}

// monitoring is the base URL of the pod's monitoring port.
func monitoring(p *corev1.Pod) (string, bool) {
	ip, err := netip.ParseAddr(p.Status.PodIP)
	if err != nil || ip.Zone() != "" {
		return "", false
	}
	port := uint16(defaultPort)
	if n, err := strconv.ParseUint(p.Annotations[portAnnotation], 10, 16); err == nil && n > 0 {
		port = uint16(n)
	}
	return "http://" + netip.AddrPortFrom(ip.Unmap(), port).String(), true
}
