package mcp_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
	"github.com/periscope-mesh/periscope/test/kubetest"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// A real istiod takes more than 16 MiB in one answer, becomes ready and holds
// all of it; and of an edit, what changed.
func TestRealIstiodHoldsMuch(t *testing.T) {
	const gateways, least = 600, 16 << 20
	kubetest.Binary(t, "istiod")
	cluster := kubetest.Start(t)
	cluster.InstallIstio(t)
	server, address := serve(t)
	names := make([]string, gateways)
	for i := range names {
		names[i] = fmt.Sprintf("gateway-%03d", i)
	}
	var maker mcp.Maker
	publish := func(names ...string) map[string][]mcp.Item {
		t.Helper()
		s, err := maker.Make(config(""), plan(names...))
		if err != nil {
			t.Fatal(err)
		}
		server.SetSnapshot(mcp.Key(""), s.Snapshot)
		return s.Items
	}
	items := publish(names...)
	bytes := 0
	for _, r := range server.Snapshots()[mcp.Key("")].Resources(envoyFilterType) {
		bytes += len(r.Any.GetValue())
	}
	if bytes < least {
		t.Fatalf("%d bytes are too few", bytes)
	}

	start := time.Now()
	i := kubetest.StartIstiod(t, kubetest.IstiodConfig{Cluster: cluster, Sources: []string{"xds://" + address}})
	t.Logf("ready %v after its start, served %d MiB", time.Since(start).Round(time.Millisecond), bytes>>20)
	holds := func(what string, items map[string][]mcp.Item) {
		t.Helper()
		start := time.Now()
		envoytest.Eventually(t, time.Minute, what, func() bool {
			held := held(t, i)
			for _, list := range items {
				for _, item := range list {
					if held[item.Name] != item.Version {
						return false
					}
				}
			}
			return len(held) == 2*len(items)
		})
		t.Logf("%s after %v", what, time.Since(start).Round(time.Millisecond))
	}
	holds("istiod holds all of it", items)
	holds("istiod holds all but one gateway's", publish(names[1:]...))
	holds("istiod holds the new gateway's too", publish(append(names[1:], "one-more")...))
	if out := i.Output(); strings.Contains(out, "Error adding a new resource") || strings.Contains(out, "Error unmarshalling") {
		t.Error("istiod has refused a resource")
	}
}

// held gives the versions of our resources that an istiod has, by name.
func held(t *testing.T, i *kubetest.Istiod) map[string]string {
	t.Helper()
	res, err := http.Get("http://" + i.Monitoring + "/debug/configz")
	if err != nil {
		return nil
	}
	defer res.Body.Close()
	var list []struct {
		Kind     string
		Metadata struct{ Name, ResourceVersion string }
	}
	if err := json.NewDecoder(res.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, o := range list {
		if strings.HasPrefix(o.Metadata.Name, mcp.DefaultPrefix) {
			out[o.Metadata.Name] = o.Metadata.ResourceVersion
		}
	}
	return out
}
