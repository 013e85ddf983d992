// Package load drives one HTTP/1.1 server over kept-alive connections, either
// as fast as it answers or at a given schedule, and measures it.
//
// It never judges what it measures and does no more work per response than
// checking its status and its body's length, because on a small machine the
// generator competes with what it measures. Benchmarks under test/bench may
// import it; it imports nothing of ours.
package load

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// grace is how long answers may take beyond the end of a burst.
const grace = 5 * time.Second

// maxFaults ends a connection's part of a burst: the burst has failed anyway,
// and redialing in a loop would only hide why.
const maxFaults = 10

// Config of a Client.
type Config struct {
	Addr  string                // of the server
	Conns int                   // connections, kept open from burst to burst
	From  func(conn int) net.IP // where a connection comes from; default: the system's choice
}

// Client holds the connections. Its bursts may not overlap.
type Client struct {
	conns []*conn
}

// Request is what a burst sends again and again, and what must come back.
type Request struct {
	Raw       []byte // the whole request
	BodyBytes int    // length of the answer's body
	Status    int    // of the answer; 0: 200
	Once      bool   // each has a connection of its own
}

// Result is a burst's outcome.
type Result struct {
	Requests   int // answered as they should be
	Errors     int // everything else
	FirstError error
	Elapsed    time.Duration   // to the last answer
	Latencies  []time.Duration // of Paced, in no particular order
}

// Dial opens the connections.
func Dial(c Config) (*Client, error) {
	cl := &Client{}
	for i := range c.Conns {
		k := &conn{addr: c.Addr, buf: make([]byte, 64<<10)}
		if c.From != nil {
			k.from = &net.TCPAddr{IP: c.From(i)}
		}
		if err := k.dial(); err != nil {
			cl.Close()
			return nil, err
		}
		cl.conns = append(cl.conns, k)
	}
	return cl, nil
}

// Close closes the connections.
func (c *Client) Close() {
	for _, k := range c.conns {
		k.close()
	}
}

// Saturate is a closed loop: for d, every connection sends its next request as
// soon as it has the answer to the last.
func (c *Client) Saturate(ctx context.Context, r Request, d time.Duration) Result {
	start := time.Now()
	end := start.Add(d)
	return c.each(start, end, func(k *conn, res *Result) {
		for ctx.Err() == nil && time.Now().Before(end) && res.Errors < maxFaults {
			res.count(k.exchange(r))
		}
	})
}

// Paced is an open loop: requests become due by schedule, whatever became of
// earlier ones. Each is sent by the first free connection, and its latency
// counts from when it was due, so that a stalled server cannot hide requests
// that it kept from being sent (coordinated omission). The queue of due
// requests holds at most the whole schedule.
func (c *Client) Paced(ctx context.Context, r Request, schedule []time.Duration) (Result, error) {
	if len(schedule) == 0 {
		return Result{}, nil
	}
	clock, err := newTimer()
	if err != nil {
		return Result{}, err
	}
	defer clock.close()
	due := make(chan time.Time, len(schedule))
	start := time.Now()
	var clockErr error
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(due)
		for _, at := range schedule {
			if clockErr = clock.until(start.Add(at)); clockErr != nil || ctx.Err() != nil {
				return
			}
			due <- start.Add(at)
		}
	})
	res := c.each(start, start.Add(schedule[len(schedule)-1]), func(k *conn, res *Result) {
		for at := range due {
			if res.Errors >= maxFaults {
				res.count(fmt.Errorf("not sent: too many errors on this connection"))
				continue
			}
			err := k.exchange(r)
			res.count(err)
			if err == nil {
				res.Latencies = append(res.Latencies, time.Since(at))
			}
		}
	})
	wg.Wait()
	return res, clockErr
}

// each runs f for every connection and sums the results up.
func (c *Client) each(start, end time.Time, f func(*conn, *Result)) Result {
	parts := make([]Result, len(c.conns))
	var wg sync.WaitGroup
	for i, k := range c.conns {
		k.deadline = end.Add(grace)
		wg.Go(func() { k.arm(); f(k, &parts[i]) })
	}
	wg.Wait()
	sum := Result{Elapsed: time.Since(start)}
	for _, p := range parts {
		sum.Requests += p.Requests
		sum.Errors += p.Errors
		if sum.FirstError == nil {
			sum.FirstError = p.FirstError
		}
		sum.Latencies = append(sum.Latencies, p.Latencies...)
	}
	return sum
}

func (r *Result) count(err error) {
	if err == nil {
		r.Requests++
		return
	}
	r.Errors++
	if r.FirstError == nil {
		r.FirstError = err
	}
}

// Poisson gives the arrival times of independent clients: rate a second, for d.
func Poisson(seed uint64, rate float64, d time.Duration) []time.Duration {
	rng := rand.New(rand.NewPCG(seed, 0))
	var out []time.Duration
	for at := 0.0; ; {
		at += rng.ExpFloat64() / rate
		t := time.Duration(at * float64(time.Second))
		if t >= d {
			return out
		}
		out = append(out, t)
	}
}
