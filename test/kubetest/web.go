package kubetest

import "fmt"

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
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: echo, namespace: %[1]s}
spec:
  hosts: [echo.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[4]s}]
  endpoints: [{address: 127.0.0.1}]
`, namespace, selector, port, upstreamPort)
}
