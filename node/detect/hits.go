package detect

import (
	"bytes"
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/attack"
	"github.com/periscope-mesh/periscope/node/decode"
)

// Thresholds of CRS's default set-up.
const (
	inboundThreshold  = 5
	outboundThreshold = 4
	maxHitMatches     = 64
	maxClockSkew      = time.Hour // beyond it, a gateway's clock is not believed
	maxSampleString   = 8 << 10   // of a host, path or header value in a sample
)

// place is a location with its score by type.
type place struct {
	location attack.Location
	order    int
	scores   map[attack.Type]int
	total    int
	matches  []match
}

// hits groups matches: by location, then locations by their primary type.
func hits(x *Input, req *decode.Request, resp *decode.Response, matches []match) []attack.Hit {
	byType := map[attack.Type][]*place{}
	for _, p := range places(matches) {
		if p.total > 0 {
			t := primary(p.scores)
			byType[t] = append(byType[t], p)
		}
	}
	var out []attack.Hit
	var sample *attack.Exchange
	for _, t := range attack.Types() {
		score := 0
		for _, p := range byType[t] {
			score += p.total
		}
		threshold := inboundThreshold
		if t == attack.DataLeakage {
			threshold = outboundThreshold
		}
		if score < threshold {
			continue
		}
		if sample == nil {
			sample = exchange(x.Event, req, resp)
		}
		out = append(out, hit(x, t, score, byType[t], sample))
	}
	return out
}

// places collects matches by location. Weak ones count beside others only.
func places(matches []match) []*place {
	byLocation := map[attack.Location]*place{}
	var out []*place
	for _, m := range matches {
		p := byLocation[m.Location]
		if p == nil {
			p = &place{location: m.Location, order: m.order, scores: map[attack.Type]int{}}
			byLocation[m.Location] = p
			out = append(out, p)
		}
		p.order = min(p.order, m.order)
		if slices.ContainsFunc(p.matches, func(o match) bool { return o.RuleID == m.RuleID }) {
			continue
		}
		p.matches = append(p.matches, m)
	}
	for _, p := range out {
		strong := slices.ContainsFunc(p.matches, func(m match) bool { return !m.weak && !m.Excluded })
		for _, m := range p.matches {
			if m.Excluded || m.weak && !strong {
				continue
			}
			p.scores[m.Type] += m.Severity.Score()
			p.total += m.Severity.Score()
		}
	}
	return out
}

// primary is the type with the highest score; ties go by attack.Types.
func primary(scores map[attack.Type]int) attack.Type {
	best, top := attack.Other, 0
	for _, t := range attack.Types() {
		if scores[t] > top {
			best, top = t, scores[t]
		}
	}
	return best
}

func hit(x *Input, t attack.Type, score int, where []*place, sample *attack.Exchange) attack.Hit {
	slices.SortStableFunc(where, func(a, b *place) int {
		return cmp.Or(cmp.Compare(b.total, a.total), cmp.Compare(a.order, b.order))
	})
	h := attack.Hit{
		ID:   x.VM + "-" + strconv.FormatUint(x.Event.N, 10) + "-" + string(t),
		Time: when(x), Type: t, Score: score,
		Tenant: x.Policy.Tenant, Application: x.Policy.Application, Policy: x.Policy.ID, PolicyRev: x.Policy.Rev,
		Gateway: x.Gateway, Client: client(x.Event), Location: where[0].location, Weight: 1, Exchange: *sample,
	}
	if ppm := x.Event.SharePPM; ppm > 0 && ppm < 1_000_000 {
		h.Weight = 1_000_000 / float64(ppm)
	}
	for _, p := range where {
		// What counts goes first, then the location's own type.
		slices.SortStableFunc(p.matches, func(a, b match) int {
			return cmp.Or(
				compareBool(a.Excluded, b.Excluded), compareBool(a.weak, b.weak), compareBool(b.Type == t, a.Type == t),
				cmp.Compare(b.Severity, a.Severity), cmp.Compare(a.RuleID, b.RuleID))
		})
		for _, m := range p.matches {
			if !m.Excluded {
				h.Severity = max(h.Severity, m.Severity)
			}
			if len(h.Matches) < maxHitMatches {
				h.Matches = append(h.Matches, m.Match)
			}
		}
	}
	return h
}

// compareBool orders false before true.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// when is the exchange's start by the gateway's clock, if that is credible.
func when(x *Input) time.Time {
	at := time.UnixMicro(int64(min(x.Event.StartUS, 1<<62)))
	if x.Received.IsZero() {
		return at.UTC()
	}
	if d := x.Received.Sub(at); d > maxClockSkew || d < -maxClockSkew {
		return x.Received.UTC()
	}
	return at.UTC()
}

func client(e *event.Event) string {
	host, _ := clientOf(e.Source)
	return strings.Clone(printable(host[:min(len(host), 64)]))
}

// exchange copies what a hit keeps of its exchange.
func exchange(e *event.Event, req *decode.Request, resp *decode.Response) *attack.Exchange {
	const incomplete = event.FlagRequestCut | event.FlagResponseCut | event.FlagHeadersCut | event.FlagFieldsDropped |
		event.FlagRequestOpen
	x := &attack.Exchange{
		Method: short(req.Method), Scheme: short(req.Scheme), Host: short(req.Authority), Path: short(req.Target),
		Protocol: short(e.Protocol), TLS: short(e.TLS), SNI: short(e.SNI), Route: short(e.Route), Peer: short(e.Peer),
		Duration: time.Duration(min(e.EndUS, uint64((24*time.Hour).Microseconds()))) * time.Microsecond,
		Flags:    short(e.ResponseFlags), Details: short(e.ResponseDetails),
		Request: attack.Message{Headers: headers(req.Headers), Body: bytes.Clone(e.Request.Body), BodyBytes: e.Request.BodyBytes},
	}
	x.Truncated = e.Flags&incomplete != 0 || len(req.Target) > maxSampleString
	for _, h := range req.Headers {
		if x.Host == "" && h.Name == "host" {
			x.Host = short(h.Value)
		}
		x.Truncated = x.Truncated || len(h.Value) > maxSampleString
	}
	if resp != nil {
		x.Status, _ = strconv.Atoi(resp.Status)
		x.Response = attack.Message{
			Headers: headers(resp.Headers), Body: bytes.Clone(e.Response.Body), BodyBytes: e.Response.BodyBytes,
		}
	}
	return x
}

func headers(in []decode.Field) []attack.Field {
	out := make([]attack.Field, 0, len(in))
	for _, h := range in {
		out = append(out, attack.Field{Name: short(h.Name), Value: short(h.Value)})
	}
	return out
}

// short bounds and copies a string from traffic: strings of an event share
// the memory of its whole batch.
func short(s string) string {
	return strings.Clone(printable(s[:min(len(s), maxSampleString)]))
}
