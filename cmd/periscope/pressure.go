package main

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/mirror/load"
	"github.com/periscope-mesh/periscope/node/cgroup"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/node/pressure"
)

const (
	// sampleEvery is the time between two samples of the node's load.
	sampleEvery = 10 * time.Millisecond
	// findEvery is the time between two looks at which CPU quotas there are.
	findEvery = time.Second
	// lookEvery is the time between two looks at them while they may have changed.
	lookEvery = 100 * time.Millisecond
	// urgentDelay is the delay that control planes hear of at once.
	urgentDelay = 2 * load.Target
)

// meter samples the node's load, sets the guard by it, and tells it:
//
//	ring, batches' lag, CPU time ─► pressure.Meter ─► guard, load reports
type meter struct {
	ring    *ingest.Ring
	started time.Time
	counts  func() (analysed, discarded uint64)
	workers int
	worked  func() time.Duration // what they did, summed up
	kernel  func() time.Duration // age of the oldest bytes in a socket
	urge    func()               // tells control planes at once

	guard pressure.Guard
	level atomic.Pointer[pressure.Level]

	mu   sync.Mutex
	lags pressure.Lags

	part, utilization, capacity prometheus.Gauge
	delay                       *prometheus.GaugeVec
	faults                      *prometheus.CounterVec
}

func newMeter(ring *ingest.Ring, started time.Time, reg prometheus.Registerer) *meter {
	m := &meter{ring: ring, started: started,
		part: prometheus.NewGauge(prometheus.GaugeOpts{Name: "periscope_pressure_guard_ratio",
			Help: "Part of routine exchanges that the guard discards unread, 0 to 1."}),
		utilization: prometheus.NewGauge(prometheus.GaugeOpts{Name: "periscope_pressure_utilization_ratio",
			Help: "CPU time used, of what the node may use; above 1: it may use more than it knows."}),
		capacity: prometheus.NewGauge(prometheus.GaugeOpts{Name: "periscope_pressure_capacity_exchanges",
			Help: "Exchanges a second that the node could analyse, by its own estimate; 0: not known yet."}),
		delay: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "periscope_pressure_delay_seconds",
			Help: "How long what arrives now waits: kernel (in sockets), queue (between reading and analysis), lag (from its sending, beyond the least of late)."}, []string{"where"}),
		faults: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "periscope_pressure_sample_faults_total",
			Help: "Samples of the node's load that were not of use: gap (too long after the last: the node stood still), clock, counter, value."}, []string{"fault"}),
	}
	m.level.Store(&pressure.Level{})
	for _, f := range []pressure.Fault{pressure.FaultGap, pressure.FaultClock, pressure.FaultCounter, pressure.FaultValue} {
		m.faults.WithLabelValues(string(f))
	}
	reg.MustRegister(m.part, m.utilization, m.capacity, m.delay, m.faults)
	return m
}

// Discard decides about an exchange that has come, see ingest.Guard. What has come
// since the last sample counts.
func (m *meter) Discard(priority bool) (discard bool, weight float64) {
	if !priority {
		l := m.level.Load()
		m.guard.Set(max(l.Delay, l.Wait(m.ring.Len())))
	}
	return m.guard.Discard(priority)
}

// heard takes when a gateway's worker sent a batch, by its clock.
func (m *meter) heard(gateway, vm string, sentUS uint64, received time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lags.Heard(gateway, vm, time.Duration(min(sentUS, 1<<53))*time.Microsecond, received.Sub(m.started))
}

// run samples until the context ends.
func (m *meter) run(ctx context.Context) error {
	var levels pressure.Meter
	var foundAt, lookedAt time.Time
	var quota func() float64
	var cpus float64
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := time.Now()
		was := m.level.Load()
		found := now.Sub(foundAt) >= findEvery
		if found {
			quota, foundAt = cgroup.Host{}.Quota(), now
		}
		// A node that a quota has just cut is late, one that it has given more to
		// uses more than it knows of.
		changed := was.Delay > urgentDelay || was.Utilization > 1
		if found || changed && now.Sub(lookedAt) >= lookEvery {
			cpus, lookedAt = cpusOf(quota()), now
		}
		s := pressure.Sample{At: now.Sub(m.started), Kernel: m.kernel(), Queue: m.ring.Age(now), Queued: m.ring.Len(), CPU: cpuTime(), CPUs: cpus, Worked: m.worked(), Workers: m.workers}
		s.Analysed, s.Discarded = m.counts()
		m.mu.Lock()
		s.Lag = m.lags.Lag(s.At)
		m.mu.Unlock()
		level, fault := levels.Add(s)
		m.level.Store(&level)
		m.guard.Set(level.Delay)
		if level.Delay > urgentDelay && was.Delay <= urgentDelay {
			m.urge()
		}
		if fault != pressure.FaultNone {
			m.faults.WithLabelValues(string(fault)).Inc()
		}
		m.show(level)
	}
}

func (m *meter) show(l pressure.Level) {
	m.part.Set(m.guard.Part())
	m.utilization.Set(l.Utilization)
	m.capacity.Set(l.Capacity)
	m.delay.WithLabelValues("kernel").Set(l.Kernel.Seconds())
	m.delay.WithLabelValues("queue").Set(l.Queue.Seconds())
	m.delay.WithLabelValues("lag").Set(l.Lag.Seconds())
}

// fill puts the level into a load report.
func (m *meter) fill(r *load.Report) {
	l := m.level.Load()
	r.Kernel, r.Queue, r.Lag = l.Kernel, l.Queue, l.Lag
	r.Utilization, r.Capacity = l.Utilization, l.Capacity
	_, r.Discarded = m.counts()
}

// nodePressureState is a node's /debug/pressurez. Times are in seconds.
type nodePressureState struct {
	Delay       loadDelay   `json:"delaySeconds"`
	Utilization float64     `json:"utilization"`
	Rate        float64     `json:"rate"`     // exchanges a second
	Capacity    float64     `json:"capacity"` // likewise; 0: not known yet
	Guard       float64     `json:"guard"`    // part of routine exchanges that is discarded
	Analysed    uint64      `json:"analysed"`
	Discarded   uint64      `json:"discarded"`
	Sockets     socketState `json:"sockets"`
}

func (n *node) pressureState() nodePressureState {
	l := n.meter.level.Load()
	out := nodePressureState{
		Delay:       loadDelay{Worst: l.Delay.Seconds(), Kernel: l.Kernel.Seconds(), Queue: l.Queue.Seconds(), Lag: l.Lag.Seconds()},
		Utilization: l.Utilization, Rate: l.Rate, Capacity: l.Capacity, Guard: n.meter.guard.Part(), Sockets: n.sockets.state(),
	}
	out.Analysed, out.Discarded = n.meter.counts()
	return out
}

// cpusOf is how many CPUs the process may use at a time. Go counts the quotas of its
// control groups in, but as whole CPUs, and never less than two. 0: there is none.
func cpusOf(quota float64) float64 {
	all := float64(runtime.GOMAXPROCS(0))
	if quota > 0 {
		return min(all, quota)
	}
	return all
}

// cpuTime is what the process has used.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
