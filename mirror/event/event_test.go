package event_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/tinylib/msgp/msgp"

	"github.com/periscope-mesh/periscope/mirror/event"
)

func header() *event.Header {
	return &event.Header{
		Version: event.Version, Gateway: "istio-ingress/public", VM: "00112233445566ff", Plugin: "0.1.0",
		Pod: "gw-0", PolicyRev: "abc", ShareRev: "1", Seq: 7, SentUS: 1_790_000_000_000_000,
		Counters: map[string]uint64{event.CounterSeen: 12, event.CounterMirrored: 3},
		Policy:   "default/default", Eligible: 9, Priority: 2, Mirrored: 3,
	}
}

func exchange() *event.Event {
	return &event.Event{
		N: 42, Policy: "default/default", SharePPM: 1_000_000, StartUS: 1_790_000_000_000_000, HeadersUS: 1000, EndUS: 2000,
		Source: "203.0.113.7:51000", Local: "10.0.0.1:8443", Protocol: "HTTP/2", SNI: "shop.example", TLS: "TLSv1.3", Route: "default",
		RequestEndUS: 900, PeerSubject: "CN=shop", PeerSANs: []string{"spiffe://shop/a", "a.shop"}, ResponseFlags: "UF,URX", ResponseDetails: "upstream_reset",
		Flags: event.FlagRequestCut,
		Request: event.Message{
			Headers: []event.Field{
				field(":method", "POST"), field(":path", "/api/items?q=1"), field(":authority", "shop.example"),
				field("set", "a"), field("set", "b"), field("binary", "\x00\xff\xfe"),
			},
			Body: []byte("a\x00b\xff"), BodyBytes: 99,
			Trailers: []event.Field{field("x-sum", "1")},
		},
		Response: event.Message{Headers: []event.Field{field(":status", "200")}, Body: []byte(`{"ok":true}`), BodyBytes: 11},
	}
}

func field(k, v string) event.Field { return event.Field{Name: []byte(k), Value: []byte(v)} }

func batch(events ...*event.Event) []byte {
	b := event.AppendHeader(nil, header())
	for _, e := range events {
		b = event.Append(b, e)
	}
	return b
}

// frame wraps bytes as an event of a batch.
func frame(payload []byte) []byte {
	n := len(payload)
	return append([]byte{0xc6, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, payload...)
}

func TestRoundTrip(t *testing.T) {
	got, err := event.Decode(batch(exchange(), exchange()), event.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	want := &event.Batch{Header: *header(), Events: []event.Event{*exchange(), *exchange()}}
	if d := cmp.Diff(want, got, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestDecodeHeaderFaults(t *testing.T) {
	whole := event.AppendHeader(nil, header())
	other := header()
	other.Version = 99
	for name, tc := range map[string]struct {
		in   []byte
		want event.Reason
	}{
		"empty":           {nil, event.ReasonTruncated},
		"truncated":       {whole[:len(whole)-3], event.ReasonTruncated},
		"http text":       {[]byte("GET / HTTP/1.1\r\n"), event.ReasonNotMsgp},
		"json":            {[]byte(`{"v":1}`), event.ReasonNotMsgp},
		"nil":             {[]byte{0xc0}, event.ReasonNotMsgp},
		"unknown version": {event.AppendHeader(nil, other), event.ReasonVersion},
		"version as text": {msgp.AppendString(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "v"), "1"), event.ReasonType},
		"policy as bytes": {msgp.AppendString(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "policy"), "\xff"), event.ReasonType},
		"negative demand": {msgp.AppendInt64(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "eligible"), -1), event.ReasonType},
		"negative seq":    {msgp.AppendInt64(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "seq"), -1), event.ReasonType},
		"no version":      {msgp.AppendMapHeader(nil, 0), event.ReasonMissing},
		"no vm":           {msgp.AppendUint64(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "v"), 1), event.ReasonMissing},
		"long name":       {msgp.AppendString(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "vm"), strings.Repeat("x", 257)), event.ReasonTooLarge},
		"bytes as a name": {msgp.AppendString(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "plugin"), "\xff"), event.ReasonType},
		"many counters":   {msgp.AppendMapHeader(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "counters"), 65), event.ReasonTooLarge},
		"huge map":        {[]byte{0xdf, 0xff, 0xff, 0xff, 0xff}, event.ReasonTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := event.Decode(tc.in, event.DefaultLimits())
			var e *event.Error
			if !errors.As(err, &e) || e.Reason != tc.want {
				t.Errorf("got %v, want reason %s", err, tc.want)
			}
		})
	}
}

