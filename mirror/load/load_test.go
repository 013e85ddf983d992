package load_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	orca "github.com/cncf/xds/go/xds/data/orca/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/mirror/load"
)

func report() *load.Report {
	return &load.Report{
		Node: "node/a b", Epoch: math.MaxUint64 - 5, Uptime: 26*time.Hour + 7*time.Microsecond,
		Kernel: 12345 * time.Microsecond, Queue: time.Millisecond, Lag: 3 * time.Second,
		Utilization: 0.75, Capacity: 1234.5, Rate: 1000.25,
		Analysed: 1 << 53, Priority: 2, Discarded: 3, Overflown: 4,
		Sockets: load.Sockets{Backend: "inet_diag", Connections: 5, Bytes: 6, Backlog: 7, BacklogMax: 8, ZeroWindows: 9, Drops: 10, Retransmits: 11},
		Demands: []load.Demand{
			{Gateway: "ns/gw-0", VM: "00112233445566ff", Policy: "ns/p", Eligible: 100, Priority: 3, Mirrored: 50, Received: 40, Heard: 2 * time.Second, Share: math.MaxUint32, ShareSince: time.Microsecond},
			{Gateway: "ns/gw-0", VM: "00112233445566ff", Policy: "ns/q/ä%2f"},
		},
		Partial: true,
	}
}

func TestRoundTrip(t *testing.T) {
	for _, want := range []*load.Report{report(), {Node: "n"}} {
		got, err := load.Decode(load.Encode(want))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
	}
}

// What any consumer of ORCA understands is where it looks for it.
func TestStandardFields(t *testing.T) {
	o := load.Encode(report())
	if o.GetApplicationUtilization() != 0.75 || o.GetCpuUtilization() != 0.75 || o.GetRpsFractional() != 1000.25 {
		t.Errorf("got %v", o)
	}
	m := o.GetNamedMetrics()
	if m["periscope.delay.kernel"] != 0.012345 || m["periscope.demand/ns%2Fgw-0/00112233445566ff/ns%2Fp/eligible"] != 100 {
		t.Errorf("named metrics %v", m)
	}
}

