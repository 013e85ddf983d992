package conformance

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// Errors are injected before each statement of the plugin that a line begins with
// or that follows the words behind which one may begin. Whether a place is one,
// Envoy says: other code it refuses.
var (
	statement = regexp.MustCompile(`^\s*`)
	within    = regexp.MustCompile(`(\bthen|\belse|\bdo|\brepeat|;) `)
	noCode    = regexp.MustCompile(`^\s*(--.*)?$`)
)

const (
	injected = `do INJECTED = (INJECTED or 0) + 1; error("injected") end `
	// probe answers for the plugin how often the error was raised, and how often
	// the plugin counted one.
	probe = `
do
  local request = envoy_on_request
  function envoy_on_request(h)
    if h:headers():get("x-probe") then
      return h:respond({ [":status"] = "200", ["x-place"] = "%s", ["x-injected"] = tostring(INJECTED or 0), ["x-errors"] = tostring(count.errors) }, "")
    end
    return request(h)
  end
end
`
)

// place is where an error is injected.
type place struct{ line, column int }

// places lists those worth trying.
func places(code string) []place {
	var out []place
	for n, l := range strings.Split(code, "\n") {
		if noCode.MatchString(l) {
			continue
		}
		code, _, _ := strings.Cut(l, " -- ")
		out = append(out, place{n, len(statement.FindString(l))})
		for _, at := range within.FindAllStringIndex(code, -1) {
			if at[1] < len(code) {
				out = append(out, place{n, at[1]})
			}
		}
	}
	return out
}

func (p place) inject(code string) string {
	lines := strings.Split(code, "\n")
	l := lines[p.line]
	lines[p.line] = l[:p.column] + injected + l[p.column:]
	return strings.Join(lines, "\n") + fmt.Sprintf(probe, p)
}

func (p place) String() string { return fmt.Sprintf("%d:%d", p.line+1, p.column+1) }

// answer is what a client sees of an exchange.
type answer struct{ head, body, end string }

func (r *rig) answers(t *testing.T, c *client) []answer {
	t.Helper()
	var out []answer
	for n := range injectedExchanges {
		tr, err := c.do(injectedExchanges[n].defaults(), []string{h11, h2}[n%2], "inject")
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, answer{text(plain(tr.got.Head)), string(tr.got.Body), string(tr.got.End)})
	}
	return out
}

// injectedPolicy has the plugin do all that it can.
const injectedPolicy = `
apiVersion: periscope.dev/v1alpha1
kind: MirrorPolicy
metadata: {name: all, namespace: default}
spec:
  mode: Monitor
  match:
  - {hosts: ["*.nowhere.example", "elsewhere.example"]}
  - {hosts: ["gateway.example"], paths: [{type: Exact, value: /exact}, {type: PathPrefix, value: /}]}
  exclude: [{paths: [{type: Exact, value: /nudge}]}]
  sampling: {percent: 99.9999, always: [Authentication, Suspicious, NewEndpoint]}
  body:
    request:  {maxBytes: 64Ki, contentTypes: ["*/*"]}
    response: {maxBytes: 64Ki, contentTypes: ["application/json", "text/*"]}
  mask: {headers: [x-secret], jsonPaths: ["$.password"], detectors: [CreditCard]}
`

