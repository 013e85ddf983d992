package xds

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestSnapshotVersions(t *testing.T) {
	one := snap(t, map[string][]string{typeLDS: {"a=1", "b=1"}, typeCDS: {}})
	same := snap(t, map[string][]string{typeLDS: {"b=1", "a=1"}})
	other := snap(t, map[string][]string{typeLDS: {"a=1", "b=2"}})
	if one.Version(typeLDS) != same.Version(typeLDS) {
		t.Error("the order of resources changes the version")
	}
	if one.Version(typeLDS) == other.Version(typeLDS) {
		t.Error("another content has the same version")
	}
	if v := one.Version(typeCDS); v == "" || v != one.Version("never/Heard") || v == one.Version(typeLDS) {
		t.Errorf("version of an empty type is %q", v)
	}
	if d := cmp.Diff([]string{typeCDS, typeLDS}, one.Types()); d != "" {
		t.Error(d)
	}
	a, b := one.Resources(typeLDS), other.Resources(typeLDS)
	if len(a) != 2 || a[0].Name != "a" || a[0].Version != b[0].Version || a[1].Version == b[1].Version {
		t.Errorf("resources: %v, %v", a, b)
	}
}

// TestSnapshotIsDeterministic: maps in messages must not change versions.
func TestSnapshotIsDeterministic(t *testing.T) {
	fields := map[string]any{}
	for i := range 50 {
		fields[fmt.Sprint(i)] = fmt.Sprint(i)
	}
	versions := map[string]bool{}
	for range 20 {
		m, err := structpb.NewStruct(fields)
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSnapshot(map[string][]Message{"t": {{Name: "x", Message: m}}})
		if err != nil {
			t.Fatal(err)
		}
		versions[s.Version("t")] = true
	}
	if len(versions) != 1 {
		t.Errorf("%d versions of one content", len(versions))
	}
}

