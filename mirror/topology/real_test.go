package topology

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/test/kubetest"
)

// A real API server: kinds installed while we watch, pods that end, and
// permissions that matter nowhere else.
func TestRealAPI(t *testing.T) {
	cluster := kubetest.Start(t)
	c := &rest.Config{Host: cluster.URL, BearerToken: cluster.Token, TLSClientConfig: rest.TLSClientConfig{CAFile: cluster.CAFile}}
	shared, err := rest.HTTPClientFor(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(shared.CloseIdleConnections)
	w, err := New(Config{REST: c, NodeServices: []ServiceRef{{"ingress", "periscope-node"}},
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Rediscover: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	r, err := w.Load(t.Context())
	if err != nil || len(r.Topology.Gateways) > 0 {
		t.Fatal(r, err)
	}
	await := follow(t, w)

	cluster.Namespace(t, "ingress")
	cluster.Namespace(t, "shop")
	pod := func(name, labels, machine string) string {
		return "apiVersion: v1\nkind: Pod\nmetadata: {name: " + name + ", namespace: ingress, labels: {" + labels +
			"}}\nspec: {" + machine + "automountServiceAccountToken: false, containers: [{name: c, image: none}]}\n---\n"
	}
	cluster.Apply(t, pod("gw-0", "istio: ingressgateway", "nodeName: host-b, ")+pod("gw-1", "istio: ingressgateway", "")+pod("web-0", "gateway.networking.k8s.io/gateway-name: web", "nodeName: host-a, "))

	cluster.InstallIstio(t)
	cluster.Apply(t, `{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: public, namespace: shop}, spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}, {port: {number: 443, name: https, protocol: HTTPS}, hosts: ["shop/Shop.example", "./*.shop.example"], tls: {mode: SIMPLE, credentialName: shop}}]}}`)
	await("Istio's Gateway", is("ingress/ingressgateway[gw-0 gw-1]@host-b"))

	cluster.InstallGatewayAPI(t)
	cluster.Apply(t, `{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: web, namespace: ingress}, spec: {gatewayClassName: istio, listeners: [{name: http, port: 80, protocol: HTTP}]}}`)
	await("the Gateway API's Gateway", is("ingress/ingressgateway[gw-0 gw-1]@host-b", "ingress/web[web-0]@host-a"))

	cluster.Apply(t, `{apiVersion: v1, kind: Service, metadata: {name: edge, namespace: ingress}, spec: {selector: {istio: ingressgateway}, ports: [{port: 80}]}}
---
{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: manual, namespace: ingress}, spec: {gatewayClassName: istio, addresses: [{type: Hostname, value: edge.ingress.svc.cluster.local}], listeners: [{name: http, port: 80, protocol: HTTP, hostname: "*.web.example"}]}}`)
	r = await("a manual deployment", func(r Result) bool {
		return len(r.Topology.Gateways) == 2 && len(r.Topology.Gateways[0].Targets) == 2
	})
	targets := []mirror.Target{hosted(apiTarget("ingress", "manual"), "*.web.example"), hosted(istioTarget("shop", "public"), "*", "*.shop.example", "shop.example")}
	if diff := cmp.Diff(targets, r.Topology.Gateways[0].Targets); diff != "" {
		t.Error(diff)
	}
	cluster.Apply(t, `{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: public, namespace: shop}, spec: {selector: {istio: ingressgateway}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["shop.example"]}]}}`)
	await("a Gateway's new hosts", func(r Result) bool {
		return slices.Equal(r.Topology.Gateways[0].Targets[1].Hosts, []string{"shop.example"})
	})

	cluster.Apply(t, `{apiVersion: v1, kind: Service, metadata: {name: periscope-node, namespace: ingress}, spec: {ports: [{name: mirror, port: 5050, targetPort: events}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: periscope-node-1, namespace: ingress, labels: {kubernetes.io/service-name: periscope-node}}, addressType: IPv4, ports: [{name: mirror, port: 15050}], endpoints: [{addresses: [10.0.0.7], conditions: {ready: true}, nodeName: host-a}, {addresses: [10.0.0.8], conditions: {ready: false}}]}`)
	node := "ingress/periscope-node:5050 [{10.0.0.7 15050}@host-a]"
	await("the node's endpoint", is("ingress/ingressgateway[gw-0 gw-1]@host-b", "ingress/web[web-0]@host-a", node))

	// The scheduler finds a machine for the second pod.
	if err := w.clients.Kubernetes.CoreV1().Pods("ingress").Bind(t.Context(), &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: "gw-1"},
		Target: corev1.ObjectReference{Kind: "Node", Name: "host-a"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await("a pod's machine", is("ingress/ingressgateway[gw-0 gw-1]@host-a@host-b", "ingress/web[web-0]@host-a", node))

	// A pod that has ended is there still, but is no gateway any more.
	if _, err := w.clients.Kubernetes.CoreV1().Pods("ingress").Patch(t.Context(), "gw-1", types.MergePatchType,
		[]byte(`{"status": {"phase": "Succeeded"}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	await("a pod's end", is("ingress/ingressgateway[gw-0]@host-b", "ingress/web[web-0]@host-a", node))
	cluster.Delete(t, "{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: public, namespace: shop}}")
	cluster.Delete(t, "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: manual, namespace: ingress}}")
	await("the Gateways' end", is("ingress/web[web-0]@host-a", node))
}
