package accesslog_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/ingest"
)

const peer, local = "192.0.2.1:5", "10.0.0.1:80"

// h1 is an exchange of one HTTP/1.1 connection; times in ns after began.
type h1 struct {
	start, headers, end int64 // its first byte, its request's headers, its end
	status              int   // 0: aborted
	flags               string
	copied              bool
}

const ms = 1_000_000

// entry is what Envoy logs of it.
func (x h1) entry() []string {
	return []string{"ns", fmt.Sprint(x.start), "copied", "1", "n", "-", "proto", "HTTP/1.1", "peer", peer, "dst", local,
		"rf", x.flags, ":status", fmt.Sprint(x.status), "te", fmt.Sprint((x.end - x.start) / ms)}
}

// event is what the plugin makes of it, whose clock is of ms.
func (x h1) event(n int) event.Event {
	e := event.Event{N: uint64(n), Protocol: "HTTP/1.1", Source: "198.51.100.1:9", Peer: peer, Local: local, StartUS: uint64(began+x.headers/ms) * 1000}
	if x.status == 0 {
		e.Flags, e.EndUS = event.FlagNoResponse, 30_000_000
		return e
	}
	e.Response.Headers = []event.Field{{Name: []byte(":status"), Value: []byte(strconv.Itoa(x.status))}}
	e.EndUS = uint64(x.end/ms-x.headers/ms) * 1000
	return e
}

// connection makes exchanges that follow one another, the last of them aborted;
// pause gives the time between two.
func connection(r *rand.Rand, pause func() int64, flagged, copied float64) []h1 {
	var out []h1
	at := r.Int64N(ms)
	for i := range 2 + r.IntN(30) {
		x := h1{start: at, headers: at + 20_000 + r.Int64N(100_000), status: []int{200, 503, 504}[r.IntN(3)], flags: "-", copied: r.Float64() < copied}
		if r.IntN(10) == 0 {
			x.headers += r.Int64N(5 * ms) // they come slowly
		}
		x.end = x.headers + []int64{r.Int64N(200_000), r.Int64N(3 * ms), r.Int64N(40 * ms)}[r.IntN(3)]
		if r.Float64() < flagged {
			x.flags = fmt.Sprint("F", i) // its own, to be known by
		}
		out = append(out, x)
		at = x.end + pause()
	}
	out[len(out)-1].status = 0
	return out
}

// run sends a connection's entries, in any order, then its events in batches of
// so many, and gives the flags that each copied exchange got; "" is none.
func run(t *testing.T, r *rand.Rand, list []h1, batch int) map[int]string {
	t.Helper()
	u := newUnit(t, ingest.Trusting{})
	var logged [][]string
	for _, x := range list {
		if x.flags != "-" {
			logged = append(logged, x.entry())
		}
	}
	r.Shuffle(len(logged), func(i, j int) { logged[i], logged[j] = logged[j], logged[i] })
	if status := u.call(bytes.NewReader(message(t, logged...))); status != "0" {
		t.Fatal(status)
	}
	got := map[int]string{}
	b := &event.Batch{Header: event.Header{VM: vm}}
	send := func() {
		u.log.Join("ns/gw", b)
		for _, e := range b.Events {
			got[int(e.N)] = e.ResponseFlags
		}
		b.Events = nil
	}
	for i, x := range list {
		if x.copied {
			if b.Events = append(b.Events, x.event(i)); len(b.Events) == batch {
				send()
			}
		}
	}
	send()
	return got
}

func own(x h1) string {
	if x.flags == "-" {
		return ""
	}
	return x.flags
}

// On a connection with pauses of 2 ms each exchange gets its own end, or none,
// whatever is flagged and whatever was left out.
func TestConnectionWithPauses(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		list := connection(r, func() int64 { return 2*ms + r.Int64N(50*ms) }, r.Float64(), r.Float64())
		for i, got := range run(t, r, list, 1+r.IntN(32)) {
			if got != own(list[i]) {
				t.Fatalf("seed %d: exchange %d of %+v got %q", seed, i, list, got)
			}
		}
	}
}

// Without any pause, several in a ms: where all are flagged and copied each has
// its own end. Otherwise one may get its neighbour's, if that is within a ms and
// was answered with the same status.
func TestConnectionWithoutPauses(t *testing.T) {
	mixed, all := 0, 0
	for seed := range uint64(1000) {
		r := rand.New(rand.NewPCG(seed, 2))
		flagged, copied, batch := r.Float64(), r.Float64(), 1+r.IntN(32)
		whole := seed%2 == 0
		if whole {
			flagged, copied = 1, 1
		}
		list := connection(r, func() int64 { return r.Int64N(100_000) }, flagged, copied)
		for i, got := range run(t, r, list, batch) {
			x := list[i]
			all++
			if got == own(x) {
				continue
			}
			mixed++
			if whole {
				t.Fatalf("seed %d: exchange %d of %+v got %q", seed, i, list, got)
			}
			if got == "" {
				continue
			}
			of, err := strconv.Atoi(got[1:])
			if err != nil {
				t.Fatal(got)
			}
			// The plugin's time is up to 1 ms before the truth, Envoy's end too.
			y := list[of]
			if early, late := y.start/ms*ms-x.headers/ms*ms, x.headers/ms*ms-y.end; early > 0 || late > ms || x.status != 0 && x.status != y.status {
				t.Fatalf("seed %d: exchange %d of %+v got %q", seed, i, list, got)
			}
		}
	}
	t.Logf("%d of %d exchanges got a neighbour's end, or theirs went to a neighbour", mixed, all)
}

// An abort isn't lost to the exchange before it, whose event went without an
// entry, be it within the same ms.
func TestAbortAfterAnother(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	before := h1{start: 100_000, headers: 200_000, end: 300_000, status: 200}
	abort := h1{start: 500_000, headers: 600_000, end: 50 * ms, flags: "DC"}
	join := func(x h1, n int) event.Event {
		b := &event.Batch{Header: event.Header{VM: vm}, Events: []event.Event{x.event(n)}}
		u.log.Join("ns/gw", b)
		return b.Events[0]
	}
	join(before, 1)
	u.entry(abort.entry()...)
	if e := join(abort, 2); e.ResponseFlags != "DC" || e.EndUS != 49_000 {
		t.Errorf("%+v", e)
	}
	// An answer's event may come first.
	refused := h1{start: 60 * ms, headers: 60 * ms, end: 61 * ms, status: 503, flags: "UF"}
	join(refused, 3)
	u.entry(refused.entry()...)
	u.want(map[string]float64{"joined": 1, "joined_late": 1})
}

// Many entries of one connection cost no more than so many looks, and the latest
// are found.
func TestOneConnectionIsBounded(t *testing.T) {
	u := newUnit(t, ingest.Trusting{})
	var list [][]string
	var events []event.Event
	for i := range 200 {
		x := h1{start: int64(i) * 5 * ms, headers: int64(i) * 5 * ms, end: int64(i)*5*ms + ms, status: 503, flags: fmt.Sprint("F", i)}
		list, events = append(list, x.entry()), append(events, x.event(i))
	}
	u.call(bytes.NewReader(message(t, list...)))
	for i := 0; i < len(events); i++ {
		b := &event.Batch{Header: event.Header{VM: vm}, Events: events[i : i+1]}
		u.log.Join("ns/gw", b)
		if want := map[bool]string{true: fmt.Sprint("F", i)}[i >= 200-64]; b.Events[0].ResponseFlags != want {
			t.Fatalf("event %d: %q, want %q", i, b.Events[0].ResponseFlags, want)
		}
	}
}
