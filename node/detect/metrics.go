package detect

import (
	"errors"
	"time"

	"github.com/periscope-mesh/periscope/node/decode"
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	inspections *prometheus.CounterVec
	duration    prometheus.Histogram
	errors      *prometheus.CounterVec
	incomplete  *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		inspections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_detect_inspections_total",
			Help: "Exchanges inspected, by outcome: clean, hit or error.",
		}, []string{"outcome"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "periscope_detect_inspection_duration_seconds",
			Help:    "Time of one inspection.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_detect_errors_total",
			Help: "Exchanges not inspected in full, by reason: panic, closed, input or rules.",
		}, []string{"reason"}),
		incomplete: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_detect_incomplete_total",
			Help: "Messages of which a part was not inspected as what it is, by direction and reason.",
		}, []string{"direction", "reason"}),
	}
	for _, c := range []prometheus.Collector{m.inspections, m.duration, m.errors, m.incomplete} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) observe(res Result, err error, d time.Duration) {
	m.duration.Observe(d.Seconds())
	switch {
	case err != nil:
		m.inspections.WithLabelValues("error").Inc()
		reason := "rules"
		switch {
		case errors.Is(err, errPanic):
			reason = "panic"
		case errors.Is(err, ErrClosed):
			reason = "closed"
		case errors.Is(err, errInput):
			reason = "input"
		}
		m.errors.WithLabelValues(reason).Inc()
	case len(res.Hits) > 0:
		m.inspections.WithLabelValues("hit").Inc()
	default:
		m.inspections.WithLabelValues("clean").Inc()
	}
	m.facts("request", res.RequestFacts)
	m.facts("response", res.ResponseFacts)
}

func (m *metrics) facts(direction string, f decode.Facts) {
	if f == 0 {
		return
	}
	for _, r := range [...]struct {
		fact   decode.Facts
		reason string
	}{
		{decode.Cut, "cut"}, {decode.Malformed, "malformed"}, {decode.UnknownEncoding, "unknown_encoding"},
		{decode.InflateLimit, "inflate_limit"}, {decode.Folded, "folded"}, {decode.FieldsDropped, "fields_dropped"},
		{decode.Opaque, "opaque"},
	} {
		if f&r.fact != 0 {
			m.incomplete.WithLabelValues(direction, r.reason).Inc()
		}
	}
}
