package istiod

import (
	"strings"
	"testing"
	"time"
)

const (
	key  = "EnvoyFilter/ns/ef"
	near = "http://a:15014"
)

var (
	epoch = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC) // when version v2 was served
	later = epoch.Add(20 * time.Second)
)

func exchange(sent, acked string, after time.Duration, fault string) Proxy {
	return Proxy{TypeCluster: {Sent: sent, Acked: acked, SentAt: epoch.Add(after), Error: fault}}
}

func TestJudge(t *testing.T) {
	before := map[string]Proxy{"gw-0.ns": exchange("n1", "n1", -time.Minute, "")}
	arrived := map[string]Held{key: {Version: "v2", Since: epoch.Add(time.Second), Arrived: true, Before: before}}
	resident := map[string]Held{key: {Version: "v2", Since: epoch.Add(time.Second), Before: before}}
	one := func(p Proxy) map[string]Proxy {
		return map[string]Proxy{"gw-0.ns": p, "other.ns": exchange("x", "x", 0, "")}
	}
	reading := func(held map[string]Held, p map[string]Proxy) []Reading {
		return []Reading{{Istiod: near, At: later, Held: held, Proxies: p}}
	}
	for name, c := range map[string]struct {
		readings []Reading
		since    time.Time
		noPods   bool
		stage    Stage
		reason   string
	}{
		"nobody to ask":           {nil, epoch, false, Unknown, "no istiod is known"},
		"nobody to ask, no pods":  {nil, epoch, true, Unknown, "no istiod is known"},
		"no access":               {[]Reading{{Istiod: near, At: later, ConfigProblem: "denied", SyncProblem: "denied"}}, epoch, false, Unknown, "http://a:15014: denied"},
		"connected nowhere":       {reading(arrived, map[string]Proxy{}), epoch, false, Unknown, "connected to none"},
		"store unknown":           {[]Reading{{Istiod: near, At: later, ConfigProblem: "denied", Proxies: one(exchange("n2", "n2", 2*time.Second, ""))}}, epoch, false, Unknown, "denied"},
		"not there yet":           {reading(nil, one(exchange("n1", "n1", 0, ""))), later.Add(-time.Second), false, Pending, "doesn't have it yet"},
		"the old one, for now":    {reading(map[string]Held{key: {Version: "v1"}}, one(exchange("n1", "n1", 0, ""))), later.Add(-time.Second), false, Pending, "has version v1, not yet v2"},
		"never there":             {reading(nil, one(exchange("n1", "n1", 0, ""))), epoch, false, Refused, "istiod doesn't have it"},
		"the old one, for good":   {reading(map[string]Held{key: {Version: "v1"}}, one(exchange("n1", "n1", 0, ""))), epoch, false, Refused, "keeps version v1, not v2"},
		"there, not pushed":       {reading(arrived, one(exchange("n1", "n1", -time.Minute, ""))), epoch, false, Accepted, "no Cluster since"},
		"nothing ever pushed":     {reading(arrived, one(Proxy{})), epoch, false, Accepted, "no Cluster yet"},
		"an earlier push's end":   {reading(arrived, one(exchange("n2", "n2", -time.Minute, ""))), epoch, false, Accepted, "no Cluster since"},
		"pushed":                  {reading(arrived, one(exchange("n2", "n1", 2*time.Second, ""))), epoch, false, Pushed, ""},
		"acknowledged":            {reading(arrived, one(exchange("n2", "n2", 2*time.Second, ""))), epoch, false, Acknowledged, ""},
		"refused by Envoy":        {reading(arrived, one(exchange("n2", "n1", 2*time.Second, "no such filter"))), epoch, false, Refused, "Envoy refuses Cluster: no such filter"},
		"refused something older": {reading(arrived, one(exchange("n1", "n0", -time.Minute, "no such filter"))), epoch, false, Accepted, "no Cluster since"},
		"there before we looked, a moment ago": {[]Reading{{Istiod: near, At: epoch.Add(10 * time.Second), Held: resident,
			Proxies: one(exchange("n1", "n1", -time.Minute, ""))}}, epoch, false, Accepted, "no Cluster since"},
		"there before we looked, long since": {[]Reading{{Istiod: near, At: epoch.Add(time.Minute), Held: resident,
			Proxies: one(exchange("n1", "n1", -time.Minute, ""))}}, epoch, false, Acknowledged, ""},
		"and never acknowledged": {[]Reading{{Istiod: near, At: epoch.Add(time.Minute), Held: resident,
			Proxies: one(exchange("n1", "n0", -time.Minute, "broken"))}}, epoch, false, Refused, "broken"},
		"istiod's clock is behind": {[]Reading{{Istiod: near, At: later, Ahead: -time.Hour, Held: arrived,
			Proxies: one(exchange("n2", "n2", -time.Hour+2*time.Second, ""))}}, epoch, false, Acknowledged, ""},
		"two istiods, one with the gateway": {[]Reading{
			{Istiod: "http://b:15014", At: later, Held: arrived, Proxies: map[string]Proxy{}},
			{Istiod: near, At: later, Held: arrived, Proxies: one(exchange("n2", "n2", 2*time.Second, ""))}}, epoch, false, Acknowledged, ""},
		"two istiods, the other is silent": {[]Reading{
			{Istiod: "http://b:15014", At: later, ConfigProblem: "away", SyncProblem: "away"},
			{Istiod: near, At: later, Held: arrived, Proxies: map[string]Proxy{}}}, epoch, false, Unknown, "http://b:15014: away"},
		"two istiods claim it: the newer stream": {[]Reading{
			{Istiod: "http://b:15014", At: later, Held: arrived, Proxies: one(exchange("n2", "n2", 2*time.Second, ""))},
			{Istiod: near, At: later, Held: arrived, Proxies: one(exchange("m2", "m1", 9*time.Second, "bad"))}}, epoch, false, Refused, "bad"},
		"no pods": {reading(arrived, map[string]Proxy{}), epoch, true, Accepted, "no pods"},
	} {
		t.Run(name, func(t *testing.T) {
			g := Gateway{ID: "ns/gw", Policy: "ns/p", Namespace: "ns", Pods: []string{"gw-0"}, Resources: []string{key}}
			if c.noPods {
				g.Pods = nil
			}
			v := Judge(Served{
				Resources: map[string]Resource{key: {Version: "v2", Since: c.since, Types: []string{TypeCluster}}},
				Gateways:  []Gateway{g, {ID: "ns/idle"}},
			}, c.readings, "")
			if len(v.Gateways) != 1 || len(v.Pods) != len(g.Pods) || len(v.Resources) != len(c.readings) {
				t.Fatalf("%+v", v)
			}
			got := v.Gateways[0]
			if got.Stage != c.stage || !strings.Contains(got.Reason, c.reason) || got.Gateway != "ns/gw" || got.Policy != "ns/p" {
				t.Errorf("got %+v, want %s: %s", got, c.stage, c.reason)
			}
		})
	}
}

