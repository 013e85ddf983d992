package conformance

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/policy"
)

// deviation is what events by a transport tell otherwise than by Lua: check
// takes the place of the cases' own. All else of these cases holds.
type deviation struct {
	kind  policy.Transport
	row   string // of docs/transport.md's table, which says the same to users
	why   string
	cases []string
	check func(f *faults, ev *event.Event, tr *truth)
}

var deviations = []deviation{
	{
		kind: policy.TransportExtProc, row: "`mask.headers`", cases: []string{"masked header"},
		why: "Envoy withholds the lines, and tells only that there are any", check: masks("x-secret", 1),
	},
	{
		kind: policy.TransportExtProc, row: "client certificate: subject, names", cases: []string{"TLS with the client's certificate"},
		why: "Envoy has attributes for the first name of a kind alone", check: tlsFacts("CN=cart,O=Shop\\, Ltd", clientURI, serverDNS),
	},
	{
		kind: policy.TransportExtProc, row: "times within an exchange", cases: []string{"times"},
		why: "messages carry no times, and several may reach a busy node at once", check: func(f *faults, ev *event.Event, _ *truth) {
			if ev.HeadersUS < ev.RequestEndUS || ev.EndUS < ev.HeadersUS || ev.EndUS > 5_000_000 {
				f.add("request's end, response's header and end after %d, %d, %d µs", ev.RequestEndUS, ev.HeadersUS, ev.EndUS)
			}
		},
	},
}

// by gives the case as it is by a transport.
func (c testCase) by(kind policy.Transport) testCase {
	for _, d := range deviations {
		if d.kind == kind && slices.Contains(d.cases, c.name) {
			c.check = d.check
		}
	}
	return c
}

// Each deviation is of cases that there are, and users are told of it.
func TestDeviationsAreDocumented(t *testing.T) {
	raw, err := os.ReadFile("../../docs/transport.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range deviations {
		t.Logf("%s, %s: %s", d.kind, d.row, d.why)
		if !strings.Contains(string(raw), "\n| "+d.row+" |") {
			t.Errorf("docs/transport.md has no row %q", d.row)
		}
		for _, name := range d.cases {
			if !slices.ContainsFunc(allCases(), func(c testCase) bool { return c.name == name }) {
				t.Errorf("%s: there is no case %q", d.row, name)
			}
		}
	}
}
