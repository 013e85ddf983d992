package store

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of a Store.
type metrics struct {
	hits       *prometheus.CounterVec // result: sampled, counted, duplicate
	registered prometheus.Counter
	deleted    *prometheus.CounterVec // reason: age, count, size
	seconds    prometheus.Histogram
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		hits: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_store_hits_total",
			Help: "Hits appended, by result: sampled (counted and kept), counted (only counted) or duplicate (neither).",
		}, []string{"result"}),
		registered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_store_attacks_registered_total",
			Help: "Attacks that were new when their first hit was appended.",
		}),
		deleted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_store_attacks_deleted_total",
			Help: "Attacks deleted, by reason: age (retention), count (too many) or size (file too large).",
		}, []string{"reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "periscope_store_append_seconds",
			Help:    "Time of one append, its commit included.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5},
		}),
	}
	return m, register(r, m.hits, m.registered, m.deleted, m.seconds)
}

// writerMetrics of a Writer.
type writerMetrics struct {
	dropped *prometheus.CounterVec // reason: queue_full, error, shutdown
	queued  prometheus.Gauge
}

func newWriterMetrics(r prometheus.Registerer) (*writerMetrics, error) {
	m := &writerMetrics{
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_store_dropped_hits_total",
			Help: "Hits that never reached the store, by reason: queue_full, error (the append failed) or shutdown.",
		}, []string{"reason"}),
		queued: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "periscope_store_queued_hits",
			Help: "Hits waiting to be appended.",
		}),
	}
	for _, reason := range []string{dropFull, dropError, dropShutdown} {
		m.dropped.WithLabelValues(reason) // shown as 0 from the start
	}
	return m, register(r, m.dropped, m.queued)
}

func register(r prometheus.Registerer, all ...prometheus.Collector) error {
	for _, c := range all {
		if err := r.Register(c); err != nil {
			return fmt.Errorf("store metrics: %w", err)
		}
	}
	return nil
}
