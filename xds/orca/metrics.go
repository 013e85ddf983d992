package orca

import "github.com/prometheus/client_golang/prometheus"

// Why streams end that are wanted.
const (
	endLost    = "lost"    // the node went, refuses, or can't be reached
	endStalled = "stalled" // it was silent
	endGarbage = "garbage" // it sent what can't be used
)

type metrics struct {
	reports *prometheus.CounterVec
	ended   *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, count func() (known, reporting int)) *metrics {
	m := &metrics{
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_load_reports_total", Help: "Load reports of nodes by what became of them: taken, or refused as unreadable."}, []string{"result"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_load_stream_ends_total", Help: "Streams of nodes' load reports that ended, or could not be opened, by reason: lost, stalled (the node was silent), garbage."}, []string{"reason"}),
	}
	known := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_load_nodes", Help: "Nodes whose load is watched."}, func() float64 { n, _ := count(); return float64(n) })
	reporting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_load_nodes_reporting", Help: "Nodes whose last load report is not stale."}, func() float64 { _, n := count(); return float64(n) })
	if reg != nil {
		reg.MustRegister(m.reports, m.ended, known, reporting)
	}
	for _, r := range []string{"taken", "refused"} {
		m.reports.WithLabelValues(r)
	}
	for _, r := range []string{endLost, endStalled, endGarbage} {
		m.ended.WithLabelValues(r)
	}
	return m
}
