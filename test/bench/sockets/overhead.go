package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"runtime"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/ingest"
	"github.com/periscope-mesh/periscope/node/sockstat"
	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/result"
)

// Variants of windows.
const (
	without = iota
	again   // the same once more: what differs is noise
	counted // programs attached, a sample every 10 ms
	variants
)

// Batches of the overhead's load are as large as the plugin makes them.
const (
	overheadConns  = 64
	overheadEvents = 32
	overheadBody   = 1024
)

// overhead is what counting costs a node that has as much to do as it can.
type overhead struct {
	way    string
	blocks []block
}

// block is one window of each variant, next to each other, in random order.
type block [variants]usage

// usage is of one window.
type usage struct {
	Exchanges  int
	Node, Sent float64 // CPU time, seconds: the node's process, the sender's
	Samples    uint64
	Elapsed    float64 // seconds
}

func (u usage) node() float64  { return u.Node / float64(u.Exchanges) }
func (u usage) total() float64 { return (u.Node + u.Sent) / float64(u.Exchanges) }

// ratio compares two variants, block by block. Without counters there are two
// windows to compare with.
func (o overhead) ratio(variant int, of func(usage) float64) result.Spread {
	var out []float64
	for _, b := range o.blocks {
		base := of(b[without])
		if variant == counted {
			base = (base + of(b[again])) / 2
		}
		out = append(out, of(b[variant])/base)
	}
	return result.Over(out)
}

// micros is the CPU time of an exchange without counters.
func (o overhead) micros(of func(usage) float64) float64 {
	var out []float64
	for _, b := range o.blocks {
		out = append(out, of(b[without])*1e6)
	}
	return result.Over(out).Mid
}

// rate is how many exchanges a second the node takes without counters.
func (o overhead) rate() float64 {
	var out []float64
	for _, b := range o.blocks {
		out = append(out, float64(b[without].Exchanges)/b[without].Elapsed)
	}
	return result.Over(out).Mid
}

// samples is how many there were a second.
func (o overhead) samples() float64 {
	var out []float64
	for _, b := range o.blocks {
		out = append(out, float64(b[counted].Samples)/b[counted].Elapsed)
	}
	return result.Over(out).Mid
}

func (b *bench) overhead(ctx context.Context, way string, blocks int, window time.Duration, until time.Time) (_ overhead, err error) {
	out := overhead{way: way}
	r, err := b.startNode(ctx, nodeConfig{}, false)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, r.close(b)) }()
	client, err := load.Dial(load.Config{Addr: listenAddress.String(), Conns: overheadConns, From: func(i int) net.IP { return gatewayAddress(i) }})
	if err != nil {
		return out, err
	}
	defer client.Close()
	request := load.Request{Raw: raw(batch(exchanges(overheadEvents, overheadBody), 1, time.Now())), Status: 202, Once: way == once,
		BodyBytes: len(fmt.Sprintf(`{"accepted":%d,"dropped":0}`+"\n", overheadEvents))}
	// At least one block, besides the first, which warms up.
	for i := 0; i <= blocks && (i < 2 || time.Now().Before(until)); i++ {
		var bl block
		for _, v := range rand.Perm(variants) {
			if bl[v], err = r.window(ctx, client, request, v, window); err != nil {
				return out, err
			}
		}
		if i > 0 {
			out.blocks = append(out.blocks, bl)
		}
		if i%40 == 0 {
			fmt.Fprintf(b.progress, "overhead, %s: block %d of %d, node %.3f %.3f, all %.3f %.3f\n", way, i, blocks,
				out.ratio(again, usage.node).Mid, out.ratio(counted, usage.node).Mid, out.ratio(again, usage.total).Mid, out.ratio(counted, usage.total).Mid)
		}
	}
	return out, nil
}

// window sends as fast as the node answers.
func (r *rig) window(ctx context.Context, client *load.Client, request load.Request, variant int, length time.Duration) (usage, error) {
	backend := ""
	if variant == counted {
		backend = sockstat.EBPF
	}
	if _, err := r.ask(ctx, nodeRequest{Op: opSample, Backend: backend}); err != nil {
		return usage{}, err
	}
	runtime.GC()
	before, err := r.ask(ctx, nodeRequest{Op: opCount})
	if err != nil {
		return usage{}, err
	}
	own := cpuTime()
	sent := client.Saturate(ctx, request, length)
	own = cpuTime() - own
	after, err := r.ask(ctx, nodeRequest{Op: opCount})
	if err != nil {
		return usage{}, err
	}
	u := usage{Exchanges: int(after.Received - before.Received), Node: time.Duration(after.CPU - before.CPU).Seconds(), Sent: time.Duration(own).Seconds(),
		Samples: after.Samples - before.Samples, Elapsed: sent.Elapsed.Seconds()}
	if sent.Errors > 0 {
		return u, fmt.Errorf("%d batches were not taken: %w", sent.Errors, sent.FirstError)
	}
	if want := sent.Requests * overheadEvents; u.Exchanges != want || want == 0 {
		return u, fmt.Errorf("the node took %d exchanges of %d", u.Exchanges, want)
	}
	return u, ctx.Err()
}

// raw is a whole HTTP request.
func raw(body []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", ingest.Path, listenAddress, event.ContentType, len(body))
	b.Write(body)
	return b.Bytes()
}
