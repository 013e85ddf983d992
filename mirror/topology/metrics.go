package topology

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	changes  prometheus.Counter
	gateways prometheus.Gauge
	problems prometheus.Gauge
	seconds  prometheus.Histogram
	errors   *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		changes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_topology_changes_total",
			Help: "Times that the topology became another one.",
		}),
		gateways: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "periscope_topology_gateways",
			Help: "Gateway workloads found in the Kubernetes API.",
		}),
		problems: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "periscope_topology_problems",
			Help: "Gateway resources that lead to no workload, or not to all of its pods.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "periscope_topology_resolve_seconds",
			Help:    "Time to resolve Gateways to pods.",
			Buckets: []float64{.0001, .001, .01, .1, 1, 10},
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_topology_source_errors_total",
			Help: "Failed lists, watches and discoveries of the Kubernetes API, by source.",
		}, []string{"source"}),
	}
	for _, c := range []prometheus.Collector{m.changes, m.gateways, m.problems, m.seconds, m.errors} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	for _, s := range []string{sourceIstio, sourceGatewayAPI, sourcePods, sourceServices, sourceSlices, sourceMachines} {
		m.errors.WithLabelValues(s)
	}
	return m, nil
}

func (m *metrics) resolved(gateways, problems int, took time.Duration) {
	m.gateways.Set(float64(gateways))
	m.problems.Set(float64(problems))
	m.seconds.Observe(took.Seconds())
}
