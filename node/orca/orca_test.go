package orca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	data "github.com/cncf/xds/go/xds/data/orca/v3"
	service "github.com/cncf/xds/go/xds/service/orca/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/periscope-mesh/periscope/mirror/load"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a node whose load the test sets, behind a real gRPC server.
type rig struct {
	t      *testing.T
	server *Server
	addr   string

	mu      sync.Mutex
	load    load.Report
	unknown error
	asked   int
}

func newRig(t *testing.T, change func(*Server)) *rig {
	t.Helper()
	r := &rig{t: t, load: load.Report{Node: "n", Epoch: 7, Capacity: 100}}
	var err error
	r.server, err = New(Config{Report: r.report, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewPedanticRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(r.server)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	g := NewGRPCServer()
	r.server.Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) report() (load.Report, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	return r.load, r.unknown
}

func (r *rig) set(change func(*load.Report)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.load)
}

// watch opens a stream; interval 0: none is asked for.
func (r *rig) watch(interval time.Duration) (grpc.ServerStreamingClient[data.OrcaLoadReport], context.CancelFunc) {
	r.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	r.t.Cleanup(func() { cancel(); conn.Close() })
	req := &service.OrcaLoadReportRequest{}
	if interval != 0 {
		req.ReportInterval = durationpb.New(interval)
	}
	stream, err := service.NewOpenRcaServiceClient(conn).StreamCoreMetrics(ctx, req)
	if err != nil {
		r.t.Fatal(err)
	}
	return stream, cancel
}

func (r *rig) next(stream grpc.ServerStreamingClient[data.OrcaLoadReport]) (*load.Report, time.Time) {
	r.t.Helper()
	o, err := stream.Recv()
	if err != nil {
		r.t.Fatal(err)
	}
	got, err := load.Decode(o)
	if err != nil {
		r.t.Fatal(err)
	}
	return got, time.Now()
}

func demand(vm string, eligible uint64) load.Demand {
	return load.Demand{Gateway: "g", VM: vm, Policy: "p", Eligible: eligible}
}

// All comes first and every five seconds, and in between what has changed.
func TestFullThenChanges(t *testing.T) {
	r := newRig(t, nil)
	r.set(func(l *load.Report) { l.Demands = []load.Demand{demand("a", 1), demand("b", 1)} })
	stream, _ := r.watch(time.Millisecond) // no shorter than 50 ms is granted
	got, start := r.next(stream)
	if got.Partial || len(got.Demands) != 2 || got.Node != "n" || got.Epoch != 7 {
		t.Errorf("first: %+v", got)
	}
	r.set(func(l *load.Report) { l.Demands = []load.Demand{demand("a", 1), demand("b", 2)} })
	got, at := r.next(stream)
	if !got.Partial || len(got.Demands) != 1 || got.Demands[0] != demand("b", 2) || got.Capacity != 100 {
		t.Errorf("changed: %+v", got)
	}
	if gap := at.Sub(start); gap < MinInterval-20*time.Millisecond {
		t.Errorf("it came after %v", gap)
	}
	// Noise and time that passes are no news.
	r.set(func(l *load.Report) {
		l.Uptime, l.Queue, l.Capacity, l.Utilization = time.Hour, 300*time.Microsecond, 100.5, 0.001
		l.Demands = []load.Demand{demand("b", 2)} // one is gone: the next full report tells
	})
	got, at = r.next(stream)
	if got.Partial || len(got.Demands) != 1 || got.Uptime != time.Hour {
		t.Errorf("full: %+v", got)
	}
	if gap := at.Sub(start); gap < FullEvery-100*time.Millisecond || gap > FullEvery+time.Second {
		t.Errorf("the second full report came after %v", gap)
	}
	if n := testutil.ToFloat64(r.server.metrics.reports.WithLabelValues("partial")); n != 1 {
		t.Errorf("%v partial reports", n)
	}
}

// What is urgent comes at once, whatever interval was asked for, and is not
// repeated by a flood of urgency.
func TestUrgent(t *testing.T) {
	r := newRig(t, nil)
	stream, _ := r.watch(0)
	r.next(stream)
	best := time.Hour
	for i := range 5 {
		time.Sleep(2 * urgentGap)
		r.set(func(l *load.Report) { l.Kernel = time.Duration(i+1) * 100 * time.Millisecond })
		start := time.Now()
		r.server.Urge()
		got, at := r.next(stream)
		if got.Kernel != time.Duration(i+1)*100*time.Millisecond {
			t.Fatalf("got %v", got.Kernel)
		}
		best = min(best, at.Sub(start))
	}
	if best > 100*time.Millisecond { // an interval is a second
		t.Errorf("it took %v", best)
	}
	r.mu.Lock()
	before := r.asked
	r.mu.Unlock()
	for start := time.Now(); time.Since(start) < 200*time.Millisecond; time.Sleep(time.Millisecond) {
		r.server.Urge()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.asked - before; n > 200 {
		t.Errorf("the load was asked for %d times", n)
	}
}

func TestSeveralClients(t *testing.T) {
	r := newRig(t, nil)
	var streams []grpc.ServerStreamingClient[data.OrcaLoadReport]
	for range 8 {
		s, _ := r.watch(50 * time.Millisecond)
		r.next(s)
		streams = append(streams, s)
	}
	r.set(func(l *load.Report) { l.Analysed = 1000 })
	for _, s := range streams {
		if got, _ := r.next(s); got.Analysed != 1000 {
			t.Errorf("got %d", got.Analysed)
		}
	}
}

// A client that does not read is dropped, others go on meanwhile, and what it
// would have been told takes no memory.
func TestStalledClient(t *testing.T) {
	r := newRig(t, func(s *Server) { s.stall = time.Second })
	big := make([]load.Demand, 2000)
	r.set(func(l *load.Report) {
		for i := range big {
			big[i] = load.Demand{Gateway: strings.Repeat("g", 200), VM: fmt.Sprintf("%04d", i), Policy: "p"}
		}
		l.Demands = big
	})
	stalled, _ := r.watch(50 * time.Millisecond) // never read
	reader, _ := r.watch(50 * time.Millisecond)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range 40 {
		r.set(func(l *load.Report) {
			l.Analysed++
			l.Demands = nil
			for _, d := range big {
				d.Eligible = uint64(i)
				l.Demands = append(l.Demands, d)
			}
		})
		r.next(reader)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 32<<20 {
		t.Errorf("%d MiB more are held", grown>>20)
	}
	for start := time.Now(); testutil.ToFloat64(r.server.metrics.ended.WithLabelValues(endStalled)) != 1; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatal("it is not dropped")
		}
	}
	// What it reads at last is what was on its way; then it hears why.
	for {
		if _, err := stalled.Recv(); err != nil {
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("it hears %v", err)
			}
			break
		}
	}
	if n := r.server.open(); n != 1 {
		t.Errorf("%d streams are open", n)
	}
}

