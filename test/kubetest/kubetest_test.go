package kubetest_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/test/kubetest"
)

// The parts come up and know Istio's and Gateway API's resources.
func TestStart(t *testing.T) {
	c := kubetest.Start(t)
	c.InstallIstio(t)
	c.InstallGatewayAPI(t)
	c.Apply(t, `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: web, namespace: istio-system}
spec:
  selector: {istio: gw}
  servers: [{port: {number: 8080, name: http, protocol: HTTP}, hosts: ["*"]}]
`)
	i := kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: c})
	res, err := http.Get("http://" + i.Monitoring + "/debug/configz")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	if res.StatusCode != 200 || !strings.Contains(string(body), `"name":"web"`) {
		t.Errorf("istiod's configuration: %d %s", res.StatusCode, body)
	}
}
