package policy

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

const minimal = "apiVersion: periscope.dev/v1alpha1\nkind: MirrorPolicy\nmetadata: {name: shop}\n"

// example is the one of the documentation.
const example = `apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: public-api, namespace: istio-ingress}
spec:
  tenant: shop                       # allowed for this namespace by the operator's tenant table
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: public}]   # or selector.matchLabels
  mode: Monitor                      # Off | Monitor | Enforce
  match:   [{hosts: ["*.shop.example"], paths: [{type: PathPrefix, value: /api}]}]
  exclude: [{paths: [{type: Exact, value: /healthz}]}]
  sampling: {percent: 100, adaptive: {minPercent: 5}, always: [NewEndpoint, Authentication, Suspicious]}
  body: {request: {maxBytes: 64Ki}, response: {maxBytes: 16Ki, contentTypes: [application/json, text/*]}}
  mask: {headers: [authorization, cookie], jsonPaths: ["$.password"], detectors: [CreditCard]}
  application: storefront
  detection: {paranoia: 1, exclusions: [{ruleId: 942100, target: "ARGS:q"}]}
  nodes: {service: periscope-node, port: 5050}
`

func TestFaults(t *testing.T) {
	files, err := filepath.Glob("testdata/fault/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			for _, doc := range Parse(filepath.Base(file), data) {
				for _, f := range doc.Faults {
					fmt.Fprintln(&got, f.Error())
				}
			}
			if got.Len() == 0 {
				t.Error("no fault found")
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("faults differ (-want +got):\n%s", diff)
			}
		})
	}
}

// parseOne expects one document without faults.
func parseOne(t *testing.T, text string) *MirrorPolicy {
	t.Helper()
	docs := Parse("p.yaml", []byte(text))
	if len(docs) != 1 {
		t.Fatalf("%d documents, want 1: %+v", len(docs), docs)
	}
	for _, f := range docs[0].Faults {
		t.Error(f)
	}
	if docs[0].Policy == nil {
		t.Fatal("no policy")
	}
	return docs[0].Policy
}

func TestParseExample(t *testing.T) {
	want := &MirrorPolicy{
		APIVersion: APIVersion, Kind: Kind,
		Metadata: Metadata{Name: "public-api", Namespace: "istio-ingress"},
		Spec: Spec{
			Tenant:     "shop",
			TargetRefs: []TargetRef{{Group: "gateway.networking.k8s.io", Kind: "Gateway", Name: "public"}},
			Mode:       ModeMonitor,
			Transport:  TransportLua,
			Match:      []Match{{Hosts: []string{"*.shop.example"}, Paths: []PathMatch{{Type: PathPrefix, Value: "/api"}}}},
			Exclude:    []Match{{Paths: []PathMatch{{Type: PathExact, Value: "/healthz"}}}},
			Sampling:   Sampling{Percent: 100, Adaptive: Adaptive{MinPercent: 5}, Always: []Class{ClassNewEndpoint, ClassAuthentication, ClassSuspicious}},
			Body: Body{
				Request:  BodyLimit{MaxBytes: 65536, ContentTypes: []string{"*/*"}},
				Response: BodyLimit{MaxBytes: 16384, ContentTypes: []string{"application/json", "text/*"}},
			},
			Mask:        Mask{Headers: []string{"authorization", "cookie"}, QueryParameters: []string{"access_token"}, JSONPaths: []string{"$.password"}, Detectors: []Detector{DetectorCreditCard}},
			Application: "storefront",
			Detection:   Detection{Paranoia: 1, Exclusions: []Exclusion{{RuleID: 942100, Target: "ARGS:q"}}},
			Nodes:       Nodes{Service: "periscope-node", Port: 5050},
		},
	}
	if diff := cmp.Diff(want, parseOne(t, example)); diff != "" {
		t.Errorf("policy differs (-want +got):\n%s", diff)
	}
}

func TestParseDefaults(t *testing.T) {
	want := Default()
	want.Metadata.Name = "shop"
	if diff := cmp.Diff(&want, parseOne(t, minimal)); diff != "" {
		t.Errorf("policy differs (-want +got):\n%s", diff)
	}
	for _, f := range want.Validate() {
		t.Errorf("default policy: %v", f)
	}
}

