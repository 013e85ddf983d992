package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/status"

	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

var update = flag.Bool("update", false, "write goldens")

// The test binary is its own server process, as the program is.
func TestMain(m *testing.M) {
	if config := os.Getenv(serverEnv); config != "" {
		os.Exit(serveMain(config))
	}
	goleak.VerifyTestMain(m)
}

// A whole, very short run: every edit reaches exactly those whom it concerns.
func TestRun(t *testing.T) {
	b := &bench{rounds: 2, deadline: time.Now().Add(time.Hour), progress: t.Output(), profile: filepath.Join(t.TempDir(), "cpu.prof")}
	got, err := b.all(t.Context(), []stage{{2, true}, {10, false}})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].rounds != 2 || got[1].rounds != 2 {
		t.Fatalf("got %+v", got)
	}
	for _, m := range got {
		for _, name := range m.servers() {
			f := m.figures[name]
			for _, kind := range m.edits() {
				p := f.edits[kind]
				if p == nil || len(p.millis) != 2 || !(p.millis[0] > 0) || !(p.cpu[0] > 0) || !(p.bytes[0] > 0) {
					t.Errorf("%v, %s, %s: %+v", m.stage, name, kind, p)
				}
			}
			if f.before <= 0 || f.connected <= 0 || f.peak < f.connected {
				t.Errorf("%v, %s: %+v", m.stage, name, f)
			}
		}
	}
	// All settings of ten gateways are more than those of one.
	for name, f := range got[1].figures {
		if one, all := f.edits[editOne].bytes[0], f.edits[editAll].bytes[0]; all < 5*one || all > 20*one {
			t.Errorf("%s sent %.0f bytes for one gateway, %.0f for all ten", name, one, all)
		}
	}
	if _, err := os.Stat(b.profile); err != nil {
		t.Error(err)
	}
}

