package detect

import (
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/corazawaf/coraza-coreruleset/v4/tests"
	"github.com/corazawaf/coraza/v3"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/decode"
	"go.yaml.in/yaml/v3"
)

// crsFile is the part of CRS's regression tests (go-ftw format) that is used.
type crsFile struct {
	RuleID int `yaml:"rule_id"`
	Tests  []struct {
		ID     int `yaml:"test_id"`
		Stages []struct {
			Input struct {
				Method     string            `yaml:"method"`
				URI        string            `yaml:"uri"`
				Version    string            `yaml:"version"`
				Headers    map[string]string `yaml:"headers"`
				Data       string            `yaml:"data"`
				Encoded    string            `yaml:"encoded_request"`
				Autofilled *bool             `yaml:"autocomplete_headers"`
			} `yaml:"input"`
			Output struct {
				Log struct {
					Expect   []int `yaml:"expect_ids"`
					NoExpect []int `yaml:"no_expect_ids"`
				} `yaml:"log"`
			} `yaml:"output"`
		} `yaml:"stages"`
	} `yaml:"tests"`
}

// TestCRSRegression runs CRS's own regression tests through our decoding at
// paranoia level 4: what CRS expects of a rule must hold with our values in
// its variables. Every sixteenth file by default; all with
// PERISCOPE_CRS_FULL=1, in some seconds. Left out are rules that are not
// loaded (see ruleFiles), responses (the suite's server echoes; there is none
// here) and raw requests, which no gateway would pass.
func TestCRSRegression(t *testing.T) {
	e := newEngine(t)
	waf, err := e.rules(maxParanoia)
	if err != nil {
		t.Fatal(err)
	}
	files, err := fs.Glob(tests.FS, "REQUEST-9[2-4]*/*.yaml")
	if err != nil || len(files) < 200 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	step := 16
	if os.Getenv("PERISCOPE_CRS_FULL") != "" {
		step = 1
	}
	var met, expected, silent, unwanted int
	for i := 0; i < len(files); i += step {
		b, err := fs.ReadFile(tests.FS, files[i])
		if err != nil {
			t.Fatal(err)
		}
		var f crsFile
		if err := yaml.Unmarshal(b, &f); err != nil {
			t.Fatalf("%s: %v", files[i], err)
		}
		if f.RuleID < 921000 || f.RuleID == 943120 {
			continue
		}
		for _, test := range f.Tests {
			for _, stage := range test.Stages {
				in := stage.Input
				if in.Encoded != "" {
					continue
				}
				ev := crsEvent(in.Method, in.URI, in.Version, in.Data, in.Headers, in.Autofilled == nil || *in.Autofilled)
				ids := matchedIDs(waf, ev)
				for _, id := range stage.Output.Log.Expect {
					if id < 921000 || id >= 949000 || id == 943120 {
						continue
					}
					if expected++; slices.Contains(ids, id) {
						met++
					} else {
						t.Logf("%d-%d: rule %d is missing", f.RuleID, test.ID, id)
					}
				}
				for _, id := range stage.Output.Log.NoExpect {
					if id < 921000 || id >= 949000 {
						continue
					}
					if silent++; slices.Contains(ids, id) {
						unwanted++
						t.Logf("%d-%d: rule %d is unwanted", f.RuleID, test.ID, id)
					}
				}
			}
		}
	}
	t.Logf("met %d of %d expected, %d of %d unwanted", met, expected, unwanted, silent)
	if expected < 100 || float64(met) < 0.99*float64(expected) || float64(unwanted) > 0.02*float64(silent) {
		t.Errorf("met %d of %d expected, %d of %d unwanted", met, expected, unwanted, silent)
	}
}

// matchedIDs are the rules that matched, before scoring.
func matchedIDs(waf coraza.WAF, ev *event.Event) []int {
	var ids []int
	for _, r := range evaluate(waf, &Input{Event: ev}, decode.ParseRequest(ev), nil) {
		ids = append(ids, r.Rule().ID())
	}
	return ids
}

func crsEvent(method, uri, version, data string, headers map[string]string, fill bool) *event.Event {
	e := &event.Event{N: 1, Source: "127.0.0.1:1", Protocol: version, Flags: event.FlagNoResponse}
	if e.Protocol == "" {
		e.Protocol = "HTTP/1.1"
	}
	if method == "" {
		method = "GET"
	}
	if uri == "" {
		uri = "/"
	}
	add := func(name, value string) {
		e.Request.Headers = append(e.Request.Headers, event.Field{Name: []byte(name), Value: []byte(value)})
	}
	add(":method", method)
	add(":path", uri)
	hasType := false
	for name, value := range headers {
		hasType = hasType || strings.EqualFold(name, "content-type")
		if strings.EqualFold(name, "host") {
			add(":authority", value)
			continue
		}
		add(name, value)
	}
	if data != "" && fill {
		if !hasType {
			add("Content-Type", "application/x-www-form-urlencoded")
		}
		add("Content-Length", fmt.Sprint(len(data)))
	}
	e.Request.Body, e.Request.BodyBytes = []byte(data), uint64(len(data))
	return e
}
