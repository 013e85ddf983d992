package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/sink"
)

const (
	connections   = 32 // of each variant, kept open
	responseBytes = 1 << 10
	warmUp        = 300 * time.Millisecond
)

// receiver takes what a gateway copies.
type receiver interface {
	Port() int
	Copies() uint64           // complete ones that have arrived
	Expected() (uint64, bool) // how many the sender says there are, if it says so
	Open() int64              // that have begun to arrive
	Run(ctx context.Context) error
}

// gateway is a variant, running.
type gateway struct {
	variant
	envoy    *envoy
	client   *load.Client
	receiver receiver // nil: nothing is copied
}

// workload is a kind of request.
type workload struct {
	title   string
	request load.Request
}

// workloads of a run; full adds large bodies.
func workloads(full bool) []workload {
	w := []workload{
		{"GET, 1 KiB response", newRequest("GET", 0)},
		{"POST 1 KiB, 1 KiB response", newRequest("POST", 1<<10)},
	}
	if full {
		w = append(w, workload{"POST 64 KiB, 1 KiB response", newRequest("POST", 64<<10)})
	}
	return w
}

// newRequest looks like a browser's call of an API.
func newRequest(method string, bodyBytes int) load.Request {
	head := method + " /api/v1/catalog/products/4711?view=full&lang=en HTTP/1.1\r\n" +
		"Host: shop.example.com\r\n" +
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
		"Accept: application/json, text/plain, */*\r\n" +
		"Accept-Language: en-US,en;q=0.5\r\n" +
		"Accept-Encoding: gzip, deflate, br\r\n" +
		"Referer: https://shop.example.com/catalog?page=3\r\n" +
		"Origin: https://shop.example.com\r\n" +
		"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; consent=1\r\n" +
		"Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg\r\n" +
		"Sec-Fetch-Dest: empty\r\n" +
		"Sec-Fetch-Mode: cors\r\n" +
		"Sec-Fetch-Site: same-origin\r\n"
	var body []byte
	if bodyBytes > 0 {
		body = sink.JSON(bodyBytes)
		head += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return load.Request{Raw: append([]byte(head+"\r\n"), body...), BodyBytes: responseBytes}
}

// figures are what one variant did under one workload, a value per round.
type figures struct {
	throughput []float64 // requests a second, saturated
	cpu        []float64 // µs of the gateway per request, saturated
	busy       []float64 // share of the time that the gateway ran or wanted to, saturated
	p50, p99   []float64 // ms, at the fixed rate

	requests, errors int
	copies, expected uint64
	firstError       error
}

// bench is a run: all gateways stay up, and take turns.
type bench struct {
	options
	progress  io.Writer
	gateways  []*gateway
	workloads []workload
	figures   [][]figures // by workload, then gateway
}

// start brings up a gateway for v in a folder of its own below dir. The
// receiver must be listening; whoever calls it runs it.
func start(ctx context.Context, v variant, o options, dir string, backendPort int, r receiver) (*gateway, error) {
	port := 0
	if r != nil {
		port = r.Port()
	}
	config, err := bootstrapJSON(v, backendPort, port)
	if err != nil {
		return nil, err
	}
	dir = filepath.Join(dir, v.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create folder for envoy: %w", err)
	}
	e, err := startEnvoy(ctx, o.envoy, dir, config, o.pinning)
	if err != nil {
		return nil, fmt.Errorf("variant %s: %w", v.name, err)
	}
	client, err := load.Dial(load.Config{Addr: e.addr, Conns: connections})
	if err != nil {
		e.stop()
		return nil, fmt.Errorf("variant %s: %w", v.name, err)
	}
	return &gateway{variant: v, envoy: e, client: client, receiver: r}, nil
}

func (g *gateway) stop() {
	g.client.Close()
	g.envoy.stop()
}

// newReceiver listens for what v copies; nil for nothing.
func newReceiver(c copies) (receiver, error) {
	switch c {
	case copiesEvents:
		return sink.ListenEvents()
	case copiesRequests:
		return sink.ListenBackend(0)
	case copiesProcessor:
		return sink.ListenProcessor()
	default:
		return nil, nil
	}
}

// measure runs one short round that is thrown away, then the real ones. The
// order alternates, so that a machine that slows down steadily, or a variant
// that leaves work behind, favours nobody.
func (b *bench) measure(ctx context.Context) error {
	if _, err := b.round(ctx, 0, warmUp); err != nil {
		return fmt.Errorf("warm-up: %w", err)
	}
	b.figures = make([][]figures, len(b.workloads))
	for w := range b.figures {
		b.figures[w] = make([]figures, len(b.gateways))
	}
	for n := 1; n <= b.rounds; n++ {
		fmt.Fprintf(b.progress, "round %d of %d\n", n, b.rounds)
		got, err := b.round(ctx, n, b.burst)
		if err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
		for w := range got {
			for g := range got[w] {
				b.figures[w][g].add(got[w][g])
			}
		}
	}
	return nil
}

func (b *bench) round(ctx context.Context, n int, burst time.Duration) ([][]figures, error) {
	order := make([]int, len(b.gateways))
	for i := range order {
		order[i] = i
	}
	if n%2 == 1 {
		slices.Reverse(order)
	}
	out := make([][]figures, len(b.workloads))
	for w, wl := range b.workloads {
		out[w] = make([]figures, len(b.gateways))
		schedule := load.Poisson(uint64(n*len(b.workloads)+w), b.rate, burst)
		for _, i := range order {
			g := b.gateways[i]
			f, err := g.bursts(ctx, wl.request, burst, schedule)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return nil, fmt.Errorf("variant %s, %s: %w", g.name, wl.title, err)
			}
			out[w][i] = f
		}
	}
	return out, nil
}

