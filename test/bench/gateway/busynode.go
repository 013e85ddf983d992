package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/test/bench/proxy"
	"github.com/periscope-mesh/periscope/test/bench/sink"
)

const (
	batchEvents = 48 // as the plugin's
	// feedMost bounds the batches that are on their way to the node.
	feedMost = 16
	// Between two batches.
	slowest, fastest = 20 * time.Millisecond, time.Millisecond
	// wanted is the part of the CPU that a busy node wants: not all, as its workers
	// pause while batches wait in its sockets.
	wanted = 0.8
)

// busyNode is an analysis node on the gateways' CPU. It is stopped but while it
// is kept busy.
type busyNode struct {
	cmd   *exec.Cmd
	port  int
	admin string
	batch []byte
	every time.Duration // a batch is sent
	http  *http.Client
}

// startNode starts one in a folder of its own. The calling goroutine must be
// locked to its thread.
func (b *bench) startNode(ctx context.Context) (*busyNode, error) {
	dir, err := os.MkdirTemp(b.dir, "node-")
	if err != nil {
		return nil, fmt.Errorf("create folder for the node: %w", err)
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	admin, err := freeAddr()
	if err != nil {
		return nil, err
	}
	log := filepath.Join(dir, "log")
	out, err := os.Create(log)
	if err != nil {
		return nil, fmt.Errorf("create the node's log: %w", err)
	}
	defer out.Close()
	n := &busyNode{admin: admin, batch: busyBatch(), http: &http.Client{Timeout: time.Minute, Transport: &http.Transport{Protocols: new(http.Protocols)}}}
	n.http.Transport.(*http.Transport).Protocols.SetUnencryptedHTTP2(true)
	_, port, _ := net.SplitHostPort(addr)
	if n.port, err = strconv.Atoi(port); err != nil {
		return nil, err
	}
	// It finds no control plane, and analyses by the default policy.
	n.cmd = exec.Command(b.periscope, "node", "--node-listen", addr, "--node-admin", admin, "--node-orca", "127.0.0.1:0", "--control", "127.0.0.1:1", "--data", dir)
	n.cmd.Stdout, n.cmd.Stderr = out, out
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it dies with this thread
	if err := b.pinning.start(n.cmd.Start); err != nil {
		return nil, fmt.Errorf("start the node (make build makes it): %w", err)
	}
	if err := n.wait(ctx); err != nil {
		n.stop()
		text, _ := os.ReadFile(log)
		return nil, fmt.Errorf("%w\n%s", err, text)
	}
	if err := errors.Join(n.calibrate(ctx), n.drain(ctx)); err != nil {
		n.stop()
		return nil, err
	}
	return n, nil
}

// wait polls until it takes a batch.
func (n *busyNode) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for n.send(ctx) != nil {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the node does not start: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().String(), l.Close()
}

// busyBatch is of harmless exchanges.
func busyBatch() []byte {
	field := func(name, value string) event.Field { return event.Field{Name: []byte(name), Value: []byte(value)} }
	body := sink.JSON(kib)
	e := &event.Event{
		Policy: "default/default", SharePPM: 1_000_000, EndUS: 1000, Source: "127.0.0.1:40000", Protocol: "HTTP/1.1",
		Request: event.Message{Headers: []event.Field{
			field(":method", "POST"), field(":path", "/api/v1/catalog/products/4711?view=full&lang=en"), field(":authority", "shop.example.com"), field(":scheme", "http"),
			field("content-type", "application/json"), field("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"), field("accept", "application/json, text/plain, */*"),
		}, Body: body, BodyBytes: kib},
		Response: event.Message{Headers: []event.Field{field(":status", "200"), field("content-type", "application/json")}, Body: body, BodyBytes: kib},
	}
	var out []byte
	for i := range batchEvents {
		e.N, e.StartUS = uint64(i+1), uint64(time.Now().UnixMicro())
		out = event.Append(out, e)
	}
	return event.AppendHeader(out, &event.Header{Version: event.Version, Gateway: "default/feed", VM: "feed", Seq: 1, SentUS: uint64(time.Now().UnixMicro())})
}

func (n *busyNode) pid() int { return n.cmd.Process.Pid }

func (n *busyNode) stop() {
	_ = n.cmd.Process.Signal(syscall.SIGCONT)
	proxy.End(n.cmd)
	n.http.CloseIdleConnections()
	http.DefaultClient.CloseIdleConnections()
}

// send hands the node one batch.
func (n *busyNode) send(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("http://127.0.0.1:%d/v1/events", n.port), bytes.NewReader(n.batch))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/msgpack")
	resp, err := n.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// feed sends batches until the context ends. Those beyond feedMost on their way
// are left out.
func (n *busyNode) feed(ctx context.Context) {
	var sending sync.WaitGroup
	defer sending.Wait()
	slots := make(chan struct{}, feedMost)
	tick := time.NewTicker(n.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case slots <- struct{}{}:
			sending.Go(func() {
				defer func() { <-slots }()
				_ = n.send(ctx) // one that fails is one less to analyse
			})
		default:
		}
	}
}