// Who asks for a load that nobody knows hears why, and is told of it once it is known.
func TestUnknown(t *testing.T) {
	r := newRig(t, nil)
	s, _ := r.watch(0)
	r.next(s)
	unknown := func(why error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.unknown = why
	}
	unknown(errors.New("it is silent"))
	late, _ := r.watch(0)
	for _, s := range []grpc.ServerStreamingClient[data.OrcaLoadReport]{s, late} {
		_, err := s.Recv()
		if err == nil { // made a moment before
			_, err = s.Recv()
		}
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "it is silent") {
			t.Errorf("got %v", err)
		}
	}
	unknown(nil)
	s, _ = r.watch(0)
	r.next(s)
}

func TestRoom(t *testing.T) {
	r := newRig(t, nil)
	var cancels []context.CancelFunc
	for range maxStreams {
		s, cancel := r.watch(time.Second)
		r.next(s)
		cancels = append(cancels, cancel)
	}
	s, _ := r.watch(time.Second)
	if _, err := s.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one more: %v", err)
	}
	for _, cancel := range cancels {
		cancel()
	}
	for start := time.Now(); r.server.open() > 0; time.Sleep(time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatal("streams stay open")
		}
	}
	s, _ = r.watch(time.Second)
	r.next(s)
}

func TestInterval(t *testing.T) {
	for want, req := range map[time.Duration]*service.OrcaLoadReportRequest{
		defaultInterval:        {},
		MinInterval:            {ReportInterval: durationpb.New(-time.Hour)},
		200 * time.Millisecond: {ReportInterval: durationpb.New(200 * time.Millisecond)},
		maxInterval:            {ReportInterval: &durationpb.Duration{Seconds: 1 << 62, Nanos: -5}},
	} {
		if got := intervalOf(req); got != want {
			t.Errorf("%v: %v, want %v", req, got, want)
		}
	}
}

// Without a certificate nobody hears anything; with one, see xds/orca.
func TestCertified(t *testing.T) {
	r := newRig(t, func(s *Server) { s.config.Certified = true })
	s, _ := r.watch(0)
	if _, err := s.Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v", err)
	}
}
