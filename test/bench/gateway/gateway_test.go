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
	all, err := variants("")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range all {
		t.Run(v.name, func(t *testing.T) {
			config, err := bootstrapJSON(v, 1, 2)
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

// A whole, very short run: no user's request fails, and every copy arrives.
func TestRun(t *testing.T) {
	bin := realEnvoy(t)
	runtime.LockOSThread() // as main does
	defer runtime.UnlockOSThread()
	all, err := variants("")
	if err != nil {
		t.Fatal(err)
	}
	chosen, err := choose(all, "periscope,periscope-10,shadow,ext_proc")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{
		options:   options{envoy: bin, rounds: 1, burst: 100 * time.Millisecond, rate: 200},
		progress:  t.Output(),
		workloads: workloads(false),
	}
	r := &report{variants: chosen}
	if err := b.serve(t.Context(), chosen, t.TempDir(), r); err != nil {
		t.Fatal(err)
	}
	for w := range r.figures {
		for i, f := range r.figures[w] {
			v := chosen[i]
			if f.errors != 0 || f.requests == 0 || !(f.cpu[0] > 0) || !(f.p99[0] >= f.p50[0]) || r.peakRSS[i] == 0 {
				t.Errorf("%s, %s: %+v, %d bytes", v.name, r.workloads[w], f, r.peakRSS[i])
			}
			if v.copies != copiesNothing && f.copies != f.expected {
				t.Errorf("%s, %s: %d of %d copies arrived", v.name, r.workloads[w], f.copies, f.expected)
			}
		}
	}
	for _, n := range r.notes {
		t.Error(n)
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
	all, err := variants("")
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

func TestCandidate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "other.lua")
	if err := os.WriteFile(file, []byte("-- other"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := variants(file)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.Index(names(all), "candidate")
	if i < 0 || all[i].script != "-- other" {
		t.Errorf("got %+v", all)
	}
	if _, err := variants(file + "x"); err == nil {
		t.Error("a missing file is accepted")
	}
}

func TestSettings(t *testing.T) {
	text, digest := settings(10)
	if !strings.Contains(text, "ppm\t100000\n") || !strings.Contains(text, "mode\tMonitor\n") || len(digest) != 12 {
		t.Errorf("digest %q of:\n%s", digest, text)
	}
	if _, other := settings(0); other == digest {
		t.Error("two shares, one digest")
	}
}

func TestRequest(t *testing.T) {
	head, body, _ := bytes.Cut(newRequest("POST", 1024).Raw, []byte("\r\n\r\n"))
	if n := bytes.Count(head, []byte("\r\n")); n != 14 || len(body) != 1024 {
		t.Errorf("%d header lines, %d bytes of body", n, len(body))
	}
}

func TestParse(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-burst", "1ms"}, {"-rate", "0"}, {"-rate", "NaN"}, {"extra"}} {
		if _, err := parse(args, t.Output()); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
	o, err := parse(nil, t.Output())
	if err != nil || o.rounds != 7 || o.burst != time.Second || o.rate != 1000 {
		t.Errorf("defaults: %+v, %v", o, err)
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

// sample is a run with figures that can be checked by hand.
func sample() *report {
	none := figures{throughput: []float64{20000, 10000}, cpu: []float64{40, 80}, busy: []float64{1, 1}, p50: []float64{0.3, 0.3}, p99: []float64{1, 2}, requests: 30}
	ours := figures{throughput: []float64{10000, 5000}, cpu: []float64{70, 130}, busy: []float64{0.7, 0.8}, p50: []float64{0.45, 0.45}, p99: []float64{1.5, 2}, requests: 40, copies: 99999, expected: 100001}
	return &report{
		machine: result.Machine{CPU: "Test CPU", Cores: 2, Kernel: "6.1.0", Load: "0.10"}, envoy: "1.40.0", date: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		rounds: 2, burst: time.Second, rate: 1000, pinned: true, foreign: 0.021,
		variants:  []variant{{name: "none", title: "no filter"}, {name: "periscope", title: "**Periscope**, 100 %", copies: copiesEvents, share: 100}},
		workloads: []string{"GET, 1 KiB response"}, figures: [][]figures{{none, ours}}, peakRSS: []int64{60e6, 70e6},
		notes: []string{"periscope: the plugin counts 1 errors of its own"},
	}
}

func TestReport(t *testing.T) {
	var got strings.Builder
	if err := sample().write(&got); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/report.md"
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
}

func TestPublishWithErrorsChangesNothing(t *testing.T) {
	r := sample()
	r.figures[0][1].errors, r.figures[0][1].firstError = 1, errors.New("status line")
	file := filepath.Join(t.TempDir(), "doc.md")
	old := "<!-- " + section + ":begin -->\nold\n<!-- " + section + ":end -->\n"
	if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	err := publish(r, file, t.Output())
	if err == nil || !strings.Contains(err.Error(), "1 of 41 requests failed") {
		t.Errorf("got %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != old {
		t.Errorf("the file is now %q, %v", b, err)
	}
}
