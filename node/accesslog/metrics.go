package accesslog

import (
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// What became of a call.
const (
	callOK             = "ok"
	callRequest        = "request"        // no gRPC call
	callBusy           = "busy"           // too many being read
	callRead           = "read"           // its message is not there, or too large
	callMalformed      = "malformed"      // its message is none
	callAuthentication = "authentication" // no proven identity
)

// flags are Envoy's response flags that exchanges without an event may bear, as
// labels: a closed set, whatever a gateway sends.
func flags() []string {
	return []string{"DC", "DI", "DPE", "DR", "DT", "FI", "IH", "LH", "LR", "NC", "NFCF", "NR", "OM", "RFCF", "RL", "RLSE", "SI", "UAEX",
		"UC", "UF", "UH", "UMSDR", "UO", "UPE", "UR", "URX", "UT"}
}

type metrics struct {
	calls, entries, eventless              *prometheus.CounterVec
	joined, late, unmatched                prometheus.Counter
	made, dropped, limited, off, malformed prometheus.Counter
	known                                  []string
}

func newMetrics(reg prometheus.Registerer, waiting func() float64) *metrics {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_node_access_log_calls_total", Help: "Calls with gateways' access logs, by result."}, []string{"result"}),
		entries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_node_access_log_entries_total", Help: "Entries of gateways' access logs by result: joined with their event, joined_late (it was on its way to analysis), unmatched (none came here: a policy or its share left the exchange out, or the event went elsewhere), event (one was made of it: the plugin had not seen the exchange), dropped_ring_full, limited (too many such in a second), off (no policy mirrors anything), malformed."}, []string{"result"}),
		eventless: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_node_access_log_eventless_total", Help: "Exchanges without an event of the plugin's here, by Envoy's response flag, the first of several; none and other besides."}, []string{"flag"}),
		known: flags(),
	}
	gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "periscope_node_access_log_waiting", Help: "Entries of access logs waiting for their event."}, waiting)
	if reg != nil {
		reg.MustRegister(m.calls, m.entries, m.eventless, gauge)
	}
	for _, r := range []string{callOK, callRequest, callBusy, callRead, callMalformed, callAuthentication} {
		m.calls.WithLabelValues(r)
	}
	for _, f := range append(flags(), "none", "other") {
		m.eventless.WithLabelValues(f)
	}
	for result, c := range map[string]*prometheus.Counter{
		"joined": &m.joined, "joined_late": &m.late, "unmatched": &m.unmatched,
		"event": &m.made, "dropped_ring_full": &m.dropped, "limited": &m.limited, "off": &m.off, "malformed": &m.malformed,
	} {
		*c = m.entries.WithLabelValues(result)
	}
	return m
}

// flagged counts an exchange that has no event of the plugin's.
func (m *metrics) flagged(all string) {
	first, _, _ := strings.Cut(all, ",")
	switch {
	case first == "":
		first = "none"
	case !slices.Contains(m.known, first):
		first = "other"
	}
	m.eventless.WithLabelValues(first).Inc()
}
