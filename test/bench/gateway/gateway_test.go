package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

var update = flag.Bool("update", false, "write goldens")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// realEnvoy skips without an Envoy, unless REQUIRE_REAL=1.
func realEnvoy(t *testing.T) string {
	t.Helper()
	bin, err := findEnvoy("")
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
		options:  options{envoy: realEnvoy(t), rounds: 1, burst: 100 * time.Millisecond},
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
	if b.workloads, err = chooseWorkloads(workloadNames); err != nil {
		t.Fatal(err)
	}
	return b
}

// No user's request fails, and every copy arrives.
func TestSaturated(t *testing.T) {
	b := newBench(t, "periscope,periscope-10,shadow,ext_proc", "get,whole,cut,download")
	got, err := b.saturated(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := got.faults(); err != nil {
		t.Error(err)
	}
	tables := got.(*saturated).tables
	if len(tables) != 4 || len(tables[0].variants) != 5 || len(tables[1].variants) != 4 {
		t.Fatalf("%d tables, want 4; the first with all variants, the others without the share of 10 %%", len(tables))
	}
	for _, table := range tables {
		for i, f := range table.figures {
			v, w := table.variants[i], table.workload
			if f.requests == 0 || !(f.cpu[0] > 0) || f.peakRSS == 0 {
				t.Errorf("%s, %s: %+v", v.name, w.name, f)
			}
			// A saturated gateway with large bodies may run into our breakers.
			if v.copies != copiesNothing && f.copies != f.expected && w.request < 64*kib {
				t.Errorf("%s, %s: %d of %d copies arrived: %s", v.name, w.name, f.copies, f.expected, f.fault)
			}
		}
	}
}

func TestEnvoyThatDoesNotStart(t *testing.T) {
	bin := realEnvoy(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := startEnvoy(ctx, bin, t.TempDir(), []byte(`{"no_such_field": 1}`), pinning{})
	if err == nil || !strings.Contains(err.Error(), "no_such_field") {
		t.Errorf("got %v, want the reason from Envoy's log", err)
	}
}

func TestFindEnvoy(t *testing.T) {
	t.Chdir(t.TempDir())
	t.Setenv("PERISCOPE_ENVOY", "")
	t.Setenv("PATH", t.TempDir())
	if _, err := findEnvoy(""); err == nil || !strings.Contains(err.Error(), "make tools") {
		t.Errorf("got %v, want a remedy", err)
	}
	if _, err := findEnvoy("./nothing"); err == nil {
		t.Error("a flag that names nothing is accepted")
	}
	for _, p := range []string{"x/envoy", pinnedEnvoy} {
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("go.mod", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir("x") // below the repository's root
	if got, err := findEnvoy(""); err != nil || !strings.HasSuffix(got, pinnedEnvoy) {
		t.Errorf("got %q, %v; want the repository's own", got, err)
	}
	t.Setenv("PERISCOPE_ENVOY", "./envoy")
	if got, err := findEnvoy(""); err != nil || got != "./envoy" {
		t.Errorf("got %q, %v; want the environment's", got, err)
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

func TestChooseWorkloads(t *testing.T) {
	got, err := chooseWorkloads("cut,get")
	if err != nil || len(got) != 2 || got[0].name != "get" || got[1].limit != 4*kib {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := chooseWorkloads("put"); err == nil || !strings.Contains(err.Error(), "download") {
		t.Errorf("got %v, want the names there are", err)
	}
}

func TestSettings(t *testing.T) {
	text := settings(10, 0)
	if !strings.Contains(text, "ppm\t100000\n") || !strings.Contains(text, "mode\tMonitor\n") || !strings.Contains(text, "response\t16384\n") {
		t.Errorf("got:\n%s", text)
	}
	text = settings(100, 4*kib)
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
	for _, args := range [][]string{{"-rounds", "0"}, {"-burst", "1ms"}, {"extra"}} {
		if _, err := parse(args, t.Output()); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
	o, err := parse(nil, t.Output())
	if err != nil || o.rounds != 9 || o.burst != time.Second || o.plugins != nil {
		t.Errorf("defaults: %+v, %v", o, err)
	}
	o, err = parse([]string{"-plugin", "a.lua,b.lua"}, t.Output())
	if err != nil || len(o.plugins) != 2 {
		t.Errorf("two candidates: %+v, %v", o, err)
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

func TestParseSchedstat(t *testing.T) {
	got, err := parseSchedstat("123 45 6\n")
	if want := (cpuTime{123, 45}); err != nil || got != want {
		t.Errorf("got %v, %v", got, err)
	}
	for _, s := range []string{"", "1 2", "1 x 3"} {
		if _, err := parseSchedstat(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}

// around is where the samples of reports come from.
var around = surroundings{
	machine: result.Machine{CPU: "Test CPU", Cores: 2, Kernel: "6.1.0", Load: "0.10"}, envoy: "1.40.0",
	date: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), rounds: 2, pinned: true, foreign: 0.021,
}

// sampleSaturated is a run with figures that can be checked by hand.
func sampleSaturated() *saturated {
	get := workloads()[0]
	none := figures{throughput: []float64{20000, 10000}, cpu: []float64{40, 80}, busy: []float64{1, 1}, peakRSS: 60e6, requests: 30}
	mirrored := figures{throughput: []float64{10000, 5000}, cpu: []float64{70, 130}, busy: []float64{0.7, 0.8}, peakRSS: 70e6, requests: 40, copies: 99999, expected: 100001, fault: "the plugin counts 1 errors of its own"}
	other := mirrored
	other.cpu, other.fault = []float64{60, 125}, ""
	return &saturated{
		surroundings: around, burst: time.Second,
		tables: []saturatedTable{
			{get, []variant{{name: "none", title: "no filter"}, {name: "periscope", title: "**Periscope**, 100 %", copies: copiesEvents, share: 100}}, []figures{none, mirrored}},
			{get, []variant{{name: "none", title: "no filter"}, {name: "periscope", title: "**Periscope**, 100 %", copies: copiesEvents, share: 100}, {name: "a", title: "`a`, 100 %", copies: copiesEvents, share: 100, against: "periscope"}}, []figures{none, mirrored, other}},
		},
	}
}

func TestReports(t *testing.T) {
	for _, s := range []section{sampleSaturated()} {
		t.Run(s.name(), func(t *testing.T) {
			var got strings.Builder
			s.write(&got)
			golden := filepath.Join("testdata", s.name()+".md")
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

func TestPublishWithErrorsChangesNothing(t *testing.T) {
	s := sampleSaturated()
	s.tables[0].figures[1].errors, s.tables[0].figures[1].firstError = 1, errors.New("status line")
	file := filepath.Join(t.TempDir(), "doc.md")
	old := "<!-- " + s.name() + ":begin -->\nold\n<!-- " + s.name() + ":end -->\n"
	if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	err := publish(s, file, t.Output())
	if err == nil || !strings.Contains(err.Error(), "1 of 41 requests failed") {
		t.Errorf("got %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != old {
		t.Errorf("the file is now %q, %v", b, err)
	}
}
