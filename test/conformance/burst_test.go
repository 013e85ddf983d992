package conformance

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// tailWithin is how long after the last exchange's end its event may take,
// without any traffic: the plugin keeps no event back.
const tailWithin = time.Second

// burst runs n exchanges at once; of each five one is aborted by its client,
// where aborts are asked for.
func (r *rig) burst(t *testing.T, name string, n int, aborts bool) (ended, aborted []string) {
	var wait sync.WaitGroup
	for i := range n {
		id := fmt.Sprintf("%s-%d-%d", name, n, i)
		r.node.expect(id)
		x, protocol := exchange{script: reply(200, [][]byte{noise(300)})}, []string{h11, h2}[i%2]
		if aborts && i%5 == 1 {
			x.abort, x.script = afterRequest, script{fail: never}
			aborted = append(aborted, id)
		} else {
			ended = append(ended, id)
		}
		wait.Go(func() {
			if _, err := r.do(x, protocol, id); err != nil {
				t.Error(err)
			}
			r.up.forget(id)
		})
	}
	wait.Wait()
	return ended, aborted
}

// TestBurstThenSilence: the last events do not stay behind when nothing comes
// after them.
func TestBurstThenSilence(t *testing.T) {
	for _, tr := range transports {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, tr.waits(shortWait), "http")
			f := &faults{}
			for n := 1; n <= 40; n++ {
				ended, _ := r.burst(t, "plain", n, false)
				if left := r.node.missing(ended, tailWithin); len(left) > 0 {
					f.add("burst of %d: %d events did not come within %v", n, len(left), tailWithin)
				}
			}
			f.report(t, known["burst then silence"])
			f = &faults{}
			var aborted []string
			for n := 2; n <= 40; n += 6 {
				time.Sleep(200 * time.Millisecond) // what is held while much comes is not this test's matter
				ended, given := r.burst(t, "aborts", n, true)
				if left := r.node.missing(ended, tailWithin); len(left) > 0 {
					f.add("burst of %d with aborts: %d events of exchanges that ended did not come within %v", n, len(left), tailWithin)
				}
				aborted = append(aborted, given...)
			}
			// What was aborted is given up after the longest wait, when something passes.
			time.Sleep(shortWait)
			r.burst(t, "after", 1, false)
			if left := r.node.missing(aborted, tailWithin); len(left) > 0 {
				f.add("%d events of %d exchanges that were aborted did not come", len(left), len(aborted))
			}
			f.report(t, known["burst with aborts, then silence"])
			r.checkCounters(t)
		})
	}
}

// TestOneConnection: what shares a connection has events of its own.
func TestOneConnection(t *testing.T) {
	for _, tr := range []transport{transports[0], extProc} {
		t.Run(tr.name, func(t *testing.T) { runOneConnection(t, newRig(t, tr.waits(shortWait), "http")) })
	}
}

func runOneConnection(t *testing.T, r *rig) {
	t.Run("pipelining", func(t *testing.T) {
		const n = 30
		c, err := r.dial("http")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		h := NewH1(c, true)
		var all strings.Builder
		var ids []string
		for i := range n {
			id := fmt.Sprint("pipelined-", i)
			ids = append(ids, id)
			r.node.expect(id)
			s := reply(200, [][]byte{[]byte(id)})
			r.up.expect(id, &s)
			fmt.Fprintf(&all, "POST /%d HTTP/1.1\r\nHost: gateway.example\r\n%s: %s\r\ncontent-length: %d\r\n\r\n%s", i, caseHeader, id, len(id), id)
		}
		if _, err := c.Write([]byte(all.String())); err != nil {
			t.Fatal(err)
		}
		for _, id := range ids {
			h.Next()
			h.Expect("POST")
			if m := Receive(h); string(m.Body) != id {
				t.Fatalf("answer %q to %s", m.Body, id)
			}
		}
		r.eachOnce(t, ids)
	})
	t.Run("streams at once", func(t *testing.T) {
		const n = 100
		c, err := r.dial("http")
		if err != nil {
			t.Fatal(err)
		}
		h, err := NewH2Client(c)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		var wait sync.WaitGroup
		var ids []string
		for i := range n {
			id := fmt.Sprint("stream-", i)
			ids = append(ids, id)
			r.node.expect(id)
			x := (&exchange{method: "POST", unsized: true, body: pieces([]byte(id), 3), gap: time.Millisecond, script: reply(200, pieces([]byte(id), 4))}).defaults()
			s := x.script
			s.gap = time.Millisecond
			r.up.expect(id, &s)
			stream := h.Open()
			wait.Go(func() {
				if tr := r.doOn(stream, &x, h2, id, ""); string(tr.got.Body) != id {
					t.Errorf("answer %q to %s", tr.got.Body, id)
				}
			})
		}
		wait.Wait()
		r.eachOnce(t, ids)
	})
	r.checkCounters(t)
}

// eachOnce: each exchange has one event, with its own id as either body.
func (r *rig) eachOnce(t *testing.T, ids []string) {
	t.Helper()
	for _, id := range r.node.missing(ids, 3*time.Second) {
		t.Errorf("%s has no event", id)
	}
	for _, id := range ids {
		if events := r.node.of(id, 0, 0); len(events) != 1 || string(events[0].Request.Body) != id || string(events[0].Response.Body) != id {
			t.Errorf("%s has %d events, or another's body", id, len(events))
		}
	}
}
