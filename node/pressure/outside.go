package pressure

import (
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

// Outside judges what a process beside the node sees in the node's sockets, as Meter
// does in the node itself: that one can't tell of it while it is stopped, or has no
// CPU time. The zero value is ready.
type Outside struct {
	doubting    bool
	since, idle time.Duration // when the doubt began, and how long CPUs had stood idle by then
}

// minIdle is the part of the time for which CPUs stand idle, from which on a node that
// does not read does not wait for one that others use.
const minIdle = 0.2

// Kernel is the age of the oldest bytes in a socket, as far as it is believed. told is
// what the node told last. idle tells for how long CPUs have stood idle so far, on
// average; it is asked only while there is a doubt.
func (o *Outside) Kernel(at, age time.Duration, told *load.Report, idle func() time.Duration) time.Duration {
	age = min(max(age, 0), MaxDelay)
	busy := told.Utilization > busyUse || told.Queue > load.Target || told.Kernel > load.Target
	switch {
	case busy || age > maxSchedule:
		o.doubting = false
		return age
	case age <= load.Target:
		o.doubting = false
		return 0
	case !o.doubting:
		*o = Outside{true, at, idle()}
		return 0
	case (idle()-o.idle).Seconds() >= minIdle*(at-o.since).Seconds() && at > o.since:
		return age
	}
	return 0
}