func TestSnapshotFaults(t *testing.T) {
	ok := wrapperspb.String("x")
	for name, in := range map[string]map[string][]Message{
		"is empty":            {"": {}},
		`"" can't be a name`:  {"t": {{Name: "", Message: ok}}},
		`"*" can't be a name`: {"t": {{Name: "*", Message: ok}}},
		"two resources":       {"t": {{Name: "a", Message: ok}, {Name: "a", Message: ok}}},
		"is nil":              {"t": {{Name: "a"}}},
		"marshal":             {"t": {{Name: "a", Message: wrapperspb.String("\xff")}}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := NewSnapshot(in); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// TestSnapshotWith: what is derived is what is made anew, and shares the rest.
func TestSnapshotWith(t *testing.T) {
	before := snap(t, map[string][]string{typeLDS: {"a=1", "b=1"}, typeCDS: {"c=1"}})
	changed := Message{Name: "b", Message: wrapperspb.String("b=2/2")}
	for name, tt := range map[string]struct {
		typeURL string
		message Message
		want    map[string][]string
	}{
		"replaced": {typeLDS, changed, map[string][]string{typeLDS: {"a=1", "b=2"}, typeCDS: {"c=1"}}},
		"added":    {typeCDS, changed, map[string][]string{typeLDS: {"a=1", "b=1"}, typeCDS: {"b=2", "c=1"}}},
		"new type": {typeRDS, changed, map[string][]string{typeLDS: {"a=1", "b=1"}, typeCDS: {"c=1"}, typeRDS: {"b=2"}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := before.With(tt.typeURL, tt.message)
			if err != nil {
				t.Fatal(err)
			}
			want := snap(t, tt.want)
			for _, typeURL := range append(want.Types(), "never/Heard") {
				if got.Version(typeURL) != want.Version(typeURL) {
					t.Errorf("%s is %v", typeURL, got.Resources(typeURL))
				}
			}
			if got.set(typeLDS).byName["a"].Any != before.set(typeLDS).byName["a"].Any {
				t.Error("what stays is not shared")
			}
		})
	}
	if len(before.Types()) != 2 || before.Version(typeLDS) != snap(t, map[string][]string{typeLDS: {"a=1", "b=1"}}).Version(typeLDS) {
		t.Error("the snapshot that others were derived from has changed")
	}
	for _, bad := range []Message{{Name: "", Message: changed.Message}, {Name: "x"}} {
		if _, err := before.With(typeLDS, bad); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
	if _, err := before.With("", changed); err == nil {
		t.Error("a type without URL is taken")
	}
}

// TestSnapshotSize: more than clients can take is refused, to the byte.
func TestSnapshotSize(t *testing.T) {
	part := &anypb.Any{Value: make([]byte, 1<<20)}
	var fits []Resource
	for i := range maxTypeBytes / len(part.Value) {
		fits = append(fits, Resource{Name: fmt.Sprint(i), Any: part})
	}
	if _, err := Assemble(map[string][]Resource{"t": fits, "u": fits}); err != nil {
		t.Error(err)
	}
	over := append(fits, Resource{Name: "more", Any: &anypb.Any{Value: []byte{1}}})
	if _, err := Assemble(map[string][]Resource{"t": over}); err == nil || !strings.Contains(err.Error(), "more than 1024 MiB in 1025 resources") {
		t.Errorf("error is %v", err)
	}
}

func benchmarkSnapshot(b *testing.B, settings int) *Snapshot {
	in := map[string][]Message{}
	for i := range 20 {
		value := wrapperspb.String(strings.Repeat("listener ", 200))
		in[typeLDS] = append(in[typeLDS], Message{Name: fmt.Sprint("l", i), Message: value})
		in[typeCDS] = append(in[typeCDS], Message{Name: fmt.Sprint("c", i), Message: value})
	}
	in[typeECDS] = []Message{
		{Name: "code", Message: wrapperspb.String(strings.Repeat("lua ", 8000))},
		{Name: "settings", Message: wrapperspb.String(fmt.Sprint(settings))},
	}
	s, err := NewSnapshot(in)
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func BenchmarkSnapshotBuild(b *testing.B) {
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		benchmarkSnapshot(b, i)
	}
}

// benchmarkClient is a stream's watches without the stream.
func benchmarkClient(b *testing.B, s *Server) *connection {
	c := &connection{server: s, key: testKey, types: map[string]*tracker{}}
	for _, typeURL := range []string{typeLDS, typeCDS, typeECDS, typeEDS} {
		c.types[typeURL] = &tracker{}
		sub := stream.NewDeltaSubscription([]string{"settings"}, nil, nil, false)
		if typeURL == typeLDS || typeURL == typeCDS {
			sub = stream.NewDeltaSubscription(nil, nil, nil, true)
		}
		for {
			out := make(chan cache.DeltaResponse, 1)
			if _, err := c.CreateDeltaWatch(&cache.DeltaRequest{TypeUrl: typeURL}, sub, out); err != nil {
				b.Fatal(err)
			}
			if len(out) == 0 {
				break
			}
			sub.SetReturnedResources((<-out).GetReturnedResources())
		}
	}
	return c
}

// BenchmarkSnapshotSet swaps a snapshot under 1,000 idle watches: with nothing
// new for them, and with new settings for each of 250 streams.
func BenchmarkSnapshotSet(b *testing.B) {
	for _, changed := range []bool{false, true} {
		b.Run(fmt.Sprintf("changed=%v", changed), func(b *testing.B) {
			s, err := New(Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
			if err != nil {
				b.Fatal(err)
			}
			old, next := benchmarkSnapshot(b, 0), benchmarkSnapshot(b, 1)
			b.ReportAllocs()
			fill := func() {
				s.SetSnapshot(testKey, old)
				for range 250 {
					benchmarkClient(b, s)
				}
			}
			fill()
			for b.Loop() {
				if !changed {
					s.SetSnapshot(testKey, old)
					continue
				}
				s.SetSnapshot(testKey, next)
				b.StopTimer()
				s.SetSnapshot(testKey, nil)
				delete(s.keys, testKey)
				fill()
				b.StartTimer()
			}
		})
	}
}
