package console

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
)

// LoadSource tells what load there has been over the last minutes: the control
// plane. Load is asked about once a second at most, however many look.
type LoadSource interface {
	Load(context.Context) (Load, error)
}

// Load is load control at work: what is wanted, what nodes can do and do, and what
// is left out. Series have a value for each StepSeconds, the oldest first, and end
// at At.
type Load struct {
	At          time.Time   `json:"at" doc:"Time of the newest value of each series."`
	StepSeconds float64     `json:"stepSeconds" doc:"Time between two values of a series."`
	Notes       []string    `json:"notes" nullable:"false" doc:"What has to be known of the figures."`
	Demand      Series      `json:"demand" doc:"Exchanges a second that policies want, before sampling."`
	Capacity    Series      `json:"capacity" doc:"Exchanges a second that nodes can analyse, by their own reports."`
	Analysed    Series      `json:"analysed" doc:"Exchanges a second that nodes have analysed."`
	Kernel      Series      `json:"kernelDelaySeconds" doc:"Age of the oldest bytes in a node's sockets: the worst node's, at its highest since the value before, as are the next two."`
	Queue       Series      `json:"queueDelaySeconds" doc:"How long exchanges wait between reading and analysis."`
	Lag         Series      `json:"lagDelaySeconds" doc:"From a batch's sending to its reading, beyond the least seen of late."`
	Policies    LoadCounts  `json:"policies" doc:"All that mirror, shown or not."`
	Shares      []LoadShare `json:"shares" nullable:"false" doc:"The mirrored share by policy, most wanted first; each followed by its gateways where they differ."`
	MoreShares  int         `json:"moreShares" doc:"Policies and gateways left out of shares."`
	NotAnalysed []LoadLoss  `json:"notAnalysed" nullable:"false" doc:"Exchanges that were not analysed, by reason."`
	Nodes       []LoadNode  `json:"nodes" nullable:"false" doc:"Nodes, the latest first."`
	MoreNodes   int         `json:"moreNodes" doc:"Nodes left out of nodes."`
	Reporting   int         `json:"reportingNodes" doc:"Nodes that report, shown or not."`
}

// LoadCounts counts policies.
type LoadCounts struct {
	Total   int `json:"total"`
	Lowered int `json:"lowered" doc:"Those of which a gateway mirrors less than the policy asks for."`
	Classes int `json:"classesLeftOut" doc:"Those of which a gateway leaves out exchanges of classes that sampling spares."`
}

// Add counts a policy.
func (c *LoadCounts) Add(s LoadShare) {
	c.Total++
	if s.Lowered() {
		c.Lowered++
	}
	if s.LeftOut > 0 {
		c.Classes++
	}
}

// LoadShare is the mirrored share of a policy, or of a policy at one gateway.
type LoadShare struct {
	Policy  string  `json:"policy"`
	Gateway string  `json:"gateway,omitempty" doc:"A pod, or a gateway that the control plane serves; absent: all of them, their mean by demand."`
	Ceiling float64 `json:"ceilingPercent" doc:"The policy's spec.sampling.percent."`
	Least   float64 `json:"leastPercent" doc:"The lowest share of a gateway now."`
	Most    float64 `json:"mostPercent" doc:"The highest share of a gateway now."`
	Demand  float64 `json:"demand" doc:"Exchanges a second that the policy wants now, those of its classes among them."`
	LeftOut float64 `json:"classesLeftOutPercent" doc:"The part of the exchanges of its classes that a gateway leaves out now, at most: 0 as long as they take no more than their part of what nodes can do."`
	Percent Series  `json:"percent" doc:"The share of exchanges outside of classes that is mirrored."`
}

// LoadLoss is a reason for which exchanges were not analysed.
type LoadLoss struct {
	Reason string  `json:"reason" doc:"off, excluded, sampled_out, plugin_error, lost, stream, guard, ring_overflow, rejected, limited or inspection."`
	Rate   Series  `json:"rate" doc:"Exchanges a second."`
	Total  float64 `json:"total" doc:"Exchanges since the control plane's start."`
}

