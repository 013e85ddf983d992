package xds

import (
	"context"
	"time"

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

// bucket holds tokens for a burst, and is filled at a steady rate.
type bucket struct {
	burst, perSecond float64
	tokens           float64
	filled           time.Time
}

func newBucket(burst, perSecond float64) bucket {
	return bucket{burst: burst, perSecond: perSecond, tokens: burst}
}

// take takes a token, or tells how long it is until there is one.
func (b *bucket) take(now time.Time) (wait time.Duration) {
	if !b.filled.IsZero() {
		b.tokens = min(b.burst, b.tokens+b.perSecond*now.Sub(b.filled).Seconds())
	}
	b.filled = now
	if b.tokens < 1 {
		return max(1, time.Duration((1-b.tokens)/b.perSecond*float64(time.Second)))
	}
	b.tokens--
	return 0
}

// pace waits until the stream's next request is due; false: the stream has
// ended. It is called by the one goroutine that reads the stream.
func (c *connection) pace(ctx context.Context) bool {
	for late := false; ; late = true {
		wait := c.requests.take(time.Now())
		if wait == 0 {
			return true
		}
		if !late {
			c.late()
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false
		}
	}
}

// late accounts for a request that is read late.
func (c *connection) late() {
	s := c.server
	s.metrics.late.Inc()
	if c.flooded {
		return
	}
	c.flooded = true
	s.mu.Lock()
	log := s.floodLogs.take(time.Now()) == 0
	s.mu.Unlock()
	if log {
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
	if err == nil && !p.connection.pace(p.Context()) {
		return nil, p.Context().Err()
	}
	return r, err
}

type deltaStream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer

type pacedDelta struct {
	deltaStream
	connection *connection
}

func (p *pacedDelta) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	r, err := p.deltaStream.Recv()
	if err == nil && !p.connection.pace(p.Context()) {
		return nil, p.Context().Err()
	}
	return r, err
}