// busy calls f while the node wants all of its CPU, and gives the part that it
// had. The node is to be drained then.
func (n *busyNode) busy(ctx context.Context, f func() error) (had float64, err error) {
	if err := n.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		return 0, fmt.Errorf("go on with the node: %w", err)
	}
	feeding, cancel := context.WithCancel(ctx)
	var fed sync.WaitGroup
	fed.Go(func() { n.feed(feeding) })
	err = n.saturated(ctx, 25)
	if err == nil {
		had, err = n.over(f)
	}
	cancel()
	fed.Wait()
	return had, err
}

// saturated waits until the node wants all of its CPU.
func (n *busyNode) saturated(ctx context.Context, tries int) error {
	for {
		t, took, err := n.during(ctx, 200*time.Millisecond)
		wants := (t.Run + t.Wait).Seconds() / took.Seconds()
		if err != nil || wants >= wanted {
			return err
		}
		if tries--; tries == 0 {
			return fmt.Errorf("%d exchanges each %v do not keep the node busy: it wants %.0f %% of the CPU", batchEvents, n.every, 100*wants)
		}
	}
}

// calibrate finds how often batches have to be sent.
func (n *busyNode) calibrate(ctx context.Context) (err error) {
	for n.every = slowest; n.every >= fastest; n.every /= 2 {
		feeding, cancel := context.WithCancel(ctx)
		var fed sync.WaitGroup
		fed.Go(func() { n.feed(feeding) })
		err = n.saturated(ctx, 5)
		cancel()
		fed.Wait()
		if err == nil {
			n.every /= 2 // for sure
			return nil
		}
	}
	return err
}

// over gives the part of the CPU that the node has during f.
func (n *busyNode) over(f func() error) (float64, error) {
	before, err := proxy.CPUOf(n.pid())
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := f(); err != nil {
		return 0, err
	}
	took := time.Since(start)
	after, err := proxy.CPUOf(n.pid())
	return after.Sub(before).Run.Seconds() / took.Seconds(), err
}

// during is the node's CPU time in a while.
func (n *busyNode) during(ctx context.Context, while time.Duration) (proxy.CPUTime, time.Duration, error) {
	before, err := proxy.CPUOf(n.pid())
	if err != nil {
		return proxy.CPUTime{}, 0, err
	}
	start := time.Now()
	select {
	case <-ctx.Done():
		return proxy.CPUTime{}, 0, ctx.Err()
	case <-time.After(while):
	}
	after, err := proxy.CPUOf(n.pid())
	return after.Sub(before), time.Since(start), err
}

// drain waits until the node has nothing more to analyse, and stops it.
func (n *busyNode) drain(ctx context.Context) error {
	for start := time.Now(); ; {
		left, err := n.queued(ctx)
		if err != nil {
			return err
		}
		if left == 0 {
			return n.cmd.Process.Signal(syscall.SIGSTOP)
		}
		if time.Since(start) > drainFor {
			return fmt.Errorf("the node still has %d exchanges to analyse %v after the end of a burst", left, drainFor)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// queued is how many exchanges wait for analysis.
func (n *busyNode) queued(ctx context.Context) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.admin+"/debug/ingestz", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("ask the node: %w", err)
	}
	defer resp.Body.Close()
	var state struct{ RingExchanges int }
	if err := json.NewDecoder(resp.Body).Decode(&state); err != nil {
		return 0, fmt.Errorf("ask the node: %w", err)
	}
	return state.RingExchanges, nil
}
