package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/console"
	"github.com/periscope-mesh/periscope/policy"
	xdsnode "github.com/periscope-mesh/periscope/xds/node"
)

var second0 = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time {
	return second0.Add(time.Duration(seconds * float64(time.Second)))
}

// counts are series of the ledger.
func counts(seen, mirrored, sampled, accepted, discarded, clean uint64) map[string]uint64 {
	return map[string]uint64{
		`periscope_gateway_exchanges_total{outcome="seen"}`: seen, `periscope_gateway_exchanges_total{outcome="mirrored"}`: mirrored,
		`periscope_gateway_exchanges_total{outcome="sampled_out"}`: sampled, `periscope_gateway_batches_total`: 7,
		`periscope_ingest_events_total{outcome="accepted"}`: accepted, `periscope_ingest_events_total{outcome="discarded"}`: discarded,
		`periscope_detect_inspections_total{outcome="clean"}`: clean, `periscope_store_hits_total{result="sampled"}`: 5,
	}
}

func TestLossByLedger(t *testing.T) {
	m := newLossMeter()
	one := func(at time.Time, c map[string]uint64) xdsnode.Reporter {
		return xdsnode.Reporter{Node: "one", ReportedAt: at, Counts: c}
	}
	m.ledger(at(0), []xdsnode.Reporter{one(at(0), counts(1000, 500, 500, 480, 20, 480))})
	if r := m.rates(); r[lossGuard] != 0 || m.total[lossGuard] != 0 {
		t.Errorf("what was counted before we looked: %v", r)
	}
	// A report that came after half a second gives a rate for that half.
	m.ledger(at(1), []xdsnode.Reporter{one(at(0.5), counts(1100, 520, 580, 495, 25, 490))})
	r := m.rates()
	if r[lossGuard] != 10 || r[lossSampled] != 160 || m.analysed() != 20 || m.total[lossSampled] != 80 || m.total[lossGuard] != 5 {
		t.Errorf("rates %v, total %v", r, m.total)
	}
	if _, known := r[lossLost]; known {
		t.Error("nobody has told what was lost")
	}
	// Nothing new: the rate stays for a moment, as reports tell changes alone.
	m.ledger(at(2), []xdsnode.Reporter{one(at(0.5), counts(1100, 520, 580, 495, 25, 490))})
	if r := m.rates(); r[lossGuard] != 10 {
		t.Errorf("a second later: %v", r)
	}
	m.ledger(at(4), []xdsnode.Reporter{one(at(0.5), counts(1100, 520, 580, 495, 25, 490))})
	if r := m.rates(); r[lossGuard] != 0 || m.analysed() != 0 {
		t.Errorf("silent: %v", r)
	}
	// Started anew, it has counted all of it since.
	m.ledger(at(6), []xdsnode.Reporter{one(at(5.5), counts(10, 4, 6, 2, 2, 2))})
	if m.total[lossGuard] != 7 || m.total[lossSampled] != 86 {
		t.Errorf("after a restart: %v", m.total)
	}
	// Two: what gateways counted can't be added up, what nodes did can.
	two := xdsnode.Reporter{Node: "two", ReportedAt: at(6.5), Counts: counts(10, 4, 6, 2, 2, 2)}
	m.ledger(at(7), []xdsnode.Reporter{one(at(6.5), counts(20, 8, 12, 4, 4, 4)), two})
	two.ReportedAt, two.Counts = at(7.5), counts(20, 8, 12, 4, 5, 4)
	m.ledger(at(8), []xdsnode.Reporter{one(at(7.5), counts(30, 12, 18, 6, 6, 6)), two})
	r = m.rates()
	if _, known := r[lossSampled]; known || r[lossGuard] != 5 || m.total[lossGuard] != 14 || m.total[lossSampled] != 86 {
		t.Errorf("of two: %v, total %v", r, m.total)
	}
	m.ledger(at(9), nil)
	if r := m.rates(); len(r) != 0 || m.analysed() != 0 {
		t.Errorf("both have gone: %v, %v analysed", r, m.analysed())
	}
	m.ledger(at(2000), nil)
	if len(m.nodes) != 0 {
		t.Errorf("%d nodes are remembered", len(m.nodes))
	}
}

// worker is what a node heard of the one worker, and got of it.
func worker(vm string, eligible, mirrored, received uint64) load.Demand {
	return load.Demand{Gateway: "ns/gw", VM: vm, Policy: "ns/p", Eligible: eligible, Mirrored: mirrored, Received: received}
}

