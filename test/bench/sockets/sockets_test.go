package main

import (
	"bytes"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

var update = flag.Bool("update", false, "write goldens")

// The test binary is all of a run's processes, as the program is.
func TestMain(m *testing.M) {
	if code, ok := act(); ok {
		os.Exit(code)
	}
	goleak.VerifyTestMain(m)
}

// realKernel skips where eBPF cannot run, unless REQUIRE_REAL is set.
func realKernel(t *testing.T) {
	t.Helper()
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	if os.Getuid() == 0 && err == nil || os.Getenv("REQUIRE_REAL") != "" {
		return
	}
	t.Skip("needs root and a kernel with BTF")
}

// A whole, very short run.
func TestRun(t *testing.T) {
	realKernel(t)
	var out, progress bytes.Buffer
	before := remains(t)
	if code := run(t.Context(), []string{"-blocks", "2", "-window", "20ms", "-sizes", "100", "-rounds", "2", "-only", "SIGSTOP|" + slowWorkers}, &out, &progress); code != 0 {
		t.Fatalf("code %d:\n%s", code, progress.String())
	}
	got := out.String()
	for _, want := range []string{"| 64, kept |", "| a new one for each batch |", "\n| 100 | ", "\n| SIGSTOP for 300 ms | ", "\n| " + slowWorkers + " | – | "} {
		if !strings.Contains(got, want) {
			t.Errorf("there is no %q", want)
		}
	}
	if strings.Contains(got, "\n| inline CPU") {
		t.Error("a step is made that is not wanted")
	}
	// Who samples from outside sees a node that was stopped, unless the machine was too
	// busy to tell; in the node, all may have been read before the next sample.
	for l := range strings.Lines(got) {
		columns := strings.Split(l, "|")
		if !strings.HasPrefix(l, "| SIGSTOP") || strings.Contains(l, "| ? |") {
			continue
		}
		for _, outside := range columns[3:6] {
			if strings.Contains(outside, "–") || strings.Contains(outside, "/2)") {
				t.Errorf("somebody has not seen it: %s", l)
			}
		}
	}
	if t.Failed() {
		t.Logf("%s\n%s", got, progress.String())
	}
	for _, dir := range remains(t) {
		if !slices.Contains(before, dir) {
			t.Errorf("%s is left behind", dir)
		}
	}
}

// remains are control groups and directories of runs, this one's or others'.
func remains(t *testing.T) (out []string) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/periscope-bench-sockets-*", "/sys/fs/cgroup/*/periscope-bench-sockets-*", filepath.Join(os.TempDir(), "periscope-bench-sockets-*")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	return out
}

// A run that can't be says why, and not twice.
func TestRefused(t *testing.T) {
	doc := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(doc, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-write", doc}, {"extra"}} {
		var progress bytes.Buffer
		if code := run(t.Context(), args, io.Discard, &progress); code != 1 || strings.Count(progress.String(), "bench-sockets: ") != 1 {
			t.Errorf("%v: code %d, %q", args, code, progress.String())
		}
	}
}

func TestParse(t *testing.T) {
	o, err := parse(nil, t.Output())
	if err != nil || len(o.sizes) != 3 || o.blocks == 0 || o.rounds < 5 {
		t.Errorf("defaults: %+v, %v", o, err)
	}
	if o, err := parse([]string{"-sizes", "", "-blocks", "0", "-rounds", "0"}, t.Output()); err != nil || o.sizes != nil {
		t.Errorf("nothing: %+v, %v", o, err)
	}
	for _, args := range [][]string{{"-sizes", "1"}, {"-sizes", "10,,20"}, {"-sizes", "20000"}, {"-blocks", "-1"}, {"-rounds", "-1"}, {"-window", "1ms"}, {"-only", "("}, {"-limit", "1ms"}, {"extra"}, {"-nothing"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
}

func TestFirst(t *testing.T) {
	const ms = int64(time.Millisecond)
	at := 1000 * ms
	r := func(after, delay int64) reading { return reading{at + after*ms, time.Duration(delay * ms)} }
	for name, tt := range map[string]struct {
		series    []reading
		ms        float64
		disturbed bool
	}{
		"nothing":        {nil, math.Inf(1), false},
		"never":          {[]reading{r(10, 9), r(20, 0)}, math.Inf(1), false},
		"the first":      {[]reading{r(-5, 0), r(5, 4), r(15, 14), r(25, 24)}, 15, false},
		"too late":       {[]reading{r(601, 500)}, math.Inf(1), false},
		"late before":    {[]reading{r(-5, 10), r(5, 0)}, -5, true},
		"began before":   {[]reading{r(5, 11)}, 5, true},
		"a little early": {[]reading{r(8, 12)}, 8, false},
	} {
		if got, disturbed := first(tt.series, at, at+600*ms); got != tt.ms || disturbed != tt.disturbed {
			t.Errorf("%s: %v, %v", name, got, disturbed)
		}
	}
}

func TestRecorder(t *testing.T) {
	var r recorder
	r.add(map[string]time.Duration{"a": 1, "b": 2})
	r.add(map[string]time.Duration{"a": 3})
	got, err := r.take()
	if err != nil || len(got["a"]) != 2 || len(got["b"]) != 1 || got["a"][1].Delay != 3 || got["a"][0].At > got["a"][1].At {
		t.Errorf("%v %v", got, err)
	}
	r.fail(io.ErrUnexpectedEOF)
	r.fail(io.EOF)
	if got, err := r.take(); len(got) != 0 || err != io.ErrUnexpectedEOF {
		t.Errorf("%v %v", got, err)
	}
}

func TestConverse(t *testing.T) {
	realKernel(t)
	cpus, err := allowed()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := startProcess(t.Context(), "other", struct{}{}, cpus, nil, io.Discard); err == nil {
		t.Error("a role that doesn't exist is played")
	}
	if _, err := startProcess(t.Context(), roleWatcher, watcherConfig{Backends: []string{sockstat.InProcess}}, cpus, nil, io.Discard); err == nil {
		t.Error("a back end that doesn't work is watched by")
	}
	p, err := startProcess(t.Context(), roleWatcher, watcherConfig{}, cpus, nil, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.ask(t.Context(), nodeRequest{Op: "dance"}, nil); err == nil || !strings.Contains(err.Error(), "unknown") {
		t.Errorf("got %v", err)
	}
	if err := p.ask(t.Context(), nodeRequest{Op: opTake}, nil); err != nil {
		t.Error(err)
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	if err := p.ask(t.Context(), nodeRequest{Op: opTake}, nil); err == nil {
		t.Error("a process that has ended answers")
	}
}

// sample is a run with figures that can be checked by hand.
func sample() *report {
	inf := math.Inf(1)
	same := func(v ...float64) map[string][]float64 {
		out := map[string][]float64{}
		for _, name := range append(sockstat.Backends(), seriesWatch, seriesLevel, seriesKernel) {
			out[name] = v
		}
		out[seriesQueue], out[seriesLag] = []float64{inf, inf, inf}, []float64{inf, inf, inf}
		return out
	}
	quota, slow := same(50, 60, 100), same(inf, inf, inf)
	quota[sockstat.InProcess] = []float64{96, inf, inf}
	slow[seriesLevel] = []float64{101, 120, inf}
	slow[seriesQueue] = slow[seriesLevel]
	bl := func(node float64) block {
		u := func(f float64) usage {
			return usage{Exchanges: 1000, Node: node * f, Sent: node * f, Samples: 19, Elapsed: 0.2}
		}
		return block{u(1), u(1.02), u(1.03)}
	}
	micros := func(v float64) []float64 { return []float64{v, v * 2, v * 3} }
	busy := detected{"SIGSTOP for 300 ms", 3, nil, nil, 4}
	return &report{
		machine: result.Machine{CPU: "Test CPU", Cores: 2, Kernel: "6.1.0", Load: "0.10"},
		date:    time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC), window: 200 * time.Millisecond,
		overheads: []overhead{{kept, []block{bl(0.01), bl(0.02), bl(0.03)}}, {once, []block{bl(0.04)}}},
		costs: []cost{{1000, map[string][]float64{
			sockstat.EBPF: micros(100), sockstat.Pinned: micros(200), sockstat.InetDiag: micros(1000), sockstat.InProcess: micros(2000)}}},
		steps: []detected{{"inline CPU ×2", 3, []float64{8000, 9000, 7000}, same(10, 20, 30), 1}, {quotaCut, 3, []float64{8000, 8000, 8000}, quota, 0}, {slowWorkers, 3, []float64{0, 0, 0}, slow, 2}, busy},
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
	if got := (&report{}).markdown(); strings.Contains(got, "**") {
		t.Errorf("nothing has been measured: %s", got)
	}
}
