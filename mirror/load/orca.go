package load

import (
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	orca "github.com/cncf/xds/go/xds/data/orca/v3"
)

// Bounds of a report that travels.
const (
	MaxDemands = 8192    // beyond them the last are left out
	MaxBytes   = 8 << 20 // encoded

	maxName      = 256                 // bytes of a name, before it is escaped
	maxNames     = MaxBytes - 1<<20    // bytes of demands' names, escaped, with what is around them
	maxCount     = 1 << 53             // what a float64 holds exactly
	maxRPS       = 1e12                // exchanges a second
	maxShare     = 1000                // utilisation
	maxSeconds   = 100 * 365 * 86400   // of a duration
	perMetric    = 24                  // bytes around a metric's name
	otherMetrics = 1000                // that a report may have besides demands
	demandPrefix = "periscope.demand/" // GATEWAY/VM/POLICY/ and a kind
	nodePrefix   = "periscope.node/"   // NAME, escaped as a path's segment; 1
	whoPrefix    = "periscope.sockets.backend/"
	partialName  = "periscope.demands.partial" // 1: demands are those that have changed
)

// Kinds of a demand's metrics, which are counts.
const (
	kindEligible = "eligible"
	kindPriority = "priority"
	kindMirrored = "mirrored"
	kindReceived = "received"
	kindHeard    = "heard" // the node's uptime, in seconds
	kindShare    = "share"
	kindSince    = "share_since" // likewise
	kinds        = 7
)

// metric is a number of a report that ORCA has no field for.
type metric struct {
	name  string
	max   float64
	whole bool
	get   func(*Report) float64
	set   func(*Report, float64)
}

func count(name string, field func(*Report) *uint64) metric {
	return metric{name, maxCount, true,
		func(r *Report) float64 { return float64(*field(r)) },
		func(r *Report, v float64) { *field(r) = uint64(v) }}
}

func number[T int | int64](name string, field func(*Report) *T) metric {
	return metric{name, maxCount, true,
		func(r *Report) float64 { return float64(*field(r)) },
		func(r *Report, v float64) { *field(r) = T(v) }}
}

// duration is in seconds, and exact to the microsecond.
func duration(name string, field func(*Report) *time.Duration) metric {
	return metric{name, maxSeconds, false,
		func(r *Report) float64 { return seconds(*field(r)) },
		func(r *Report, v float64) { *field(r) = ofSeconds(v) }}
}

func seconds(d time.Duration) float64 { return float64(d.Round(time.Microsecond).Microseconds()) / 1e6 }

func ofSeconds(v float64) time.Duration { return time.Duration(math.Round(v*1e6)) * time.Microsecond }

var metrics = []metric{
	{"periscope.epoch.high", math.MaxUint32, true,
		func(r *Report) float64 { return float64(r.Epoch >> 32) },
		func(r *Report, v float64) { r.Epoch |= uint64(v) << 32 }},
	{"periscope.epoch.low", math.MaxUint32, true,
		func(r *Report) float64 { return float64(uint32(r.Epoch)) },
		func(r *Report, v float64) { r.Epoch |= uint64(v) }},
	duration("periscope.uptime", func(r *Report) *time.Duration { return &r.Uptime }),
	duration("periscope.delay.kernel", func(r *Report) *time.Duration { return &r.Kernel }),
	duration("periscope.delay.queue", func(r *Report) *time.Duration { return &r.Queue }),
	duration("periscope.delay.lag", func(r *Report) *time.Duration { return &r.Lag }),
	{"periscope.capacity", maxRPS, false,
		func(r *Report) float64 { return r.Capacity },
		func(r *Report, v float64) { r.Capacity = v }},
	count("periscope.analysed", func(r *Report) *uint64 { return &r.Analysed }),
	count("periscope.priority", func(r *Report) *uint64 { return &r.Priority }),
	count("periscope.discarded", func(r *Report) *uint64 { return &r.Discarded }),
	count("periscope.overflown", func(r *Report) *uint64 { return &r.Overflown }),
	number("periscope.sockets.connections", func(r *Report) *int { return &r.Sockets.Connections }),
	number("periscope.sockets.bytes", func(r *Report) *int64 { return &r.Sockets.Bytes }),
	number("periscope.sockets.backlog", func(r *Report) *int { return &r.Sockets.Backlog }),
	number("periscope.sockets.backlog_max", func(r *Report) *int { return &r.Sockets.BacklogMax }),
	count("periscope.sockets.zero_windows", func(r *Report) *uint64 { return &r.Sockets.ZeroWindows }),
	count("periscope.sockets.drops", func(r *Report) *uint64 { return &r.Sockets.Drops }),
	count("periscope.sockets.retransmits", func(r *Report) *uint64 { return &r.Sockets.Retransmits }),
}

