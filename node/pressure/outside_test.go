package pressure

import (
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/load"
)

// An age is believed once the node is busy, CPUs stand idle, or it is high.
func TestOutside(t *testing.T) {
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		told  load.Report
		idle  float64 // part of the time
		grows bool    // the age; else it stays at 8 ms
		want  time.Duration
	}{
		"nothing waits long":    {idle: 1},
		"others use all CPUs":   {grows: true, want: 110 * ms},
		"CPUs stand idle":       {idle: 0.5, grows: true, want: 20 * ms},
		"little is idle":        {idle: 0.1, grows: true, want: 110 * ms},
		"the node is busy":      {told: load.Report{Utilization: 0.9}, grows: true, want: 10 * ms},
		"exchanges wait":        {told: load.Report{Queue: 30 * ms}, grows: true, want: 10 * ms},
		"the node believed one": {told: load.Report{Kernel: 30 * ms}, grows: true, want: 10 * ms},
	} {
		t.Run(name, func(t *testing.T) {
			var o Outside
			asked := false
			for at := 10 * ms; at < 200*ms; at += 10 * ms {
				age := 4 * ms
				if c.grows {
					age = at
				}
				got := o.Kernel(at, age, &c.told, func() time.Duration { asked = true; return time.Duration(c.idle * float64(at)) })
				switch {
				case c.want == 0 && got != 0, c.want != 0 && at < c.want && got != 0:
					t.Fatalf("%v is believed after %v", got, at)
				case c.want != 0 && at >= c.want && got != at:
					t.Fatalf("%v after %v, want all of it from %v on", got, at, c.want)
				}
			}
			if doubt := c.grows && c.want > 10*ms; asked != doubt {
				t.Errorf("idle time was asked for: %v", asked)
			}
		})
	}
	var o Outside
	if got := o.Kernel(0, time.Hour, &load.Report{}, nil); got != MaxDelay {
		t.Errorf("%v of an hour", got)
	}
	if got := o.Kernel(0, -time.Hour, &load.Report{}, nil); got != 0 {
		t.Errorf("%v of less than nothing", got)
	}
}
