package kubetest

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// Istiod is a running istiod.
type Istiod struct {
	*Process
	GRPC       string // xDS for proxies, plain text, host:port
	Monitoring string // host:port of /metrics and /debug
	HTTP       string // host:port of /ready and /debug
	run        func() *Process
}

// IstiodConfig is what an istiod is started with.
type IstiodConfig struct {
	Cluster       *Cluster
	Name          string   // of its pod; default istiod-0
	Sources       []string // addresses for meshConfig.configSources beside k8s://, such as xds://127.0.0.1:15051
	MeshConfig    string   // further lines of the mesh config
	Revision      string
	GatewayAPI    bool // on, but for what deploys gateways: that takes the injector's templates
	Environment   []string
	BindHost      string // default 127.0.0.1
	Monitoring    string // host:port of /metrics and /debug; default any
	NoWait        bool   // don't wait until it is ready
	MeshConfigRaw string // in place of all of the mesh config
}

// StartIstiod starts an istiod that speaks to Envoys from other makers than
// Istio: without the extensions that only its own proxy has.
func StartIstiod(t testing.TB, c IstiodConfig) *Istiod {
	t.Helper()
	path := Binary(t, "istiod")
	dir := t.TempDir()
	if c.BindHost == "" {
		c.BindHost = "127.0.0.1"
	}
	if c.Name == "" {
		c.Name = "istiod-0"
	}
	mesh := c.MeshConfigRaw
	if mesh == "" {
		var b strings.Builder
		b.WriteString("enableAutoMtls: false\nenableTracing: false\nconfigSources:\n- address: k8s://\n")
		for _, s := range c.Sources {
			fmt.Fprintf(&b, "- address: %s\n", s)
		}
		mesh = b.String() + c.MeshConfig
	}
	meshFile := filepath.Join(dir, "mesh.yaml")
	writeFile(t, meshFile, mesh)
	i := &Istiod{GRPC: addr(t, c.BindHost), Monitoring: addr(t, c.BindHost), HTTP: addr(t, c.BindHost)}
	if c.Monitoring != "" {
		i.Monitoring = c.Monitoring
	}
	_, ctrlz, _ := strings.Cut(envoytest.FreeAddr(t), ":")
	environment := append([]string{
		"POD_NAME=" + c.Name, "POD_NAMESPACE=istio-system", "CLUSTER_ID=test", "ENABLE_CA_SERVER=false", "INJECT_ENABLED=false",
		"VALIDATION_WEBHOOK_CONFIG_NAME=", "INJECTION_WEBHOOK_CONFIG_NAME=", "PILOT_ENABLE_METADATA_EXCHANGE=false", "PILOT_ENABLE_ALPN_FILTER=false",
		"REVISION=" + c.Revision, fmt.Sprint("PILOT_ENABLE_GATEWAY_API=", c.GatewayAPI), "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER=false",
	}, c.Environment...)
	i.run = func() *Process {
		t.Helper()
		return Run(t, c.Name, environment, path, "discovery", "--registries=Kubernetes", "--kubeconfig="+c.Cluster.Kubeconfig, "--meshConfig="+meshFile,
			"--networksConfig=/nonexistent", "--grpcAddr="+i.GRPC, "--secureGRPCAddr=", "--httpAddr="+i.HTTP, "--httpsAddr=", "--monitoringAddr="+i.Monitoring,
			"--ctrlz_address=127.0.0.1", "--ctrlz_port="+ctrlz)
	}
	i.Process = i.run()
	if !c.NoWait {
		i.AwaitReady(t)
	}
	return i
}

// Restart starts an istiod that has ended again, at the same addresses, and
// waits until it is ready.
func (i *Istiod) Restart(t testing.TB) {
	t.Helper()
	i.Process = i.run()
	i.AwaitReady(t)
}

// AwaitReady waits until istiod is ready.
func (i *Istiod) AwaitReady(t testing.TB) {
	t.Helper()
	i.await(t, i.name+" is ready", func() bool {
		res, err := http.Get("http://" + i.HTTP + "/ready")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
}

// addr is a free address on a host of this machine.
func addr(t testing.TB, host string) string {
	t.Helper()
	_, port, _ := strings.Cut(envoytest.FreeAddr(t), ":")
	return host + ":" + port
}