// TestParseExplicit checks that what a document says outweighs every default,
// be it zero or empty.
func TestParseExplicit(t *testing.T) {
	p := parseOne(t, minimal+`spec:
  sampling: {percent: 0}
  body: {request: {maxBytes: 0, contentTypes: []}, response: {contentTypes: [Text/HTML]}}
  mask: {headers: []}
`)
	if s := p.Spec.Sampling; s.Percent != 0 || s.Adaptive.MinPercent != 0 {
		t.Errorf("sampling = %+v, want zeroes", s)
	}
	if b := p.Spec.Body.Request; b.MaxBytes != 0 || b.ContentTypes == nil || len(b.ContentTypes) != 0 {
		t.Errorf("request = %#v, want no bytes and no types", b)
	}
	if b := p.Spec.Body.Response; b.MaxBytes != 16<<10 || !cmp.Equal(b.ContentTypes, []string{"text/html"}) {
		t.Errorf("response = %#v, want 16Ki of text/html", b)
	}
	if h := p.Spec.Mask.Headers; h == nil || len(h) != 0 {
		t.Errorf("headers = %#v, want none", h)
	}
}

func TestParseForms(t *testing.T) {
	p := parseOne(t, "\ufeff"+`{"apiVersion": "periscope.dev/v1alpha1", "kind": "MirrorPolicy",
  "metadata": {"name": "shop", "creationTimestamp": "2026-01-31T12:00:00+01:00", "labels": {"a.b/c": "1"}},
  "spec": {"mode": "Off", "mask": {"headers": ["Cookie"], "cookies": ["SID"], "queryParameters": ["Key"], "formFields": ["user[Password]", "Schlüssel"]}, "sampling": {"percent": 2.5},
  "targetRefs": [{"name": "public"}], "match": [{"paths": [{"value": "/api/"}, {"value": "/"}, {"type": "Exact", "value": "/x/"}]}]}}`)
	if want := time.Date(2026, 1, 31, 11, 0, 0, 0, time.UTC); !p.Metadata.CreationTimestamp.Equal(want) {
		t.Errorf("created %v, want %v", p.Metadata.CreationTimestamp, want)
	}
	if diff := cmp.Diff([]PathMatch{{PathPrefix, "/api"}, {PathPrefix, "/"}, {PathExact, "/x/"}}, p.Spec.Match[0].Paths); diff != "" {
		t.Errorf("paths differ (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]TargetRef{{GroupGatewayAPI, KindGateway, "public"}}, p.Spec.TargetRefs); diff != "" {
		t.Errorf("targets differ (-want +got):\n%s", diff)
	}
	mask := Mask{Headers: []string{"cookie"}, Cookies: []string{"sid"}, QueryParameters: []string{"key"}, FormFields: []string{"user[password]", "schlüssel"}}
	if diff := cmp.Diff(mask, p.Spec.Mask); diff != "" {
		t.Errorf("masks differ (-want +got):\n%s", diff)
	}
	if p.Spec.Mode != ModeOff || p.Spec.Sampling.Adaptive.MinPercent != 2.5 {
		t.Errorf("spec = %+v", p.Spec)
	}
	null := parseOne(t, "apiVersion: periscope.dev/v1alpha1\nkind: MirrorPolicy\nmetadata: {name: shop, creationTimestamp: null}\n")
	if !null.Metadata.CreationTimestamp.IsZero() {
		t.Errorf("created %v, want never", null.Metadata.CreationTimestamp)
	}
}

func TestParseDocuments(t *testing.T) {
	type doc struct {
		Line   int
		ID     string
		Faults int
	}
	bad := strings.Replace(minimal, "shop", "bad", 1) + "spec: {mode: On}\n"
	tests := map[string]struct {
		text string
		want []doc
	}{
		"empty":                 {"", nil},
		"comments":              {"# a\n---\n# b\n---\n...\n", nil},
		"null":                  {"null\n---\n~\n", nil},
		"one":                   {"# first\n" + minimal, []doc{{2, "default/shop", 0}}},
		"marked":                {"---\n" + minimal + "---\n", []doc{{2, "default/shop", 0}}},
		"marker with content":   {"--- {apiVersion: periscope.dev/v1alpha1, kind: MirrorPolicy, metadata: {name: a}}\n", []doc{{1, "default/a", 0}}},
		"carriage returns":      {strings.ReplaceAll(minimal+"---\n"+minimal, "\n", "\r\n"), []doc{{1, "default/shop", 0}, {5, "default/shop", 0}}},
		"faulty with id":        {bad, []doc{{1, "default/bad", 1}}},
		"neighbours":            {bad + "---\n" + minimal + "---\n" + bad, []doc{{1, "default/bad", 1}, {6, "default/shop", 0}, {10, "default/bad", 1}}},
		"syntax between":        {minimal + "---\na: [\n---\n" + minimal, []doc{{1, "default/shop", 0}, {5, "", 1}, {7, "default/shop", 0}}},
		"end marker":            {minimal + "...\n" + minimal, []doc{{1, "default/shop", 0}, {5, "default/shop", 0}}},
		"dashes within a block": {minimal + "spec:\n  tenant: |-\n    ---\n", []doc{{1, "default/shop", 1}}},
		"name unknown":          {strings.Replace(minimal, "name:", "name: 5 #", 1), []doc{{3, "", 1}}},
		"name twice":            {minimal + "metadata: {name: other}\n", []doc{{1, "", 1}}},
		"other line separator":  {minimal + "\u2028---\u2028" + minimal, []doc{{1, "", 1}}},
		"utf-16":                {"\xff\xfea\x00", []doc{{1, "", 1}}},
		"directive":             {"%YAML 1.2\n---\n" + minimal, []doc{{1, "", 1}, {3, "default/shop", 0}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var got []doc
			for _, d := range Parse("p.yaml", []byte(tt.text)) {
				got = append(got, doc{d.Line, d.ID, len(d.Faults)})
				if (d.Policy == nil) != (len(d.Faults) > 0) {
					t.Errorf("line %d: policy %v beside faults %v", d.Line, d.Policy, d.Faults)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("documents differ (-want +got):\n%s\n%v", diff, Parse("p.yaml", []byte(tt.text)))
			}
		})
	}
}

func TestParseBounds(t *testing.T) {
	docs := Parse("p.yaml", bytes.Repeat([]byte("#"), MaxFileBytes+1))
	if len(docs) != 1 || len(docs[0].Faults) != 1 {
		t.Errorf("too large: %+v", docs)
	}
	docs = Parse("p.yaml", []byte(strings.Repeat(minimal+"---\n", MaxDocuments+5)))
	if len(docs) != MaxDocuments+1 || docs[MaxDocuments].Policy != nil || docs[MaxDocuments].ID != "" {
		t.Errorf("too many: %d documents", len(docs))
	}
	if docs = Parse("p.yaml", []byte(strings.Repeat("---\n}\n", 1000))); len(docs) != MaxDocuments+1 {
		t.Errorf("too many that are no YAML: %d documents", len(docs))
	}
	many := strings.Builder{}
	for i := range 1000 {
		fmt.Fprintf(&many, "k%d: 1\n", i)
	}
	docs = Parse("p.yaml", []byte(minimal+many.String()))
	if n := len(docs[0].Faults); n != maxFaults+1 {
		t.Errorf("%d faults, want %d", n, maxFaults+1)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(example))
	files, err := filepath.Glob("testdata/fault/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		lines := 1 + bytes.Count(data, []byte("\n"))
		for _, doc := range Parse("p.yaml", data) {
			if (doc.Policy == nil) != (len(doc.Faults) > 0) {
				t.Fatalf("policy %v beside faults %v", doc.Policy, doc.Faults)
			}
			for _, fault := range doc.Faults {
				s := fault.Error()
				if len(s) > 2000 || printable(s) != s || fault.Line < 1 || fault.Line > lines && !bytes.ContainsAny(data, "\r\u0085\u2028\u2029") {
					t.Errorf("bad fault, line %d of %d: %q", fault.Line, lines, s)
				}
			}
			if doc.Policy == nil {
				continue
			}
			if faults := doc.Policy.Validate(); len(faults) > 0 {
				t.Errorf("accepted, but %v", faults)
			}
			roundTrip(t, doc.Policy)
		}
	})
}

// roundTrip checks that a policy survives JSON, in which it is kept.
func roundTrip(t *testing.T, p *MirrorPolicy) {
	t.Helper()
	first, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var back MirrorPolicy
	if err := json.Unmarshal(first, &back); err != nil {
		t.Fatal(err)
	}
	second, err := json.Marshal(back)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Errorf("%s became %s", first, second)
	}
}

func BenchmarkParse(b *testing.B) {
	for name, data := range map[string][]byte{
		"example": []byte(example),
		"100":     []byte(strings.Repeat(example+"---\n", 100)),
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				Parse("p.yaml", data)
			}
		})
	}
}
