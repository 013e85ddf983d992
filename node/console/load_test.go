package console

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/periscope-mesh/periscope/test/browsertest"
)

// fakeControl is a control plane that answers what it is told to.
type fakeControl struct {
	mu    sync.Mutex
	load  Load
	err   error
	asked int
}

func (f *fakeControl) Load(context.Context) (Load, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return f.load, f.err
}

func (f *fakeControl) set(l Load, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load, f.err = l, err
}

func with(f *fakeControl) func(*Config) {
	return func(c *Config) { c.Load = f }
}

// series makes n values; of those that f does not know it gives NaN.
func series(n int, f func(i int) float64) Series {
	s := make(Series, n)
	for i := range s {
		s[i] = f(i)
	}
	return s
}

func constant(v float64) func(int) float64 { return func(int) float64 { return v } }

// quiet is a control plane that has just started, with a node that has nothing to
// do.
func quiet(now time.Time) Load {
	unknown := series(3, constant(math.NaN()))
	l := Load{At: now, StepSeconds: 1, Notes: []string{}, Demand: unknown, Capacity: unknown, Analysed: series(3, constant(0)), Kernel: unknown, Queue: unknown, Lag: unknown,
		Shares: []LoadShare{}, Nodes: []LoadNode{}}
	for _, k := range losses {
		l.NotAnalysed = append(l.NotAnalysed, LoadLoss{Reason: k.reason, Rate: series(3, constant(0))})
	}
	return l
}

// busy is five minutes in which demand doubles, falls, and rises tenfold, with a
// gap while the control plane was away, and names that want to be markup.
func busy(now time.Time) Load {
	const n = 300
	demand := func(i int) float64 {
		v := 480 + 60*math.Sin(float64(i)/9) + 25*math.Sin(float64(i)*1.7)
		switch {
		case i >= 240:
			v *= 10
		case i >= 90 && i < 150:
			v *= 4
		}
		return v
	}
	share := func(i int) float64 {
		switch {
		case i >= 241:
			return max(19, 100/(1+float64(i-240)))
		case i >= 91 && i < 151:
			return 48
		case i >= 151:
			return min(100, 48*math.Exp(float64(i-151)/6))
		}
		return 100
	}
	gap := func(f func(int) float64) Series {
		return series(n, func(i int) float64 {
			if i >= 60 && i < 72 {
				return math.NaN()
			}
			return f(i)
		})
	}
	late := func(scale float64) Series {
		return gap(func(i int) float64 {
			if i >= 240 {
				return scale * (0.024 + 0.19*math.Exp(float64(240-i)/8))
			}
			return scale * (0.002 + 0.001*math.Abs(math.Sin(float64(i))))
		})
	}
	l := Load{At: now, StepSeconds: 1, Notes: []string{"Of a node nothing is heard: what gateways send to it counts as lost on the way."},
		Demand: gap(demand), Capacity: gap(func(i int) float64 { return 1150 + 40*math.Sin(float64(i)/40) }),
		Analysed: gap(func(i int) float64 { return min(demand(i)*share(i)/100, 1100) }),
		Kernel:   late(0.4), Queue: late(1), Lag: late(0.6), MoreShares: 12, MoreNodes: 1, Reporting: 3, Policies: LoadCounts{Total: 9, Lowered: 3}}
	public := gap(share)
	l.Shares = []LoadShare{
		{Policy: "istio-ingress/public-api", Ceiling: 100, Least: 12.5, Most: 100, Demand: 412.4, Percent: public},
		{Policy: "istio-ingress/public-api", Gateway: "istio-ingress/public-5d9c7f6b8-x2x9z", Ceiling: 100, Least: 12.5, Most: 12.5, Demand: 390, Percent: gap(func(i int) float64 { return share(i) * 0.66 })},
		{Policy: "istio-ingress/public-api", Gateway: "istio-ingress/public-5d9c7f6b8-k4mqp", Ceiling: 100, Least: 100, Most: 100, Demand: 22.4, Percent: gap(constant(100))},
		{Policy: "istio-ingress/partners", Ceiling: 25, Least: 25, Most: 25, Demand: 61, Percent: gap(constant(25))},
		{Policy: "<script>alert(1)</script>", Ceiling: 100, Least: 100, Most: 100, Demand: 0.4, Percent: series(4, constant(math.NaN()))},
		{Policy: "<script>alert(1)</script>", Gateway: "\u202e\"><img src=x onerror=alert(1)>", Ceiling: 100, Least: 100, Most: 100, Demand: 0.4, Percent: series(4, constant(math.NaN()))},
	}
	for _, k := range losses {
		loss := LoadLoss{Reason: k.reason, Rate: gap(constant(0))}
		switch k.reason {
		case "sampled_out":
			loss.Total, loss.Rate = 412_902, gap(func(i int) float64 { return demand(i) * (1 - share(i)/100) })
		case "guard":
			loss.Total, loss.Rate = 3_821, gap(func(i int) float64 {
				if i >= 240 && i < 247 {
					return 700
				}
				return 0
			})
		case "lost":
			loss.Total, loss.Rate = 96, gap(func(i int) float64 { return map[bool]float64{true: 48}[i == 241 || i == 242] })
		case "off", "excluded":
			loss.Rate = series(n, constant(math.NaN()))
		}
		l.NotAnalysed = append(l.NotAnalysed, loss)
	}
	l.NotAnalysed = append(l.NotAnalysed, LoadLoss{Reason: "<b>of a newer control plane</b>", Rate: gap(constant(1)), Total: 300})
	l.Nodes = []LoadNode{
		{Node: "node-b", Address: "10.0.3.9:9091", State: "reporting", ReceivedAt: now, Kernel: 0.004, Queue: 0.024, Lag: 0.02, Utilization: 0.997, Capacity: 560, Rate: 551},
		{Node: "node-a", Address: "10.0.3.7:9091", State: "reporting", ReceivedAt: now.Add(-time.Second), Queue: 0.0021, Utilization: 0.41, Rate: 230},
		{Node: "node-c", Address: "10.0.3.8:9091", State: "stale", ReceivedAt: now.Add(-40 * time.Second), Fault: "no report came in time", Utilization: 0.2, Capacity: 580},
		{Address: "10.0.3.11:9091", State: "connecting", Fault: "connection refused <img src=x onerror=alert(1)>"},
	}
	return l
}

