package istiod

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	reads    *prometheus.CounterVec
	gateways *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		reads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "periscope_istiod_reads_total",
			Help: "Debug pages of istiods that were read, by result.",
		}, []string{"result"}),
		gateways: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "periscope_istiod_gateways",
			Help: "Gateways by how far their configuration has come through istiod.",
		}, []string{"stage"}),
	}
	for _, c := range []prometheus.Collector{m.reads, m.gateways} {
		if err := r.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	for _, result := range []string{readOK, readDenied, readUnreachable, readInvalid} {
		m.reads.WithLabelValues(result)
	}
	m.verdict(State{})
	return m, nil
}

func (m *metrics) read(err error) {
	result := readOK
	if f := (*fault)(nil); errors.As(err, &f) {
		result = f.result
	}
	m.reads.WithLabelValues(result).Inc()
}

func (m *metrics) verdict(s State) {
	n := map[Stage]int{}
	for _, g := range s.Gateways {
		n[g.Stage]++
	}
	for _, stage := range []Stage{Refused, Unknown, Pending, Accepted, Pushed, Acknowledged} {
		m.gateways.WithLabelValues(string(stage)).Set(float64(n[stage]))
	}
}
