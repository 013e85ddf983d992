package main

import (
	"strings"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/mirror/rollout"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/gateway"
	"github.com/periscope-mesh/periscope/xds/istiod"
)

// What istiods say becomes evidence only where it is of what is served now, and
// a refusal only where it is Envoy's.
func TestToldBy(t *testing.T) {
	const plugin, settings = "EnvoyFilter/a/plugin", "EnvoyFilter/a/settings"
	g := mirror.Gateway{Namespace: "a", Name: "web", Pods: []string{"web-0"}}
	served := istiod.Served{Serial: 7, Gateways: []istiod.Gateway{{ID: "a/web", Resources: []string{plugin, settings}}}}
	state := func(serial uint64, stage istiod.Stage, reason string, resources ...istiod.Status) istiod.State {
		return istiod.State{Serial: serial, Verdict: istiod.Verdict{Resources: resources, Gateways: []istiod.Status{{Gateway: "a/web", Stage: stage, Reason: reason}}}}
	}
	for name, tc := range map[string]struct {
		state istiod.State
		pods  []string
		want  rollout.Delivery
	}{
		"acknowledged":         {state(7, istiod.Acknowledged, ""), g.Pods, rollout.Acknowledged},
		"of what was before":   {state(6, istiod.Acknowledged, ""), g.Pods, rollout.Pending},
		"another gateway's":    {istiod.State{Serial: 7}, g.Pods, rollout.Pending},
		"refused by Envoy":     {state(7, istiod.Refused, "script load error"), g.Pods, rollout.Refused},
		"not taken by istiod":  {state(7, istiod.Refused, "istiod keeps version 1", istiod.Status{Resource: plugin, Stage: istiod.Refused}), g.Pods, rollout.Pending},
		"another's not taken":  {state(7, istiod.Refused, "script load error", istiod.Status{Resource: "EnvoyFilter/b/plugin", Stage: istiod.Refused}), g.Pods, rollout.Refused},
		"pushed":               {state(7, istiod.Pushed, ""), g.Pods, rollout.Pending},
		"nobody tells":         {state(7, istiod.Unknown, "HTTP 401"), g.Pods, rollout.Unknown},
		"no pods":              {state(7, istiod.Accepted, "the gateway has no pods"), nil, rollout.Acknowledged},
		"pods without a push":  {state(7, istiod.Accepted, ""), g.Pods, rollout.Pending},
		"no pods, not taken":   {state(7, istiod.Pending, ""), nil, rollout.Pending},
		"nothing is known yet": {istiod.State{}, g.Pods, rollout.Pending},
	} {
		gateway := g
		gateway.Pods = tc.pods
		if got, reason := toldBy(tc.state, served)(gateway); got != tc.want {
			t.Errorf("%s: %q (%s), want %q", name, got, reason, tc.want)
		}
	}
}

// Gateways that get no plugin are no part of a roll-out.
func TestEvidenceOfSuppliedGateways(t *testing.T) {
	c := testControl(t)
	on := mirror.Settings{Mode: policy.ModeMonitor, SharePPM: mirror.Everything}
	streams, none := on, on
	streams.Transport, none.SharePPM = policy.TransportExtProc, 0
	planned := func(name string, s mirror.Settings) mirror.GatewayPlan {
		return mirror.GatewayPlan{Gateway: mirror.Gateway{Namespace: "a", Name: name, Selector: map[string]string{"istio": name}}, Policy: "a/p", Settings: s}
	}
	plan := mirror.Plan{Gateways: []mirror.GatewayPlan{planned("governed", on), planned("left-alone", on), planned("streams", streams), planned("idle", none)}}
	plan.Gateways[1].Policy = ""
	if e := c.evidence(plan, nil); len(e) != 1 || e[0].ID != "a/governed" || e[0].Delivery != rollout.Unknown {
		t.Errorf("%+v", e)
	}
	c.unfit["a/governed"] = "too large"
	if e := c.evidence(plan, nil); e[0].Delivery != rollout.Refused || e[0].Reason != "too large" {
		t.Errorf("%+v", e)
	}
}

