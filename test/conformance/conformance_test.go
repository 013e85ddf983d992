package conformance

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/policy"
)

func TestMain(m *testing.M) {
	flag.Parse()
	_ = flag.Set("test.parallel", "16") // cases wait more than they work
	os.Exit(m.Run())
}

// transports are the ways that all cases hold for.
var transports = []transport{
	{name: "Lua"},
	{name: "Lua of Envoy 1.39", plugin: masked("requestHeaders", "filterContext", "base64Decode")},
	{name: "Lua of Envoy 1.36", plugin: masked("requestHeaders", "filterContext", "base64Decode", "stats", "virtualHost", "route", "virtualClusterName", "drainConnectionUponCompletion")},
	extProc,
}

var extProc = transport{name: "ExtProc", kind: policy.TransportExtProc}

// masked hides methods of Envoy's objects from the plugin, as where they don't
// exist. Their metatables are known once Envoy has made them: after loading.
func masked(methods ...string) func(string) string {
	return func(code string) string {
		return code + fmt.Sprintf(`
do
  local hidden, request = { %s }, envoy_on_request
  function envoy_on_request(h)
    if hidden then
      for _, mt in pairs(debug.getregistry()) do
        if type(mt) == "table" then for _, m in ipairs(hidden) do if type(rawget(mt, m)) == "function" then mt[m] = nil end end end
      end
      hidden = nil
    end
    return request(h)
  end
end
`, `"`+strings.Join(methods, `", "`)+`"`)
	}
}

// twins are listeners without our filters.
var twins = map[string]string{"http": "bare", "wide": "wide-bare", "https": "https-bare", "h3": "h3-bare"}

func TestCases(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			for name, wait := range map[string]time.Duration{"that end": longWait, "that are cut": shortWait} {
				t.Run(name, func(t *testing.T) { runCases(t, tr.waits(wait)) })
			}
		})
	}
}

func runCases(t *testing.T, tr transport) {
	r := newRig(t, tr)
	r.nudges(t)
	var mu sync.Mutex
	var ids []string
	codec, faulty := 0, 0 // refused by the codec, and status 4xx with an event
	t.Run("each", func(t *testing.T) {
		for n, c := range allCases() {
			c = c.by(tr.kind)
			if c.cut() != (tr.wait == shortWait) {
				continue
			}
			if c.protocols == nil {
				c.protocols = []string{h11, h2}
			}
			for _, protocol := range c.protocols {
				id := fmt.Sprintf("%d-%s", n, protocol)
				t.Run(c.name+" "+strings.ReplaceAll(protocol, "/", " "), func(t *testing.T) {
					t.Parallel()
					f := &faults{}
					tr, saw := r.runCase(t, f, c, protocol, id)
					mu.Lock()
					switch {
					case !saw:
						codec++
					case strings.HasPrefix(Get(tr.got.Head, ":status"), "4"):
						faulty++
					}
					if saw && c.want != legs {
						ids = append(ids, id)
					}
					mu.Unlock()
					f.report(t, isKnown(c.name, protocol))
				})
			}
		}
	})
	for _, id := range ids {
		if n := len(r.node.of(id, 1, 0)); n > 1 {
			t.Errorf("%s has %d events", id, n)
		}
	}
	counted := 0
	for _, l := range r.listeners {
		if !l.bare {
			counted += r.envoy.Stat("http."+l.name+".downstream_cx_protocol_error") + r.envoy.Stat("http."+l.name+".downstream_rq_4xx")
		}
	}
	t.Logf("%d exchanges had an event; %d were refused by Envoy's codec", len(ids), codec)
	if counted < codec+faulty {
		t.Errorf("%d exchanges were refused by Envoy's codec, and %d had an event with status 4xx; Envoy counts %d", codec, faulty, counted)
	}
	r.checkCounters(t)
}

// isKnown gives the reason why a case is known to fail, or "".
func isKnown(name, protocol string) string {
	if why := known[name+" "+protocol]; why != "" {
		return why
	}
	return known[name]
}

// runCase tells whether the plugin saw the exchange.
func (r *rig) runCase(t *testing.T, f *faults, c testCase, protocol, id string) (*truth, bool) {
	x := c.x.defaults()
	if protocol == h3 && x.listener == "http" {
		x.listener = "h3"
	}
	var bare *truth
	if twin := twins[x.listener]; twin != "" {
		without := x
		without.listener = twin
		var err error
		if bare, err = r.do(without, protocol, "bare-"+id); err != nil {
			t.Fatal(err)
		}
		bare.seen = r.up.forget("bare-" + id)
	}
	r.node.expect(id)
	tr, err := r.do(x, protocol, id)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if len(f.list) > 0 {
			f.add("%s", tr.describe())
		}
	}()
	within := 5 * time.Second
	if c.cut() {
		within += shortWait
	}
	if c.want == refused || c.want == either && len(r.up.attempts(id)) == 0 {
		within = 300 * time.Millisecond
	}
	count := 1
	if c.want == legs {
		count = 2
	}
	events := r.node.of(id, count, within)
	tr.seen = r.up.forget(id)
	if bare != nil && !c.loose {
		tr.sameAs(f, bare)
	} else if bare != nil {
		if a, b := Get(tr.got.Head, ":status"), Get(bare.got.Head, ":status"); a != b {
			f.add("status %q, without the plugin %q", a, b)
		}
	}
	return tr, c.judge(f, tr, events)
}

func (c *testCase) judge(f *faults, tr *truth, events []arrived) bool {
	switch {
	case c.want == refused || c.want == either && len(events) == 0:
		if len(events) > 0 || len(tr.seen) > 0 {
			f.add("Envoy's codec does not refuse it: %d events, %d attempts at the upstream", len(events), len(tr.seen))
		}
		return false
	case len(events) == 0:
		f.add("no event")
		return false
	case c.want == legs:
		events = slices.DeleteFunc(slices.Clone(events), func(e arrived) bool { return e.Flags&event.FlagNoResponse != 0 })
		tr.sent = nil
	}
	if len(events) != 1 {
		f.add("%d events", len(events))
		return true
	}
	ev := events[0]
	tr.compare(f, &ev.Event)
	if c.check != nil {
		c.check(f, &ev.Event, tr)
	}
	return true
}

// Masked methods are not there for the plugin.
func TestMasked(t *testing.T) {
	const methods = "return tostring(h.stats) .. tostring(h.requestHeaders) .. tostring(h:streamInfo().virtualClusterName)"
	r := newRig(t, transport{plugin: func(string) string {
		return masked("stats", "requestHeaders", "virtualClusterName")(`
local function told(h) ` + methods + ` end
function envoy_on_request(h) h:respond({ [":status"] = "200", ["x-told"] = told(h) }, "") end`)
	}}, "http")
	tr, err := r.do(exchange{}, h11, "masked")
	if err != nil {
		t.Fatal(err)
	}
	if got := Get(tr.got.Head, "x-told"); got != "nilnilnil" {
		t.Errorf("methods that are masked: %q", got)
	}
}
