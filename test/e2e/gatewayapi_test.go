package e2e

import (
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/test/netnstest"
)

const apiPolicy = `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: web, namespace: gw-ns}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: web}]
`

// strayPolicies name a Gateway that does not exist, and one that is no ingress.
const strayPolicies = `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: nowhere, namespace: gw-ns}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: missing}]
---
apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: inside, namespace: gw-ns}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: inner}]
---
`

const waypoint = `---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: inner, namespace: gw-ns}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
`

// The same path with an istiod that has the Gateway API enabled, for a Gateway
// of that API; what leads to no gateway is said, with its reason.
func TestGatewayAPI(t *testing.T) {
	if !netnstest.Isolate(t) { // its Envoy listens on all addresses
		return
	}
	m := startMeshOf(t, meshConfig{gatewayAPI: true, pod: "web-istio-0", labels: kubetest.APIGatewayLabels(), policies: strayPolicies + apiPolicy,
		objects: func(namespace, port, upstreamPort string) string {
			return kubetest.APIGateway(namespace, port, upstreamPort) + waypoint
		}})
	m.follows(t, apiPolicy, "gw-ns/web")

	var state struct {
		Attachments []struct {
			Policy             string
			Gateways, Problems []string
		}
		Unresolved []struct {
			Target struct{ Group, Namespace, Name string }
			Reason string
		}
	}
	getJSON(t, "http://"+m.debug+"/debug/policyz", &state)
	want := map[string]string{"gw-ns/web": "", "gw-ns/nowhere": `"missing"`, "gw-ns/inside": `"inner"`}
	if len(state.Attachments) != len(want) {
		t.Errorf("attachments: %+v", state.Attachments)
	}
	for _, a := range state.Attachments {
		problems := strings.Join(a.Problems, "; ")
		if problem := want[a.Policy]; !strings.Contains(problems, problem) || (problem == "") != (problems == "") || (problem == "") != (len(a.Gateways) == 1) {
			t.Errorf("%+v, want a problem with %s", a, problem)
		}
	}
	if u := state.Unresolved; len(u) != 1 || u[0].Target.Group != "gateway.networking.k8s.io" || u[0].Target.Namespace != "gw-ns" || u[0].Target.Name != "inner" || !strings.Contains(u[0].Reason, "waypoint") {
		t.Errorf("unresolved: %+v", u)
	}
}
