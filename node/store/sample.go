package store

import (
	"bytes"
	"compress/flate"
	"encoding/gob"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/periscope-mesh/periscope/node/attack"
)

// What a sample keeps at most, whatever policies and gateways say.
const (
	maxSampleBody    = 64 << 10
	maxSampleFields  = 256
	maxSampleHeaders = 64 << 10 // bytes of names and values, per message
	maxSampleMatches = 64
	maxSampleTags    = 32
	maxRecordBytes   = 4 << 20 // decoded
	maxText          = 256     // of a short text, such as a host
	maxPathBytes     = 16 << 10
	maxPayload       = 256
	maxRules         = 100
)

// recordVersion 1 is a gob of attack.Hit, deflated. gob rather than JSON: the
// strings of an exchange are bytes from traffic and must stay as they were.
const recordVersion = 1

func (s *Store) encodeSample(h *attack.Hit) ([]byte, error) {
	var out bytes.Buffer
	out.WriteByte(recordVersion)
	s.packer.Reset(&out)
	if err := gob.NewEncoder(s.packer).Encode(boundHit(h)); err != nil {
		return nil, fmt.Errorf("encode hit: %w", err)
	}
	if err := s.packer.Close(); err != nil {
		return nil, fmt.Errorf("compress hit: %w", err)
	}
	return out.Bytes(), nil
}

func decodeSample(record []byte) (attack.Hit, error) {
	if len(record) == 0 || record[0] != recordVersion {
		return attack.Hit{}, errors.New("decode hit: unknown version of the record; update periscope")
	}
	r := flate.NewReader(bytes.NewReader(record[1:]))
	defer r.Close()
	var h attack.Hit
	if err := gob.NewDecoder(io.LimitReader(r, maxRecordBytes)).Decode(&h); err != nil {
		return attack.Hit{}, fmt.Errorf("decode hit: %w", err)
	}
	h.Time = h.Time.UTC()
	return h, nil
}

// boundHit is a copy of h within the limits above. What was cut is marked.
func boundHit(h *attack.Hit) *attack.Hit {
	b := *h
	x := &b.Exchange
	for _, text := range []*string{&b.Tenant, &b.Application, &b.Policy, &b.PolicyRev, &b.Gateway, &b.Client, &b.Location.Name,
		&x.Method, &x.Scheme, &x.Host, &x.Protocol, &x.TLS, &x.SNI, &x.Route, &x.Peer, &x.Flags, &x.Details} {
		*text = cut(*text, maxText)
	}
	if len(x.Path) > maxPathBytes {
		x.Path, x.Truncated = x.Path[:maxPathBytes], true
	}
	for _, m := range []*attack.Message{&x.Request, &x.Response} {
		if boundMessage(m) {
			x.Truncated = true
		}
	}
	b.Matches = append([]attack.Match(nil), b.Matches[:min(len(b.Matches), maxSampleMatches)]...)
	for i := range b.Matches {
		boundMatch(&b.Matches[i])
	}
	return &b
}

func boundMessage(m *attack.Message) (wasCut bool) {
	m.BodyBytes = max(m.BodyBytes, uint64(len(m.Body)))
	if len(m.Body) > maxSampleBody {
		m.Body, wasCut = m.Body[:maxSampleBody], true
	}
	kept, size := 0, 0
	for kept < len(m.Headers) && kept < maxSampleFields {
		size += len(m.Headers[kept].Name) + len(m.Headers[kept].Value)
		if size > maxSampleHeaders {
			break
		}
		kept++
	}
	if kept < len(m.Headers) {
		m.Headers, wasCut = m.Headers[:kept], true
	}
	return wasCut
}

func boundMatch(m *attack.Match) {
	m.Value = m.Value[:min(len(m.Value), attack.MaxValueBytes)]
	m.End = min(max(m.End, 0), len(m.Value))
	m.Start = min(max(m.Start, 0), m.End)
	m.Message = cut(m.Message, 2*maxText)
	m.Location.Name = cut(m.Location.Name, maxText)
	m.Tags = append([]string(nil), m.Tags[:min(len(m.Tags), maxSampleTags)]...)
	for i := range m.Tags {
		m.Tags[i] = cut(m.Tags[i], maxText)
	}
}

// payloadOf is the matched part of the worst match that counts, at the hit's
// own location if there is one.
func payloadOf(h *attack.Hit) string {
	var best *attack.Match
	rank := func(m *attack.Match) int {
		r := int(m.Severity)
		if m.Location == h.Location {
			r += 10
		}
		if !m.Excluded {
			r += 100
		}
		return r
	}
	for i := range h.Matches {
		if m := &h.Matches[i]; best == nil || rank(m) > rank(best) {
			best = m
		}
	}
	if best == nil {
		return ""
	}
	value := best.Value
	if 0 <= best.Start && best.Start < best.End && best.End <= len(value) {
		value = value[best.Start:best.End]
	}
	return cut(string(value), maxPayload)
}

// digestOf is equal for hits that show an analyst nothing new about the
// attack: the same values matched.
func digestOf(h *attack.Hit) int64 {
	sum := fnv.New64a()
	for i := range h.Matches[:min(len(h.Matches), maxSampleMatches)] {
		m := &h.Matches[i]
		io.WriteString(sum, string(m.Location.Place)+"\x00"+cut(m.Location.Name, maxText)+"\x00")
		sum.Write(m.Value[:min(len(m.Value), attack.MaxValueBytes)])
		sum.Write([]byte{0})
	}
	return int64(sum.Sum64())
}

// searchable is the form in which texts are searched: lower case, valid UTF-8,
// without control characters.
func searchable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || unicode.IsControl(r) {
			return ' '
		}
		return unicode.ToLower(r)
	}, s)
}

// cut is the start of s, at most n bytes, without half a rune at the end.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for i := 0; i < utf8.UTFMax-1 && n > 0 && !utf8.RuneStart(s[n]); i++ {
		n--
	}
	return s[:n]
}
