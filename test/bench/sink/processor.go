package sink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"

	extproc "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
)

// Processor is an external processor that does nothing: it takes what Envoy's
// ext_proc filter sends in observability mode, and never answers.
type Processor struct {
	extproc.UnimplementedExternalProcessorServer

	ln     net.Listener
	copies atomic.Uint64
	open   atomic.Int64
}

// ListenProcessor makes one on a free port.
func ListenProcessor() (*Processor, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the processor: %w", err)
	}
	return &Processor{ln: ln}, nil
}

// Port is where it listens.
func (p *Processor) Port() int { return p.ln.Addr().(*net.TCPAddr).Port }

// Copies is the number of exchanges seen to the end of their response.
func (p *Processor) Copies() uint64 { return p.copies.Load() }

// Expected tells nothing of its own: every exchange is meant for it.
func (p *Processor) Expected() (uint64, bool) { return 0, false }

// Open is the number of streams that have not ended.
func (p *Processor) Open() int64 { return p.open.Load() }

// Run serves until ctx ends.
func (p *Processor) Run(ctx context.Context) error {
	srv := grpc.NewServer()
	extproc.RegisterExternalProcessorServer(srv, p)
	stop := context.AfterFunc(ctx, srv.Stop)
	defer stop()
	if err := srv.Serve(p.ln); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve the processor: %w", err)
	}
	return nil
}

// Process takes one exchange.
func (p *Processor) Process(stream extproc.ExternalProcessor_ProcessServer) error {
	p.open.Add(1)
	defer p.open.Add(-1)
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if m.GetResponseHeaders().GetEndOfStream() || m.GetResponseBody().GetEndOfStream() {
			p.copies.Add(1)
		}
	}
}
