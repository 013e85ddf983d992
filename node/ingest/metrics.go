package ingest

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// Reasons besides event's for refusing a whole batch.
const (
	reasonRequest        = "request"        // wrong path, method or content type
	reasonRead           = "read"           // the body ended early
	reasonBusy           = "busy"           // too many bodies being read
	reasonAuthentication = "authentication" // no proven identity
)

type metrics struct {
	batches  *prometheus.CounterVec
	refused  *prometheus.CounterVec
	events   *prometheus.CounterVec
	rejected *prometheus.CounterVec
	bytes    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, ring *Ring) *metrics {
	m := &metrics{
		batches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_ingest_batches_total", Help: "Requests for the ingest endpoint by answer."}, []string{"status"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_ingest_refused_batches_total", Help: "Batches refused as a whole, by reason."}, []string{"reason"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_ingest_events_total", Help: "Events by what became of them: accepted for analysis; discarded unread, by the guard of a node that is late; dropped_ring_full."}, []string{"outcome"}),
		rejected: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_ingest_rejected_events_total", Help: "Events of a readable batch that could not be decoded, by reason."}, []string{"reason"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_ingest_bytes_total", Help: "Bytes of decoded batches."}),
	}
	length := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_ring_exchanges", Help: "Exchanges waiting for analysis."}, func() float64 { return float64(ring.Len()) })
	held := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_ring_bytes", Help: "Memory of exchanges waiting or being analysed, in bytes."}, func() float64 { return float64(ring.Bytes()) })
	if reg != nil {
		reg.MustRegister(m.batches, m.refused, m.events, m.rejected, m.bytes, length, held)
	}
	// A series exists before its first event, so that rates and alerts work.
	for _, r := range []string{reasonRequest, reasonRead, reasonBusy, reasonAuthentication} {
		m.refused.WithLabelValues(r)
	}
	for _, r := range []event.Reason{event.ReasonTruncated, event.ReasonNotMsgp, event.ReasonVersion, event.ReasonType, event.ReasonMissing, event.ReasonTooLarge} {
		m.refused.WithLabelValues(string(r))
		m.rejected.WithLabelValues(string(r))
	}
	for _, o := range []string{"accepted", "discarded", "dropped_ring_full"} {
		m.events.WithLabelValues(o)
	}
	return m
}

// statusLabel keeps the label set closed.
func statusLabel(status int) string {
	switch status {
	case http.StatusAccepted:
		return "202"
	case http.StatusServiceUnavailable:
		return "503"
	default:
		return "4xx"
	}
}