// A gateway is as far as the last of its pods, and a pod as the last of its
// resources and their types.
func TestJudgeTakesTheLast(t *testing.T) {
	held := map[string]Held{key: {Version: "v2", Arrived: true}}
	p := exchange("n2", "n2", 2*time.Second, "")
	served := Served{
		Resources: map[string]Resource{key: {Version: "v2", Since: epoch, Types: []string{TypeCluster}}},
		Gateways:  []Gateway{{ID: "ns/gw", Namespace: "ns", Pods: []string{"a", "b"}, Resources: []string{key}}},
	}
	readings := []Reading{{Istiod: near, At: later, Held: held, Proxies: map[string]Proxy{"a.ns": p, "b.ns": exchange("n2", "n1", 2*time.Second, "")}}}
	if g := Judge(served, readings, "").Gateways[0]; g.Stage != Pushed || g.Pod != "b" || g.Istiod != near {
		t.Errorf("two pods: %+v", g)
	}
	served.Gateways[0].Pods = []string{"a"}
	served.Resources[key] = Resource{Version: "v2", Since: epoch}
	if g := Judge(served, readings, "").Gateways[0]; g.Stage != Accepted || !strings.Contains(g.Reason, "no Listener yet") {
		t.Errorf("all types: %+v", g)
	}
	served.Gateways[0].Resources = append(served.Gateways[0].Resources, "EnvoyFilter/ns/missing")
	if g := Judge(served, readings, "").Gateways[0]; g.Stage != Unknown || !strings.Contains(g.Reason, "nothing of that name") {
		t.Errorf("an unknown resource: %+v", g)
	}
}

// Where there may be istiods that nobody knows, only what is seen counts.
func TestJudgeUnlisted(t *testing.T) {
	served := Served{
		Resources: map[string]Resource{key: {Version: "v2", Since: epoch, Types: []string{TypeCluster}}},
		Gateways: []Gateway{
			{ID: "ns/seen", Namespace: "ns", Pods: []string{"gw-0"}, Resources: []string{key}},
			{ID: "ns/unseen", Namespace: "ns", Pods: []string{"gw-1"}, Resources: []string{key}},
			{ID: "ns/without-pods", Namespace: "ns", Resources: []string{key}},
		},
	}
	reading := Reading{Istiod: near, At: later, Held: map[string]Held{key: {Version: "v2", Arrived: true}},
		Proxies: map[string]Proxy{"gw-0.ns": exchange("n2", "n2", 2*time.Second, "")}}
	for name, c := range map[string]struct {
		readings []Reading
		seen     Stage
	}{
		"none": {nil, Unknown},
		"some": {[]Reading{reading}, Acknowledged},
	} {
		for i, g := range Judge(served, c.readings, "pods is forbidden").Gateways {
			want, reason := Unknown, "not every istiod is known: pods is forbidden"
			if i == 0 && c.seen == Acknowledged {
				want, reason = Acknowledged, ""
			}
			if g.Stage != want || g.Reason != reason {
				t.Errorf("%s known: %+v", name, g)
			}
		}
	}
}

