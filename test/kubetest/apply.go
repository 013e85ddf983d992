package kubetest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// Apply creates or updates objects from YAML, by server-side apply. A kind that
// the API does not know yet, because its definition was applied a moment ago,
// is waited for.
func (c *Cluster) Apply(t testing.TB, text string) {
	t.Helper()
	c.apply(t, text, "")
}

// ApplyStatus is Apply for the status of objects that exist.
func (c *Cluster) ApplyStatus(t testing.TB, text string) {
	t.Helper()
	c.apply(t, text, "/status")
}

func (c *Cluster) apply(t testing.TB, text, subresource string) {
	t.Helper()
	for d := yaml.NewDecoder(strings.NewReader(text)); ; {
		var object map[string]any
		if err := d.Decode(&object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
		if object == nil {
			continue
		}
		body, err := json.Marshal(object)
		if err != nil {
			t.Fatal(err)
		}
		envoytest.Eventually(t, 20*time.Second, fmt.Sprintf("%v is applied", object["kind"]), func() bool {
			path, err := c.path(t, object)
			if err != nil {
				return false
			}
			status, out, err := c.do(t.Context(), http.MethodPatch, path+subresource+"?fieldManager=kubetest&force=true", "application/apply-patch+yaml", body)
			if err != nil {
				return false
			}
			if status >= 400 && status != http.StatusNotFound && status != http.StatusServiceUnavailable {
				t.Fatalf("apply %s: %d %s", path, status, out)
			}
			return status < 300
		})
	}
}

// Delete deletes an object, named as in Apply.
func (c *Cluster) Delete(t testing.TB, text string) {
	t.Helper()
	var object map[string]any
	if err := yaml.Unmarshal([]byte(text), &object); err != nil {
		t.Fatal(err)
	}
	path, err := c.path(t, object)
	if err != nil {
		t.Fatal(err)
	}
	if status, out, err := c.do(t.Context(), http.MethodDelete, path, "", nil); err != nil || status >= 300 {
		t.Fatalf("delete %s: %d %s %v", path, status, out, err)
	}
}

// Get reads an object by its path into v.
func (c *Cluster) Get(t testing.TB, path string, v any) {
	t.Helper()
	status, out, err := c.do(t.Context(), http.MethodGet, path, "", nil)
	if err != nil || status != http.StatusOK {
		t.Fatalf("get %s: %d %s %v", path, status, out, err)
	}
	if err := json.Unmarshal(out, v); err != nil {
		t.Fatal(err)
	}
}

// path is an object's place in the API, by discovery.
func (c *Cluster) path(t testing.TB, object map[string]any) (string, error) {
	version, _ := object["apiVersion"].(string)
	kind, _ := object["kind"].(string)
	metadata, _ := object["metadata"].(map[string]any)
	name, _ := metadata["name"].(string)
	namespace, _ := metadata["namespace"].(string)
	base := "/apis/" + version
	if !strings.Contains(version, "/") {
		base = "/api/" + version
	}
	status, out, err := c.do(t.Context(), http.MethodGet, base, "", nil)
	if err != nil || status != http.StatusOK {
		return "", fmt.Errorf("discover %s: %d %w", version, status, err)
	}
	var list struct {
		Resources []struct {
			Name, Kind string
			Namespaced bool
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return "", err
	}
	for _, r := range list.Resources {
		if r.Kind != kind || strings.Contains(r.Name, "/") {
			continue
		}
		if r.Namespaced {
			if namespace == "" {
				namespace = "default"
			}
			base += "/namespaces/" + namespace
		}
		return base + "/" + r.Name + "/" + name, nil
	}
	return "", fmt.Errorf("%s has no kind %s", version, kind)
}

// ServiceAccountToken makes a service account, unless there is one, and gives a
// token of it for an audience, as the projected volume of a pod has it. Without
// an audience it is for the API server itself.
func (c *Cluster) ServiceAccountToken(t testing.TB, namespace, name, audience string) string {
	t.Helper()
	c.Apply(t, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: "+name+", namespace: "+namespace+"}\n")
	var review struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Spec       struct {
			Audiences         []string `json:"audiences,omitempty"`
			ExpirationSeconds int      `json:"expirationSeconds"`
		} `json:"spec"`
		Status struct {
			Token string `json:"token"`
		} `json:"status,omitzero"`
	}
	review.APIVersion, review.Kind, review.Spec.ExpirationSeconds = "authentication.k8s.io/v1", "TokenRequest", 3600
	if audience != "" {
		review.Spec.Audiences = []string{audience}
	}
	body, err := json.Marshal(review)
	if err != nil {
		t.Fatal(err)
	}
	path := "/api/v1/namespaces/" + namespace + "/serviceaccounts/" + name + "/token"
	status, out, err := c.do(t.Context(), http.MethodPost, path, "application/json", body)
	if err != nil || status >= 300 {
		t.Fatalf("request a token of %s/%s: %d %s %v", namespace, name, status, out, err)
	}
	if err := json.Unmarshal(out, &review); err != nil || review.Status.Token == "" {
		t.Fatalf("request a token of %s/%s: %v", namespace, name, err)
	}
	return review.Status.Token
}

// Namespace makes a namespace.
func (c *Cluster) Namespace(t testing.TB, name string) {
	t.Helper()
	c.Apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+name+"}\n")
}

// InstallIstio applies Istio's resource definitions and namespace.
func (c *Cluster) InstallIstio(t testing.TB) {
	t.Helper()
	c.Apply(t, moduleFile(t, "istio.io/api", "kubernetes/customresourcedefinitions.gen.yaml"))
	c.Namespace(t, "istio-system")
}

// InstallGatewayAPI applies Gateway API's standard resource definitions.
func (c *Cluster) InstallGatewayAPI(t testing.TB) {
	t.Helper()
	dir := filepath.Join(moduleDir(t, "sigs.k8s.io/gateway-api"), "config", "crd", "standard")
	files, err := filepath.Glob(filepath.Join(dir, "gateway.networking.k8s.io_*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no definitions in %s: %v", dir, err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		c.Apply(t, string(raw))
	}
}

func moduleFile(t testing.TB, module, file string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(moduleDir(t, module), file))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func moduleDir(t testing.TB, module string) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		t.Fatalf("find module %s: %v", module, err)
	}
	return string(bytes.TrimSpace(out))
}
