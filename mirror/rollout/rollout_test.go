package rollout_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/mirror/rollout"
)

var (
	old  = rollout.Build{Name: "1+old", Wire: 1}
	next = rollout.Build{Name: "2+next", Wire: 1}
)

// fleet is gateways that behave, in virtual time.
type fleet struct {
	t     *testing.T
	now   time.Time
	state rollout.State
	in    rollout.Input
	// traffic tells how many exchanges a gateway sends a second, errors how
	// many of them fail in the plugin by the build it runs.
	traffic map[string]uint64
	errors  map[string]uint64 // by build
	refuses map[string]string // builds that Envoy refuses
	silent  bool              // nobody tells of deliveries
	mute    map[string]bool   // builds that nobody hears of, though they run
	// unsettled tells that nobody has said anything yet.
	unsettled bool
	runs      map[string]map[string]rollout.Count
}

func newFleet(t *testing.T, target rollout.Build, ids ...string) *fleet {
	f := &fleet{t: t, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), traffic: map[string]uint64{}, errors: map[string]uint64{}, refuses: map[string]string{}, mute: map[string]bool{}, runs: map[string]map[string]rollout.Count{}}
	f.state = rollout.State{Stable: old, Target: old, Phase: rollout.Complete, Gateways: map[string]rollout.Assignment{}}
	f.in = rollout.Input{Target: target, Soak: time.Minute, Nodes: []rollout.Node{{Name: "n1", Wires: []int{1}}}}
	for _, id := range ids {
		f.in.Gateways = append(f.in.Gateways, rollout.Gateway{ID: id})
		f.state.Gateways[id] = rollout.Assignment{Build: old.Name, Since: f.now, Confirmed: true}
		f.traffic[id] = 10
		f.runs[id] = map[string]rollout.Count{old.Name: {Seen: 1000, Last: f.now}}
	}
	return f
}

// step lets a second pass.
func (f *fleet) step() {
	f.t.Helper()
	for i := range f.in.Gateways {
		g := &f.in.Gateways[i]
		g.Delivery, g.Reason = rollout.Acknowledged, ""
		build := f.state.Gateways[g.ID].Build
		if reason := f.refuses[build]; reason != "" {
			g.Delivery, g.Reason = rollout.Refused, reason
		} else if c := f.runs[g.ID][build]; build != "" && f.traffic[g.ID] > 0 && !f.mute[build] {
			c.Seen += f.traffic[g.ID]
			c.Errors += f.errors[build]
			c.Last = f.now
			f.runs[g.ID][build] = c
		}
		if f.silent {
			g.Delivery, g.Reason = rollout.Unknown, "no istiod is asked"
		}
		g.Runs = f.runs[g.ID]
	}
	f.in.Now = f.now
	if f.in.Settled.IsZero() && !f.unsettled {
		f.in.Settled = f.now
	}
	after := rollout.Step(f.state, f.in)
	if len(f.in.Gateways) < 10 {
		if again := rollout.Step(f.state, f.in); !cmp.Equal(after, again) {
			f.t.Fatalf("Step is not a function of what it is given: %s", cmp.Diff(after, again))
		}
	}
	f.state = after
	f.now = f.now.Add(time.Second)
}

func (f *fleet) until(within time.Duration, what string, ok func() bool) {
	f.t.Helper()
	for end := f.now.Add(within); ; {
		f.step()
		if ok() {
			return
		}
		if f.now.After(end) {
			f.t.Fatalf("not within %v: %s; %s %s %v", within, what, f.state.Phase, f.state.Reason, f.state.Gateways)
		}
	}
}

func (f *fleet) on(build rollout.Build) string {
	var ids []string
	for _, g := range f.in.Gateways {
		if f.state.Gateways[g.ID].Build == build.Name {
			ids = append(ids, g.ID)
		}
	}
	return strings.Join(ids, " ")
}

func (f *fleet) want(phase rollout.Phase, reason string) {
	f.t.Helper()
	if f.state.Phase != phase || !strings.Contains(f.state.Reason, reason) {
		f.t.Errorf("%s: %s, want %s: %s", f.state.Phase, f.state.Reason, phase, reason)
	}
}