// An error that istiod reports may be of the push before the last, until Envoy
// replies to that one.
func TestJudgeHearsay(t *testing.T) {
	served := Served{
		Resources: map[string]Resource{key: {Version: "v3", Since: epoch, Types: []string{TypeCluster}}},
		Gateways:  []Gateway{{ID: "ns/gw", Namespace: "ns", Pods: []string{"gw-0"}, Resources: []string{key}}},
	}
	before := map[string]Proxy{"gw-0.ns": exchange("n2", "n1", -time.Minute, "broken")}
	for name, c := range map[string]struct {
		push   Proxy
		after  time.Duration // the reading, after the push
		ahead  time.Duration
		stage  Stage
		reason string
	}{
		"just pushed":                        {exchange("n3", "n1", time.Second, "broken"), time.Second, 0, Pushed, "this Cluster or the one before: broken"},
		"just pushed, istiod's clock is off": {exchange("n3", "n1", time.Hour, "broken"), time.Second - time.Hour, time.Hour, Pushed, "broken"},
		"no reply but the error":             {exchange("n3", "n1", time.Second, "broken"), hearsay, 0, Refused, "Envoy refuses Cluster: broken"},
		"acknowledged, the error is cleared": {exchange("n3", "n3", time.Second, ""), time.Second, 0, Acknowledged, ""},
		"acknowledged, the error is left":    {exchange("n3", "n3", time.Second, "broken"), time.Hour, 0, Acknowledged, ""},
	} {
		t.Run(name, func(t *testing.T) {
			at := c.push[TypeCluster].SentAt.Add(c.after)
			g := Judge(served, []Reading{{Istiod: near, At: at, Ahead: c.ahead, Proxies: map[string]Proxy{"gw-0.ns": c.push},
				Held: map[string]Held{key: {Version: "v3", Arrived: true, Before: before}}}}, "").Gateways[0]
			if g.Stage != c.stage || !strings.Contains(g.Reason, c.reason) {
				t.Errorf("got %+v, want %s: %s", g, c.stage, c.reason)
			}
		})
	}
}

// What was known of an istiod decides which pushes count later.
func TestHold(t *testing.T) {
	pods := map[string][]string{key: {"gw-0.ns"}}
	at := func(n int, problem string) *Reading {
		r := &Reading{At: epoch.Add(time.Duration(n) * time.Second), SyncProblem: problem}
		if problem == "" {
			r.Proxies = map[string]Proxy{"gw-0.ns": exchange(string(rune('a'+n)), "", 0, ""), "else.ns": {}}
		}
		return r
	}
	step := func(before, now *Reading, version string) Held {
		now.Held = hold(before, now, map[string]string{key: version}, pods)
		return now.Held[key]
	}
	sent := func(h Held) string { return h.Before["gw-0.ns"][TypeCluster].Sent }
	r0, r1, r2, r3, r4 := at(0, ""), at(1, ""), at(2, ""), at(3, "away"), at(4, "")
	if h := step(&Reading{}, r0, "v1"); h.Arrived || sent(h) != "a" || len(h.Before) != 1 {
		t.Errorf("at first %+v", h)
	}
	if h := step(r0, r1, "v1"); h.Arrived || sent(h) != "a" || h.Since != r0.At {
		t.Errorf("unchanged %+v", h)
	}
	if h := step(r1, r2, "v2"); !h.Arrived || sent(h) != "b" || h.Since != r2.At {
		t.Errorf("changed %+v", h)
	}
	if h := step(r2, r3, "v3"); !h.Arrived || sent(h) != "c" {
		t.Errorf("changed while the gateways are unknown %+v", h)
	}
	if h := step(r3, r4, "v4"); h.Arrived || sent(h) != "e" {
		t.Errorf("changed after the gateways were unknown %+v", h)
	}
	blind := at(5, "away")
	if h := step(&Reading{}, blind, "v1"); h.Before != nil {
		t.Errorf("at first without gateways %+v", h)
	}
	if h := step(blind, at(6, ""), "v1"); h.Arrived || sent(h) != "g" {
		t.Errorf("gateways known later %+v", h)
	}
	if held := hold(r4, &Reading{ConfigProblem: "away"}, nil, pods); held[key].Version != "v4" {
		t.Errorf("an unreadable store forgets %+v", held)
	}
}