func TestLoadSeries(t *testing.T) {
	s := Series{0, 1234567, math.NaN(), 0.000123456, math.Inf(1), 1e300}
	b, err := json.Marshal(s)
	if want := `[0,1.2346e+06,null,0.00012346,null,1e+300]`; string(b) != want || err != nil {
		t.Errorf("%s, want %s, %v", b, want, err)
	}
	var back Series
	if err := json.Unmarshal(b, &back); err != nil || !cmp.Equal(back, Series{0, 1234600, math.NaN(), 0.00012346, math.NaN(), 1e300}, cmpopts.EquateNaNs()) {
		t.Errorf("%v %v", back, err)
	}
	if b, _ := json.Marshal(Series(nil)); string(b) != "[]" {
		t.Errorf("nothing: %s", b)
	}
	if err := json.Unmarshal([]byte(`["x"]`), &back); err == nil {
		t.Error("a text is a number")
	}
}

// TestLoadIsAskedOnce: the control plane is asked once a second, whoever looks; what
// it said last is kept while it is away.
func TestLoadIsAskedOnce(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	control := &fakeControl{err: errors.New("dial tcp 127.0.0.1:15080: connection refused")}
	h := newHandler(t, &fakeStore{}, with(control), func(c *Config) { c.Now = func() time.Time { return now } })
	if tree := getJSON(t, h, "/api/v1/load", 503); !strings.Contains(tree["detail"].(string), "connection refused") {
		t.Errorf("never heard of: %v", tree)
	}
	for range 20 {
		get(t, h, "/load/now")
	}
	if control.asked != 1 {
		t.Errorf("asked %d times within a second", control.asked)
	}
	control.set(busy(now), nil)
	now = now.Add(time.Second)
	tree := getJSON(t, h, "/api/v1/load", 200)
	if tree["current"] != true || len(tree["demand"].([]any)) != 300 || tree["capacity"].([]any)[65] != nil || tree["shares"].([]any)[0].(map[string]any)["leastPercent"] != 12.5 {
		t.Errorf("%.300v", tree)
	}
	control.set(Load{}, errors.New("gone"))
	for _, step := range []struct {
		after   time.Duration
		current bool
	}{{time.Second, true}, {loadStale, false}, {time.Hour, false}} {
		now = now.Add(step.after)
		tree := getJSON(t, h, "/api/v1/load", 200)
		if tree["current"] != step.current || tree["receivedAt"] != "2026-05-04T12:00:01Z" {
			t.Errorf("%v later: current %v, received at %v", step.after, tree["current"], tree["receivedAt"])
		}
		if page := get(t, h, "/load").Body.String(); strings.Contains(page, "Not current.") == step.current {
			t.Errorf("%v later the page says %v", step.after, step.current)
		}
	}
	if control.asked != 5 {
		t.Errorf("asked %d times in all", control.asked)
	}
	getJSON(t, newHandler(t, &fakeStore{}), "/api/v1/load", 503)
}

