package xds

import (
	"context"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// What one stream may ask: far more than a client needs, which asks once a type
// and acknowledges what comes. Requests beyond are read late. Meanwhile they
// wait in the client, but for a window's bytes, and what is new for it is merged
// into its next answer.
const (
	requestBurst     = 500
	requestPerSecond = 50

	// Of the streams that ask more, so many are logged.
	floodLogBurst     = 20
	floodLogPerSecond = 0.1
)

// pace waits until the stream's next request is due; an error: the stream has
// ended. It is called by the one goroutine that reads the stream.
func (c *connection) pace(ctx context.Context) error {
	if c.requests.Allow() {
		return nil
	}
	c.late()
	return c.requests.Wait(ctx)
}

// late accounts for a request that is read late.
func (c *connection) late() {
	s := c.server
	s.metrics.late.Inc()
	if c.flooded {
		return
	}
	c.flooded = true
	if s.floodLogs.Allow() {
		s.logger.Warn("xds client sends too many requests: they are read late", "address", c.address, "per_second", requestPerSecond)
	}
}

// pacedSotW is a stream whose first request has been looked at.
type pacedSotW struct {
	debugStream
	connection *connection
	first      *discovery.DiscoveryRequest
}

func (p *pacedSotW) Recv() (*discovery.DiscoveryRequest, error) {
	if first := p.first; first != nil {
		p.first = nil
		return first, nil
	}
	r, err := p.debugStream.Recv()
	if err != nil {
		return nil, err
	}
	return r, p.connection.pace(p.Context())
}

type deltaStream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

type pacedDelta struct {
	deltaStream
	connection *connection
}

func (p *pacedDelta) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	r, err := p.deltaStream.Recv()
	if err != nil {
		return nil, err
	}
	return r, p.connection.pace(p.Context())
}
