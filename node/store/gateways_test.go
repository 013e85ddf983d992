package store

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestGateways(t *testing.T) {
	s := open(t, nil)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, list := range [][]Gateway{
		{{Gateway: "ns/b", Plugin: "1+old", Last: at, Seen: 10, Errors: 1}},
		{{Gateway: "ns/b", Plugin: "1+old", Last: at.Add(time.Second), Seen: 5}, {Gateway: "ns/a\x00<b>", Plugin: "1+old", Last: at, Seen: 1}},
		{{Gateway: "ns/b", Plugin: "2+new", Last: at.Add(2 * time.Second), Seen: 7}},
		{{Gateway: "ns/b", Plugin: "1+old", Last: at, Seen: 1}}, // told late
	} {
		if err := s.AddGateways(t.Context(), list); err != nil {
			t.Fatal(err)
		}
	}
	want := []Gateway{
		{Gateway: "ns/a\x00<b>", Plugin: "1+old", First: at, Last: at, Seen: 1},
		{Gateway: "ns/b", Plugin: "2+new", First: at.Add(2 * time.Second), Last: at.Add(2 * time.Second), Seen: 7},
		{Gateway: "ns/b", Plugin: "1+old", First: at, Last: at.Add(time.Second), Seen: 16, Errors: 1},
	}
	got, err := s.Gateways(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	for range 3 {
		if err := s.AddGateways(t.Context(), []Gateway{{Gateway: "ns/b", Plugin: "2+new", Last: at.Add(2 * time.Second), Seen: 1<<63 - 1, Errors: -5}}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Gateways(t.Context()); err != nil || got[1].Seen != maxCount || got[1].Errors != 0 {
		t.Errorf("what overflows: %+v, %v", got, err)
	}
	if err := s.forgetGateways(t.Context(), at.Add(2*time.Second)); err != nil {
		t.Fatal(err)
	}
	if got, _ := s.Gateways(t.Context()); len(got) != 1 || got[0].Plugin != "2+new" {
		t.Errorf("left: %+v", got)
	}
}
