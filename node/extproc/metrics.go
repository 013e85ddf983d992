package extproc

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// What becomes of the exchanges that gateways stream, besides event's counters:
// each is counted as seen, and under one of the others.
const (
	outcomeNoSettings   = "no_settings"  // the gateway's are not known (yet)
	outcomeBusy         = "busy"         // too many streams at once
	outcomeNoRequest    = "no_request"   // Envoy refused the request before any filter: its access log tells
	outcomeMalformed    = "malformed"    // not ext_proc's messages
	outcomeAborted      = "aborted"      // ended before its first message
	outcomeDiscarded    = "discarded"    // by the guard: this node is late
	outcomeUnauthorized = "unauthorized" // the gateway's identity could not be verified
)

type metrics struct {
	exchanges *prometheus.CounterVec
	partial   *prometheus.CounterVec
	cut       prometheus.Counter
	open      prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, held func() float64) *metrics {
	m := &metrics{
		exchanges: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_extproc_exchanges_total", Help: "Exchanges that gateways streamed by ext_proc, by outcome: seen is all of them."}, []string{"outcome"}),
		partial: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_extproc_partial_exchanges_total", Help: "Exchanges among the mirrored whose copy is not of the whole, by reason: no end was seen in time, or there was no room."}, []string{"reason"}),
		cut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_extproc_cut_bytes_total", Help: "Body bytes beyond the policies' limits, which gateways streamed all the same."}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "periscope_extproc_open_exchanges", Help: "Exchanges under way."}),
	}
	bytes := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_extproc_held_bytes", Help: "Memory of the copies of exchanges under way, in bytes."}, held)
	if reg != nil {
		reg.MustRegister(m.exchanges, m.partial, m.cut, m.open, bytes)
	}
	for _, o := range []string{event.CounterSeen, event.CounterMirrored, event.CounterOff, event.CounterExcluded, event.CounterSampled,
		event.CounterEvicted, outcomeDiscarded, outcomeNoSettings, outcomeNoRequest, outcomeBusy, outcomeMalformed, outcomeAborted, outcomeUnauthorized} {
		m.exchanges.WithLabelValues(o)
	}
	for _, r := range []string{event.CounterUnfinished, event.CounterEvicted} {
		m.partial.WithLabelValues(r)
	}
	return m
}