func TestLossByDemand(t *testing.T) {
	m, now := newLossMeter(), at(0)
	report := func(node string, epoch uint64, d ...load.Demand) *load.Report {
		return &load.Report{Node: node, Epoch: epoch, Demands: d}
	}
	look := func(reports ...*load.Report) {
		m.demand(now, reports)
		now = now.Add(time.Second)
	}
	settle := func(reports ...*load.Report) {
		for range lossWindow {
			look(reports...)
		}
	}
	lost := func(want float64, what string) {
		t.Helper()
		if got := m.total[lossLost]; got != want {
			t.Errorf("%s: %v are lost, want %v", what, got, want)
		}
	}
	settle(report("a", 1, worker("v", 1000, 400, 100)))
	lost(0, "before we looked")
	settle(report("a", 1, worker("v", 1100, 440, 140)))
	lost(0, "all came")
	// Another node tells of the worker, and got what a did not, a moment later.
	look(report("a", 1, worker("v", 1200, 480, 160)), report("b", 1, worker("v", 1190, 470, 0)))
	settle(report("a", 1, worker("v", 1200, 480, 160)), report("b", 1, worker("v", 1200, 480, 20)))
	lost(0, "on its way for a moment")
	settle(report("a", 1, worker("v", 1300, 520, 170)), report("b", 1, worker("v", 1290, 510, 40)))
	lost(10, "ten never came")
	look(report("a", 1, worker("v", 1400, 560, 190)), report("b", 2, worker("v", 1390, 550, 20)))
	settle(report("a", 1, worker("v", 1400, 560, 190)), report("b", 2, worker("v", 1390, 550, 20)))
	lost(10, "a node that restarted counts from 0")
	settle(report("a", 1, worker("v", 1400, 560, 190), worker("w", 90, 50, 9)), report("b", 2, worker("v", 1390, 550, 20), worker("w", 80, 45, 30)))
	lost(10, "a new worker counts from here on")
	settle(report("a", 1, worker("v", 1400, 560, 190), worker("w", 140, 100, 19)), report("b", 2, worker("v", 1390, 550, 20), worker("w", 80, 45, 65)))
	lost(15, "of the new one five are missing")
	m.rejected = 3
	settle(report("a", 1, worker("v", 1403, 563, 190)))
	lost(15, "what could not be read was got")
	settle()
	if len(m.workers) != 0 {
		t.Errorf("%d workers are remembered", len(m.workers))
	}
	if _, known := m.rates()[lossLost]; known {
		t.Error("without reports nobody knows what is lost")
	}

	// Another node has got much of the worker before we knew that.
	settle(report("a", 1, worker("z", 2000, 1000, 500)))
	settle(report("a", 1, worker("z", 2020, 1010, 505)), report("b", 1, worker("z", 2010, 1005, 1e6)))
	settle(report("a", 1, worker("z", 2040, 1030, 505)), report("b", 1, worker("z", 2040, 1030, 1e6+5)))
	lost(30, "what was got before does not hide what is lost")
	settle()

	// With several nodes what was left out by sampling is what was wanted less what
	// was mirrored.
	m.ledger(now, []xdsnode.Reporter{{Node: "a"}, {Node: "b"}})
	settle(report("a", 1, worker("x", 0, 0, 0)))
	look(report("a", 1, worker("x", 100, 25, 25)))
	for range lossWindow - 1 {
		look(report("a", 1, worker("x", 100, 25, 25)))
	}
	if r := m.rates(); m.total[lossSampled] != 75 || r[lossSampled] != 75 {
		t.Errorf("sampled out: %v, %v a second", m.total[lossSampled], r[lossSampled])
	}
}

func TestLossOf(t *testing.T) {
	for series := range ledgerMetrics() {
		if reason, _ := lossOf(series + `{x="nonsense"}`); reason != "" && reason != lossRejected && reason != analysedCount {
			t.Errorf("%s, of no known label: %s", series, reason)
		}
	}
	known := map[lossReason]bool{"": true, analysedCount: true}
	for _, r := range lossReasons() {
		known[r] = true
	}
	for _, series := range []string{`periscope_gateway_exchanges_total{outcome="off"}`, `periscope_extproc_exchanges_total{outcome="busy"}`,
		`periscope_node_access_log_entries_total{result="limited"}`, `periscope_ingest_events_total{outcome="dropped_ring_full"}`,
		`periscope_ingest_rejected_events_total{reason="type"}`, `periscope_detect_inspections_total{outcome="error"}`} {
		if reason, _ := lossOf(series); reason == "" || !known[reason] {
			t.Errorf("%s: %q", series, reason)
		}
	}
}