// bursts measures g once: saturated, then at the schedule's rate.
func (g *gateway) bursts(ctx context.Context, r load.Request, burst time.Duration, schedule []time.Duration) (figures, error) {
	var f figures
	before := g.copied()
	runtime.GC() // not during the burst: see main
	cpu0, err := g.envoy.cpu()
	if err != nil {
		return f, err
	}
	sat := g.client.Saturate(ctx, r, burst)
	cpu1, err := g.envoy.cpu()
	if err != nil {
		return f, err
	}
	if err := g.settle(ctx); err != nil {
		return f, err
	}
	// What the gateway does after the last answer is part of the requests' price.
	cpu2, err := g.envoy.cpu()
	if err != nil {
		return f, err
	}
	runtime.GC()
	paced, err := g.client.Paced(ctx, r, schedule)
	if err != nil {
		return f, err
	}
	if err := g.settle(ctx); err != nil {
		return f, err
	}
	after := g.copied()

	f.requests = sat.Requests + paced.Requests
	f.errors = sat.Errors + paced.Errors
	if f.firstError = sat.FirstError; f.firstError == nil {
		f.firstError = paced.FirstError
	}
	f.copies, f.expected = after.arrived-before.arrived, after.made-before.made
	if !after.told || g.share == 100 {
		f.expected = uint64(f.requests)
	}
	f.throughput = []float64{float64(sat.Requests) / sat.Elapsed.Seconds()}
	f.cpu = []float64{cpu2.sub(cpu0).run.Seconds() * 1e6 / float64(sat.Requests)}
	had := cpu1.sub(cpu0)
	f.busy = []float64{(had.run + had.wait).Seconds() / sat.Elapsed.Seconds()}
	f.p50 = []float64{quantile(paced.Latencies, 0.50)}
	f.p99 = []float64{quantile(paced.Latencies, 0.99)}
	return f, nil
}

type copied struct {
	arrived, made uint64
	told          bool // made is what the sender says
}

func (g *gateway) copied() copied {
	if g.receiver == nil {
		return copied{}
	}
	made, told := g.receiver.Expected()
	return copied{g.receiver.Copies(), made, told}
}

// settle waits until the gateway's copies have arrived, so that they are
// counted, and disturb nobody else's burst.
func (g *gateway) settle(ctx context.Context) error {
	if g.receiver == nil {
		return nil
	}
	const still = 5 // ticks
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := g.receiver.Copies()
	for quiet, left := 0, 150; quiet < still && left > 0; left-- {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		now := g.receiver.Copies()
		if now == last && g.receiver.Open() == 0 {
			quiet++
		} else {
			quiet, last = 0, now
		}
	}
	return nil
}

// add appends a round.
func (f *figures) add(r figures) {
	f.throughput = append(f.throughput, r.throughput...)
	f.cpu = append(f.cpu, r.cpu...)
	f.busy = append(f.busy, r.busy...)
	f.p50 = append(f.p50, r.p50...)
	f.p99 = append(f.p99, r.p99...)
	f.requests += r.requests
	f.errors += r.errors
	f.copies += r.copies
	f.expected += r.expected
	if f.firstError == nil {
		f.firstError = r.firstError
	}
}