// A gateway that copies nothing doesn't hold up a roll-out, and gets what the
// roll-out says when it copies again.
func TestRolloutWithoutIdleGateways(t *testing.T) {
	c := testControl(t)
	share := func(percent float64) {
		t.Helper()
		if err := c.publish(func(s *controlState) {
			p := policy.Default()
			p.Spec.Sampling.Percent = percent
			s.set.Policies = []policy.MirrorPolicy{p}
		}); err != nil {
			t.Fatal(err)
		}
	}
	served := func() string {
		t.Helper()
		for _, r := range c.server.Snapshots()[xds.GatewayKey("a/b")].Resources(resource.ExtensionConfigType) {
			if p, is := pluginOf(r); is {
				return strings.TrimSuffix(p.Version+"+"+p.Digest, "+")
			}
		}
		return ""
	}
	is := func(build string, phase rollout.Phase) {
		t.Helper()
		if got := served(); got != build || c.plugins.state.Phase != phase {
			t.Errorf("the gateway is served %s, want %s; %+v", got, build, c.plugins.state)
		}
	}
	own := lua.Embedded()
	other, err := lua.Read(strings.Replace(own.Code, `local VERSION = "0.1.0"`, `local VERSION = "0.1.1"`, 1))
	if err != nil {
		t.Fatal(err)
	}
	share(100)
	is(own.Name(), rollout.Complete)
	share(0)
	is(gateway.Idle, rollout.Complete)
	c.plugins.target, c.plugins.builds[other.Name()], c.plugins.started = other, other, time.Now().Add(-time.Hour)
	share(0)
	for range 3 {
		if err := c.advance(); err != nil {
			t.Fatal(err)
		}
	}
	is(gateway.Idle, rollout.Rolling)
	if z := c.pluginRollout(); len(z.Gateways) != 0 || z.Reason != "there is no gateway that would run it" {
		t.Errorf("%+v", z)
	}
	share(5) // the one gateway that there is is the first to get it
	is(other.Name(), rollout.Rolling)
	a := c.plugins.state.Gateways["a/b"]
	a.Heard, a.Since = true, time.Now().Add(-time.Hour) // it was heard, and would be taken for silent
	c.plugins.state.Gateways["a/b"] = a
	share(0)
	is(gateway.Idle, rollout.Rolling)
	if failed := c.plugins.state.Failed; len(failed) != 0 {
		t.Errorf("rolled back: %v", failed)
	}
}

// A build goes out, and back, while the newest plan can't be published: with the
// last one.
func TestRollBackDuringPlanFault(t *testing.T) {
	c := testControl(t)
	other, err := lua.Read(strings.Replace(lua.Embedded().Code, `local VERSION = "0.1.0"`, `local VERSION = "0.1.1"`, 1))
	if err != nil {
		t.Fatal(err)
	}
	runs := func(want lua.Build) {
		t.Helper()
		if err := c.advance(); err != nil {
			t.Fatal(err)
		}
		if got := c.current().builds["a/b"]; got != want.Name() {
			t.Errorf("the gateway is served %s, want %s; %+v", got, want.Name(), c.plugins.state)
		}
	}
	runs(lua.Embedded())
	c.plugins.target, c.plugins.builds[other.Name()], c.plugins.started = other, other, time.Now().Add(-time.Hour)
	if err := c.publish(func(*controlState) {}); err != nil {
		t.Fatal(err)
	}
	runs(other)
	before := c.current().plan.Revision
	if err := c.publish(func(s *controlState) {
		s.topology.Nodes = []mirror.NodeService{{StandIn: true, Endpoints: []mirror.Endpoint{{}}}}
	}); err == nil {
		t.Fatal("nodes without an address are published")
	}
	c.plugins.target = lua.Embedded()
	runs(lua.Embedded())
	if c.current().plan.Revision != before || c.policyState().Fault == nil {
		t.Errorf("plan %s after %s, fault %+v", c.current().plan.Revision, before, c.policyState().Fault)
	}
}

// What was decided outlives a restart, with the builds that it names.
func TestPluginsAreKept(t *testing.T) {
	c := testControl(t)
	other, err := lua.Read(c.plugins.target.Code + "-- another\n")
	if err != nil {
		t.Fatal(err)
	}
	c.plugins.target, c.plugins.builds[other.Name()], c.plugins.started = other, other, time.Now().Add(-time.Hour)
	if err := c.publish(func(*controlState) {}); err != nil {
		t.Fatal(err)
	}
	again, err := openPlugins(t.Context(), pluginConfig{dataDir: c.cfg.dataDir, logger: c.cfg.logger, reg: newRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if again.state.Gateways["a/b"].Build != other.Name() || again.builds[other.Name()] != other || again.build("a/b") != other {
		t.Errorf("%+v", again.state)
	}
}
