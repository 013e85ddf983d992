package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/test/kubetest"
)

// What deploy/ has for nodes is taken by a real API server and by systemd, and
// states the CPU's weight and no quota.
func TestDeployNode(t *testing.T) {
	t.Run("kubernetes", func(t *testing.T) {
		c := kubetest.Start(t)
		c.Namespace(t, "istio-ingress")
		manifest, err := os.ReadFile("../../deploy/kubernetes/node.yaml")
		if err != nil {
			t.Fatal(err)
		}
		c.Apply(t, string(manifest))
		var set struct {
			Spec struct {
				Template struct {
					Spec struct {
						Containers []struct {
							Args      []string
							Resources struct{ Requests, Limits map[string]string }
						}
					}
				}
			}
		}
		c.Get(t, "/apis/apps/v1/namespaces/istio-ingress/daemonsets/periscope-node", &set)
		container := set.Spec.Template.Spec.Containers[0]
		if r := container.Resources; r.Requests["cpu"] != "100m" || r.Limits["cpu"] != "" {
			t.Errorf("resources %+v", r)
		}
		// Every flag is one that there is; the files are not there.
		out, err := exec.Command(program, container.Args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "/tls/") {
			t.Errorf("periscope %v: %v\n%s", container.Args, err, out)
		}
	})
	t.Run("systemd", func(t *testing.T) {
		analyze, err := exec.LookPath("systemd-analyze")
		if err != nil {
			t.Skip("no systemd-analyze on PATH")
		}
		unit, err := os.ReadFile("../../deploy/systemd/periscope-node.service")
		if err != nil {
			t.Fatal(err)
		}
		if text := string(unit); !strings.Contains(text, "\nCPUWeight=10\n") || strings.Contains(text, "\nCPUQuota=") {
			t.Error("no weight of 10, or a quota")
		}
		file := filepath.Join(t.TempDir(), "periscope-node.service")
		mustWrite(t, file, strings.Replace(string(unit), "/usr/local/bin/periscope", program, 1))
		if out, err := exec.Command(analyze, "verify", "--man=no", file).CombinedOutput(); err != nil || strings.Contains(string(out), "periscope-node.service:") {
			t.Errorf("%v\n%s", err, out)
		}
	})
}