// LoadNode is a node as it reported last.
type LoadNode struct {
	Node        string    `json:"node,omitempty" doc:"Its name; absent until it has reported."`
	Address     string    `json:"address"`
	State       string    `json:"state" doc:"connecting, reporting or stale."`
	Fault       string    `json:"fault,omitempty" doc:"Why nothing comes."`
	ReceivedAt  time.Time `json:"receivedAt,omitzero"`
	Kernel      float64   `json:"kernelDelaySeconds"`
	Queue       float64   `json:"queueDelaySeconds"`
	Lag         float64   `json:"lagDelaySeconds"`
	Utilization float64   `json:"utilization" doc:"Part of its CPU time that it uses."`
	Capacity    float64   `json:"capacity" doc:"Exchanges a second, by its own estimate; 0: not known yet."`
	Rate        float64   `json:"rate" doc:"Exchanges analysed a second."`
}

// Series are values in order of time; NaN, in JSON null, is one that nobody knows.
type Series []float64

// MarshalJSON writes five significant digits.
func (s Series) MarshalJSON() ([]byte, error) {
	b := append(make([]byte, 0, 8*len(s)+2), '[')
	for i, v := range s {
		if i > 0 {
			b = append(b, ',')
		}
		if math.IsNaN(v) || math.IsInf(v, 0) {
			b = append(b, "null"...)
			continue
		}
		b = strconv.AppendFloat(b, v, 'g', 5, 64)
	}
	return append(b, ']'), nil
}

// UnmarshalJSON is the inverse.
func (s *Series) UnmarshalJSON(b []byte) error {
	var list []*float64
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	*s = make(Series, len(list))
	for i, v := range list {
		(*s)[i] = math.NaN()
		if v != nil {
			(*s)[i] = *v
		}
	}
	return nil
}

// Schema is what the API's description says.
func (Series) Schema(huma.Registry) *huma.Schema {
	return &huma.Schema{Type: huma.TypeArray, Items: &huma.Schema{Type: huma.TypeNumber, Nullable: true}}
}

// now is the newest value; NaN: it is not known.
func (s Series) now() float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	return s[len(s)-1]
}

// most is the highest value that is known; NaN: none is.
func (s Series) most() float64 {
	most := math.NaN()
	for _, v := range s {
		if !(v <= most) && !math.IsNaN(v) {
			most = v
		}
	}
	return most
}

const (
	loadEvery   = time.Second     // between two questions to the control plane
	loadTimeout = 2 * time.Second // for its answer
	loadStale   = 5 * time.Second // after the last answer what it said is not current
)

var errNoControl = errors.New("this console knows no control plane")

// loadView asks the control plane for everybody who looks, and keeps what it said
// last.
type loadView struct {
	source LoadSource // nil: none
	now    func() time.Time

	mu    sync.Mutex
	asked time.Time
	last  *Load
	got   time.Time // when last came
	err   error     // of the last question
}

// loadState is a load and how far to trust it.
type loadState struct {
	*Load           // nil: none has ever come
	Got   time.Time // when it came
	Stale bool      // nothing has come since
	Fault error     // why
}

// get asks, unless that was done a moment ago.
func (v *loadView) get(ctx context.Context) loadState {
	if v.source == nil {
		return loadState{Fault: errNoControl}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.now().Sub(v.asked) >= loadEvery {
		// Others wait for this answer, too.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loadTimeout)
		defer cancel()
		l, err := v.source.Load(ctx)
		if v.err = err; err == nil {
			v.last, v.got = &l, v.now()
		}
		v.asked = v.now()
	}
	return loadState{Load: v.last, Got: v.got, Stale: v.last != nil && v.now().Sub(v.got) > loadStale, Fault: v.err}
}

type loadOutput struct {
	Body struct {
		Current bool      `json:"current" doc:"The control plane answers; if not, this is what it said last."`
		Got     time.Time `json:"receivedAt" doc:"When the control plane said this."`
		Load
	}
}

func (c *console) apiLoad(ctx context.Context, _ *struct{}) (*loadOutput, error) {
	s := c.load.get(ctx)
	if s.Load == nil {
		return nil, huma.Error503ServiceUnavailable("The load is not known: " + s.Fault.Error() + ".")
	}
	out := &loadOutput{}
	out.Body.Current, out.Body.Got, out.Body.Load = !s.Stale, s.Got.UTC(), *s.Load
	return out, nil
}

// loads is the Load page.
func (c *console) loads(w http.ResponseWriter, r *http.Request) {
	c.render(w, http.StatusOK, "load", "layout", frame{"Load", c.cfg.Version, c.loadPage(c.load.get(r.Context()))})
}

// loadNow is the part of it that changes.
func (c *console) loadNow(w http.ResponseWriter, r *http.Request) {
	c.render(w, http.StatusOK, "load", "now", c.loadPage(c.load.get(r.Context())))
}
