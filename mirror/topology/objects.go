package topology

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	istioclient "istio.io/client-go/pkg/clientset/versioned"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"
)

// Clients are those of one Kubernetes API.
type Clients struct {
	Kubernetes kubernetes.Interface
	Metadata   metadata.Interface
	Istio      istioclient.Interface
	GatewayAPI gatewayclient.Interface
}

// newClients makes clients that share connections.
func newClients(c *rest.Config) (*Clients, error) {
	shared, err := rest.HTTPClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("connect to the kubernetes api: %w", err)
	}
	out := new(Clients)
	if out.Kubernetes, err = kubernetes.NewForConfigAndClient(c, shared); err != nil {
		return nil, fmt.Errorf("make kubernetes client: %w", err)
	}
	if out.Metadata, err = metadata.NewForConfigAndClient(metadata.ConfigFor(c), shared); err != nil {
		return nil, fmt.Errorf("make metadata client: %w", err)
	}
	if out.Istio, err = istioclient.NewForConfigAndClient(c, shared); err != nil {
		return nil, fmt.Errorf("make istio client: %w", err)
	}
	if out.GatewayAPI, err = gatewayclient.NewForConfigAndClient(c, shared); err != nil {
		return nil, fmt.Errorf("make gateway api client: %w", err)
	}
	return out, nil
}

// trim drops what nobody looks at before an informer keeps an object.
func trim(object any) (any, error) {
	if o, ok := object.(metav1.Object); ok {
		o.SetManagedFields(nil)
		o.SetAnnotations(nil)
	}
	switch o := object.(type) {
	case *networkingv1.Gateway:
		o.Spec.Servers = []*networking.Server{{Hosts: istioHosts(o)}}
	case *gatewayv1.Gateway:
		o.Spec.Listeners, o.Status = hostnames(o), gatewayv1.GatewayStatus{}
	case *corev1.Service:
		o.Status = corev1.ServiceStatus{}
	case *corev1.Pod:
		o.Labels, o.OwnerReferences = nil, nil // pods' metadata comes by another source
		o.Spec, o.Status = corev1.PodSpec{NodeName: o.Spec.NodeName}, corev1.PodStatus{}
	}
	return object, nil
}

// istioHosts are those of a Gateway's servers, each once. What is far beyond
// the bound is not even kept.
func istioHosts(g *networkingv1.Gateway) []string {
	var out []string
	for _, s := range g.Spec.Servers {
		out = append(out, s.GetHosts()...)
	}
	slices.Sort(out)
	out = slices.Compact(out)
	return slices.Clone(out[:min(len(out), 4*maxHosts)])
}

// hostnames are a Gateway's listeners, of which nothing else counts.
func hostnames(g *gatewayv1.Gateway) []gatewayv1.Listener {
	out := make([]gatewayv1.Listener, 0, len(g.Spec.Listeners))
	for _, l := range g.Spec.Listeners {
		out = append(out, gatewayv1.Listener{Hostname: l.Hostname})
	}
	return out
}

// alike tells whether an update leaves what we look at: pods get one with each
// change of their status.
func alike(before, after any) bool {
	switch b := before.(type) {
	case *metav1.PartialObjectMetadata:
		a, ok := after.(*metav1.PartialObjectMetadata)
		return ok && maps.Equal(a.Labels, b.Labels)
	case *gatewayv1.Gateway:
		a, ok := after.(*gatewayv1.Gateway)
		return ok && reflect.DeepEqual(a.Spec, b.Spec)
	case *corev1.Service:
		a, ok := after.(*corev1.Service)
		return ok && reflect.DeepEqual(a.Spec, b.Spec)
	case *corev1.Pod:
		a, ok := after.(*corev1.Pod)
		return ok && a.Spec.NodeName == b.Spec.NodeName
	}
	return false
}

// inputs copies what the informers hold. Maps are shared with them, and never
// changed.
func (s *sources) inputs() Inputs {
	var in Inputs
	in.Istio = list(s.kind[sourceIstio].source, func(g *networkingv1.Gateway) IstioGateway {
		return IstioGateway{Namespace: g.Namespace, Name: g.Name, Selector: g.Spec.Selector, Hosts: istioHosts(g)}
	})
	in.GatewayAPI = list(s.kind[sourceGatewayAPI].source, apiGateway)
	in.Pods = list(s.kind[sourcePods].source, pod)
	s.machines.fill(in.Pods)
	in.Services = list(s.kind[sourceServices].source, service)
	in.Slices = list(s.slices, slice)
	return in
}

func list[T, U any](s *source, convert func(T) U) []U {
	if s == nil {
		return nil
	}
	objects := s.informer.GetStore().List()
	out := make([]U, 0, len(objects))
	for _, o := range objects {
		if t, ok := o.(T); ok {
			out = append(out, convert(t))
		}
	}
	return out
}

func apiGateway(g *gatewayv1.Gateway) APIGateway {
	out := APIGateway{Namespace: g.Namespace, Name: g.Name, Class: string(g.Spec.GatewayClassName)}
	for _, l := range g.Spec.Listeners {
		host := "*"
		if l.Hostname != nil {
			host = string(*l.Hostname)
		}
		out.Hosts = append(out.Hosts, host)
	}
	for _, a := range g.Spec.Addresses {
		out.Addresses = append(out.Addresses, Address{
			Hostname: a.Type != nil && *a.Type == gatewayv1.HostnameAddressType,
			Value:    a.Value,
		})
	}
	return out
}

func pod(o *metav1.PartialObjectMetadata) Pod {
	p := Pod{Namespace: o.Namespace, Name: o.Name, Labels: o.Labels}
	if owner := metav1.GetControllerOfNoCopy(o); owner != nil {
		p.Owner = owner.Name
		if hash := o.Labels["pod-template-hash"]; owner.Kind == "ReplicaSet" && hash != "" {
			p.Owner = strings.TrimSuffix(owner.Name, "-"+hash)
		}
	}
	return p
}

func service(o *corev1.Service) Service {
	s := Service{Namespace: o.Namespace, Name: o.Name, Selector: o.Spec.Selector}
	if o.Spec.Type == corev1.ServiceTypeExternalName {
		s.Selector = nil // leads elsewhere, whatever it selects
	}
	for _, p := range o.Spec.Ports {
		if p.Protocol == "" || p.Protocol == corev1.ProtocolTCP {
			s.Ports = append(s.Ports, ServicePort{Name: p.Name, Port: int(p.Port)})
		}
	}
	return s
}

func slice(o *discoveryv1.EndpointSlice) Slice {
	s := Slice{Namespace: o.Namespace, Service: o.Labels[discoveryv1.LabelServiceName]}
	if o.AddressType == discoveryv1.AddressTypeFQDN {
		return s
	}
	for _, p := range o.Ports {
		if p.Port == nil || p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP {
			continue
		}
		port := ServicePort{Port: int(*p.Port)}
		if p.Name != nil {
			port.Name = *p.Name
		}
		s.Ports = append(s.Ports, port)
	}
	for _, e := range o.Endpoints {
		if ready := e.Conditions.Ready; (ready == nil || *ready) && len(e.Addresses) > 0 {
			endpoint := SliceEndpoint{Address: e.Addresses[0]} // the others are of the same endpoint
			if e.NodeName != nil {
				endpoint.Machine = *e.NodeName
			}
			s.Endpoints = append(s.Endpoints, endpoint)
		}
	}
	return s
}

func sortedRefs(refs []ServiceRef) []ServiceRef {
	refs = slices.Clone(refs)
	slices.SortFunc(refs, compareRefs)
	return slices.Compact(refs)
}