func TestCanaryThenTheOthers(t *testing.T) {
	f := newFleet(t, next, "a/1", "a/2", "a/3")
	f.until(0, "the canary has the target", func() bool { return f.on(next) == "a/1" })
	start := f.now
	f.until(2*time.Minute, "the second follows", func() bool { return f.on(next) == "a/1 a/2" })
	if took := f.now.Sub(start); took < time.Minute {
		t.Errorf("the canary had %v", took)
	}
	start = f.now
	f.until(time.Minute, "the third follows", func() bool { return f.on(next) == "a/1 a/2 a/3" })
	if took := f.now.Sub(start); took < 6*time.Second || took > 10*time.Second {
		t.Errorf("the second had %v", took)
	}
	f.want(rollout.Rolling, "a/3")
	f.until(time.Minute, "it is complete", func() bool { return f.state.Phase == rollout.Complete })
	if f.state.Stable != next {
		t.Errorf("stable is %v", f.state.Stable)
	}
	// A gateway that comes later has it at once.
	f.in.Gateways = append(f.in.Gateways, rollout.Gateway{ID: "a/4"})
	f.runs["a/4"] = map[string]rollout.Count{}
	f.step()
	if f.on(next) != "a/1 a/2 a/3 a/4" {
		t.Errorf("the target is on %s", f.on(next))
	}
}

func TestNothingToFallBackTo(t *testing.T) {
	f := newFleet(t, next, "a/1", "a/2")
	f.state = rollout.State{}
	f.step()
	f.want(rollout.Complete, "")
	if f.on(next) != "a/1 a/2" {
		t.Errorf("the target is on %q", f.on(next))
	}
}

func TestEndsAndRollsBack(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*fleet)
		reason string
	}{
		"refused": {func(f *fleet) { f.refuses[next.Name] = "script load error" }, "gateway a/1: it is refused: script load error"},
		"errors":  {func(f *fleet) { f.errors[next.Name] = 1 }, "errors of the plugin in 10 exchanges, where there were none"},
		"errors doubled": {func(f *fleet) {
			f.errors[old.Name], f.errors[next.Name] = 1, 3
			f.until(0, "", func() bool { return true })
		}, "errors of the plugin in"},
		"silence": {func(f *fleet) { f.mute[next.Name] = true }, "nothing came from it in 3m0s since it got the build, though it was sending before; it is heard again by the build before"},
		"errors of a later": {func(f *fleet) {
			f.until(2*time.Minute, "", func() bool { return f.on(next) == "a/1 a/2" })
			f.errors[next.Name] = 2
		}, "where there were none"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, next, "a/1", "a/2", "a/3")
			tc.change(f)
			f.until(10*time.Minute, "it is rolled back", func() bool { return f.state.Phase == rollout.RolledBack })
			f.want(rollout.RolledBack, tc.reason)
			if f.on(old) != "a/1 a/2 a/3" {
				t.Errorf("the build before is on %q", f.on(old))
			}
			// It is not tried again, also after a restart, until told so.
			raw, err := json.Marshal(f.state)
			if err != nil {
				t.Fatal(err)
			}
			f.state = rollout.State{}
			if err := json.Unmarshal(raw, &f.state); err != nil {
				t.Fatal(err)
			}
			f.step()
			f.want(rollout.RolledBack, tc.reason)
			f.state = f.state.Retry()
			f.errors, f.refuses, f.mute = map[string]uint64{}, map[string]string{}, map[string]bool{}
			for id := range f.runs {
				delete(f.runs[id], next.Name)
			}
			f.until(10*time.Minute, "the retry is complete", func() bool { return f.state.Phase == rollout.Complete })
		})
	}
}

// The same rate of errors as before, or a rise too small to tell, ends nothing.
func TestErrorsAsBefore(t *testing.T) {
	f := newFleet(t, next, "a/1")
	f.runs["a/1"] = map[string]rollout.Count{old.Name: {Seen: 1000, Errors: 100, Last: f.now}}
	f.errors[next.Name] = 1
	f.until(10*time.Minute, "it is complete", func() bool { return f.state.Phase == rollout.Complete })
}

func TestWaits(t *testing.T) {
	newer := rollout.Build{Name: "3+newer", Wire: 2}
	for name, tc := range map[string]struct {
		target rollout.Build
		change func(*fleet)
		phase  rollout.Phase
		reason string
		heal   func(*fleet)
	}{
		"a node reads no such version": {newer, func(*fleet) {}, rollout.Held, "plugin 3+newer writes wire version 2, and node n1 reads [1]: update it first",
			func(f *fleet) { f.in.Nodes = []rollout.Node{{Name: "n1", Wires: []int{1, 2}}} }},
		"a node doesn't say": {newer, func(f *fleet) { f.in.Nodes = []rollout.Node{{Name: "n0"}} }, rollout.Held, "node n0 does not say which",
			func(f *fleet) { f.in.Nodes[0].Wires = []int{2} }},
		"no node": {newer, func(f *fleet) { f.in.Nodes = nil }, rollout.Held, "no node is connected",
			func(f *fleet) { f.in.Nodes = []rollout.Node{{Name: "n1", Wires: []int{2}}} }},
		"refused before": {next, func(f *fleet) { f.refuses[old.Name] = "no such cluster" }, rollout.Held, "gateway a/1 refuses what it has: no such cluster",
			func(f *fleet) { delete(f.refuses, old.Name) }},
		"nobody tells": {next, func(f *fleet) { f.silent, f.traffic["a/1"] = true, 0; f.runs["a/1"] = nil }, rollout.Rolling, "nobody tells whether it runs the new build: no istiod is asked",
			func(f *fleet) { f.silent = false }},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, tc.target, "a/1", "a/2")
			tc.change(f)
			for range 600 {
				f.step()
			}
			f.want(tc.phase, tc.reason)
			if on := f.on(tc.target); strings.Contains(on, "a/2") {
				t.Errorf("the target is on %s", on)
			}
			tc.heal(f)
			f.until(10*time.Minute, "it is complete", func() bool { return f.state.Phase == rollout.Complete })
		})
	}
}

