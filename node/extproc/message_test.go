package extproc

import (
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

func seeds(f *testing.F) {
	attributes, err := structpb.NewStruct(map[string]any{"source.address": "192.0.2.1:1", "response.flags": 32.0, "a": true, "b": nil, "c": []any{1.0}, "d": map[string]any{"e": "f"}})
	if err != nil {
		f.Fatal(err)
	}
	lines := &core.HeaderMap{Headers: []*core.HeaderValue{{Key: ":path", RawValue: []byte("/\xff")}, {Key: "x", Value: "text"}, {Key: "x"}}}
	for _, m := range []*extprocv3.ProcessingRequest{
		{Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{Headers: lines, EndOfStream: true}}, Attributes: map[string]*structpb.Struct{"envoy.filters.http.ext_proc": attributes}, ObservabilityMode: true},
		{Request: &extprocv3.ProcessingRequest_RequestBody{RequestBody: &extprocv3.HttpBody{Body: []byte("body"), EndOfStream: true}}},
		{Request: &extprocv3.ProcessingRequest_RequestTrailers{RequestTrailers: &extprocv3.HttpTrailers{Trailers: lines}}},
		{Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{Headers: lines}}},
		{Request: &extprocv3.ProcessingRequest_ResponseBody{ResponseBody: &extprocv3.HttpBody{}}},
		{Request: &extprocv3.ProcessingRequest_ResponseTrailers{ResponseTrailers: &extprocv3.HttpTrailers{}}},
		{},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
}

// Whatever the generated code reads is read as the same.
func FuzzDecode(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := decode(raw)
		var want extprocv3.ProcessingRequest
		if proto.Unmarshal(raw, &want) != nil || want.GetRequest() == nil {
			return // no panic, and no reading beyond raw, is all that is asked
		}
		if err != nil {
			t.Fatalf("refused: %v", want.String())
		}
		if again, err := proto.Marshal(&want); err != nil || len(again) != len(raw) {
			return // not written as a marshaller does: fields that stand twice
		}
		check := func(lines *core.HeaderMap) {
			if len(got.fields) != min(len(lines.GetHeaders()), len(got.fields)) || len(lines.GetHeaders()) != len(got.fields) && !got.cut {
				t.Fatalf("%d lines, want %d", len(got.fields), len(lines.GetHeaders()))
			}
			for i, f := range got.fields {
				l := lines.GetHeaders()[i]
				if string(f.Name) != l.GetKey() || len(l.GetRawValue()) > 0 && string(f.Value) != string(l.GetRawValue()) {
					t.Fatalf("line %d is %q: %q", i, f.Name, f.Value)
				}
			}
		}
		switch r := want.GetRequest().(type) {
		case *extprocv3.ProcessingRequest_RequestHeaders:
			check(r.RequestHeaders.GetHeaders())
			if got.end != r.RequestHeaders.GetEndOfStream() {
				t.Fatal("end")
			}
		case *extprocv3.ProcessingRequest_ResponseHeaders:
			check(r.ResponseHeaders.GetHeaders())
		case *extprocv3.ProcessingRequest_RequestBody:
			if string(got.body) != string(r.RequestBody.GetBody()) || got.end != r.RequestBody.GetEndOfStream() {
				t.Fatalf("body %q", got.body)
			}
		case *extprocv3.ProcessingRequest_RequestTrailers:
			check(r.RequestTrailers.GetTrailers())
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	m := &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{Headers: &core.HeaderMap{}}}}
	for range 16 {
		h := m.GetRequestHeaders().Headers
		h.Headers = append(h.Headers, &core.HeaderValue{Key: "x-some-header", RawValue: []byte("some value of a usual length, more or less")})
	}
	raw, err := proto.Marshal(m)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decode(raw); err != nil {
			b.Fatal(err)
		}
	}
}
