package accesslog_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	resource "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/accesslog"
	"github.com/periscope-mesh/periscope/node/ingest"
)

// unit is a Log without a gateway, and a clock that stands.
type unit struct {
	t    *testing.T
	log  *accesslog.Log
	ring *ingest.Ring
	reg  *prometheus.Registry
	now  time.Time
	off  bool
}

func newUnit(t *testing.T, auth accesslog.Authenticator) *unit {
	t.Helper()
	u := &unit{t: t, ring: ingest.NewRing(4, 1<<20), reg: prometheus.NewPedanticRegistry(), now: time.Unix(1_700_000_000, 0)}
	var err error
	u.log, err = accesslog.New(accesslog.Config{Ring: u.ring, Authenticator: auth, Registerer: u.reg,
		Now: func() time.Time { return u.now }, Mirrors: func() bool { return !u.off }})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// began is when the exchanges here began, in ms.
const began = 1_700_000_000_000

// vm is a VM's id, and vmFirst what it makes of an exchange's number.
const (
	vm      = "0000a00000000000"
	vmFirst = 0xa_0000_0000
)

// copied is an entry of the HTTP/2 exchange n of vm, with further fields.
func copied(n int, texts ...string) []string {
	return append([]string{"copied", "1", "n", fmt.Sprint(vmFirst + n), "proto", "HTTP/2"}, texts...)
}

// message writes a call's message; each entry is key, value, … The key ns gives
// the exchange's start, after began.
func message(t *testing.T, entries ...[]string) []byte {
	t.Helper()
	pairs := func(texts ...string) (out []*common.KeyValue) {
		for i := 0; i < len(texts); i += 2 {
			out = append(out, &common.KeyValue{Key: texts[i], Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: texts[i+1]}}})
		}
		return out
	}
	scope := &logs.ScopeLogs{}
	for _, e := range entries {
		var after uint64
		if len(e) > 0 && e[0] == "ns" {
			after, _ = strconv.ParseUint(e[1], 10, 64)
			e = e[2:]
		}
		scope.LogRecords = append(scope.LogRecords, &logs.LogRecord{TimeUnixNano: began*1_000_000 + after, Attributes: pairs(e...)})
	}
	b, err := proto.Marshal(&logs.LogsData{ResourceLogs: []*logs.ResourceLogs{{
		Resource: &resource.Resource{Attributes: pairs(event.LogGateway, "ns/gw")}, ScopeLogs: []*logs.ScopeLogs{scope},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b))), b...)
}

// call gives gRPC's status.
func (u *unit) call(body io.Reader) string {
	u.t.Helper()
	r := httptest.NewRequest(http.MethodPost, accesslog.Path, body)
	r.Header.Set("Content-Type", "application/grpc")
	r.ProtoMajor, r.ContentLength = 2, -1
	w := httptest.NewRecorder()
	u.log.ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		u.t.Errorf("status %d", w.Code)
	}
	return w.Header().Get(http.TrailerPrefix + "Grpc-Status")
}

func (u *unit) entry(texts ...string) {
	u.t.Helper()
	if status := u.call(bytes.NewReader(message(u.t, texts))); status != "0" {
		u.t.Errorf("call refused with %s", status)
	}
}

// join gives the event n as Join leaves it.
func (u *unit) join(gateway, vm string, n uint64) event.Event {
	b := &event.Batch{Header: event.Header{VM: vm}, Events: []event.Event{{N: n, Protocol: "HTTP/2", EndUS: 30_000_000, Flags: event.FlagNoResponse}}}
	u.log.Join(gateway, b)
	return b.Events[0]
}

func (u *unit) want(results map[string]float64) {
	u.t.Helper()
	if d := cmp.Diff(results, entries(u.t, u.reg)); d != "" {
		u.t.Errorf("-want +got\n%s", d)
	}
}

// entries is periscope_node_access_log_entries_total, by result.
func entries(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	return counters(t, reg, "periscope_node_access_log_entries_total")
}

// counters gives a family's counters that are not 0 by the value of their label.
func counters(t *testing.T, reg *prometheus.Registry, name string) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if v := m.GetCounter().GetValue(); v > 0 {
				out[m.GetLabel()[0].GetValue()] = v
			}
		}
	}
	return out
}

func TestJoin(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	u.entry(copied(7, "rf", "DC", "rd", "downstream_remote_disconnect", "te", "120")...)
	for _, other := range []event.Event{u.join("ns/gw", vm, 8), u.join("ns/gw", "0000b00000000000", 7), u.join("ns/other", vm, 7)} {
		if other.ResponseFlags != "" || other.EndUS != 30_000_000 {
			t.Errorf("another's end: %+v", other)
		}
	}
	u.want(map[string]float64{})
	e := u.join("ns/gw", vm, 7)
	if e.ResponseFlags != "DC" || e.ResponseDetails != "downstream_remote_disconnect" || e.EndUS != 120_000 {
		t.Errorf("joined: %+v", e)
	}
	u.entry(copied(8, "rf", "UF")...)
	u.want(map[string]float64{"joined": 1, "joined_late": 1})
	if u.ring.Len() != 0 {
		t.Error("an event was made")
	}
}