// Without acknowledgements, what nodes hear is evidence enough; without
// traffic, acknowledgements are.
func TestEitherEvidence(t *testing.T) {
	for _, silent := range []bool{true, false} {
		f := newFleet(t, next, "a/1", "a/2")
		f.silent = silent
		if !silent {
			f.traffic = map[string]uint64{}
			f.now = f.now.Add(time.Hour) // nothing was heard for long
		}
		f.until(10*time.Minute, fmt.Sprintf("it is complete (silent: %v)", silent), func() bool { return f.state.Phase == rollout.Complete })
	}
}

// What was heard before a start is known only once nodes have said it.
func TestSettling(t *testing.T) {
	f := newFleet(t, next, "a/1")
	f.unsettled = true
	for range 10 {
		f.step()
	}
	f.want(rollout.Rolling, "being asked")
	if f.on(old) != "a/1" {
		t.Errorf("%v", f.state.Gateways)
	}
	f.unsettled = false
	f.step()
	if a := f.state.Gateways["a/1"]; a.Build != next.Name || !a.Heard {
		t.Errorf("%+v", a)
	}
}

// Silence of which the build is not the cause ends nothing: traffic that ends, a
// node or a control plane that is away for long.
func TestSilenceWithoutFault(t *testing.T) {
	for name, silence := range map[string]func(f *fleet){
		"the traffic ends":   func(f *fleet) { f.traffic["a/1"] = 0 },
		"the nodes are away": func(f *fleet) { f.mute[old.Name], f.mute[next.Name] = true, true },
		"the control plane restarts after long": func(f *fleet) {
			f.now = f.now.Add(time.Hour)
			f.in.Settled, f.unsettled = time.Time{}, true
			f.mute[next.Name] = true
			for range 10 {
				f.step()
			}
			f.unsettled, f.mute[next.Name] = false, false
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, next, "a/1", "a/2")
			f.step()
			if f.on(next) != "a/1" {
				t.Fatalf("the target is on %q", f.on(next))
			}
			silence(f)
			for range 30 * 60 {
				f.step()
				if f.state.Phase == rollout.RolledBack {
					t.Fatalf("rolled back: %s", f.state.Reason)
				}
			}
			f.traffic["a/1"], f.mute = 10, map[string]bool{}
			f.until(20*time.Minute, "it is complete", func() bool { return f.state.Phase == rollout.Complete })
		})
	}
}

// Without a gateway nothing is decided: the target may have failed, or nobody
// can read it.
func TestNoGateway(t *testing.T) {
	f := newFleet(t, next, "a/1")
	f.refuses[next.Name] = "script load error"
	f.until(time.Minute, "it is rolled back", func() bool { return f.state.Phase == rollout.RolledBack })
	gateways := f.in.Gateways
	f.in.Gateways = nil
	f.step()
	f.want(rollout.RolledBack, "script load error")
	f.in.Gateways = gateways
	f.step()
	if f.on(old) != "a/1" {
		t.Errorf("%v", f.state.Gateways)
	}
	f = newFleet(t, next)
	f.step()
	f.want(rollout.Rolling, "no gateway")
}

// Another target while one is under way, and back again.
func TestTargetChanges(t *testing.T) {
	f := newFleet(t, next, "a/1", "a/2")
	f.step()
	f.in.Target = rollout.Build{Name: "4+other", Wire: 1}
	f.step()
	if f.on(f.in.Target) != "a/1" || f.on(old) != "a/2" {
		t.Errorf("%v", f.state.Gateways)
	}
	f.in.Target = old
	f.step()
	f.want(rollout.Complete, "")
	if f.on(old) != "a/1 a/2" {
		t.Errorf("%v", f.state.Gateways)
	}
}

func TestManyGateways(t *testing.T) {
	var ids []string
	for i := range 200 {
		ids = append(ids, fmt.Sprintf("a/%03d", i))
	}
	f := newFleet(t, next, ids...)
	f.until(time.Hour, "it is complete", func() bool { return f.state.Phase == rollout.Complete })
}