// gatewayPlan is a gateway of Istio's with these policies at these ceilings.
func gatewayPlan(name string, shares *mirror.Shares, ceilings ...int) mirror.GatewayPlan {
	g := mirror.GatewayPlan{Gateway: mirror.Gateway{Namespace: "ns", Name: name, Selector: map[string]string{"a": "b"}}, Policy: "ns/p0"}
	var list []mirror.Settings
	for i, c := range ceilings {
		list = append(list, mirror.Settings{PolicyID: fmt.Sprint("ns/p", i), SharePPM: c, Mode: policy.ModeMonitor})
	}
	g.Settings = list[0]
	g.Settings.Next, g.Settings.Shares = list[1:], shares
	return g
}

func TestShareLevels(t *testing.T) {
	part := func(ppm ...int) (out []mirror.Share) {
		for _, p := range ppm {
			out = append(out, mirror.Share{PPM: p, Priority: mirror.Everything})
		}
		return out
	}
	plan := mirror.Plan{Gateways: []mirror.GatewayPlan{
		gatewayPlan("a", &mirror.Shares{Default: part(200_000, 900_000), Pods: map[string][]mirror.Share{"a-1": part(100_000, 900_000)}}, 1_000_000, 500_000),
		gatewayPlan("b", nil, 1_000_000),
	}}
	off := gatewayPlan("off", nil, 1_000_000)
	off.Settings.PolicyID, off.Settings.Mode = "ns/off", policy.ModeOff
	plan.Gateways = append(plan.Gateways, off, mirror.GatewayPlan{Gateway: mirror.Gateway{Namespace: "ns", Name: "none"}})
	leaves := []shareDemand{
		{"ns/a-1", "ns/a", "ns/p0", 300, 10}, {"ns/a-2", "ns/a", "ns/p0", 100, 0}, {"ns/b-1", "ns/b", "ns/p0", 50, 5},
		{"ns/a-1", "ns/a", "ns/p1", 20, 0}, {"ns/stray", "", "ns/p0", 1e6, 0}, {"ns/a-1", "ns/a", "ns/gone", 1e6, 0},
	}
	got := shareLevels(plan, leaves)
	want := []shareLevel{
		{"ns/p0", "", 100, (300*10. + 100*20 + 50*100) / 450, 10, 100, 465, 100, 0},
		{"ns/p0", "ns/a-1", 100, 10, 10, 10, 310, 100, 0},
		{"ns/p0", "ns/a-2", 100, 20, 20, 20, 100, 100, 0},
		{"ns/p0", "ns/b-1", 100, 100, 100, 100, 55, 100, 0},
		{"ns/p1", "", 50, 50, 50, 50, 20, 100, 0},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(shareLevel{})); diff != "" {
		t.Error(diff)
	}
	// Nobody tells of demand: the mean of what gateways are told.
	if l := shareLevels(plan, nil); len(l) != 2 || l[0].percent != 60 || l[0].least != 20 || l[0].most != 100 {
		t.Errorf("without demand: %+v", l)
	}

	// Many are not all kept, and are counted.
	var many []shareDemand
	for i := range 30 {
		many = append(many, shareDemand{fmt.Sprintf("ns/a-%d", i), "ns/a", "ns/p0", float64(i), 0})
	}
	got = shareLevels(plan, many)
	if len(got) != 1+historyPolicyGateways+1 || got[0].hidden != 30-historyPolicyGateways || got[1].gateway != "ns/a-29" {
		t.Errorf("of many: %+v", got)
	}
	var levels []shareLevel
	for i := range 25 {
		levels = append(levels, shareLevel{policy: fmt.Sprint(i), hidden: 1}, shareLevel{policy: fmt.Sprint(i), gateway: "g"}, shareLevel{policy: fmt.Sprint(i), gateway: "h"}, shareLevel{policy: fmt.Sprint(i), gateway: "k"})
	}
	shown, more := chooseLevels(levels)
	if len(shown) != historyPolicies+historyGateways || more != 100+25-len(shown) {
		t.Errorf("%d are shown, %d are not", len(shown), more)
	}
}