// TestLoadPageIsClean: names come from gateways, and values from anywhere.
func TestLoadPageIsClean(t *testing.T) {
	wild := Load{StepSeconds: 1e300, Demand: Series{1e308, -1e308, math.Inf(1)}, Capacity: Series{math.NaN()}, Kernel: Series{1e308}, MoreNodes: -1,
		Shares: []LoadShare{{Ceiling: math.NaN(), Least: -5, Most: 1e300, Percent: Series{-1, 1e9}}}, NotAnalysed: []LoadLoss{{Total: 1e300}, {Reason: "lost", Total: -1}},
		Nodes: []LoadNode{{ReceivedAt: time.Now(), Kernel: math.NaN(), Utilization: 1e300}}}
	loads := []Load{busy(time.Now()), quiet(time.Now()), {}, wild}
	for _, dirt := range dirtCorpus() {
		l := busy(time.Now())
		l.Notes = []string{dirt}
		l.Shares[0].Policy, l.Shares[1].Gateway, l.NotAnalysed[0].Reason = dirt, dirt, dirt
		l.Nodes[0] = LoadNode{Node: dirt, Address: dirt, State: dirt, Fault: dirt, ReceivedAt: time.Now()}
		loads = append(loads, l)
	}
	for i, l := range loads {
		h := newHandler(t, &fakeStore{}, with(&fakeControl{load: l}))
		checkDocument(t, fmt.Sprint("load ", i), get(t, h, "/load"))
		checkDocument(t, fmt.Sprint("its part ", i), get(t, h, "/load/now"))
	}
	for _, dirt := range dirtCorpus() {
		checkDocument(t, "error", get(t, newHandler(t, &fakeStore{}, with(&fakeControl{err: errors.New(dirt)})), "/load"))
	}
	checkDocument(t, "no control plane", get(t, newHandler(t, &fakeStore{}), "/load"))
}

