package event_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	resource "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/proto"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// pairs makes attributes of key, value, …
func pairs(texts ...string) []*common.KeyValue {
	var out []*common.KeyValue
	for i := 0; i < len(texts); i += 2 {
		out = append(out, &common.KeyValue{Key: texts[i], Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: texts[i+1]}}})
	}
	return out
}

// logCall writes a call as Envoy does; each entry is key, value, …
func logCall(t testing.TB, gateway string, entries ...[]string) []byte {
	t.Helper()
	scope := &logs.ScopeLogs{Scope: &common.InstrumentationScope{Name: "envoy"}}
	for _, e := range entries {
		scope.LogRecords = append(scope.LogRecords, &logs.LogRecord{
			TimeUnixNano: 1_700_000_000_123_456_789, ObservedTimeUnixNano: 1, SeverityText: "x", Attributes: pairs(e...), Flags: 1,
		})
	}
	// On the wire LogsData and ExportLogsServiceRequest are the same.
	b, err := proto.Marshal(&logs.LogsData{ResourceLogs: []*logs.ResourceLogs{{
		Resource:  &resource.Resource{Attributes: pairs("log_name", "periscope", event.LogGateway, gateway)},
		ScopeLogs: []*logs.ScopeLogs{scope},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDecodeLog(t *testing.T) {
	call := logCall(t, "ns/gw",
		[]string{"rf", "UC,URX", "rd", "upstream_reset", "te", "12", "copied", "1", "n", "4.50359961E+15", "proto", "HTTP/2", "peer", "192.0.2.1:5", "dst", "10.0.0.1:80"},
		[]string{"copied", "1", "rf", "DC", "n", "-", "proto", "HTTP/1.1", "peer", "192.0.2.1:5", "dst", "10.0.0.1:80"},
		[]string{"rf", "-", "rd", "missing_host_header", "te", "0", "src", "192.0.2.1:5", "peer", "192.0.2.1:5", "dst", "10.0.0.1:80", "proto", "HTTP/1.1",
			"sni", "a.example", "tls", "TLSv1.3", "tsub", "CN=c", "tsan", "spiffe://a,spiffe://b", "tdns", "c.example", "qn", "7", "rn", "11", ":status", "400",
			":method", "POST", ":scheme", "http", ":authority", "-", ":path", "/x?WORD", "user-agent", ""},
		[]string{"rf", "DPE", "rd", "http2.invalid.header.field", ":status", "0", "src", "192.0.2.1:5", "peer", "10.0.0.2:6"},
		[]string{"n", "7"},
		[]string{"te", "-1"},
		[]string{"copied", "1", "n", "1.5"},
		[]string{"copied", "1", "n", "9007199254740992"},
	)
	call = bytes.Replace(call, []byte("WORD"), []byte("\xff\x00\xfe!"), 1) // Envoy lets clients' bytes through
	got, err := event.DecodeLog(call, event.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	field := func(name, value string) event.Field { return event.Field{Name: []byte(name), Value: []byte(value)} }
	want := []event.LogEntry{
		{Copied: true, ID: 4503599610000000, Event: event.Event{StartUS: 1_700_000_000_123_456, EndUS: 12000, ResponseFlags: "UC,URX", ResponseDetails: "upstream_reset",
			Protocol: "HTTP/2", Peer: "192.0.2.1:5", Local: "10.0.0.1:80"}},
		{Copied: true, Event: event.Event{StartUS: 1_700_000_000_123_456, ResponseFlags: "DC", Protocol: "HTTP/1.1", Peer: "192.0.2.1:5", Local: "10.0.0.1:80"}},
		{Event: event.Event{
			SharePPM: 1e6, StartUS: 1_700_000_000_123_456, ResponseDetails: "missing_host_header", Source: "192.0.2.1:5", Local: "10.0.0.1:80", Protocol: "HTTP/1.1",
			SNI: "a.example", TLS: "TLSv1.3", PeerSubject: "CN=c", PeerSANs: []string{"spiffe://a", "spiffe://b", "c.example"},
			Flags:    event.FlagLogOnly | event.FlagHeadersCut | event.FlagRequestCut | event.FlagResponseCut,
			Request:  event.Message{Headers: []event.Field{field(":method", "POST"), field(":scheme", "http"), field(":path", "/x?\xff\x00\xfe!")}, BodyBytes: 7},
			Response: event.Message{Headers: []event.Field{field(":status", "400")}, BodyBytes: 11},
		}},
		{Event: event.Event{
			SharePPM: 1e6, StartUS: 1_700_000_000_123_456, ResponseFlags: "DPE", ResponseDetails: "http2.invalid.header.field", Source: "192.0.2.1:5", Peer: "10.0.0.2:6",
			Flags: event.FlagLogOnly | event.FlagHeadersCut | event.FlagNoResponse,
		}},
	}
	if d := cmp.Diff(want, got.Entries); got.Gateway != "ns/gw" || d != "" {
		t.Errorf("of %q, -want +got\n%s", got.Gateway, d)
	}
	var where []string
	for _, fault := range got.Rejected {
		where = append(where, fault.Where)
	}
	if d := cmp.Diff([]string{"copied", "te", "n", "n"}, where); d != "" {
		t.Errorf("rejected %v, -want +got\n%s", got.Rejected, d)
	}
}

// What the plugin sets as an exchange's name (FIRST_ID + number), or that it sets
// none.
func TestLogID(t *testing.T) {
	for _, tc := range []struct {
		vm   string
		e    event.Event
		want uint64
	}{
		{"fffff123456789ab", event.Event{N: 7, Protocol: "HTTP/2", Source: "192.0.2.1:5"}, 0xfffff_0000_0007},
		{"00001fff", event.Event{N: 1<<32 - 1, Protocol: "HTTP/3", Source: "192.0.2.1:5"}, 0x1_ffff_ffff},
		{"fffff123", event.Event{N: 7, Protocol: "HTTP/1.1", Source: "[2001:db8::1]:5"}, 0},
		{"fffff123", event.Event{N: 7, Protocol: "HTTP/1.0", Source: "192.0.2.1", Peer: "10.0.0.2:6"}, 0},
		{"0000a123", event.Event{N: 7, Protocol: "HTTP/1.1", Source: "192.0.2.1:5", Peer: "envoy://internal"}, 0xa_0000_0007},
		{"0000a123", event.Event{N: 7, Protocol: "HTTP/1.1", Source: "192.0.2.1:"}, 0xa_0000_0007},
		{"0000a123", event.Event{N: 7, Protocol: "HTTP/1.1", Source: "443"}, 0xa_0000_0007},
		{"vm", event.Event{N: 7, Protocol: "HTTP/2"}, 7},
	} {
		if got := tc.e.LogID(tc.vm); got != tc.want {
			t.Errorf("%s %+v: %x, want %x", tc.vm, tc.e, got, tc.want)
		}
	}
}

func TestDecodeLogRefuses(t *testing.T) {
	good := logCall(t, "ns/gw", []string{"rf", "DC"})
	many := make([][]string, event.DefaultLimits().MaxEvents+1)
	for name, tc := range map[string]struct {
		call   []byte
		reason event.Reason
	}{
		"cut":      {good[:len(good)-3], event.ReasonTruncated},
		"JSON":     {[]byte(`{"resourceLogs":[]}`), event.ReasonTruncated},
		"too many": {logCall(t, "ns/gw", many...), event.ReasonTooLarge},
	} {
		_, err := event.DecodeLog(tc.call, event.DefaultLimits())
		if fault := new(event.Error); !errors.As(err, &fault) || fault.Reason != tc.reason {
			t.Errorf("%s: %v, want %s", name, err, tc.reason)
		}
	}
}

// A log entry has no end of fields, and no field an end.
func TestDecodeLogBounds(t *testing.T) {
	long := strings.Repeat("x", 5000)
	fields := []string{"rf", long, "rd", long, "src", long, "tsan", strings.Repeat("a,", 1000)}
	for i := range 500 {
		fields = append(fields, fmt.Sprint("h", i), "v")
	}
	got, err := event.DecodeLog(logCall(t, long, fields), event.DefaultLimits())
	if err != nil || len(got.Entries) != 1 {
		t.Fatal(got, err)
	}
	e := got.Entries[0]
	if got.Gateway != "" || len(e.ResponseFlags) > 256 || len(e.ResponseDetails) > 256 || len(e.Source) > 256 || len(e.PeerSANs) > 64 || len(e.Request.Headers) > 64 {
		t.Errorf("gateway %d, flags %d, details %d, source %d, names %d, headers %d", len(got.Gateway), len(e.ResponseFlags), len(e.ResponseDetails), len(e.Source), len(e.PeerSANs), len(e.Request.Headers))
	}
}

func FuzzDecodeLog(f *testing.F) {
	f.Add(logCall(f, "ns/gw", []string{"rf", "UC", "te", "12", "copied", "1", "n", "1"}, []string{"rf", "-", ":path", "/", ":status", "400", "tsan", "a,b"}))
	f.Add([]byte{0x0a, 0x00})
	f.Fuzz(func(t *testing.T, call []byte) {
		l, err := event.DecodeLog(call, event.DefaultLimits())
		if err != nil {
			return
		}
		if n := len(l.Entries) + len(l.Rejected); n > event.DefaultLimits().MaxEvents || n > len(call) {
			t.Errorf("%d entries of %d bytes", n, len(call))
		}
		for _, e := range l.Entries {
			if e.Copied == (e.Flags&event.FlagLogOnly != 0) || len(e.Request.Headers) > 64 {
				t.Errorf("%+v", e)
			}
		}
	})
}
