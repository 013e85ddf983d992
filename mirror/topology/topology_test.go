package topology

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/discovery"
	coreinformers "k8s.io/client-go/informers/core/v1"
	kubefake "k8s.io/client-go/kubernetes/fake"
	metadatafake "k8s.io/client-go/metadata/fake"
	clienttesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	"github.com/periscope-mesh/periscope/mirror"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	istioGroup   = "networking.istio.io/v1"
	gatewayGroup = "gateway.networking.k8s.io/v1"
)

// api is an API of fakes.
type api struct {
	*kubefake.Clientset
	metadata   *metadatafake.FakeMetadataClient
	istio      *istiofake.Clientset
	gatewayAPI *gatewayfake.Clientset

	noIstio, noGatewayAPI, down atomic.Bool
}

func newAPI(t *testing.T) *api {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	a := &api{
		Clientset:  kubefake.NewClientset(),
		metadata:   metadatafake.NewSimpleMetadataClient(scheme),
		istio:      istiofake.NewSimpleClientset(),
		gatewayAPI: gatewayfake.NewSimpleClientset(),
	}
	// This fake, unlike the others, doesn't say that it can't stream lists.
	a.istio.PrependWatchReactor("gateways", func(action clienttesting.Action) (bool, watch.Interface, error) {
		w, ok := action.(clienttesting.WatchActionImpl)
		if ok && w.ListOptions.SendInitialEvents != nil {
			return true, nil, apierrors.NewBadRequest("no streamed lists")
		}
		return false, nil, nil
	})
	return a
}

// Discovery gives one that knows the kinds that the test wants.
func (a *api) Discovery() discovery.DiscoveryInterfaces {
	return kinds{a.Clientset.Discovery(), a}
}

type kinds struct {
	discovery.DiscoveryInterfaces
	a *api
}

func (k kinds) ServerResourcesForGroupVersionWithContext(_ context.Context, group string) (*metav1.APIResourceList, error) {
	switch {
	case k.a.down.Load():
		return nil, errors.New("connection refused")
	case k.a.noIstio.Load() && group == istioGroup, k.a.noGatewayAPI.Load() && group == gatewayGroup:
		return nil, apierrors.NewNotFound(schema.GroupResource{}, group)
	}
	return &metav1.APIResourceList{GroupVersion: group, APIResources: []metav1.APIResource{{Name: "gateways", Kind: "Gateway"}}}, nil
}

