package main

import (
	"slices"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/xds/orca"
)

func TestEffects(t *testing.T) {
	start := time.Unix(1e9, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	uptime := func(ms int) time.Duration { return time.Hour + time.Duration(ms)*time.Millisecond }
	e := newEffects()
	e.configure(map[string]string{"ns/gw-0": "ns/gw", "ns/gw-1": "ns/gw"})
	var got []int // ms from push to effect
	take := func(epoch uint64, reportedMS int, demands ...load.Demand) {
		e.take(orca.Update{Address: "n", Received: at(reportedMS), Report: &load.Report{Epoch: epoch, Uptime: uptime(reportedMS), Demands: demands}},
			func(pushed, seen time.Time) { got = append(got, int(seen.Sub(pushed).Milliseconds())) })
	}
	demand := func(pod string, share uint32, sinceMS int) load.Demand {
		return load.Demand{Gateway: pod, Share: share, ShareSince: uptime(sinceMS)}
	}
	e.pushed("ns/gw", "0000000a", at(0))
	e.pushed("ns/gw", "0000000b", at(100))
	e.pushed("ns/gw", "0000000a", at(200))
	take(1, 60, demand("ns/gw-0", 10, 50), load.Demand{Gateway: "ns/gw-1", Share: 10})
	take(1, 160, demand("ns/gw-0", 10, 50), demand("ns/gw-1", 11, 140)) // one is known already
	take(1, 230, demand("ns/gw-0", 10, 190))                            // of the first push, known already
	take(1, 260, demand("ns/gw-0", 10, 250), demand("ns/gw-1", 12, 255), demand("ns/other", 10, 255))
	take(1, 270, demand("ns/gw-1", 10, 9000)) // not possible
	take(2, 300, demand("ns/gw-1", 10, 265))  // the node has restarted
	if want := []int{50, 40, 50, 65}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for i := range 2 * maxPushes {
		e.pushed("ns/gw", "1", at(1000+i))
	}
	if n := len(e.pushes["ns/gw"]); n != maxPushes {
		t.Errorf("%d pushes are kept", n)
	}
	if e.configure(nil); len(e.pushes) != 0 {
		t.Error("pushes to what is gone are kept")
	}
}
