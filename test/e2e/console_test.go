package e2e

import (
	"fmt"
	"math"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// loadNow is a part of GET /api/v1/load.
type loadNow struct {
	Current  bool
	Demand   []*float64
	Analysed []*float64
	Shares   []struct {
		Policy         string
		CeilingPercent float64
		Percent        []*float64
	}
	NotAnalysed []struct {
		Reason string
		Total  float64
	}
	Nodes []struct{ Node, State string }
}

func (l loadNow) total(reason string) float64 {
	for _, r := range l.NotAnalysed {
		if r.Reason == reason {
			return r.Total
		}
	}
	return math.NaN()
}

// most is the highest of the values that are known.
func most(values []*float64) (most float64) {
	for _, v := range values {
		if v != nil {
			most = max(most, *v)
		}
	}
	return most
}

// Of a sample, counts are estimates that are right within their error; and the Load
// page has what was sampled out, also from a console that runs by itself, and while
// the control plane is away.
func TestSampleIsEstimated(t *testing.T) {
	const sent = 400
	file := filepath.Join(t.TempDir(), "policy.yaml")
	mustWrite(t, file, `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: quarter}
spec:
  sampling: {percent: 25}
`)
	r := newRig(t).up(t, "--policy", file)
	envoytest.Eventually(t, 10*time.Second, "the node's counters are followed", func() bool {
		var l loadNow
		getJSON(t, "http://"+r.console+"/api/v1/load", &l)
		n := len(l.Analysed)
		return n > 0 && l.Analysed[n-1] != nil
	})
	for range sent {
		get(t, "http://"+r.http+"/etc/passwd")
	}
	var estimated struct {
		Attacks []struct {
			ID                 string
			Hits               float64
			EstimatedHits      float64
			EstimatedHitsError float64
		}
	}
	envoytest.Eventually(t, 5*time.Second, "all that was copied is counted", func() bool {
		getJSON(t, "http://"+r.console+"/api/v1/attacks", &estimated)
		return len(estimated.Attacks) == 1 && estimated.Attacks[0].Hits > 0 && estimated.Attacks[0].Hits == r.mirrored(t)
	})
	a := estimated.Attacks[0]
	if a.EstimatedHits != 4*a.Hits || math.Abs(a.EstimatedHitsError-math.Sqrt(12*a.Hits)) > 1e-9 || math.Abs(a.EstimatedHits-sent) > 5*a.EstimatedHitsError {
		t.Errorf("of %d: %+v", sent, a)
	}
	_, page := get(t, "http://"+r.console+"/attacks/"+a.ID)
	if want := fmt.Sprintf("≈\u202f%.0f ±\u202f%.0f", a.EstimatedHits, a.EstimatedHitsError); !strings.Contains(page, want) {
		t.Errorf("the attack's page lacks %q", want)
	}

	other := envoytest.FreeAddr(t)
	alone := start(t, "console", "--data", r.dataDir, "--console", other, "--control-debug", r.debug)
	alone.waitFor("console started")
	for _, addr := range []string{r.console, other} {
		var l loadNow
		envoytest.Eventually(t, 10*time.Second, "the load is told", func() bool {
			l = loadNow{}
			getJSON(t, "http://"+addr+"/api/v1/load", &l)
			// Those left out after the last that was copied are told with the next.
			out := l.total("sampled_out")
			return l.Current && most(l.Analysed) > 0 && most(l.Demand) > 0 && out <= sent-a.Hits && out > sent-a.Hits-40 && len(l.Shares) == 1 && len(l.Nodes) == 1
		})
		if s := l.Shares[0]; s.Policy != "default/quarter" || s.CeilingPercent != 25 || most(s.Percent) != 25 || l.Nodes[0].Node != "embedded" || l.Nodes[0].State != "reporting" {
			t.Errorf("at %s: %+v, %+v", addr, s, l.Nodes)
		}
		if lost := l.total("lost"); lost != 0 {
			t.Errorf("%v are lost", lost)
		}
	}
	r.stop(syscall.SIGTERM)
	envoytest.Eventually(t, 15*time.Second, "that the control plane is away is said", func() bool {
		_, page := get(t, "http://"+other+"/load")
		return strings.Contains(page, "Not current.") && strings.Contains(page, "default/quarter")
	})
	if status, _ := get(t, "http://"+other+"/load/now"); status != http.StatusOK {
		t.Errorf("what is refreshed: %d", status)
	}
}