// Encode writes a report as ORCA has it: utilisation and rate in their fields,
// for any consumer of ORCA, and all else as named metrics (docs/backpressure.md
// lists them), those that are 0 left out. What is out of bounds is written as
// the bound, NaN as 0; demands that have unfit names or don't fit are left out.
func Encode(r *Report) *orca.OrcaLoadReport {
	use := within(r.Utilization, maxShare)
	m := make(map[string]float64, len(metrics)+3+2*len(r.Demands))
	for i := range metrics {
		if v := within(metrics[i].get(r), metrics[i].max); v > 0 {
			m[metrics[i].name] = v
		}
	}
	for prefix, name := range map[string]string{nodePrefix: r.Node, whoPrefix: r.Sockets.Backend} {
		if fit(name) {
			m[prefix+url.PathEscape(name)] = 1
		}
	}
	if r.Partial {
		m[partialName] = 1
	}
	room := maxNames
	for _, d := range r.Demands[:min(len(r.Demands), MaxDemands)] {
		if !fit(d.Gateway) || !fit(d.VM) || !fit(d.Policy) {
			continue
		}
		name := demandPrefix + url.PathEscape(d.Gateway) + "/" + url.PathEscape(d.VM) + "/" + url.PathEscape(d.Policy) + "/"
		if room -= kinds * (len(name) + len(kindEligible) + perMetric); room < 0 {
			break
		}
		m[name+kindEligible] = within(float64(d.Eligible), maxCount) // also 0: it tells that there is one
		if d.Priority > 0 {
			m[name+kindPriority] = within(float64(d.Priority), maxCount)
		}
		if d.Mirrored > 0 {
			m[name+kindMirrored] = within(float64(d.Mirrored), maxCount)
		}
		if d.Received > 0 {
			m[name+kindReceived] = within(float64(d.Received), maxCount)
		}
		if d.Heard > 0 {
			m[name+kindHeard] = within(seconds(d.Heard), maxSeconds)
		}
		if d.Share > 0 {
			m[name+kindShare] = float64(d.Share)
		}
		if d.ShareSince > 0 {
			m[name+kindSince] = within(seconds(d.ShareSince), maxSeconds)
		}
	}
	return &orca.OrcaLoadReport{CpuUtilization: use, ApplicationUtilization: use, RpsFractional: within(r.Rate, maxRPS), NamedMetrics: m}
}

func within(v, most float64) float64 {
	if !(v > 0) { // NaN, too
		return 0
	}
	return min(v, most)
}

func fit(name string) bool { return name != "" && len(name) <= maxName && utf8.ValidString(name) }

