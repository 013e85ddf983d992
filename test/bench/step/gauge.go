package main

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/detect"
)

// gaugeEvery is how often the machine's speed is measured: for 3 % of a CPU.
const gaugeEvery = 200 * time.Millisecond

// gauge measures how fast the machine is, which varies by a fifth within minutes:
// by the CPU time that one inspection takes, always of the same request.
type gauge struct {
	engine *detect.Engine
	input  *detect.Input
}

// reading is the CPU time that the inspection took.
type reading struct{ at, cost time.Duration }

func newGauge() (*gauge, error) {
	engine, err := detect.New(detect.Config{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	if err != nil {
		return nil, err
	}
	e := &event.Event{N: 1, Policy: "default/gauge", SharePPM: 1_000_000, Source: "192.0.2.7:40000", Protocol: "HTTP/1.1", Flags: event.FlagNoResponse}
	for _, h := range [][2]string{{":method", "GET"}, {":path", "/api/items/1234?page=2&sort=price"}, {":scheme", "http"}, {":authority", "shop.example"},
		{"user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"}, {"accept", "application/json"}, {"accept-language", "en-GB,en;q=0.8"}} {
		e.Request.Headers = append(e.Request.Headers, event.Field{Name: []byte(h[0]), Value: []byte(h[1])})
	}
	return &gauge{engine: engine, input: &detect.Input{Event: e}}, nil
}

func (g *gauge) close() error { return g.engine.Close() }

// run measures until the context ends.
func (g *gauge) run(ctx context.Context, start time.Time) ([]reading, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var out []reading
	ticker := time.NewTicker(gaugeEvery)
	defer ticker.Stop()
	for {
		var cost time.Duration
		for range 2 { // the first one fetches it all into caches
			before, err := threadTime()
			if err == nil {
				_, err = g.engine.Inspect(g.input)
			}
			if err == nil {
				cost, err = threadTime()
			}
			if err != nil {
				return nil, fmt.Errorf("measure the machine's speed: %w", err)
			}
			cost -= before
		}
		out = append(out, reading{time.Since(start), cost})
		select {
		case <-ctx.Done():
			return out, nil
		case <-ticker.C:
		}
	}
}

// threadTime is the calling thread's CPU time.
func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("clock_gettime: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// cost is what the inspection took during the step: the median, in ms.
func (r *record) cost() float64 {
	var step, all []time.Duration
	for _, m := range r.readings {
		if all = append(all, m.cost); m.at >= r.lengths.from() && m.at < r.lengths.to() {
			step = append(step, m.cost)
		}
	}
	if len(step) == 0 { // too short a step
		step = all
	}
	return quantile(step, 0.5)
}