// The history is bounded, has a place for each second, and tells what nobody knows.
func TestLoadHistory(t *testing.T) {
	c := testControl(t)
	h := c.history
	empty := h.load()
	if len(empty.Demand) != 0 || len(empty.Shares) != 0 || len(empty.NotAnalysed) != len(lossReasons()) || len(empty.Notes) != 1 || !strings.Contains(empty.Notes[0], "--orca-port 0") {
		t.Errorf("at the start: %+v", empty)
	}
	level := func(p string, v float64) shareLevel {
		return shareLevel{policy: p, ceiling: 100, percent: v, least: v, most: v}
	}
	h.add(loadSample{at: at(0), demand: 10, shares: []shareLevel{level("p", 100), level("gone", 1)}, rates: map[lossReason]float64{lossGuard: 3}})
	h.add(loadSample{at: at(1.02), demand: 11, shares: []shareLevel{level("p", 50)}})
	h.add(loadSample{at: at(4.01), demand: 12, shares: []shareLevel{level("p", 25), level("new", 7)}})
	l := h.load()
	text, err := json.Marshal(map[string]any{"demand": l.Demand, "p": l.Shares[0].Percent, "new": l.Shares[1].Percent, "guard": l.NotAnalysed[6].Rate})
	if want := `{"demand":[10,11,null,null,12],"guard":[3,null,null,null,null],"new":[null,null,null,null,7],"p":[100,50,null,null,25]}`; string(text) != want || err != nil {
		t.Errorf("%s, want %s", text, want)
	}
	if len(l.Shares) != 2 || l.Shares[0].Policy != "p" || l.Policies != (console.LoadCounts{Total: 2, Lowered: 2, Classes: 2}) || !l.At.Equal(at(4.01)) {
		t.Errorf("%+v", l.Shares)
	}
	h.add(loadSample{at: at(100_000), demand: 13})
	for i := range 500 {
		h.add(loadSample{at: at(100_001 + float64(i)), demand: float64(i)})
	}
	if l := h.load(); len(l.Demand) != historySamples || l.Demand[historySamples-1] != 499 || l.Demand[0] != 200 {
		t.Errorf("%d samples, from %v to %v", len(l.Demand), l.Demand[0], l.Demand[len(l.Demand)-1])
	}
	h.add(loadSample{at: at(50), demand: 1}) // a clock that goes back
	if l := h.load(); len(l.Demand) != historySamples {
		t.Errorf("%d samples", len(l.Demand))
	}

	// What it looks at is there, without nodes too.
	h.sample(at(200_000))
	l = h.load()
	if n := len(l.Demand); n != historySamples || !math.IsNaN(l.Demand[n-1]) || !math.IsNaN(l.Kernel[n-1]) || len(l.Shares) != 1 || l.Shares[0].Percent[n-1] != 100 {
		t.Errorf("a sample of nothing: %+v", l.Shares)
	}
}

// What a console reads of a control plane is what that has.
func TestControlLoad(t *testing.T) {
	c := testControl(t)
	c.history.sample(at(0))
	server := httptest.NewServer(c.pages)
	defer server.Close()
	source, err := newControlLoad(strings.TrimPrefix(server.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := source.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	same := cmp.Comparer(func(a, b console.Series) bool { return fmt.Sprint(a) == fmt.Sprint(b) })
	if diff := cmp.Diff(c.history.load(), got, same); diff != "" {
		t.Error(diff)
	}

	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"old":     {http.NotFound, "older than this console"},
		"refusal": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusMisdirectedRequest) }, "421"},
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		}, "302"},
		"no JSON": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") }, "can't be read"},
		"flood":   {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat(" ", maxLoadBytes+1)) }, "longer than"},
	} {
		server := httptest.NewServer(tt.answer)
		source, err := newControlLoad(strings.TrimPrefix(server.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := source.Load(context.Background()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", name, err)
		}
		server.Close()
	}
	if _, err := newControlLoad("192.0.2.1:15080"); err == nil || !strings.Contains(err.Error(), "--control-debug") {
		t.Errorf("another host: %v", err)
	}
	if source, err := newControlLoad(""); source != nil || err != nil {
		t.Errorf("none: %v %v", source, err)
	}
}

// BenchmarkLoadSample is a second of 10,000 gateways, each heard of by five nodes.
func BenchmarkLoadSample(b *testing.B) {
	m, now := newLossMeter(), at(0)
	plan := mirror.Plan{Gateways: []mirror.GatewayPlan{gatewayPlan("a", &mirror.Shares{Default: []mirror.Share{{PPM: 1000}}}, 1_000_000)}}
	var reports []*load.Report
	var leaves []shareDemand
	for n := range 5 {
		r := &load.Report{Node: fmt.Sprint("node-", n), Epoch: 1}
		for i := range 10_000 {
			r.Demands = append(r.Demands, load.Demand{Gateway: fmt.Sprint("ns/a-", i), VM: "v", Policy: "ns/p0"})
		}
		reports = append(reports, r)
	}
	for i := range 10_000 {
		leaves = append(leaves, shareDemand{fmt.Sprint("ns/a-", i), "ns/a", "ns/p0", 1, 0})
	}
	for b.Loop() {
		now = now.Add(time.Second)
		for _, r := range reports {
			for i := range r.Demands {
				r.Demands[i].Eligible += 5
				r.Demands[i].Mirrored += 5
				r.Demands[i].Received++
			}
		}
		m.demand(now, reports)
		shareLevels(plan, leaves)
	}
}
