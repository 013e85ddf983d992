package main

import (
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/periscope-mesh/periscope/node/cgroup"
)

// cpuState is the node's /debug/cpuz: what its control group leaves it of the
// CPUs, now.
type cpuState struct {
	Cgroup  string  `json:"cgroup,omitempty"`  // directory
	Version int     `json:"version,omitempty"` // of control groups that bound CPU time
	Weight  float64 `json:"weight"`            // usually 100; 0: the group has none
	Quota   float64 `json:"quotaCpus"`         // 0: none
	Fault   string  `json:"fault,omitempty"`   // why others may be slowed down by the node
	Error   string  `json:"error,omitempty"`
}

func currentCPU() cpuState {
	c, err := cgroup.Host{}.CPU()
	if err != nil {
		return cpuState{Error: err.Error()}
	}
	return cpuState{Cgroup: c.Group, Version: c.Version, Weight: c.Weight, Quota: c.Quota, Fault: c.Fault()}
}

// cpuMetrics shows it; a group's weight and quota can be changed at any time.
func cpuMetrics(reg prometheus.Registerer) {
	reg.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "periscope_node_cpu_weight",
			Help: "CPU weight of the node's control group, in the measure of version 2, where 100 is usual; 0: it has none."},
			func() float64 { return currentCPU().Weight }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "periscope_node_cpu_quota_cpus",
			Help: "CPUs that control groups let the node use at most; 0: all."},
			func() float64 { return currentCPU().Quota }),
	)
}

// reportCPU says what a node of its own may use, and if others beside it may
// suffer.
func reportCPU(logger *slog.Logger) {
	s := currentCPU()
	switch {
	case s.Error != "":
		logger.Info("what the node may use of the CPUs is not known", "error", s.Error)
		return
	case s.Fault != "":
		logger.Warn("a busy node may slow down a gateway beside it: give it a control group with a low CPU weight (docs/operations.md)", "reason", s.Fault)
	}
	logger.Info("CPU time", "cgroup", s.Cgroup, "weight", s.Weight, "quota_cpus", s.Quota)
}