func TestHeadline(t *testing.T) {
	node := func(state string) LoadNode { return LoadNode{State: state} }
	policies := func(total, lowered int) LoadCounts { return LoadCounts{Total: total, Lowered: lowered} }
	for want, l := range map[string]Load{
		"No policy mirrors anything. No node is known.":                                                                                                          {},
		"Gateways mirror all that policies ask for. Analysis is on time.":                                                                                        {Policies: policies(2, 0), Reporting: 1, Nodes: []LoadNode{node("reporting")}, Queue: Series{0.019}},
		"Load control has lowered the policy's share. Analysis is 120 ms late.":                                                                                  {Policies: policies(1, 1), Reporting: 1, Nodes: []LoadNode{node("reporting")}, Queue: Series{0.12}, Lag: Series{math.NaN()}},
		"Load control has lowered the share of 1 of 2 policies. No node reports.":                                                                                {Policies: policies(2, 1), Nodes: []LoadNode{node("stale"), node("connecting")}},
		"Gateways mirror all that policies ask for. Analysis is on time. 2 nodes do not report.":                                                                 {Kernel: Series{0}, Policies: policies(1, 0), Reporting: 1, Nodes: []LoadNode{node("reporting"), node("stale"), node("connecting")}},
		"Gateways mirror all that policies ask for. How late analysis is, no node has told of late.":                                                             {Policies: policies(1, 0), Reporting: 1, Nodes: []LoadNode{node("reporting")}, Queue: Series{0.1, math.NaN()}},
		"Load control has lowered the share of 2 of 200 policies. Analysis is on time. 1 node does not report.":                                                  {Lag: Series{0}, Policies: policies(200, 2), Reporting: 60, MoreNodes: 60, Nodes: []LoadNode{node("stale")}},
		"Load control has lowered the policy's share. Even exchanges of classes that sampling spares are left out in part: they are too many. No node is known.": {Policies: LoadCounts{Total: 1, Lowered: 1, Classes: 1}},
	} {
		if got := strings.Join(headline(&l), " "); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestDrawing: lines begin and end where they should, and are broken where nothing
// is known.
func TestDrawing(t *testing.T) {
	d := drawing{100, 52, 10}
	for want, s := range map[string]Series{
		"":                  {math.NaN(), math.NaN()},
		"M0 51L50 26L100 1": {0, 5, 10},
		"M0 1L50 51L100 1":  {99, -5, 10},
		"M0 51h1M100 1h1":   {0, math.NaN(), 10},
		"M33.3 51L66.7 46":  {math.NaN(), 0, 1, math.NaN()},
		"M0 51h1":           {0},
	} {
		if got := d.line(s); got != want {
			t.Errorf("%v: %q, want %q", s, got, want)
		}
	}
	if got := d.area(Series{math.NaN(), 5, 10}); got != "M50 52L50 26L100 1L100 52Z" {
		t.Errorf("area %q", got)
	}
	for v, want := range map[float64]float64{0: 1, 0.02: 0.02, 0.021: 0.03, 1: 1, 3: 3, 7: 8, 9: 10, 100: 100, 1001: 2000, math.Inf(1): 1} {
		if got := roundUp(v); math.Abs(got-want) > 1e-9 {
			t.Errorf("above %v: %v, want %v", v, got, want)
		}
	}
	p := newPlot("id", "title", 1, 10, rate, line{"solid", "wanted", "", Series{3, 17}, false}, line{"filled", "analysed", "", Series{math.NaN(), 2.25}, true})
	if p.Top != "20/s" || p.Middle != "10/s" || p.From != "2 s ago" || p.Summary != "wanted 17/s, at most 17/s; analysed 2.2/s, at most 2.2/s" || p.Lines[0].Area != "" || p.Lines[1].Area == "" {
		t.Errorf("%+v", p)
	}
	if s := newSpark(series(300, func(i int) float64 { return float64(i % 3) }), 2, Series.most, ""); strings.Count(s.Line, "L") != 99 || strings.Contains(s.Line, " 31") {
		t.Errorf("peaks are kept: %s", s.Line)
	}
	for got, want := range map[string]string{delay(0): "0 ms", delay(0.0004): "0.4 ms", delay(0.0121): "12 ms", delay(1.25): "1.2 s", delay(61): "61 s",
		percent(100): "100 %", percent(12.34): "12.3 %", percent(0.2): "0.20 %", percent(0): "0 %", rate(0): "0/s", rate(0.44): "0.4/s", rate(0.04): "0/s", rate(12345.6): "12\u202f346/s",
		ago(299 * time.Second): "4 min ago", before(299): "4 min 59 s ago", before(300): "5 min ago", before(12): "12 s ago"} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestLoadJourney looks at the Load page in all of its states, with a real browser.
func TestLoadJourney(t *testing.T) {
	control := &fakeControl{err: errors.New("dial tcp 127.0.0.1:15080: connect: connection refused")}
	server := httptest.NewServer(newHandler(t, &fakeStore{}, with(control), func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	}))
	defer server.Close()
	b := browsertest.Open(t)
	looks := func(name string) {
		t.Helper()
		for _, l := range []struct {
			scheme        string
			width, height int64
		}{{"light", 1400, 2300}, {"dark", 1400, 2300}, {"light", 390, 2600}, {"dark", 390, 2600}} {
			b.Do(t, scheme(l.scheme), chromedp.EmulateViewport(l.width, l.height))
			b.Shot(t, fmt.Sprintf("load-%s-%s-%d", name, l.scheme, l.width))
			b.Eventually(t, fmt.Sprintf("%s fits %d", name, l.width), fmt.Sprintf(`document.documentElement.scrollWidth <= %d`, l.width))
		}
		b.Do(t, scheme("light"), chromedp.EmulateViewport(1400, 1500))
	}
	b.Do(t, chromedp.Navigate(server.URL+"/load"))
	b.Eventually(t, "that the control plane is away is said", `document.querySelector(".empty h2").textContent === "The control plane does not answer" && document.querySelector("#live").dataset.state === "off"`)
	b.Eventually(t, "the page is the current one", `document.querySelector("nav a[aria-current]").textContent === "Load"`)
	looks("away")

	control.set(quiet(time.Now()), nil)
	b.Eventually(t, "it comes by itself", `document.querySelectorAll("svg.lines").length === 2 && document.querySelector("#live").dataset.state === "on"`)
	b.Eventually(t, "nothing known is not nothing", `document.querySelector(".legend td").textContent === "not known"`)
	looks("quiet")

	control.set(busy(time.Now()), nil)
	b.Eventually(t, "what is drawn follows", `document.querySelectorAll(".plots path.line[d^=M]").length >= 6 && document.querySelector(".headline").textContent.includes("lowered the share of 3 of 9")`)
	b.Eventually(t, "gateways that differ are shown", `document.querySelectorAll("tr.sub").length === 3 && document.querySelector("tr.sub").textContent.includes("public-5d9c7f6b8-x2x9z")`)
	b.Eventually(t, "lines are broken where nothing is known", `(document.querySelector(".plots path.line.solid").getAttribute("d").match(/M/g) || []).length === 2`)
	b.Eventually(t, "lines differ in more than their colour", `new Set([...document.querySelectorAll(".legend .line")].map(p => getComputedStyle(p).strokeDasharray + getComputedStyle(p).strokeWidth)).size >= 4`)
	b.Eventually(t, "each drawing has a name", `[...document.querySelectorAll("main svg[role=img]")].every(s => s.getAttribute("aria-label") || document.getElementById(s.getAttribute("aria-labelledby")).textContent)`)
	b.Eventually(t, "hostile names are text", `document.body.textContent.includes("<script>alert(1)</script>") && document.body.textContent.includes("‹U+202E›\"><img src=x") && !document.querySelector("main img, main script")`)
	looks("busy")

	control.set(Load{}, errors.New("dial tcp 127.0.0.1:15080: connect: connection refused"))
	b.Eventually(t, "what is old says so", `document.querySelector(".warn").textContent.includes("Not current.") && document.querySelector("#live").dataset.state === "off"`)
	b.Eventually(t, "and stays to be seen", `document.querySelectorAll("tr.sub").length === 3`)
	looks("stale")
	control.set(busy(time.Now()), nil)
	b.Eventually(t, "it recovers by itself", `!document.querySelector(".warn") && document.querySelector("#live").dataset.state === "on"`)
	b.CheckNoComplaints(t)
}