var injectedExchanges = []exchange{
	{path: "/a//b/../%2e%2e/c;v=1/12?q=<x>", head: []Field{{"x-secret", "1"}, {"x-pan", "4111 1111 1111 1111"}}, script: reply(200, [][]byte{[]byte(`{"password":{"a":["b","\\"c"]},"n":1}`)}, Field{"content-type", "application/json"})},
	{path: "/login", authority: "[::1]:8080"},
	{head: []Field{{"x-a", "1"}}, script: reply(200, [][]byte{[]byte("ok")}, Field{"set-cookie", "a=1"}, Field{"set-cookie", "b=2"})},
	{method: "POST", body: pieces(noise(2000), 700), unsized: true, trailers: []Field{{"x-t", "1"}}, script: with(streamed(pieces(noise(3000), 900)), func(s *script) { s.trailers = []Field{{"x-t", "2"}} })},
	{method: "POST", body: [][]byte{[]byte(`{"password":"a\\"b","pan":"4111-1111-1111-1111"}`)}, head: []Field{{"content-type", "application/json"}}, script: reply(200, [][]byte{noise(70_000)}, Field{"content-type", "application/json"})},
	{script: streamed([][]byte{[]byte("data: 1\n\n")}, Field{"content-type", "text/event-stream"})},
	{path: "/direct/x"},
	{path: "/nudge"},
}

// TestErrorAtEveryLine: an error anywhere in the plugin changes nothing for the
// user, and is counted.
func TestErrorAtEveryLine(t *testing.T) {
	r := prepare(t, transports[0], injectedPolicy, "http")
	r.start()
	c := &client{r: r}
	defer c.close()
	code := r.config.Plugin
	want := r.answers(t, c)
	var refused, silent, raised int
	for _, p := range places(code) {
		why := r.swap(p.inject(code))
		if why != "" {
			// No statement begins there, or it is run at load: the gateway keeps
			// what it had.
			refused++
			if !strings.Contains(why, "injected") && !strings.Contains(why, "expected") && !strings.Contains(why, "unexpected") && !strings.Contains(why, "near") {
				t.Fatalf("%s: refused: %s", p, why)
			}
			continue
		}
		if errs := r.tryInjected(t, c, p, want); errs < 0 {
			silent++
		} else {
			raised++
		}
	}
	if got := r.answers(t, c); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("at the end the client sees %q, want %q", got, want)
	}
	t.Logf("errors were raised at %d places, at %d that these exchanges do not reach; %d are no places", raised, silent, refused)
	if raised < 100 {
		t.Errorf("errors were raised at %d places only", raised)
	}
}

// tryInjected runs the exchanges with an error at a place, and gives how many
// errors were raised; -1: none.
func (r *rig) tryInjected(t *testing.T, c *client, p place, want []answer) int {
	t.Helper()
	number := func(tr *truth, name string) int { n, _ := strconv.Atoi(Get(tr.got.Head, name)); return n }
	atLoad := number(r.probe(t, c, p), "x-injected") // and caught there
	before := r.luaErrors()
	for n, got := range r.answers(t, c) {
		if got != want[n] {
			t.Errorf("error at %s: exchange %d is\n%s, body %d, %s\nwant\n%s, body %d, %s", p, n, got.head, len(got.body), got.end, want[n].head, len(want[n].body), want[n].end)
		}
	}
	abort := (&exchange{method: "POST", unsized: true, body: [][]byte{noise(100)}, abort: amidRequest, script: script{fail: never}}).defaults()
	if _, err := c.do(abort, h2, "inject"); err != nil {
		t.Fatal(err)
	}
	tr := r.probe(t, c, p)
	raised := number(tr, "x-injected") - atLoad
	if raised == 0 {
		return -1
	}
	after := r.luaErrors()
	if after < before { // Envoy's counter went with the last VM that had it
		before = 0
	}
	if counted := number(tr, "x-errors") + after - before; counted < raised {
		t.Errorf("error at %s: raised %d times, counted %d", p, raised, counted)
	}
	return raised
}

// probe waits until the worker runs the code of a place.
func (r *rig) probe(t *testing.T, c *client, p place) (tr *truth) {
	t.Helper()
	envoytest.Eventually(t, 5*time.Second, "the worker runs new code", func() bool {
		var err error
		if tr, err = c.do((&exchange{head: []Field{{"x-probe", "1"}}}).defaults(), h11, "probe"); err != nil {
			t.Fatal(err)
		}
		return Get(tr.got.Head, "x-place") == p.String()
	})
	return tr
}
