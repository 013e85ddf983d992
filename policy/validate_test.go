package policy

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestValidate covers what a file cannot hold, or only in other words.
func TestValidate(t *testing.T) {
	tests := map[string]struct {
		change func(*MirrorPolicy)
		want   []string // paths
	}{
		"default":            {func(p *MirrorPolicy) {}, nil},
		"zero":               {func(p *MirrorPolicy) { *p = MirrorPolicy{} }, []string{"apiVersion", "kind", "metadata.name", "metadata.namespace", "spec.mode", "spec.transport", "spec.detection.paranoia", "spec.nodes.service", "spec.nodes.port"}},
		"no number":          {func(p *MirrorPolicy) { p.Spec.Sampling.Percent = math.NaN() }, []string{"spec.sampling.percent"}},
		"infinite":           {func(p *MirrorPolicy) { p.Spec.Sampling.Adaptive.MinPercent = math.Inf(1) }, []string{"spec.sampling.adaptive.minPercent"}},
		"header in capitals": {func(p *MirrorPolicy) { p.Spec.Mask.Headers = []string{"Cookie"} }, []string{"spec.mask.headers[0]"}},
		"names in capitals": {func(p *MirrorPolicy) {
			p.Spec.Mask.Cookies = []string{"SID"}
			p.Spec.Mask.QueryParameters = []string{"Key"}
			p.Spec.Mask.FormFields = []string{"PIN"}
		}, []string{"spec.mask.cookies[0]", "spec.mask.queryParameters[0]", "spec.mask.formFields[0]"}},
		"long mask": {func(p *MirrorPolicy) {
			p.Spec.Mask.QueryParameters = []string{strings.Repeat("a", 128), strings.Repeat("a", 129)}
		}, []string{"spec.mask.queryParameters[1]"}},
		"too many masks": {func(p *MirrorPolicy) {
			p.Spec.Mask.Cookies = make([]string, 65)
			p.Spec.Mask.FormFields = make([]string, 65)
		}, []string{"spec.mask.cookies", "spec.mask.formFields"}},
		"session":             {func(p *MirrorPolicy) { p.Spec.Sampling.Session.Cookie = "JSESSIONID" }, nil},
		"two sessions":        {func(p *MirrorPolicy) { p.Spec.Sampling.Session = Session{Cookie: "a", Header: "b"} }, []string{"spec.sampling.session"}},
		"no cookie's name":    {func(p *MirrorPolicy) { p.Spec.Sampling.Session.Cookie = "a=b" }, []string{"spec.sampling.session.cookie"}},
		"session in capitals": {func(p *MirrorPolicy) { p.Spec.Sampling.Session.Header = "X-Session" }, []string{"spec.sampling.session.header"}},
		"session by ext_proc": {func(p *MirrorPolicy) { p.Spec.Transport = TransportExtProc; p.Spec.Sampling.Session.Cookie = "a" }, []string{"spec.sampling.session"}},
		"type in capitals":    {func(p *MirrorPolicy) { p.Spec.Body.Request.ContentTypes = []string{"Text/HTML"} }, []string{"spec.body.request.contentTypes[0]"}},
		"long name":           {func(p *MirrorPolicy) { p.Metadata.Name = strings.Repeat("a.", 126) + "a" }, nil},
		"too long name":       {func(p *MirrorPolicy) { p.Metadata.Name = strings.Repeat("a.", 127) + "a" }, []string{"metadata.name"}},
		"too many":            {func(p *MirrorPolicy) { p.Spec.Match = make([]Match, 65); p.Spec.Sampling.Always = make([]Class, 100) }, []string{"spec.match", "spec.sampling.always"}},
		"empty label":         {func(p *MirrorPolicy) { p.Spec.Selector = &Selector{MatchLabels: map[string]string{"": "x"}} }, []string{"spec.selector.matchLabels"}},
		"istio gateway":       {func(p *MirrorPolicy) { p.Spec.TargetRefs = []TargetRef{{GroupIstio, KindGateway, "public"}} }, nil},
		"no group":            {func(p *MirrorPolicy) { p.Spec.TargetRefs = []TargetRef{{"", "", "public"}} }, []string{"spec.targetRefs[0].group", "spec.targetRefs[0].kind"}},
		"whole collection": {func(p *MirrorPolicy) {
			p.Spec.Detection.Exclusions = []Exclusion{{942100, "REQUEST_COOKIES"}, {920100, ""}, {942100, "ARGS:json.items[0].q"}}
		}, nil},
		"service elsewhere": {func(p *MirrorPolicy) { p.Spec.Nodes.Service = "node.periscope" }, nil},
		"any host":          {func(p *MirrorPolicy) { p.Spec.Match = []Match{{Hosts: []string{"*", "*.a.example", "a"}}} }, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := Default()
			tt.change(&p)
			faults := p.Validate()
			var got []string
			for _, f := range faults {
				got = append(got, f.Path)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("faults differ (-want +got):\n%s%v", diff, faults)
			}
		})
	}
}

func TestParseQuantity(t *testing.T) {
	good := map[string]Quantity{
		"0": 0, "65536": 65536, "64k": 64000, "64Ki": 65536, "1M": 1e6, "1Mi": 1 << 20, "1.5Ki": 1536, "+2k": 2000, "-1": -1,
		"0.5Mi": 1 << 19, "2Gi": 2 << 30, "1T": 1e12, "7Ei": 7 << 60, "9223372036854775807": math.MaxInt64,
	}
	for s, want := range good {
		if got, err := ParseQuantity(s); err != nil || got != want {
			t.Errorf("ParseQuantity(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "k", "1 k", "64KB", "64K", "64kb", "64ki", "0.1", "1.0001Ki", "8Ei", "1e3", "100m", "0x10", "1_000", ".5k", "1.", "1/2", strings.Repeat("9", 21)} {
		if got, err := ParseQuantity(s); err == nil {
			t.Errorf("ParseQuantity(%q) = %d, want an error", s, got)
		}
	}
}

func TestNearest(t *testing.T) {
	words := []string{"sampling", "mode", "match", "ruleId"}
	for word, want := range map[string]string{"smapling": "sampling", "Mode": "mode", "mod": "mode", "matches": "match", "rule": "ruleId", "x": "", "body": "", strings.Repeat("m", 100): ""} {
		if got := nearest(word, words); got != want {
			t.Errorf("nearest(%q) = %q, want %q", word, got, want)
		}
	}
}

func TestFaultError(t *testing.T) {
	f := Fault{File: "shop.yaml", Line: 7, Column: 3, Path: "spec.sampling.percent", Problem: "must be between 0 and 100, got 250", Remedy: "set a percentage such as 100"}
	if got, want := f.Error(), "shop.yaml:7: spec.sampling.percent: must be between 0 and 100, got 250; set a percentage such as 100"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := (Fault{File: "a\nb", Problem: "is empty"}).Error(), `"a\nb": is empty`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := quote(strings.Repeat("a", 63) + "é"); got != `"`+strings.Repeat("a", 63)+`"…` {
		t.Errorf("cut within a character: %s", got)
	}
}
