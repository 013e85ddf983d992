package policy

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	exact, nearest, unknown, noPolicies prometheus.Counter
	accepted, rejected                  prometheus.Counter
	policies, connected                 prometheus.Gauge
	reconnects, saveErrors              prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	lookups := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "periscope_node_policy_lookups_total",
		Help: "Look-ups of an event's policy: exact; nearest, for want of its revision; unknown in every revision and no_policies at all, which get a default.",
	}, []string{"result"})
	updates := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "periscope_node_policy_updates_total",
		Help: "Policy sets received, by what became of them.",
	}, []string{"result"})
	m := &metrics{
		exact:      lookups.WithLabelValues("exact"),
		nearest:    lookups.WithLabelValues("nearest"),
		unknown:    lookups.WithLabelValues("unknown"),
		noPolicies: lookups.WithLabelValues("no_policies"),
		accepted:   updates.WithLabelValues("accepted"),
		rejected:   updates.WithLabelValues("rejected"),
		policies: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "periscope_node_policies", Help: "Policies in the newest revision.",
		}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "periscope_node_policy_connected", Help: "1 while the control plane's stream is open.",
		}),
		reconnects: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_node_policy_stream_ends_total", Help: "Streams to the control plane that ended or could not be opened.",
		}),
		saveErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "periscope_node_policy_state_errors_total", Help: "Policy sets that could not be saved in the state file.",
		}),
	}
	for _, c := range []prometheus.Collector{lookups, updates, m.policies, m.connected, m.reconnects, m.saveErrors} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	return m, nil
}
