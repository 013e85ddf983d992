package kubetest

import (
	"encoding/json"
	"fmt"
)

// WebGateway is a Gateway named web on loopback, with a route to a server on
// loopback, for Apply. selector picks its pods by the label istio.
func WebGateway(namespace, selector, port, upstreamPort string) string {
	return fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: %[1]s}
spec:
  selector: {istio: %[2]s}
  servers:
  - {port: {number: %[3]s, name: http, protocol: HTTP}, bind: 127.0.0.1, hosts: ["*"]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: %[1]s}
spec:
  hosts: ["*"]
  gateways: [web]
  http: [{route: [{destination: {host: echo.example, port: {number: 80}}}]}]
`, namespace, selector, port) + echo(namespace, upstreamPort)
}

// APIGateway is a Gateway of the Gateway API named web, with a route to a server
// on loopback, for Apply; and what Istio's deployment controller makes of it:
// a Service, and a pod named web-istio-0. Its Envoy listens on all addresses.
func APIGateway(namespace, port, upstreamPort string) string {
	labels, _ := json.Marshal(APIGatewayLabels()) // strings are never refused
	return fmt.Sprintf(`
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web, namespace: %[1]s}
spec:
  gatewayClassName: istio
  listeners: [{name: http, port: %[2]s, protocol: HTTP}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: echo, namespace: %[1]s}
spec:
  parentRefs: [{name: web}]
  rules: [{backendRefs: [{group: networking.istio.io, kind: Hostname, name: echo.example, port: 80}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web-istio, namespace: %[1]s, labels: {gateway.networking.k8s.io/gateway-name: web, gateway.networking.k8s.io/gateway-class-name: istio}}
spec:
  type: LoadBalancer
  selector: {gateway.networking.k8s.io/gateway-name: web}
  ports: [{name: http, port: %[2]s, appProtocol: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-istio-0, namespace: %[1]s, labels: %[3]s}
spec: {containers: [{name: istio-proxy, image: none}]}
`, namespace, port, labels) + echo(namespace, upstreamPort)
}

// APIGatewayLabels are those that Istio's deployment controller gives the pods
// of the Gateway web.
func APIGatewayLabels() map[string]string {
	return map[string]string{
		"gateway.networking.k8s.io/gateway-name":       "web",
		"gateway.networking.k8s.io/gateway-class-name": "istio",
		"gateway.istio.io/managed":                     "istio.io-gateway-controller",
		"service.istio.io/canonical-name":              "web-istio",
		"service.istio.io/canonical-revision":          "latest",
		"sidecar.istio.io/inject":                      "false",
	}
}

// echo is the server on loopback.
func echo(namespace, port string) string {
	return fmt.Sprintf(`---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: echo, namespace: %s}
spec:
  hosts: [echo.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %s}]
  endpoints: [{address: 127.0.0.1}]
`, namespace, port)
}
