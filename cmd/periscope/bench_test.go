package main

import (
	"math"
	"strings"
	"testing"
	"time"
)

func TestPlotLine(t *testing.T) {
	nothing := loadSample{demand: math.NaN(), capacity: math.NaN(), analysed: math.NaN(), delays: noDelays}
	if got, want := plotLine(1, nothing, 0), "  1 s         –  ████████████████████ 100.0 %         –        –  0 ms"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	s := loadSample{demand: 1000.4, analysed: 93, delays: delays{0.02, 0.045, math.NaN()}, shares: []shareLevel{{percent: 12.5}}}
	if got, want := plotLine(12, s, 3400*time.Microsecond), " 12 s      1000  ███░░░░░░░░░░░░░░░░░  12.5 %        93    45 ms  3 ms"; got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestOverloadFlags(t *testing.T) {
	good := overloadFlags{capacity: 100, times: 10, steady: 5 * time.Second, overload: 5 * time.Second, after: 5 * time.Second}
	if err := good.check(); err != nil {
		t.Fatal(err)
	}
	for flag, change := range map[string]func(*overloadFlags){
		"--capacity": func(f *overloadFlags) { f.capacity = math.NaN() },
		"--times":    func(f *overloadFlags) { f.times = 51 },
		"--before":   func(f *overloadFlags) { f.steady = time.Second },
		"--for":      func(f *overloadFlags) { f.overload = time.Hour },
		"--after":    func(f *overloadFlags) { f.after = -1 },
	} {
		f := good
		change(&f)
		if err := f.check(); err == nil || !strings.HasPrefix(err.Error(), flag+": ") {
			t.Errorf("%s: %v", flag, err)
		}
	}
}