// Decode reads what Encode has written, and whatever else comes: an error says
// what is wrong with it. Metrics of unknown names are passed over.
func Decode(o *orca.OrcaLoadReport) (*Report, error) {
	if n := len(o.GetNamedMetrics()); n > kinds*MaxDemands+otherMetrics {
		return nil, fmt.Errorf("%d named metrics: more than %d", n, kinds*MaxDemands+otherMetrics)
	}
	r := &Report{Utilization: o.GetApplicationUtilization(), Rate: o.GetRpsFractional()}
	if err := errors.Join(check("application_utilization", r.Utilization, maxShare, false), check("rps_fractional", r.Rate, maxRPS, false)); err != nil {
		return nil, err
	}
	m := o.GetNamedMetrics()
	for i := range metrics {
		v := m[metrics[i].name]
		if err := check(metrics[i].name, v, metrics[i].max, metrics[i].whole); err != nil {
			return nil, err
		}
		metrics[i].set(r, v)
	}
	r.Partial = m[partialName] == 1
	demands := map[string]*Demand{} // by name, without the kind
	for name, v := range m {
		var err error
		switch {
		case strings.HasPrefix(name, demandPrefix):
			err = decodeDemand(demands, name, v)
		case strings.HasPrefix(name, nodePrefix):
			err = decodeName(&r.Node, name, name[len(nodePrefix):])
		case strings.HasPrefix(name, whoPrefix):
			err = decodeName(&r.Sockets.Backend, name, name[len(whoPrefix):])
		}
		if err != nil {
			return nil, err
		}
	}
	if r.Node == "" {
		return nil, fmt.Errorf("no metric %sNAME: this is no report of an analysis node", nodePrefix)
	}
	if len(demands) > MaxDemands {
		return nil, fmt.Errorf("%d demands: more than %d", len(demands), MaxDemands)
	}
	for _, d := range demands {
		r.Demands = append(r.Demands, *d)
	}
	slices.SortFunc(r.Demands, Demand.Compare)
	return r, nil
}

func decodeDemand(demands map[string]*Demand, name string, v float64) error {
	end := strings.LastIndexByte(name, '/')
	id, kind := name[:end], name[end+1:]
	most, whole := float64(maxCount), true
	switch kind {
	case kindHeard, kindSince:
		most, whole = maxSeconds, false
	case kindShare:
		most = math.MaxUint32
	}
	if err := check(name, v, most, whole); err != nil {
		return err
	}
	d := demands[id]
	if d == nil {
		parts := strings.SplitN(strings.TrimPrefix(id, demandPrefix), "/", 4)
		if len(parts) != 3 {
			return fmt.Errorf("metric %.300q: it is not %sGATEWAY/VM/POLICY/KIND", name, demandPrefix)
		}
		d = new(Demand)
		for i, into := range []*string{&d.Gateway, &d.VM, &d.Policy} {
			if err := decodeName(into, name, parts[i]); err != nil {
				return err
			}
		}
		demands[id] = d
	}
	switch kind {
	case kindEligible:
		d.Eligible = uint64(v)
	case kindPriority:
		d.Priority = uint64(v)
	case kindMirrored:
		d.Mirrored = uint64(v)
	case kindReceived:
		d.Received = uint64(v)
	case kindHeard:
		d.Heard = ofSeconds(v)
	case kindShare:
		d.Share = uint32(v)
	case kindSince:
		d.ShareSince = ofSeconds(v)
	}
	return nil
}

// decodeName reads a name in the one way that it is escaped.
func decodeName(into *string, metric, escaped string) error {
	name, err := url.PathUnescape(escaped)
	switch {
	case err != nil || url.PathEscape(name) != escaped || !fit(name):
		return fmt.Errorf("metric %.300q: a name of 1 to %d bytes of UTF-8 is needed, escaped as a path's segment", metric, maxName)
	case *into != "":
		return fmt.Errorf("metric %.300q: there is another, %q", metric, *into)
	}
	*into = name
	return nil
}

func check(name string, v, most float64, whole bool) error {
	switch {
	case math.IsNaN(v) || v < 0 || v > most:
		return fmt.Errorf("%.300s is %v, not from 0 to %v", name, v, most)
	case whole && v != math.Trunc(v):
		return fmt.Errorf("%.300s is %v, not a whole number", name, v)
	}
	return nil
}
