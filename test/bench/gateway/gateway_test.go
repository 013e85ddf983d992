package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/bench/result"
	"github.com/periscope-mesh/periscope/test/bench/sink"
	"github.com/periscope-mesh/periscope/xds"
	xdsgateway "github.com/periscope-mesh/periscope/xds/gateway"
)

var update = flag.Bool("update", false, "write goldens")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// realEnvoy skips without an Envoy, unless REQUIRE_REAL=1.
func realEnvoy(t *testing.T) string {
	t.Helper()
	bin, err := proxy.Find("")
	if err != nil && os.Getenv("REQUIRE_REAL") == "1" {
		t.Fatal(err)
	}
	if err != nil {
		t.Skip(err)
	}
	return bin
}

func TestConfigurationsAreValid(t *testing.T) {
	bin := realEnvoy(t)
	all, err := variants(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range all {
		if v.fault != "" {
			continue // as ours with a node that is well
		}
		t.Run(v.name, func(t *testing.T) {
			config, err := bootstrapJSON(v, 0, 1, 2)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "envoy.json")
			if err := os.WriteFile(file, config, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), bin, "--mode", "validate", "-c", file).CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// newBench is a very short run of some variants and workloads.
func newBench(t *testing.T, variantNames, workloadNames string) *bench {
	t.Helper()
	b := &bench{
		options:  options{envoy: realEnvoy(t), rounds: 1, burst: 100 * time.Millisecond, rate: 200},
		progress: t.Output(), dir: t.TempDir(),
	}
	runtime.LockOSThread() // as main does
	t.Cleanup(runtime.UnlockOSThread)
	all, err := variants(nil)
	if err != nil {
		t.Fatal(err)
	}
	if b.variants, err = choose(all, variantNames); err != nil {
		t.Fatal(err)
	}
	if b.workloads, err = named(workloads(), workloadNames, func(w workload) string { return w.name }); err != nil {
		t.Fatal(err)
	}
	return b
}

// No user's request fails, and every copy arrives, or Envoy counts why not: on a
// busy machine, the receiver may be too slow for the mirror cluster's breakers.
func TestSaturated(t *testing.T) {
	b := newBench(t, "periscope,periscope-10,shadow,ext_proc", "get,cut,download")
	got, err := b.saturated(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := got.faults(); err != nil {
		t.Error(err)
	}
	tables := got.(*saturated).tables
	if len(tables) != 3 || len(tables[0].variants) != 5 || len(tables[1].variants) != 4 {
		t.Fatalf("%d tables, want 3; the first with all variants, the others without the share of 10 %%", len(tables))
	}
	for _, table := range tables {
		for i, f := range table.figures {
			v, w := table.variants[i], table.workload
			if f.requests == 0 || !(f.cpu[0] > 0) || f.peakRSS == 0 {
				t.Errorf("%s, %s: %+v", v.name, w.name, f)
			}
			if v.copies == copiesProcessor && w.name != "get" {
				continue // it closes its streams after deferredClose, whatever a busy machine has still to send
			}
			if v.copies != copiesNothing && f.copies != f.expected && !strings.Contains(f.noted, "overflow") {
				t.Errorf("%s, %s: %d of %d copies arrived: %s", v.name, w.name, f.copies, f.expected, f.noted)
			}
		}
	}
}

// With a node well, every copy arrives; whatever the node does, no user's request
// fails.
func TestLatency(t *testing.T) {
	b := newBench(t, "periscope,periscope-slow,periscope-stalled,periscope-dead,periscope-503", "")
	got, err := b.latency(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := got.faults(); err != nil {
		t.Error(err)
	}
	s := got.(*latency)
	if len(s.figures) != 6 {
		t.Fatalf("%d variants, want 6", len(s.figures))
	}
	for i, f := range s.figures {
		if f.requests == 0 || !(f.p50[0] > 0) || !(f.p99[0] >= f.p50[0]) {
			t.Errorf("%s: %+v", s.variants[i].name, f)
		}
	}
	if f := s.figures[1]; f.copies != f.expected && !strings.Contains(f.noted, "overflow") {
		t.Errorf("%d of %d copies arrived: %s", f.copies, f.expected, f.noted)
	}
}

// Edits reach a gateway with many filter chains, and cost no request.
func TestChanges(t *testing.T) {
	b := newBench(t, "", "")
	b.burst = 300 * time.Millisecond // long enough for an edit
	got, err := b.changes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := got.faults(); err != nil {
		t.Error(err)
	}
	if s := got.(*changes); s.edits < 2 || s.figures[0].copies != 0 {
		t.Errorf("%d edits; the gateway without our filters mirrored %d exchanges", s.edits, s.figures[0].copies)
	}
}

func TestSoak(t *testing.T) {
	b := newBench(t, "", "")
	b.soakFor = time.Second
	got, err := b.soak(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := got.faults(); err != nil {
		t.Error(err)
	}
	s := got.(*soak)
	if d := cmp.Diff([]string{"none", "periscope", "periscope-slow"}, names(s.variants)); d != "" {
		t.Error(d)
	}
	for i, f := range s.figures {
		if len(s.rss[i]) != len(s.at) || len(s.at) < 3 || s.rss[i][0] < 10 || f.requests == 0 {
			t.Errorf("%s: %+v, %v MB", s.variants[i].name, f, s.rss[i])
		}
	}
}

// The node has what its weight leaves it, and no user's request fails. It needs
// root, for control groups.
func TestBeside(t *testing.T) {
	if os.Getuid() != 0 && os.Getenv("REQUIRE_REAL") == "" {
		t.Skip("control groups need root")
	}
	b := newBench(t, "", "")
	b.periscope = filepath.Join(t.TempDir(), "periscope")
	if out, err := exec.Command("go", "build", "-o", b.periscope, "../../../cmd/periscope").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	all := placements()
	got, err := b.placed(t.Context(), []placement{all[0], all[1], all[3]})
	if err != nil {
		t.Fatal(err)
	}
	if err := got.faults(); err != nil {
		t.Error(err)
	}
	tables := got.(*beside).tables
	if len(tables) != 3 {
		t.Fatalf("%d tables", len(tables))
	}
	used := make([]float64, 3) // where other tests want all CPUs, a node of little weight may get none for a while
	for _, table := range tables {
		for i, f := range table.figures {
			if f.requests == 0 || len(f.throughput) != 1 || table.rate > 0 && !(f.p50[0] > 0) {
				t.Errorf("%.0f a second, %s: %+v", table.rate, got.(*beside).placements[i].name, f)
			}
			if i > 0 {
				if len(table.node[i]) != 1 {
					t.Fatalf("%.0f a second: the node had %v of the CPU", table.rate, table.node[i])
				}
				used[i] += table.node[i][0]
			}
		}
	}
	if used[1] <= 0 || used[2] <= 0 {
		t.Errorf("nodes had %v of the CPU", used[1:])
	}
}

func TestChoose(t *testing.T) {
	all, err := variants(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := choose(all, "shadow,periscope")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"none", "periscope", "shadow"}, names(got)); d != "" {
		t.Error(d)
	}
	if _, err := choose(all, "wasm"); err == nil || !strings.Contains(err.Error(), "empty-lua") {
		t.Errorf("got %v, want the names there are", err)
	}
	if got, err := choose(all, ""); err != nil || len(got) != len(all) {
		t.Errorf("got %v, %v; want all", names(got), err)
	}
}

func TestCandidates(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte("-- "+name), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	all, err := variants([]string{file("a.lua"), file("b.lua")})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.Index(names(all), "b-10")
	if i < 0 || all[i].script != "-- b.lua" || all[i].against != "periscope-10" || all[i].share != 10 {
		t.Errorf("got %+v", all)
	}
	for _, files := range [][]string{
		{filepath.Join(dir, "missing.lua")},
		{file("shadow.lua")},
		{file("a.lua"), file("a.lua")},
		{file("a,b.lua")},
	} {
		if _, err := variants(files); err == nil {
			t.Errorf("%v is accepted", files)
		}
	}
}

func TestSettings(t *testing.T) {
	text := settings(10, 0).Encode()
	if !strings.Contains(text, "ppm\t100000\n") || !strings.Contains(text, "mode\tMonitor\n") || !strings.Contains(text, "response\t16384\n") {
		t.Errorf("got:\n%s", text)
	}
	text = settings(100, 4*kib).Encode()
	if !strings.Contains(text, "request\t4096\n") || !strings.Contains(text, "response\t4096\n") {
		t.Errorf("got:\n%s", text)
	}
}

func TestCall(t *testing.T) {
	head, body, _ := bytes.Cut(workload{request: kib, response: 64 * kib}.call().Raw, []byte("\r\n\r\n"))
	if n := bytes.Count(head, []byte("\r\n")); n != 14 || len(body) != 1024 || !bytes.Contains(head, []byte("bytes=65536 ")) {
		t.Errorf("%d header lines, %d bytes of body:\n%s", n, len(body), head)
	}
}

func TestParse(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-burst", "1ms"}, {"-rate", "0"}, {"-rate", "NaN"}, {"-soak", "1ms"}, {"-soak", "1m", "-only", "latency"}, {"extra"}} {
		if _, err := parse(args, t.Output()); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
	o, err := parse(nil, t.Output())
	if err != nil || o.rounds != 9 || o.burst != time.Second || o.rate != 1000 || o.plugins != nil {
		t.Errorf("defaults: %+v, %v", o, err)
	}
	o, err = parse([]string{"-plugin", "a.lua,b.lua"}, t.Output())
	if err != nil || len(o.plugins) != 2 {
		t.Errorf("two candidates: %+v, %v", o, err)
	}
}

func TestScenarios(t *testing.T) {
	for _, tc := range []struct {
		o    options
		want []string
	}{
		{options{}, []string{"saturated", "latency", "changes"}},
		{options{only: "changes,saturated"}, []string{"saturated", "changes"}},
		{options{only: "beside"}, []string{"beside"}},
		{options{soakFor: time.Minute}, []string{"soak"}},
	} {
		all, err := new(bench).scenarios(tc.o)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range all {
			got = append(got, s.name)
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%+v: %s", tc.o, d)
		}
	}
	if _, err := new(bench).scenarios(options{only: "speed"}); err == nil || !strings.Contains(err.Error(), "latency") {
		t.Errorf("got %v, want the names there are", err)
	}
}

func TestVerdict(t *testing.T) {
	for _, tc := range []struct {
		g    goal
		want string
	}{
		{atMost("", result.Spread{Mid: 20, Low: 19, High: 21}, 27, "µs"), "met"},
		{atMost("", result.Spread{Mid: 26, Low: 25, High: 28}, 27, "µs"), "met; within the interval"},
		{atMost("", result.Spread{Mid: 40.5, Low: 39, High: 41}, 27, "µs"), "**not met**, by 13.5 µs"},
		{atLeast("", result.Spread{Mid: 0.5, Low: 0.4, High: 0.7}, 0.6), "**not met**, by ×0.10; within the interval"},
		{atLeast("", result.Spread{Mid: 0.7, Low: 0.65, High: 0.8}, 0.6), "met"},
		{atMost("", result.Over(nil), 27, "µs"), "**not met**, by NaN µs"},
	} {
		if got := tc.g.verdict(); got != tc.want {
			t.Errorf("%+v: got %q, want %q", tc.g, got, tc.want)
		}
	}
}

// Every edit is a new policy for the gateway, or its new share.
func TestEdit(t *testing.T) {
	c, err := listenControl(3, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer c.ln.Close()
	seen := map[string]bool{}
	settings := func() string {
		for _, r := range c.server.Snapshots()[xds.GatewayKey("default/"+mirroring)].Resources(resource.ExtensionConfigType) {
			if r.Name == xdsgateway.SettingsFilter {
				return r.Version
			}
		}
		return ""
	}
	for range 20 {
		seen[settings()] = true
		if err := c.edit(); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) != 20 || seen[""] {
		t.Errorf("20 edits gave %d settings", len(seen))
	}
}

func TestQuantile(t *testing.T) {
	var l []time.Duration
	for i := 100; i > 0; i-- {
		l = append(l, time.Duration(i)*time.Millisecond)
	}
	for q, want := range map[float64]float64{0: 1, 0.5: 50, 0.99: 99, 1: 100} {
		if got := quantile(l, q); got != want {
			t.Errorf("quantile %v: got %v, want %v", q, got, want)
		}
	}
	if !math.IsNaN(quantile(nil, 0.5)) {
		t.Error("nothing has a quantile")
	}
}

// around is where the samples of reports come from.
var around = surroundings{
	machine: result.Machine{CPU: "Test CPU", Cores: 2, Kernel: "6.1.0", Load: "0.10"}, envoy: "1.40.0",
	date: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), rounds: 2, pinned: true, foreign: 0.021,
}

var (
	sampleNone      = variant{name: "none", title: "no filter"}
	samplePeriscope = variant{name: "periscope", title: "**Periscope**, 100 %", copies: copiesEvents, share: 100}
)

// sampleSaturated is a run with figures that can be checked by hand.
func sampleSaturated() *saturated {
	get := workloads()[0]
	none := figures{throughput: []float64{20000, 10000}, cpu: []float64{40, 80}, busy: []float64{1, 1}, peakRSS: 60e6, requests: 30}
	mirrored := figures{throughput: []float64{10000, 5000}, cpu: []float64{70, 130}, busy: []float64{0.7, 0.8}, peakRSS: 70e6, requests: 40, copies: 99999, expected: 100001, noted: "the plugin counts 1 errors of its own"}
	other := mirrored
	other.cpu, other.noted = []float64{60, 125}, ""
	return &saturated{
		surroundings: around, burst: time.Second,
		tables: []saturatedTable{
			{get, []variant{sampleNone, samplePeriscope}, []figures{none, mirrored}},
			{get, []variant{sampleNone, samplePeriscope, {name: "a", title: "`a`, 100 %", copies: copiesEvents, share: 100, against: "periscope"}}, []figures{none, mirrored, other}},
		},
	}
}

func sampleLatency() *latency {
	slow := samplePeriscope
	slow.name, slow.title, slow.fault = "periscope-slow", "Periscope, slow", sink.Slow
	return &latency{
		surroundings: around, workload: workloads()[0], rate: 1000, burst: 2 * time.Second,
		variants: []variant{sampleNone, samplePeriscope, slow},
		figures: []figures{
			{p50: []float64{0.3, 0.3}, p99: []float64{1, 2}, peakRSS: 60e6, requests: 30},
			{p50: []float64{0.45, 0.35}, p99: []float64{1.25, 2.5}, peakRSS: 68e6, requests: 30, copies: 30, expected: 30},
			{p50: []float64{0.3, 0.3}, p99: []float64{2, 3}, peakRSS: 72e6, requests: 30, expected: 30, noted: "lua.errors 1"},
		},
	}
}

func sampleChanges() *changes {
	return &changes{
		surroundings: around, chains: 100, rate: 1000, burst: 4 * time.Second, editEvery: editEvery, edits: 16, inForce: 16,
		variants: []variant{sampleNone, {name: "quiet", title: "no changes"}, {name: "edited", title: "changes"}},
		figures: []figures{
			{p50: []float64{0.3, 0.3}, p99: []float64{1, 2}, peakRSS: 60e6, requests: 30},
			{p50: []float64{0.4, 0.4}, p99: []float64{1, 2}, peakRSS: 90e6, requests: 30, copies: 30},
			{p50: []float64{0.4, 0.5}, p99: []float64{1.05, 2.2}, peakRSS: 90e6, requests: 30, copies: 30},
		},
	}
}

func sampleSoak() *soak {
	s := &soak{
		surroundings: around, length: 10 * time.Minute, rate: 1000, variants: []variant{sampleNone, samplePeriscope},
		figures: []figures{{requests: 600_000, peakRSS: 70e6}, {requests: 600_000, peakRSS: 81e6}}, rss: make([][]float64, 2),
	}
	for i := range 60 {
		s.at = append(s.at, 10*float64(i+1))
		s.rss[0] = append(s.rss[0], 70)
		s.rss[1] = append(s.rss[1], 78+float64(i)/20)
	}
	return s
}

func sampleBeside() *beside {
	all := placements()
	return &beside{
		surroundings: around, version: 2, workload: workloads()[0], burst: 3 * time.Second, placements: []placement{all[0], all[3]},
		tables: []besideTable{
			{figures: []figures{{throughput: []float64{10000, 8000}, requests: 30}, {throughput: []float64{8000, 7000}, requests: 25}}, node: [][]float64{nil, {0.2, 0.1}}},
			{part: 0.3, rate: 3000, figures: []figures{
				{p50: []float64{0.2, 0.3}, p99: []float64{1, 2}, throughput: []float64{3000, 3000}, requests: 30},
				{p50: []float64{0.3, 0.3}, p99: []float64{2, 3}, throughput: []float64{3000, 2700}, requests: 28, errors: 2, firstError: io.EOF},
			}, node: [][]float64{nil, {0.7, 0.7}}},
		},
	}
}

func TestReports(t *testing.T) {
	for name, s := range map[string]section{"saturated": sampleSaturated(), "latency": sampleLatency(), "changes": sampleChanges(), "soak": sampleSoak(), "beside": sampleBeside()} {
		t.Run(name, func(t *testing.T) {
			var got strings.Builder
			s.write(&got)
			golden := filepath.Join("testdata", name+".md")
			if *update {
				if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got.String()); d != "" {
				t.Error(d)
			}
		})
	}
}

// A file without the marks is refused at once.
func TestWriteNeedsMarks(t *testing.T) {
	file := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := benchmark(t.Context(), options{write: file}, t.Output(), t.Output())
	if err == nil || !strings.Contains(err.Error(), "bench-gateway-saturated:begin") {
		t.Errorf("got %v, want the marks that are missing", err)
	}
}

// Edits that did nothing, or a gateway that mirrors nothing, show nothing.
func TestChangesThatMeanNothing(t *testing.T) {
	for name, spoil := range map[string]func(*changes){
		"edits that got lost": func(s *changes) { s.inForce = 14 },
		"nothing mirrored":    func(s *changes) { s.figures[1].copies = 0 },
		"a failed request":    func(s *changes) { s.figures[2].errors, s.figures[2].firstError = 1, io.EOF },
	} {
		s := sampleChanges()
		if err := s.faults(); err != nil {
			t.Fatal(err)
		}
		if spoil(s); s.faults() == nil {
			t.Errorf("%s: no fault", name)
		}
	}
}

// Users may wait too long beside a node, but not without one.
func TestBesideFaults(t *testing.T) {
	s := sampleBeside()
	if err := s.faults(); err != nil {
		t.Error(err)
	}
	s.tables[0].figures[0].errors, s.tables[0].figures[0].firstError = 1, io.EOF
	if s.faults() == nil {
		t.Error("a request fails without a node, and that is no fault")
	}
}

func TestPublishWithErrorsChangesNothing(t *testing.T) {
	s := sampleSaturated()
	s.tables[0].figures[1].errors, s.tables[0].figures[1].firstError = 1, errors.New("status line")
	file := filepath.Join(t.TempDir(), "doc.md")
	old := "<!-- x:begin -->\nold\n<!-- x:end -->\n"
	if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	err := publish("x", s, file, t.Output())
	if err == nil || !strings.Contains(err.Error(), "1 of 41 requests failed") {
		t.Errorf("got %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != old {
		t.Errorf("the file is now %q, %v", b, err)
	}
}
