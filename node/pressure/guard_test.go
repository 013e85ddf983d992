package pressure_test

import (
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/node/pressure"
)

func TestGuard(t *testing.T) {
	for delay, want := range map[time.Duration]float64{
		-time.Second: 0, 0: 0, 20 * time.Millisecond: 0, 25 * time.Millisecond: 0.25, 30 * time.Millisecond: 0.5,
		38 * time.Millisecond: 0.9, 40 * time.Millisecond: 1, time.Hour: 1, math.MaxInt64: 1,
	} {
		var g pressure.Guard
		g.Set(delay)
		if got := g.Part(); math.Abs(got-want) > 1e-9 {
			t.Errorf("at %v: part %v, want %v", delay, got, want)
		}
		const n = 1000
		discarded, weights := 0, 0.0
		for i := range n {
			if discard, weight := g.Discard(true); discard || weight != 1 {
				t.Fatalf("at %v: a priority exchange is discarded or weighs %v", delay, weight)
			}
			discard, weight := g.Discard(false)
			if discard {
				discarded++
			}
			weights += weight
			if d := math.Abs(float64(discarded) - want*float64(i+1)); d > 1 {
				t.Fatalf("at %v: %d of %d discarded", delay, discarded, i+1)
			}
		}
		if want < 1 && math.Abs(weights-n) > 1/(1-want)+1e-6 {
			t.Errorf("at %v: what passed stands for %.1f exchanges, want %d", delay, weights, n)
		}
	}
}

func TestGuardConcurrent(t *testing.T) {
	var g pressure.Guard
	g.Set(26 * time.Millisecond)
	var discarded atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 10_000 {
				if d, _ := g.Discard(false); d {
					discarded.Add(1)
				}
			}
		})
	}
	all.Wait()
	if got := discarded.Load(); got < 23_999 || got > 24_001 {
		t.Errorf("%d of 80,000 discarded, want 24,000", got)
	}
}

func TestLags(t *testing.T) {
	var l pressure.Lags
	const offset = 1e6 * time.Hour // between the clocks
	now := time.Duration(0)
	vms := []string{"a", "b", "c"}
	send := func(d, lag time.Duration, skew map[string]time.Duration) {
		for end := now + d; now < end; now += 50 * time.Millisecond {
			for i, vm := range vms {
				l.Heard(vm, "vm", now-lag+offset*time.Duration(i)/2+skew[vm], now)
			}
		}
	}
	want := func(what string, want time.Duration) {
		t.Helper()
		if got := l.Lag(now); got != want {
			t.Errorf("%s: lag %v, want %v", what, got, want)
		}
	}
	want("before anything", 0)
	send(time.Second, 0, nil)
	want("no lag", 0)
	send(time.Second, 300*time.Millisecond, nil)
	want("late", 300*time.Millisecond)
	send(time.Second, 0, nil)
	want("in time again", 0)
	send(time.Second, 0, map[string]time.Duration{"a": -500 * time.Millisecond})
	want("one clock set back", 0)
	send(time.Second, 0, map[string]time.Duration{"a": 5 * time.Second})
	want("one clock set forward", 0)
	send(time.Second, 0, map[string]time.Duration{"a": -24 * time.Hour, "b": -24 * time.Hour, "c": -24 * time.Hour})
	want("all clocks set back by a day", 0)
	l.Heard("a", "vm", math.MinInt64, now)
	l.Heard("b", "vm", math.MaxInt64, now)
	want("garbage", 0)
	for i := range 2 * 64 { // of one gateway, by many names
		l.Heard("liar", strconv.Itoa(i), now, now)
		l.Heard("liar", strconv.Itoa(i), now-time.Minute+time.Second, now)
	}
	want("one gateway lies", 0)
	l.Heard("c", "vm", now-300*time.Millisecond+offset, now)
	l.Heard("b", "vm", now-300*time.Millisecond+offset/2, now)
	l.Heard("c", "vm", now-200*time.Millisecond+offset, now-time.Millisecond) // overtaken: it is not set anew
	now += time.Second
	want("silence", 0)
}

func TestLagsBounded(t *testing.T) {
	var l pressure.Lags
	name := func(i int) string { return string(rune('a'+i%26)) + time.Duration(i).String() }
	for i := range 10_000 {
		l.Heard(name(i), "vm", 0, time.Duration(i)*time.Millisecond/100)
	}
	for i := range 5000 {
		l.Heard(name(100_000+i), "vm", 0, time.Minute+time.Duration(i))
	}
	l.Heard(name(100_000), "vm", 0, time.Minute+100*time.Millisecond)
	if got := l.Lag(time.Minute + 100*time.Millisecond); got != 0 {
		t.Errorf("lag %v, want the median of workers without any", got)
	}
}

func BenchmarkGuard(b *testing.B) {
	var g pressure.Guard
	g.Set(30 * time.Millisecond)
	for b.Loop() {
		g.Discard(false)
	}
}

func BenchmarkLags(b *testing.B) {
	var l pressure.Lags
	for i := range 1000 {
		l.Heard(time.Duration(i).String(), "vm", 0, time.Duration(i))
	}
	for b.Loop() {
		l.Lag(time.Millisecond)
	}
}