// A bad event never costs its neighbours while its bounds can be known.
func TestDecodeKeepsNeighbours(t *testing.T) {
	nested := bytes.Repeat([]byte{0x91}, 100_000) // arrays in arrays
	deep := append(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "later"), nested...)
	noHeaders := exchange()
	noHeaders.Request.Headers = nil
	certain := exchange()
	certain.SharePPM = 0
	for name, tc := range map[string]struct {
		frame []byte
		want  event.Reason
	}{
		"empty":            {frame(nil), event.ReasonTruncated},
		"not a map":        {frame([]byte{0x01}), event.ReasonNotMsgp},
		"truncated inside": {frame(event.Append(nil, exchange())[5:200]), event.ReasonTruncated},
		"text for number":  {frame(msgp.AppendString(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "n"), "x")), event.ReasonType},
		"number for text":  {frame(msgp.AppendInt(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "src"), 1)), event.ReasonType},
		"map for headers":  {frame(msgp.AppendMapHeader(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "qh"), 0)), event.ReasonType},
		"odd headers":      {frame(msgp.AppendString(msgp.AppendArrayHeader(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "qh"), 1), "a")), event.ReasonType},
		"claims 4G fields": {frame(append(msgp.AppendString(msgp.AppendMapHeader(nil, 1), "qh"), 0xdd, 0xff, 0xff, 0xff, 0xfe)), event.ReasonTruncated},
		"deep nesting":     {frame(deep), event.ReasonTooLarge},
		"no headers":       {event.Append(nil, noHeaders), event.ReasonMissing},
		"no probability":   {event.Append(nil, certain), event.ReasonType},
		"trailing bytes":   {frame(append(event.Append(nil, exchange())[5:], 0x00)), event.ReasonNotMsgp},
		"too large":        {frame(make([]byte, 5<<20)), event.ReasonTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			in := event.Append(batch(exchange()), exchange())
			in = append(in, tc.frame...)
			in = event.Append(in, exchange())
			got, err := event.Decode(in, event.DefaultLimits())
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Events) != 3 {
				t.Errorf("%d neighbours survived, want 3", len(got.Events))
			}
			if len(got.Rejected) != 1 || got.Rejected[0].Index != 2 || got.Rejected[0].Rest || got.Rejected[0].Err.Reason != tc.want {
				t.Errorf("rejected %+v, want index 2, reason %s", got.Rejected, tc.want)
			}
		})
	}
}

func TestDecodeBrokenFraming(t *testing.T) {
	for name, tail := range map[string][]byte{
		"not a frame":     {0x81, 0xa1, 0x6e, 0x01},
		"ends in length":  {0xc6, 0x00, 0x00},
		"claims too much": {0xc6, 0xff, 0xff, 0xff, 0xff, 0x80},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := event.Decode(append(batch(exchange()), tail...), event.DefaultLimits())
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Events) != 1 || len(got.Rejected) != 1 || !got.Rejected[0].Rest {
				t.Errorf("events %d, rejected %+v", len(got.Events), got.Rejected)
			}
		})
	}
}

func TestDecodeBounds(t *testing.T) {
	many := exchange()
	for i := range 10_000 {
		many.Request.Headers = append(many.Request.Headers, field(fmt.Sprint("x-", i), "v"))
	}
	got, err := event.Decode(batch(many), event.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Events) != 1 || len(got.Events[0].Request.Headers) != 1024 || got.Events[0].Flags&event.FlagFieldsDropped == 0 {
		t.Errorf("10,000 headers: kept %d, flags %b", len(got.Events[0].Request.Headers), got.Events[0].Flags)
	}
	limits := event.DefaultLimits()
	limits.MaxEvents = 2
	got, err = event.Decode(batch(exchange(), exchange(), exchange()), limits)
	if err != nil || len(got.Events) != 2 || len(got.Rejected) != 1 || !got.Rejected[0].Rest {
		t.Errorf("beyond MaxEvents: %d events, %+v, %v", len(got.Events), got.Rejected, err)
	}
}