func TestUnmatched(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	u.entry(copied(1, "rf", "DC")...)
	u.entry(copied(2, "rf", "XX")...)
	u.now = u.now.Add(61 * time.Second)
	entries(t, u.reg) // who reads the gauge has old entries forgotten
	u.want(map[string]float64{"unmatched": 2})
	// By HTTP/2 what the plugin copies has a name.
	u.entry("copied", "1", "rf", "UH", "proto", "HTTP/2", "peer", "192.0.2.1:5", "dst", "10.0.0.1:80")
	u.want(map[string]float64{"unmatched": 3})
	if e := u.join("ns/gw", vm, 1); e.ResponseFlags != "" {
		t.Errorf("an entry was kept: %+v", e)
	}
	got := counters(t, u.reg, "periscope_node_access_log_eventless_total")
	if d := cmp.Diff(map[string]float64{"DC": 1, "UH": 1, "other": 1}, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

// Whatever is sent, what is kept is bounded, and nothing goes uncounted.
func TestWaitingIsBounded(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	const calls, each = 40, 1000
	for i := range calls {
		var list [][]string
		for j := range each {
			list = append(list, copied(i*each+j, "rf", "DC"))
		}
		if status := u.call(bytes.NewReader(message(t, list...))); status != "0" {
			t.Fatal(status)
		}
	}
	const kept = 16384
	u.want(map[string]float64{"unmatched": calls*each - kept})
	for n := range uint64(calls * each) {
		if e := u.join("ns/gw", vm, n); (e.ResponseFlags != "") != (n >= calls*each-kept) {
			t.Fatalf("event %d: %+v", n, e)
		}
	}
	u.want(map[string]float64{"unmatched": calls*each - kept, "joined": kept})
}

func TestEvents(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	var list [][]string
	for range 6 {
		list = append(list, []string{"rf", "DPE", "rd", "http1.codec_error", ":status", "400"})
	}
	if status := u.call(bytes.NewReader(message(t, list...))); status != "0" {
		t.Fatal(status)
	}
	u.want(map[string]float64{"event": 4, "dropped_ring_full": 2}) // the ring's room
	ids := map[string]bool{}
	for range 4 {
		x, _ := u.ring.Pop(t.Context())
		ids[fmt.Sprint(x.Header.VM, x.Event.N)] = true
		if x.Gateway != "ns/gw" || !strings.HasPrefix(x.Header.VM, "log-") || x.Event.SharePPM != 1e6 {
			t.Errorf("%+v", x)
		}
		x.Done()
	}
	if len(ids) != 4 || u.ring.Bytes() != 0 {
		t.Errorf("ids %v, %d bytes held", ids, u.ring.Bytes())
	}
	u.off = true
	u.entry("rf", "DPE")
	u.want(map[string]float64{"event": 4, "dropped_ring_full": 2, "off": 1})
	u.off, list = false, nil
	for range 1000 {
		list = append(list, []string{"rf", "-"})
	}
	u.call(bytes.NewReader(message(t, list...)))
	if got := entries(t, u.reg); got["limited"] != 6 || got["event"] != 8 || got["dropped_ring_full"] != 992 {
		t.Errorf("a flood: %v", got)
	}
}

type nobody struct{}

func (nobody) Authenticate(*http.Request, string) (string, error) { return "", errors.New("no") }

func TestCallRefused(t *testing.T) {
	good := message(t, []string{"rf", "DPE"})
	for name, tc := range map[string]struct {
		body           []byte
		auth           accesslog.Authenticator
		status, result string
	}{
		"no head":      {good[:3], nil, "3", "read"},
		"cut":          {good[:len(good)-1], nil, "3", "read"},
		"compressed":   {append([]byte{1}, good[1:]...), nil, "3", "read"},
		"too large":    {append(binary.BigEndian.AppendUint32([]byte{0}, 1<<20+1), make([]byte, 1<<20+1)...), nil, "3", "read"},
		"claims much":  {append(binary.BigEndian.AppendUint32([]byte{0}, 1<<32-1), good...), nil, "3", "read"},
		"not protobuf": {append([]byte{0, 0, 0, 0, 4}, "hell"...), nil, "3", "malformed"},
		"nobody":       {good, nobody{}, "16", "authentication"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.auth == nil {
				tc.auth = ingest.Trusting{}
			}
			u := newUnit(t, tc.auth)
			if got := u.call(bytes.NewReader(tc.body)); got != tc.status {
				t.Errorf("gRPC's status %s, want %s", got, tc.status)
			}
			if got := counters(t, u.reg, "periscope_node_access_log_calls_total"); len(got) != 1 || got[tc.result] != 1 {
				t.Errorf("counted %v", got)
			}
			if u.ring.Len() != 0 {
				t.Error("something was queued")
			}
		})
	}
	u := newUnit(t, ingest.Trusting{})
	w := httptest.NewRecorder()
	u.log.ServeHTTP(w, httptest.NewRequest(http.MethodGet, accesslog.Path, nil))
	if w.Code != http.StatusUnsupportedMediaType {
		t.Errorf("GET is answered with %d", w.Code)
	}
}

// So many calls are read at once; a further one does not wait.
func TestBusy(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	done := make(chan string)
	var writers []*io.PipeWriter
	for range 16 {
		read, write := io.Pipe()
		writers = append(writers, write)
		go func() { done <- u.call(read) }()
		if _, err := write.Write([]byte{0}); err != nil { // it has begun to read
			t.Fatal(err)
		}
	}
	if got := u.call(bytes.NewReader(message(t))); got != "8" {
		t.Errorf("gRPC's status %s, want 8", got)
	}
	for _, w := range writers {
		_ = w.Close()
		<-done
	}
	if got := u.call(bytes.NewReader(message(t))); got != "0" {
		t.Errorf("afterwards: %s", got)
	}
}