func TestOnlyOursServesIstiods(t *testing.T) {
	if got := (stage{mesh: true}).servers(); !slices.Equal(got, []string{ours}) {
		t.Errorf("got %v", got)
	}
	b, err := newBackend(peer, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.setMesh(nil); err == nil {
		t.Error("the peer takes a mesh")
	}
	if _, err := newBackend("other", 1, nil); err == nil {
		t.Error("a server that doesn't exist is made")
	}
}

// A server process that can't do what it is told says so, and goes on.
func TestServerRefuses(t *testing.T) {
	h, err := startChild(t.Context(), serverConfig{Name: ours, Clients: 1}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []request{{Op: "dance"}, {Op: opEdit, Edit: "none", Times: 1}} {
		if _, err := h.ask(t.Context(), r); err == nil || !strings.Contains(err.Error(), "unknown") {
			t.Errorf("%+v: got %v", r, err)
		}
	}
	if _, err := h.ask(t.Context(), request{Op: opFill}); err != nil {
		t.Error(err)
	}
	if err := h.stop(); err != nil {
		t.Error(err)
	}
	if _, err := h.ask(t.Context(), request{Op: opFill}); err == nil {
		t.Error("a server that has ended answers")
	}
}

func TestServerThatDoesNotStart(t *testing.T) {
	if _, err := startChild(t.Context(), serverConfig{Name: "other"}, io.Discard); err == nil {
		t.Error("no error")
	}
	if err := serve("{", nil, nil); err == nil {
		t.Error("a configuration that is no JSON is accepted")
	}
}

func TestConverse(t *testing.T) {
	var out bytes.Buffer
	s := &served{tally: newTally()}
	s.tally.acks.Store(7)
	if err := s.converse("127.0.0.1:1", strings.NewReader(`{"op":"count"}`), &out); err != nil {
		t.Fatal(err)
	}
	var got []reply
	for d := json.NewDecoder(&out); d.More(); {
		var r reply
		if err := d.Decode(&r); err != nil {
			t.Fatal(err)
		}
		got = append(got, r)
	}
	if d := cmp.Diff([]reply{{Address: "127.0.0.1:1"}, {Acks: 7}}, got); d != "" {
		t.Error(d)
	}
	if err := s.converse("", strings.NewReader("x"), io.Discard); err == nil {
		t.Error("a request that is no JSON is accepted")
	}
}

func TestTally(t *testing.T) {
	c := newTally()
	c.expect(2)
	for _, m := range []any{
		&discovery.DeltaDiscoveryRequest{TypeUrl: "t"},                                  // subscribes
		&discovery.DiscoveryRequest{TypeUrl: "t", ResponseNonce: "made up"},             // subscribes, as istiod does
		&discovery.DiscoveryRequest{TypeUrl: "t", ResponseNonce: "1", VersionInfo: "v"}, // acknowledges
		&discovery.DeltaDiscoveryRequest{TypeUrl: "t", ResponseNonce: "2", ErrorDetail: &status.Status{}},
	} {
		c.received(m)
	}
	if a, n := c.acks.Load(), c.nacks.Load(); a != 1 || n != 1 || len(c.done) != 0 {
		t.Errorf("%d acknowledged, %d refused, %d done; want 1, 1, 0", a, n, len(c.done))
	}
	c.received(&discovery.DeltaDiscoveryRequest{TypeUrl: "t", ResponseNonce: "3"})
	if len(c.done) != 1 {
		t.Error("the last acknowledgement is not noticed")
	}
	if c.expect(1); len(c.done) != 0 {
		t.Error("an old end is left")
	}
}

// An edit changes the settings, and nothing else.
func TestMaterial(t *testing.T) {
	m, err := newMaterial()
	if err != nil {
		t.Fatal(err)
	}
	base, err := xds.NewSnapshot(m.fixed)
	if err != nil {
		t.Fatal(err)
	}
	snapshot := func(i, revision int) *xds.Snapshot {
		settings, err := settingsMessage(i, revision)
		if err != nil {
			t.Fatal(err)
		}
		s, err := base.With(resource.ExtensionConfigType, settings)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a, b := snapshot(3, 0), snapshot(3, 1)
	for _, typeURL := range a.Types() {
		var names []string
		for i, r := range a.Resources(typeURL) {
			names = append(names, r.Name)
			same := r.Version == b.Resources(typeURL)[i].Version
			if want := r.Name != gateway.SettingsFilter; same != want {
				t.Errorf("%s: unchanged %v, want %v", r.Name, same, want)
			}
		}
		if d := cmp.Diff(names, m.names[typeURL]); d != "" {
			t.Errorf("%s: %s", typeURL, d)
		}
	}
	if len(m.names) != 5 {
		t.Errorf("types: %v", m.names)
	}
}

func TestMeshSnapshot(t *testing.T) {
	a, err := mcp.Snapshot(meshConfig(), meshPlan([]int{0, 0}))
	if err != nil {
		t.Fatal(err)
	}
	b, err := mcp.Snapshot(meshConfig(), meshPlan([]int{0, 1}))
	if err != nil {
		t.Fatal(err)
	}
	changed := 0
	for i, r := range a.Resources(envoyFilterType) {
		if r.Version != b.Resources(envoyFilterType)[i].Version {
			changed++
		}
	}
	if changed != 1 || len(a.Resources(envoyFilterType)) != 4 || len(a.Types()) != 16 {
		t.Errorf("%d of %d EnvoyFilters changed; %d types", changed, len(a.Resources(envoyFilterType)), len(a.Types()))
	}
}

func TestSelectKey(t *testing.T) {
	if key, err := selectKey(gatewayNode(3)); err != nil || key != xds.GatewayKey(gatewayID(3).ID()) {
		t.Errorf("gateway: %q, %v", key, err)
	}
	if key, err := selectKey(istiodNode(3)); err != nil || key != "istiod/default" {
		t.Errorf("istiod: %q, %v", key, err)
	}
}

func TestFollow(t *testing.T) {
	names := map[string][]string{resource.EndpointType: {"e"}, resource.RouteType: {"r"}, resource.ExtensionConfigType: {"x", "y"}}
	var got []string
	for _, typeURL := range []string{resource.ClusterType, resource.EndpointType, resource.ListenerType, resource.RouteType} {
		for _, r := range follow(typeURL, names) {
			got = append(got, fmt.Sprint(r.GetTypeUrl()[strings.LastIndexByte(r.GetTypeUrl(), '.')+1:], r.GetResourceNamesSubscribe()))
		}
	}
	want := []string{"ClusterLoadAssignment[e]", "Listener[]", "RouteConfiguration[r]", "TypedExtensionConfig[x y]"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestParse(t *testing.T) {
	o, err := parse(nil, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	want := []stage{{1, true}, {10, true}, {100, true}, {1, false}, {100, false}, {1000, false}, {10000, false}}
	if d := cmp.Diff(want, o.stages(), cmp.AllowUnexported(stage{})); d != "" || o.rounds != 5 || o.limit != 5*time.Minute {
		t.Errorf("defaults: %+v\n%s", o, d)
	}
	for _, args := range [][]string{
		{"-gateways", "0"}, {"-gateways", "1,,2"}, {"-gateways", "1e3"}, {"-istiods", "100001"}, {"-istiods", "", "-gateways", ""},
		{"-rounds", "0"}, {"-limit", "1ms"}, {"extra"}, {"-nothing"},
	} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
}

func TestParseStatus(t *testing.T) {
	got, err := parseStatus("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
	if want := (memory{Resident: 1 << 20, Peak: 2 << 20}); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, s := range []string{"", "VmRSS: 1 kB\n", "VmHWM: x kB\n"} {
		if _, err := parseStatus(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}

// sample is a run with figures that can be checked by hand.
func sample() *report {
	edits := func(by float64) map[string]*push {
		p := func(f float64) *push {
			return &push{millis: []float64{1 * by * f, 2 * by * f, 3 * by * f}, cpu: []float64{100 * by * f, 300 * by * f, 200 * by * f}, bytes: []float64{500 * by * f, 500 * by * f, 600 * by * f}}
		}
		return map[string]*push{editOne: p(1), editAll: p(100), editRest: p(50)}
	}
	return &report{
		machine: result.Machine{CPU: "Test CPU", Cores: 2, Kernel: "6.1.0", Load: "0.10"}, peer: "v0.14.0",
		date: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), wanted: 3,
		stages: []measured{
			{stage{10, true}, 3, map[string]figures{ours: {edits: edits(1000), before: 10e6, snapshots: 12e6, connected: 13e6, peak: 20e6}}},
			{stage{100, false}, 2, map[string]figures{
				ours: {edits: edits(0.5), before: 10e6, snapshots: 12e6, connected: 13e6, peak: 20e6},
				peer: {edits: edits(1), before: 10e6, snapshots: 11e6, connected: 13e6, peak: 30e6},
			}},
		},
	}
}

func TestReport(t *testing.T) {
	got := sample().markdown()
	const golden = "testdata/report.md"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Error(d)
	}
}