func (a *api) watcher(t *testing.T, logs *strings.Builder, nodes ...ServiceRef) *Watcher {
	t.Helper()
	logger := slog.New(slog.DiscardHandler)
	if logs != nil {
		logger = slog.New(slog.NewTextHandler(logs, nil))
	}
	w, err := New(Config{
		Clients:      &Clients{a, a.metadata, a.istio, a.gatewayAPI},
		NodeServices: nodes, Logger: logger, Registerer: prometheus.NewRegistry(),
		Rediscover: 100 * time.Millisecond, SyncTimeout: 5 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

var podResource = schema.GroupVersionResource{Version: "v1", Resource: "pods"}

func (a *api) pod(t *testing.T, namespace, name string, labels set) {
	t.Helper()
	p := &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
	}
	pods, ok := a.metadata.Resource(podResource).Namespace(namespace).(metadatafake.MetadataClient)
	if !ok {
		t.Fatal("no fake metadata client")
	}
	if _, err := pods.CreateFake(p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// runs says where a pod runs.
func (a *api) runs(t *testing.T, namespace, name string, labels set, machine string) {
	t.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}, Spec: corev1.PodSpec{NodeName: machine}}
	if _, err := a.CoreV1().Pods(namespace).Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (a *api) istioGateway(t *testing.T, namespace, name string, selector set) {
	t.Helper()
	g := &networkingv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	g.Spec.Selector = selector
	if _, err := a.istio.NetworkingV1().Gateways(namespace).Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (a *api) apiGateway(t *testing.T, namespace, name string) {
	t.Helper()
	g := &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: gatewayv1.GatewaySpec{GatewayClassName: "istio"}}
	if _, err := a.gatewayAPI.GatewayV1().Gateways(namespace).Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (a *api) nodeService(t *testing.T, namespace, name string, addresses ...string) {
	t.Helper()
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "mirror", Port: 5050}, {Name: "udp", Port: 53, Protocol: corev1.ProtocolUDP}}}}
	if _, err := a.CoreV1().Services(namespace).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	port, portName, no := int32(15050), "mirror", false
	e := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name + "-1", Labels: set{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.9.9.9"}, Conditions: discoveryv1.EndpointConditions{Ready: &no}}},
	}
	for _, address := range addresses {
		e.Endpoints = append(e.Endpoints, discoveryv1.Endpoint{Addresses: []string{address}})
	}
	if _, err := a.DiscoveryV1().EndpointSlices(namespace).Create(t.Context(), e, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// follow runs a watcher until the test ends; await waits for a result.
func follow(t *testing.T, w *Watcher) (await func(what string, ok func(Result) bool) Result) {
	t.Helper()
	results := make(chan Result, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, func(r Result) { results <- r }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func(what string, ok func(Result) bool) Result {
		t.Helper()
		deadline := time.After(20 * time.Second)
		var last Result
		for {
			select {
			case last = <-results:
				if ok(last) {
					return last
				}
			case <-deadline:
				t.Fatalf("waiting for %s; the last result was %+v", what, last)
			}
		}
	}
}

func summary(r Result) []string {
	out := []string{}
	for _, g := range r.Topology.Gateways {
		text := fmt.Sprint(g.ID(), g.Pods)
		for _, m := range g.Machines {
			text += "@" + m
		}
		out = append(out, text)
	}
	for _, n := range r.Topology.Nodes {
		var endpoints []string
		for _, e := range n.Endpoints {
			text := fmt.Sprintf("{%s %d}", e.Host, e.Port)
			if e.Machine != "" {
				text += "@" + e.Machine
			}
			endpoints = append(endpoints, text)
		}
		out = append(out, fmt.Sprintf("%s/%s:%d %v", n.Namespace, n.Name, n.Port, endpoints))
	}
	return out
}

func is(want ...string) func(Result) bool {
	return func(r Result) bool { return slices.Equal(want, summary(r)) }
}

func TestLoadThenRun(t *testing.T) {
	a := newAPI(t)
	a.pod(t, "ingress", "gw-0", set{"app": "gw"})
	a.istioGateway(t, "shop", "public", set{"app": "gw"})
	a.apiGateway(t, "shop", "web")
	a.nodeService(t, "ingress", "periscope-node", "10.0.0.1")
	w := a.watcher(t, nil, ServiceRef{"ingress", "periscope-node"})
	r, err := w.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	node := "ingress/periscope-node:5050 [{10.0.0.1 15050}]"
	if diff := cmp.Diff([]string{"ingress/gw[gw-0]", node}, summary(r)); diff != "" {
		t.Fatal(diff)
	}
	if diff := cmp.Diff([]mirror.Target{istioTarget("shop", "public")}, r.Topology.Gateways[0].Targets); diff != "" {
		t.Error(diff)
	}
	if len(r.Problems) != 1 || compareTargets(r.Problems[0].Target, apiTarget("shop", "web")) != 0 {
		t.Errorf("problems %v", r.Problems)
	}

	await := follow(t, w) // says nothing of what Load has said: the first result has the second pod
	a.pod(t, "ingress", "gw-1", set{"app": "gw"})
	first := await("a second pod", func(Result) bool { return true })
	if diff := cmp.Diff([]string{"ingress/gw[gw-0 gw-1]", node}, summary(first)); diff != "" {
		t.Error(diff)
	}
	a.pod(t, "shop", "web-istio-0", set{gatewayNameLabel: "web"})
	await("the Gateway API's gateway", is("ingress/gw[gw-0 gw-1]", "shop/web[web-istio-0]", node))
	if err := a.metadata.Resource(podResource).Namespace("ingress").Delete(t.Context(), "gw-0", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await("a pod's end", is("ingress/gw[gw-1]", "shop/web[web-istio-0]", node))

	a.nodeService(t, "other", "nodes", "10.0.0.2", "10.0.0.3")
	w.SetNodeServices([]ServiceRef{{"other", "nodes"}, {"other", "No Service\x00"}})
	await("another node service", is("ingress/gw[gw-1]", "shop/web[web-istio-0]", "other/nodes:5050 [{10.0.0.2 15050} {10.0.0.3 15050}]"))
	w.SetNodeServices(nil)
	await("no node service", is("ingress/gw[gw-1]", "shop/web[web-istio-0]"))
}

// Load waits until it is known where gateways' pods run; those of gateways that
// come later are told when they are known.
func TestMachines(t *testing.T) {
	a := newAPI(t)
	a.pod(t, "ingress", "gw-0", set{"app": "gw"})
	a.pod(t, "ingress", "gw-1", set{"app": "gw"})
	a.istioGateway(t, "shop", "public", set{"app": "gw"})
	a.runs(t, "ingress", "gw-0", set{"app": "gw"}, "host-b")
	a.runs(t, "ingress", "gw-1", set{"app": "gw"}, "")
	a.runs(t, "ingress", "else", set{"app": "else"}, "host-c")
	w := a.watcher(t, nil)
	r, err := w.Load(t.Context())
	if err != nil || !is("ingress/gw[gw-0 gw-1]@host-b")(r) {
		t.Fatal(summary(r), err)
	}
	await := follow(t, w) // tells nothing of what Load has told
	a.pod(t, "shop", "web-0", set{gatewayNameLabel: "web"})
	a.runs(t, "shop", "web-0", set{gatewayNameLabel: "web"}, "host-a")
	a.apiGateway(t, "shop", "web")
	await("a gateway that came later", func(r Result) bool {
		if got := summary(r)[0]; got != "ingress/gw[gw-0 gw-1]@host-b" {
			t.Errorf("what Load knew is forgotten: %s", got)
		}
		return is("ingress/gw[gw-0 gw-1]@host-b", "shop/web[web-0]@host-a")(r)
	})
	p, err := a.CoreV1().Pods("ingress").Get(t.Context(), "gw-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Spec.NodeName = "host-a"
	if _, err := a.CoreV1().Pods("ingress").Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	await("a pod's machine", is("ingress/gw[gw-0 gw-1]@host-a@host-b", "shop/web[web-0]@host-a"))
}

// What comes once machines have been read was not read: it doesn't make them known.
func TestMachinesThatComeLate(t *testing.T) {
	a := newAPI(t)
	s := a.watcher(t, nil).newSources()
	pods := coreinformers.NewPodInformer(a, metav1.NamespaceAll, 0, nil)
	synced := false
	s.machines["app=gw"] = &source{informer: pods, synced: func() bool { return synced }}
	gateways := []mirror.Gateway{{Selector: set{"app": "gw"}}}
	read := []Pod{{Namespace: "ingress", Name: "gw-0"}}

	s.machines.fill(read)
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ingress", Name: "gw-0"}, Spec: corev1.PodSpec{NodeName: "host-a"}}
	if err := pods.GetStore().Add(p); err != nil {
		t.Fatal(err)
	}
	synced = true
	if s.adjustMachines(t.Context(), gateways) || read[0].Machine != "" {
		t.Errorf("known before they were read: %+v", read)
	}
	s.machines.fill(read)
	if !s.adjustMachines(t.Context(), gateways) || read[0].Machine != "host-a" {
		t.Errorf("not known though they were read: %+v", read)
	}
}

func TestPodSelectors(t *testing.T) {
	var gateways []mirror.Gateway
	for i := range 3 {
		gateways = append(gateways, mirror.Gateway{Selector: set{gatewayNameLabel: fmt.Sprint(i)}}, mirror.Gateway{Selector: set{"istio": "gw", "app": fmt.Sprint(i % 2)}})
	}
	if diff := cmp.Diff([]string{"app=0,istio=gw", "app=1,istio=gw", gatewayNameLabel}, podSelectors(gateways)); diff != "" {
		t.Error(diff)
	}
}

// A kind that isn't installed is no error, and is found when it comes, and
// given up when it goes.
func TestKindsComeAndGo(t *testing.T) {
	a := newAPI(t)
	a.noIstio.Store(true)
	a.noGatewayAPI.Store(true)
	a.pod(t, "shop", "web-0", set{gatewayNameLabel: "web"})
	a.apiGateway(t, "shop", "web")
	var logs strings.Builder
	w := a.watcher(t, &logs)
	r, err := w.Load(t.Context())
	if err != nil || len(r.Topology.Gateways)+len(r.Problems) > 0 {
		t.Fatal(r, err)
	}
	if n := strings.Count(logs.String(), "kind is not installed"); n != 2 {
		t.Errorf("told %d times what is not installed: %s", n, logs.String())
	}
	await := follow(t, w)
	a.noGatewayAPI.Store(false)
	await("the kind to come", is("shop/web[web-0]"))
	a.noGatewayAPI.Store(true)
	await("the kind to go", is())
	a.noGatewayAPI.Store(false)
	await("the kind to come again", is("shop/web[web-0]"))
}

// An API that fails makes Load fail in time, with the reason; Run goes on
// trying, and tells nothing before all is known.
func TestUnreachable(t *testing.T) {
	a := newAPI(t)
	a.down.Store(true)
	a.pod(t, "ingress", "gw-0", set{"app": "gw"})
	a.istioGateway(t, "shop", "public", set{"app": "gw"})
	w := a.watcher(t, nil)
	w.syncTimeout = 300 * time.Millisecond
	_, err := w.Load(t.Context())
	if err == nil || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "istio_gateways (discover networking.istio.io/v1: connection refused)") {
		t.Fatal(err)
	}
	await := follow(t, w)
	a.down.Store(false)
	first := await("the API", func(Result) bool { return true })
	if diff := cmp.Diff([]string{"ingress/gw[gw-0]"}, summary(first)); diff != "" {
		t.Error(diff)
	}
}

// Without permission there is no topology, rather than an empty one.
func TestForbidden(t *testing.T) {
	a := newAPI(t)
	a.istio.PrependReactor("list", "gateways", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Group: "networking.istio.io", Resource: "gateways"}, "", errors.New("no role"))
	})
	w := a.watcher(t, nil)
	w.syncTimeout = time.Second
	_, err := w.Load(t.Context())
	if err == nil || !strings.Contains(err.Error(), "istio_gateways") || !strings.Contains(err.Error(), "forbidden") {
		t.Fatal(err)
	}
}

func TestPodOwner(t *testing.T) {
	yes := true
	owned := func(kind, name string, labels set) *metav1.PartialObjectMetadata {
		return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Labels: labels,
			OwnerReferences: []metav1.OwnerReference{{Kind: kind, Name: name, Controller: &yes}}}}
	}
	for want, p := range map[string]*metav1.PartialObjectMetadata{
		"gw":     owned("ReplicaSet", "gw-5d9f", set{"pod-template-hash": "5d9f"}),
		"gw-set": owned("StatefulSet", "gw-set", nil),
		"gw-1":   owned("ReplicaSet", "gw-1", nil),
		"":       {},
	} {
		if got := pod(p).Owner; got != want {
			t.Errorf("owner %q, want %q", got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []Config{{}, {Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()}} {
		if _, err := New(c); err == nil {
			t.Error("made without what it needs")
		}
	}
}
