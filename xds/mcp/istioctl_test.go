package mcp_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// inherent is what istioctl says of any EnvoyFilter whatsoever.
const inherent = "EnvoyFilter exposes internal implementation details that may change at any time. Prefer other APIs if possible, and exercise extreme caution, especially around upgrades."

// The real istioctl finds nothing to say about what is rendered.
func TestIstioctl(t *testing.T) {
	istioctl := kubetest.Binary(t, "istioctl")
	beside := nodes(mirror.Endpoint{Host: "10.0.0.8", Port: 5050, Machine: "host-a"}, mirror.Endpoint{Host: "10.0.0.9", Port: 5050, Machine: strings.Repeat("host-b.", 30) + "example"})
	for name, tc := range map[string]struct {
		form  mcp.Form
		nodes []mirror.NodeService
	}{
		"EnvoyFilter machines":           {mcp.FormEnvoyFilter, beside},
		"TrafficExtension machines":      {mcp.FormTrafficExtension, beside},
		"EnvoyFilter":                    {mcp.FormEnvoyFilter, oneNode},
		"EnvoyFilter names":              {mcp.FormEnvoyFilter, nodes(mirror.Endpoint{Host: "nodes.example", Port: 5051}, mirror.Endpoint{Host: "fd00::9", Port: 5050})},
		"EnvoyFilter without nodes":      {mcp.FormEnvoyFilter, nil},
		"TrafficExtension":               {mcp.FormTrafficExtension, oneNode},
		"TrafficExtension names":         {mcp.FormTrafficExtension, nodes(mirror.Endpoint{Host: "nodes.example", Port: 5051}, mirror.Endpoint{Host: "fd00::9", Port: 5050})},
		"TrafficExtension without nodes": {mcp.FormTrafficExtension, nil},
		"TrafficExtension one address":   {mcp.FormTrafficExtension, nodes(mirror.Endpoint{Host: "10.0.0.9", Port: 5050}, mirror.Endpoint{Host: "10.0.0.9", Port: 5051})},
	} {
		t.Run(name, func(t *testing.T) {
			public := workload("public")
			public.Machines = []string{beside[0].Endpoints[0].Machine, beside[0].Endpoints[1].Machine}
			p := mirror.Compile(
				[]policy.MirrorPolicy{policyFor("public", func(s *policy.Spec) {
					s.Exclude = []policy.Match{{Hosts: []string{"*.shop.example"}, Paths: []policy.PathMatch{{Type: policy.PathExact, Value: `/é"\`}}}}
				}), policyFor("internal", nil)},
				mirror.Topology{Gateways: []mirror.Gateway{public, workload("internal")}, Nodes: tc.nodes})
			dir := t.TempDir()
			file := filepath.Join(dir, "objects.yaml")
			if err := os.WriteFile(file, []byte(render(t, config(tc.form), p)), 0o600); err != nil {
				t.Fatal(err)
			}
			// For analysis, the gateways' pods are there.
			pods := filepath.Join(dir, "pods.yaml")
			if err := os.WriteFile(pods, []byte(gatewayPods), 0o600); err != nil {
				t.Fatal(err)
			}
			istio := func(args ...string) string {
				t.Helper()
				cmd := exec.Command(istioctl, args...)
				cmd.Env = append(os.Environ(), "HOME="+dir, "KUBECONFIG="+filepath.Join(dir, "none"))
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Errorf("istioctl %s: %v\n%s", args[0], err, out)
				}
				return string(out)
			}
			for _, args := range [][]string{{"validate", "-f", file}, {"analyze", "--use-kube=false", "-A", file, pods}} {
				if said := findings(istio(args...), file, pods); len(said) > 0 {
					t.Errorf("%s says\n%s", args[0], strings.Join(said, "\n"))
				}
			}
		})
	}
}

// findings are the lines that say more than that all is well, or what is said
// of any EnvoyFilter.
func findings(out, file, pods string) []string {
	var said []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", line == "- "+file, line == "- "+pods, strings.HasSuffix(line, " is valid"), strings.Contains(line, "No validation issues found"):
		case strings.HasSuffix(line, "has warnings:"), strings.HasSuffix(line, ": "+inherent):
		default:
			said = append(said, line)
		}
	}
	return said
}

const gatewayPods = `
apiVersion: v1
kind: Namespace
metadata: {name: istio-ingress, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Pod
metadata:
  name: public-0
  namespace: istio-ingress
  labels: {istio: public}
spec: {containers: [{name: istio-proxy, image: proxyv2}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: internal-0
  namespace: istio-ingress
  labels: {istio: internal}
spec: {containers: [{name: istio-proxy, image: proxyv2}]}
`
