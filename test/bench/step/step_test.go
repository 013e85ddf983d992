package main

import (
	"context"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/overload"
	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/cgrouptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// realParts skips without an Envoy or a control group, unless REQUIRE_REAL=1.
func realParts(t *testing.T) (envoy string) {
	t.Helper()
	envoy, err := proxy.Find("")
	if err == nil {
		var g *cgrouptest.Group
		if g, err = cgrouptest.New(); err == nil {
			err = g.Remove()
		}
	}
	if err != nil && os.Getenv("REQUIRE_REAL") == "1" {
		t.Fatal(err)
	}
	if err != nil {
		t.Skip(err)
	}
	return envoy
}

// A short step for real: what is measured is there, and no user notices.
func TestStep(t *testing.T) {
	o := options{envoy: realParts(t), periscope: filepath.Join(t.TempDir(), "periscope"), quota: 0.3, log: filepath.Join(t.TempDir(), "log")}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", o.periscope, "../../../cmd/periscope").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	runtime.LockOSThread() // as main does
	defer runtime.UnlockOSThread()
	s := scenario{gateways: 2, multiple: 10}
	l := lengths{500 * time.Millisecond, 2 * time.Second, 500 * time.Millisecond}
	const capacity = 60 // what the node can do on a slow machine
	var r *record
	err := within(t.Context(), o, s.gateways, func(ctx context.Context, w *world) (err error) {
		c := cell{s, overload.Budget, true}
		if r, err = w.play(ctx, s, l, capacity, 1, w.newControl(c), true); err != nil {
			return err
		}
		return r.write(o.log, c, 1)
	})
	if err != nil {
		t.Fatal(err)
	}
	got := r.outcome(s, capacity)
	t.Logf("goodput %.2f, priority %.2f, waste %.2f, p99 %.0f ms, effect %.0f ms, %d reports, %d fates, users' p99 %.1f ms", got.goodput, got.priority, got.waste, got.p99, got.effect, len(r.reports), len(r.fates), got.users)
	if got.errors > 0 || got.broken > 0 {
		t.Errorf("%d errors of users, %d of the plugin: %v", got.errors, got.broken, r.users)
	}
	if got.spoilt > 0 {
		t.Errorf("the guard discarded %d of a priority class", got.spoilt)
	}
	if !(got.goodput > 0) || !(got.priority > 0) || !(got.users > 0) || len(r.reports) < 10 || r.counters[1].mirrored <= r.counters[0].mirrored {
		t.Errorf("nothing was measured: %+v", got)
	}
}

func TestDemand(t *testing.T) {
	for _, s := range scenarios() {
		var sum [phases]float64
		for i := range s.gateways {
			for phase, rate := range s.rates(i) {
				sum[phase] += rate
			}
		}
		if math.Abs(sum[phaseStep]-s.multiple) > 1e-9 || math.Abs(sum[phaseBefore]-0.5) > 1e-9 || sum[phaseAfter] != sum[phaseBefore] {
			t.Errorf("%v: %v", s, sum)
		}
	}
	l := lengths{time.Second, 2 * time.Second, time.Second}
	s := scenario{gateways: 2, multiple: 10}
	d := s.demands(l, 1000, 1)
	if again := s.demands(l, 1000, 1); !slices.Equal(d[1].all(), again[1].all()) {
		t.Error("the same round has other demand")
	}
	n, priority := 0, 0
	for _, one := range d {
		priority += len(one.priority[phaseStep])
		n += len(one.routine[phaseStep]) + len(one.priority[phaseStep])
		if due := one.routine[phaseStep]; due[0] < l.from() || due[len(due)-1] >= l.to() {
			t.Errorf("due from %v to %v", due[0], due[len(due)-1])
		}
	}
	if math.Abs(float64(n)-20_000) > 600 || math.Abs(float64(priority)-1000) > 150 {
		t.Errorf("%d requests in the step, %d of a priority class", n, priority)
	}
}

// madeUp is a run of a node that analyses 100 a second, 10 ms after they were sent,
// but 150 ms in the first half second of the step. It is late by one in ten of the
// exchanges that are mirrored.
func madeUp() (*record, scenario) {
	s := scenario{gateways: 2, multiple: 2}
	r := &record{lengths: lengths{time.Second, 2 * time.Second, time.Second}, start: time.Unix(1e9, 0), demands: make([]demand, 2)}
	at := func(ms int) time.Time { return r.start.Add(time.Duration(ms) * time.Millisecond) }
	for ms := 0; ms < 4000; ms += 10 {
		age := 10 * time.Millisecond
		if ms >= 1000 && ms < 1500 {
			age = 150 * time.Millisecond
		}
		r.fates = append(r.fates, fate{at: at(ms).Add(age), age: age, analysed: true, priority: ms%100 == 0})
		phase := phaseBefore
		if ms >= 1000 {
			phase = phaseStep
		}
		if ms >= 3000 {
			phase = phaseAfter
		}
		due := time.Duration(ms) * time.Millisecond
		if ms%100 == 0 {
			r.demands[0].priority[phase] = append(r.demands[0].priority[phase], due)
		} else {
			r.demands[1].routine[phase] = append(r.demands[1].routine[phase], due)
		}
	}
	r.fates = append(r.fates, fate{at: at(1100)}, fate{at: at(1200)})
	r.counters = [2]counters{{mirrored: 100}, {mirrored: 350, overflow: 3, failed: 1}}
	half := overload.Shares{Routine: 0.5, Priority: 1}
	all := overload.Shares{Routine: 1, Priority: 1}
	r.pushes = []pushed{{At: -time.Second, Shares: []overload.Shares{all, all}}, {At: 1100 * time.Millisecond, Shares: []overload.Shares{half, half}}, {At: 1200 * time.Millisecond},
		{At: 1300 * time.Millisecond, Shares: []overload.Shares{half, {Routine: 0.25, Priority: 1}}}, {At: 3300 * time.Millisecond, Shares: []overload.Shares{all, all}}}
	r.effects = []time.Duration{20 * time.Millisecond}
	r.users[phaseStep] = load.Result{Requests: 100, Latencies: []time.Duration{time.Millisecond, 2 * time.Millisecond}}
	return r, s
}

func TestOutcome(t *testing.T) {
	r, s := madeUp()
	o := r.outcome(s, 100)
	near := func(what string, got, want float64) {
		t.Helper()
		if !(math.Abs(got-want) < 0.011*max(1, want)) {
			t.Errorf("%s %g, want %g", what, got, want)
		}
	}
	near("goodput", o.goodput, 0.75)
	near("priority classes", o.priority, 0.75)
	near("waste", o.waste, 0.2)
	near("rate", o.analysed, 100)
	near("longest delay", o.longest, 150)
	near("settled", o.settled, 0.640)
	near("recovery", o.recovery, 0.3)
	near("changes", o.changes, 1.5)
	near("share of the quiet", o.quiet, 0.25)
	near("variation", o.varies, 0)
	near("effect", o.effect, 20)
	near("users' p99", o.users, 1)
	if o.dropped != 4 || o.spoilt != 0 || o.errors != 0 {
		t.Errorf("%+v", o)
	}
	if len(o.points) != 80 || o.points[0].Share != 1 || o.points[30].Share < 0.25 || o.points[30].Share > 0.5 || o.points[70].Demand != 1 || o.points[22].Delay < 0.1 {
		t.Errorf("points %+v", o.points)
	}
	r.fates = append(r.fates, fate{at: r.start, priority: true})
	if got := r.outcome(s, 100).spoilt; got != 1 {
		t.Errorf("%d of a priority class were discarded, want 1", got)
	}
}

// A node that did nothing, and users of whom nobody was answered, have an outcome.
func TestOutcomeOfNothing(t *testing.T) {
	s := scenario{gateways: 1, multiple: 2}
	r := &record{lengths: lengths{time.Second, 2 * time.Second, time.Second}, start: time.Now(), demands: make([]demand, 1)}
	r.users[phaseStep].Errors = 7
	o := r.outcome(s, 100)
	if o.goodput != 0 || o.errors != 7 || !math.IsNaN(o.users) {
		t.Errorf("%+v", o)
	}
}

func TestFates(t *testing.T) {
	file := filepath.Join(t.TempDir(), "trace")
	if err := os.WriteFile(file, []byte("a 2000000 5000 3000 -\nd 1000000 -\na 3000000 1000 0 Authentication\nd 4000000 priority\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := fates(file)
	if err != nil {
		t.Fatal(err)
	}
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	want := []fate{{at: at(1)}, {at(2), 5 * time.Millisecond, false, true}, {at(3), time.Millisecond, true, true}, {at: at(4), priority: true}}
	if !slices.EqualFunc(got, want, func(a, b fate) bool {
		return a.at.Equal(b.at) && a.age == b.age && a.priority == b.priority && a.analysed == b.analysed
	}) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, line := range []string{"", "a", "x 1 2", "a 1 2 -", "a x 2 3 -", "a 1 x 3 -", "d x -", "d 1 2 -"} {
		if f, err := parseFate(line); err == nil {
			t.Errorf("%q is taken as %v", line, f)
		}
	}
}

func TestParseCPU(t *testing.T) {
	a, err := parseCPU("cpu  10 0 10 80 0 0 0 0 0 0\ncpu0 1\n")
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseCPU("cpu  60 0 10 120 10 0 0 0 0 0\n")
	if got := b.idleSince(a); err != nil || got != 0.5 {
		t.Errorf("idle %g, %v", got, err)
	}
	for _, s := range []string{"", "cpu 1 2", "intr 1 2 3 4 5 6", "cpu 1 x 3 4 5 6"} {
		if _, err := parseCPU(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}

func made(t *testing.T) *results {
	t.Helper()
	o, err := parse(nil, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	r := &results{options: o, version: "1.40.0", date: time.Unix(1e9, 0), capacity: map[scenario][]float64{}, costs: []float64{2.5, 2.25, 3}, cells: map[cell][]outcome{}}
	for _, s := range scenarios() {
		r.capacity[s] = []float64{100, 110, 120}
		for _, c := range o.cells(s, 1) {
			one := outcome{goodput: 0.9, p99: 100, settled: 0.1, recovery: 1, quiet: 1, users: 2, points: []overload.Point{{T: 1}, {T: 2, Share: 1, Delay: 9}}}
			never := one
			never.settled, never.goodput = math.NaN(), 0.4
			r.cells[c] = []outcome{one, never, one}
			if s.multiple == 2 {
				r.cells[c] = []outcome{never, never, one}
			}
		}
	}
	return r
}

func TestReport(t *testing.T) {
	r := made(t)
	out := r.markdown()
	for _, want := range []string{
		"| ×10, 4 gateways | yes | **budget** | 0.90 |", "| ×2, 1 gateway | no | AIMD | 0.40 |", "met: 0.90 (0.40–0.90)", "**not met**: 0.40 (0.40–0.90)",
		"**not met**: never (0.10 s–never)", "| AIMD | 100 % |", "met: 2.0 ms", "110 exchanges a second (100–120)", "took 2.50 ms of CPU time (2.25–3.00)", plotFile,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "NaN") || strings.Contains(out, "%!") || strings.Contains(out, "Inf") {
		t.Errorf("report:\n%s", out)
	}
	if svg := r.plot(); !strings.HasPrefix(svg, "<svg") || !strings.HasSuffix(svg, "</svg>\n") {
		t.Errorf("plot:\n%s", svg)
	}
	short := made(t)
	clear(short.cells)
	if out := short.markdown(); strings.Contains(out, "Goals") || short.plot() != "" {
		t.Errorf("report of nothing:\n%s", out)
	}
}

func TestParse(t *testing.T) {
	for _, args := range []string{"-rounds 0", "-others 4", "-quota 2", "-quota NaN", "-step 1s", "-only [", "x"} {
		if _, err := parse(strings.Fields(args), t.Output()); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
	file := filepath.Join(t.TempDir(), "x.md")
	if err := os.WriteFile(file, []byte("no marks\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code := run(t.Context(), []string{"-write", file}, t.Output(), t.Output()); code != 1 {
		t.Errorf("a file without marks: code %d", code)
	}
	o, err := parse([]string{"-only", "×10, 4 gateways, AIMD, guard"}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range scenarios() {
		for _, c := range o.cells(s, 1) {
			names = append(names, c.String())
		}
	}
	if !slices.Equal(names, []string{"×10, 4 gateways, AIMD, guard"}) {
		t.Errorf("chosen: %v", names)
	}
}