func TestEncodeOutOfBounds(t *testing.T) {
	r := &load.Report{Node: "n", Uptime: -time.Second, Utilization: math.NaN(), Capacity: math.Inf(1), Rate: -1, Analysed: math.MaxUint64,
		Sockets: load.Sockets{Bytes: -1},
		Demands: []load.Demand{{Gateway: "", VM: "v", Policy: "p"}, {Gateway: strings.Repeat("g", 257), VM: "v", Policy: "p"},
			{Gateway: "g\xff", VM: "v", Policy: "p"}, {Gateway: "g", VM: "v", Policy: "p", Eligible: math.MaxUint64}}}
	got, err := load.Decode(load.Encode(r))
	if err != nil {
		t.Fatal(err)
	}
	want := &load.Report{Node: "n", Capacity: 1e12, Analysed: 1 << 53, Demands: []load.Demand{{Gateway: "g", VM: "v", Policy: "p", Eligible: 1 << 53}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	for _, name := range []string{"g", strings.Repeat("/", 256)} {
		r = &load.Report{Node: "n"}
		for i := range load.MaxDemands + 10 {
			r.Demands = append(r.Demands, load.Demand{Gateway: name, VM: fmt.Sprintf("%06d", i), Policy: name, Eligible: 1, Priority: 1, Mirrored: 1, Received: 1, Heard: time.Second, Share: 1, ShareSince: time.Second})
		}
		o := load.Encode(r)
		if n := proto.Size(o); n > load.MaxBytes {
			t.Errorf("encoded it has %d bytes", n)
		}
		if got, err = load.Decode(o); err != nil || len(got.Demands) > load.MaxDemands || len(got.Demands) < 600 {
			t.Errorf("%d demands, %v", len(got.Demands), err)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	const demand = "periscope.demand/g/v/p/eligible"
	for name, change := range map[string]func(*orca.OrcaLoadReport){
		"no node":              func(o *orca.OrcaLoadReport) { o.NamedMetrics = nil },
		"two nodes":            func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.node/b"] = 1 },
		"utilisation NaN":      func(o *orca.OrcaLoadReport) { o.ApplicationUtilization = math.NaN() },
		"utilisation negative": func(o *orca.OrcaLoadReport) { o.ApplicationUtilization = -0.1 },
		"rate infinite":        func(o *orca.OrcaLoadReport) { o.RpsFractional = math.Inf(1) },
		"delay negative":       func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.delay.queue"] = -1 },
		"delay NaN":            func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.delay.queue"] = math.NaN() },
		"count in parts":       func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.analysed"] = 1.5 },
		"count too large":      func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.analysed"] = 1e300 },
		"epoch too large":      func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.epoch.low"] = 1 << 32 },
		"demand NaN":           func(o *orca.OrcaLoadReport) { o.NamedMetrics[demand] = math.NaN() },
		"demand negative":      func(o *orca.OrcaLoadReport) { o.NamedMetrics[demand] = -1 },
		"demand of no policy":  func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand/g/v/eligible"] = 1 },
		"demand of nobody":     func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand///p/eligible"] = 1 },
		"demand with slashes":  func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand/g/v/p/q/eligible"] = 1 },
		"demand, bare":         func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand/"] = 1 },
		"escaped otherwise":    func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand/%67/v/p/eligible"] = 1 },
		"escaped badly":        func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand/%zz/v/p/eligible"] = 1 },
		"not UTF-8":            func(o *orca.OrcaLoadReport) { o.NamedMetrics["periscope.demand/%FF/v/p/eligible"] = 1 },
		"long name": func(o *orca.OrcaLoadReport) {
			o.NamedMetrics["periscope.demand/"+strings.Repeat("g", 257)+"/v/p/eligible"] = 1
		},
		"many metrics": func(o *orca.OrcaLoadReport) {
			for i := range 8 * load.MaxDemands {
				o.NamedMetrics[fmt.Sprint(i)] = 1
			}
		},
		"many demands": func(o *orca.OrcaLoadReport) {
			for i := range load.MaxDemands + 1 {
				o.NamedMetrics[fmt.Sprintf("periscope.demand/g/%d/p/eligible", i)] = 1
			}
		},
	} {
		o := load.Encode(&load.Report{Node: "a"})
		change(o)
		if r, err := load.Decode(o); err == nil {
			t.Errorf("%s: it is taken as %+v", name, r)
		}
	}
	if _, err := load.Decode(nil); err == nil {
		t.Error("nothing is taken as a report")
	}
	o := load.Encode(&load.Report{Node: "a"})
	o.NamedMetrics["other.metric"], o.NamedMetrics["periscope.later"] = math.NaN(), -1
	if _, err := load.Decode(o); err != nil {
		t.Errorf("metrics of others: %v", err)
	}
}

// With what has changed, a reader has what the node has.
func TestMergeOfChanged(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var now, merged []load.Demand
	for range 300 {
		before := now
		now = slices.Clone(now)
		for range rng.IntN(6) {
			d := load.Demand{Gateway: fmt.Sprint(rng.IntN(5)), VM: fmt.Sprint(rng.IntN(4)), Policy: fmt.Sprint(rng.IntN(3)), Eligible: rng.Uint64N(50)}
			i, found := slices.BinarySearchFunc(now, d, load.Demand.Compare)
			if found {
				now[i] = d
			} else {
				now = slices.Insert(now, i, d)
			}
		}
		changed := load.Changed(before, now)
		if len(changed) > 5 {
			t.Fatalf("%d of at most 5 have changed", len(changed))
		}
		merged = load.Merge(merged, changed)
		if !slices.Equal(now, merged) {
			t.Fatalf("now %v\nmerged %v\nchanged %v", now, merged, changed)
		}
	}
	if changed := load.Changed(now, now); len(changed) != 0 {
		t.Errorf("nothing has changed: %v", changed)
	}
}

func FuzzDecode(f *testing.F) {
	for _, r := range []*load.Report{report(), {Node: "n"}} {
		raw, err := proto.Marshal(load.Encode(r))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		o := new(orca.OrcaLoadReport)
		if proto.Unmarshal(raw, o) != nil {
			return
		}
		r, err := load.Decode(o)
		if err != nil {
			return
		}
		again, err := load.Decode(load.Encode(r))
		if err != nil {
			t.Fatalf("what was read can't be written: %v", err)
		}
		if d := cmp.Diff(r, again, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("-first +again\n%s", d)
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	r := report()
	r.Demands = nil
	for i := range 1000 {
		r.Demands = append(r.Demands, load.Demand{Gateway: "istio-ingress/public-0", VM: fmt.Sprintf("%016x", i), Policy: "istio-ingress/api", Eligible: 1e6, Priority: 1e4, Mirrored: 1e5})
	}
	for b.Loop() {
		if _, err := load.Decode(load.Encode(r)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(proto.Size(load.Encode(r))), "bytes")
}