// A later version may add keys: they are passed over.
// What is discarded is not even read, and of a class that sampling spares if the
// event's first key says so.
func TestDecodeSome(t *testing.T) {
	var b []byte
	for i, class := range []string{"", "Suspicious", "", "NewEndpoint"} {
		e := exchange()
		e.N, e.Class = uint64(i+1), class
		b = event.Append(b, e)
	}
	broken := append(b, 0xc6, 0, 0, 0, 1, 0xc1) // no event at all
	broken = event.AppendHeader(broken, &event.Header{Version: event.Version, VM: "v"})
	for name, tt := range map[string]struct {
		discard             func(priority bool) (bool, float64)
		left                []uint64
		discarded, rejected int
	}{
		"none":    {func(bool) (bool, float64) { return false, 1 }, []uint64{1, 2, 3, 4}, 0, 1},
		"routine": {func(priority bool) (bool, float64) { return !priority, 1 }, []uint64{2, 4}, 3, 0},
		"half": {func(priority bool) (bool, float64) {
			if priority {
				return false, 1
			}
			return false, 2
		}, []uint64{1, 2, 3, 4}, 0, 1},
		"all": {func(bool) (bool, float64) { return true, 0 }, nil, 5, 0},
	} {
		got, err := event.DecodeSome(broken, event.DefaultLimits(), tt.discard)
		if err != nil {
			t.Fatal(err)
		}
		var left []uint64
		for _, e := range got.Events {
			left = append(left, e.N)
			if want := uint64(1_000_000); name == "half" && e.Class == "" && e.SharePPM != want/2 || (name != "half" || e.Class != "") && e.SharePPM != want {
				t.Errorf("%s: event %d has share %d", name, e.N, e.SharePPM)
			}
		}
		if !slices.Equal(left, tt.left) || got.Discarded != tt.discarded || len(got.Rejected) != tt.rejected {
			t.Errorf("%s: %v are left, %d discarded, %d rejected", name, left, got.Discarded, len(got.Rejected))
		}
	}
}

func TestDecodeUnknownKeys(t *testing.T) {
	b := msgp.AppendMapHeader(nil, 4)
	b = msgp.AppendArrayHeader(msgp.AppendString(b, "new"), 2)
	b = msgp.AppendNil(msgp.AppendFloat64(b, 1.5))
	b = msgp.AppendUint64(msgp.AppendString(b, "s"), 1)
	b = msgp.AppendUint64(msgp.AppendString(b, "n"), 9)
	b = msgp.AppendArrayHeader(msgp.AppendString(b, "qh"), 2)
	b = msgp.AppendString(msgp.AppendString(b, ":method"), "GET")
	got, err := event.Decode(append(batch(), frame(b)...), event.DefaultLimits())
	if err != nil || len(got.Events) != 1 || got.Events[0].N != 9 {
		t.Errorf("got %+v, %v", got, err)
	}
}

// Nodes read the batches of plugins that tell no demand.
func TestDecodeWithoutDemand(t *testing.T) {
	b := msgp.AppendMapHeader(nil, 2)
	b = msgp.AppendUint64(msgp.AppendString(b, "v"), event.Version)
	b = msgp.AppendString(msgp.AppendString(b, "vm"), "a")
	got, err := event.Decode(b, event.DefaultLimits())
	if err != nil || got.Header.Policy != "" || got.Header.Eligible != 0 {
		t.Errorf("got %+v, %v", got, err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(batch(exchange()))
	f.Add(batch())
	f.Add([]byte{0xdf, 0xff, 0xff, 0xff, 0xff})
	f.Add(append(batch(exchange()), 0xc6, 0, 0, 0, 1, 0x80))
	f.Fuzz(func(t *testing.T, in []byte) {
		b, err := event.Decode(in, event.DefaultLimits())
		if err != nil {
			return
		}
		// What was read can be written, and reads the same.
		out := event.AppendHeader(nil, &b.Header)
		for i := range b.Events {
			b.Events[i].Flags &^= event.FlagFieldsDropped
			out = event.Append(out, &b.Events[i])
		}
		again, err := event.Decode(out, event.DefaultLimits())
		if err != nil || len(again.Rejected) > 0 {
			t.Fatalf("re-encoded batch is refused: %v %+v", err, again)
		}
		again.Rejected = b.Rejected
		if d := cmp.Diff(b, again, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("-first +again\n%s", d)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	e := exchange()
	e.Request.Body = bytes.Repeat([]byte("x"), 1024)
	for i := range 12 {
		e.Request.Headers = append(e.Request.Headers, field(fmt.Sprint("x-header-", i), "some ordinary value"))
	}
	events := make([]*event.Event, 32)
	for i := range events {
		events[i] = e
	}
	in := batch(events...)
	b.SetBytes(int64(len(in)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := event.Decode(in, event.DefaultLimits()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)*32/b.Elapsed().Seconds(), "events/s")
}

// The nearest share of whole parts is taken: a lower one would count too much.
func TestWeigh(t *testing.T) {
	for _, tt := range []struct {
		ppm    uint64
		weight float64
		want   uint64
	}{{1_000_000, 1, 1_000_000}, {1_000_000, 0, 1_000_000}, {1_000_000, 3, 333_333}, {2000, 3, 667}, {5, 2.1, 2}, {1, 50, 1}} {
		e := event.Event{SharePPM: tt.ppm}
		if e.Weigh(tt.weight); e.SharePPM != tt.want {
			t.Errorf("%d ppm, %v times: %d, want %d", tt.ppm, tt.weight, e.SharePPM, tt.want)
		}
	}
}
