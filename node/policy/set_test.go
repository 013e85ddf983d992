package policy

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

func TestDecodeSetFaults(t *testing.T) {
	fit := func(change func(*nodev1.NodePolicy)) *nodev1.NodePolicy {
		p := monitor("default/a", 1)
		change(p)
		return p
	}
	long := strings.Repeat("x", maxNameBytes+1)
	// Strings that aren't UTF-8 can't be made by the library.
	invalid := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte("\xff"))
	for name, raw := range map[string][]byte{
		"not a NodePolicySet":               []byte("\xff\xff"),
		"invalid UTF-8":                     invalid,
		"revision is empty":                 encode(t, ""),
		"revision is longer":                encode(t, long),
		"id is empty":                       encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Id = "" })),
		"tenant is longer":                  encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Tenant = long })),
		"application is longer":             encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Application = long })),
		"unknown mode 0":                    encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Mode = 0 })),
		"unknown mode 77":                   encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Mode = 77 })),
		"paranoia 0":                        encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Paranoia = 0 })),
		"rule id -1":                        encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Exclusions[0].RuleId = -1 })),
		"target is longer":                  encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Exclusions[0].Target = strings.Repeat("x", maxTargetBytes+1) })),
		"1001 exclusions":                   encode(t, "r", fit(func(p *nodev1.NodePolicy) { p.Exclusions = make([]*nodev1.Exclusion, maxExclusions+1) })),
		"another one has the id":            encode(t, "r", monitor("default/a", 1), monitor("default/a", 2)),
		"10001 policies":                    encode(t, "r", make([]*nodev1.NodePolicy, maxPolicies+1)...),
		"bytes, more than":                  make([]byte, maxSetBytes+1),
		"gateway is empty":                  streaming(t, &nodev1.GatewaySettings{Revision: "r", Settings: []byte("{}")}),
		"gateway 0: the revision is longer": streaming(t, &nodev1.GatewaySettings{Gateway: "ns/a", Revision: long, Settings: []byte("{}")}),
		"it has no settings":                streaming(t, &nodev1.GatewaySettings{Gateway: "ns/a", Revision: "r"}),
		"another one has the id \"ns/a\"":   streaming(t, &nodev1.GatewaySettings{Gateway: "ns/a", Revision: "r", Settings: []byte("{}")}, &nodev1.GatewaySettings{Gateway: "ns/a", Revision: "s", Settings: []byte("{}")}),
		"10001 gateways":                    streaming(t, make([]*nodev1.GatewaySettings, maxGateways+1)...),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := decodeSet(raw); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// FuzzDecodeSet: whatever comes, a set that is taken is within its bounds.
func FuzzDecodeSet(f *testing.F) {
	f.Add([]byte{})
	f.Add(encode(f, "rev1", monitor("default/a", 1), monitor("default/b", 4)))
	f.Add(encode(f, "rev1", monitor("default/a", 1), monitor("default/a", 4)))
	f.Add([]byte("\x0a\x03abc\x12\x05\x0a\x01x\x20\x02"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := decodeSet(raw)
		if err != nil {
			return
		}
		if r.name == "" || len(r.policies) > maxPolicies {
			t.Errorf("revision %q with %d policies", r.name, len(r.policies))
		}
		for id, p := range r.policies {
			if id != p.ID || id == "" || len(id) > maxNameBytes || p.Paranoia < 1 || p.Paranoia > 4 || p.Mode == "" || len(p.Exclusions) > maxExclusions {
				t.Errorf("policy %q: %+v", id, p)
			}
		}
	})
}

func TestMirrors(t *testing.T) {
	c, err := New(Config{Address: "127.0.0.1:1", NodeID: "node~one", Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if !c.Mirrors() {
		t.Error("nothing is wanted before policies come")
	}
	for i, want := range []bool{true, false, true} {
		r := &revision{name: fmt.Sprint(i), policies: map[string]Policy{"a": {Mode: ModeOff}}}
		if want {
			r.policies["b"] = Policy{Mode: ModeMonitor}
		}
		if c.adopt(r); c.Mirrors() != want {
			t.Errorf("revision %d: %v", i, !want)
		}
	}
}

// streaming is a set of no policies, and settings of gateways.
func streaming(t testing.TB, gateways ...*nodev1.GatewaySettings) []byte {
	t.Helper()
	raw, err := proto.Marshal(&nodev1.NodePolicySet{Revision: "r", Gateways: gateways})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Settings are given by their revision, or the newest that are known.
func TestSettings(t *testing.T) {
	c := &Client{metrics: &metrics{policies: prometheus.NewGauge(prometheus.GaugeOpts{})}}
	c.current.Store(&history{})
	if _, ok := c.Settings("ns/a", "1"); ok {
		t.Error("settings where none are known")
	}
	for _, revision := range []string{"1", "2"} {
		r, err := decodeSet(streaming(t, &nodev1.GatewaySettings{Gateway: "ns/a", Revision: revision, Settings: []byte("of " + revision)}))
		if err != nil {
			t.Fatal(err)
		}
		r.name = revision
		c.adopt(r)
	}
	for asked, want := range map[string]string{"1": "of 1", "2": "of 2", "3": "of 2"} {
		if got, ok := c.Settings("ns/a", asked); !ok || string(got.Encoded) != want {
			t.Errorf("revision %s gives %q, want %q", asked, got.Encoded, want)
		}
	}
	if _, ok := c.Settings("ns/b", "1"); ok {
		t.Error("settings of another gateway")
	}
}
