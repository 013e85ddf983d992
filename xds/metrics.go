package xds

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Reasons for which a client is refused or held: a closed set.
const (
	refusedIdentity    = "identity"    // held: no snapshot is meant for it
	refusedCertificate = "certificate" // what it asks for is for clients with one
	refusedConnections = "connections" // too many streams
	refusedNames       = "names"       // too many or too long resource names
	refusedTypes       = "types"       // too many types on one stream
	refusedDebug       = "debug"       // istioctl: from afar without a certificate, or too often
)

type metrics struct {
	connections *prometheus.GaugeVec
	pushes      *prometheus.CounterVec
	nacks       *prometheus.CounterVec
	ack         *prometheus.HistogramVec
	refused     *prometheus.CounterVec
	late        prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		connections: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "periscope_xds_connections",
			Help: "Open xDS streams by protocol.",
		}, []string{"protocol"}),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_xds_pushes_total",
			Help: "xDS responses sent, by resource type.",
		}, []string{"type"}),
		nacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_xds_nacks_total",
			Help: "xDS responses that clients rejected, by resource type.",
		}, []string{"type"}),
		ack: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "periscope_xds_push_ack_seconds",
			Help:    "Time from sending an xDS response to its acknowledgement, by resource type.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"type"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_xds_refused_total",
			Help: "xDS clients that were refused, or held without answer for want of an identity, by reason.",
		}, []string{"reason"}),
		late: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_xds_late_requests_total",
			Help: "xDS requests that were read late, as their client sent too many.",
		}),
	}
	for _, c := range []prometheus.Collector{m.connections, m.pushes, m.nacks, m.ack, m.refused, m.late} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	for _, reason := range []string{refusedIdentity, refusedCertificate, refusedConnections, refusedNames, refusedTypes, refusedDebug} {
		m.refused.WithLabelValues(reason)
	}
	for _, p := range []string{protocolSotW, protocolDelta} {
		m.connections.WithLabelValues(p)
	}
	return m, nil
}

func (m *metrics) acked(typeURL string, d time.Duration) {
	m.ack.WithLabelValues(shortName(typeURL)).Observe(d.Seconds())
}
