package orca

import "github.com/prometheus/client_golang/prometheus"

// Why streams end.
const (
	endClient      = "client"      // it went
	endStalled     = "stalled"     // it took nothing
	endRoom        = "room"        // there were too many
	endCertificate = "certificate" // it showed none
	endUnknown     = "unknown"     // there is nothing to report
)

type metrics struct {
	reports *prometheus.CounterVec
	ended   *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, streams func() int) *metrics {
	m := &metrics{
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_orca_reports_total", Help: "Load reports sent to control planes: full, or partial, with the demands that had changed."}, []string{"kind"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_orca_stream_ends_total", Help: "Streams of load reports that ended, by reason: the client went, it took nothing (stalled), there was no room, it showed no certificate, the load is unknown."}, []string{"reason"}),
	}
	open := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_orca_streams", Help: "Clients that take load reports."}, func() float64 { return float64(streams()) })
	if reg != nil {
		reg.MustRegister(m.reports, m.ended, open)
	}
	for _, k := range []string{"full", "partial"} {
		m.reports.WithLabelValues(k)
	}
	for _, r := range []string{endClient, endStalled, endRoom, endCertificate, endUnknown} {
		m.ended.WithLabelValues(r)
	}
	return m
}
