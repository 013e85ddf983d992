package store

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

// Filter, Page and Minute are aliases of unnamed types, so that node/console
// can declare the same ones and use a Reader without importing this package.

// Filter chooses attacks: those that satisfy all fields that are set.
type Filter = struct {
	Types       []attack.Type // any of these
	MinSeverity attack.Severity
	Tenant      string // exact, as are the next four
	Application string
	Gateway     string
	Client      string
	Host        string
	PathPrefix  string // of the path template
	Search      string // part of host, path, payload, client, gateway, location or rule id; any case
	Since       time.Time
	Until       time.Time // active in [Since, Until): a hit not before Since, and one before Until
}

// Page is a piece of a list.
type Page = struct {
	Limit  int    // at most 100; 0 means 50
	Cursor string // of the page before; empty for the first
}

// Minute is the count of hits in one minute.
type Minute = struct {
	Start time.Time
	attack.Count
}

const (
	maxLimit       = 100
	defaultLimit   = 50
	maxSearchBytes = 256
	maxCursorBytes = 160
	maxIDBytes     = 96
)

func limitOf(p Page) int {
	switch {
	case p.Limit <= 0:
		return defaultLimit
	case p.Limit > maxLimit:
		return maxLimit
	}
	return p.Limit
}

// position is a place in a list ordered by time and id.
type position struct {
	us int64
	id string
}

// cursor is the opaque form of a position: base64 of a version, 8 bytes of
// time and the id.
func (p position) cursor() string {
	b := make([]byte, 9, 9+len(p.id))
	b[0] = 1
	binary.BigEndian.PutUint64(b[1:], uint64(p.us))
	return base64.RawURLEncoding.EncodeToString(append(b, p.id...))
}

// parseCursor is the inverse; the empty cursor is no position.
func parseCursor(s string) (p position, ok bool, err error) {
	if s == "" {
		return position{}, false, nil
	}
	if len(s) > maxCursorBytes {
		return position{}, false, fmt.Errorf("%w: longer than %d bytes", ErrCursor, maxCursorBytes)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || len(b) < 10 || len(b) > 9+maxIDBytes || b[0] != 1 {
		return position{}, false, fmt.Errorf("%w: not one of ours", ErrCursor)
	}
	p = position{us: int64(binary.BigEndian.Uint64(b[1:9])), id: string(b[9:])}
	if p.cursor() != s { // base64 skips line breaks
		return position{}, false, fmt.Errorf("%w: not one of ours", ErrCursor)
	}
	return p, true, nil
}

// conditions are the parts of a WHERE clause with their arguments.
type conditions struct {
	parts []string
	args  []any
}

func (c *conditions) add(part string, args ...any) {
	c.parts = append(c.parts, part)
	c.args = append(c.args, args...)
}

func (c *conditions) where() string {
	if len(c.parts) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(c.parts, " AND ")
}

func conditionsOf(f Filter) *conditions {
	c := &conditions{}
	if len(f.Types) > 0 {
		args := make([]any, len(f.Types))
		for i, t := range f.Types {
			args[i] = string(t)
		}
		c.add("type IN (?"+strings.Repeat(", ?", len(args)-1)+")", args...)
	}
	if f.MinSeverity > 0 {
		c.add("severity >= ?", int(f.MinSeverity))
	}
	for _, exact := range []struct{ column, value string }{
		{"tenant", f.Tenant}, {"application", f.Application}, {"gateway", f.Gateway}, {"client", f.Client}, {"host", f.Host},
	} {
		if exact.value != "" {
			c.add(exact.column+" = ?", exact.value)
		}
	}
	if f.PathPrefix != "" {
		c.add("substr(path, 1, length(?)) = ?", f.PathPrefix, f.PathPrefix)
	}
	if word := cut(searchable(f.Search), maxSearchBytes); word != "" {
		c.add(`search LIKE ? ESCAPE '\'`, "%"+strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`).Replace(word)+"%")
	}
	if !f.Since.IsZero() {
		c.add("last_us >= ?", f.Since.UnixMicro())
	}
	if !f.Until.IsZero() {
		c.add("first_us < ?", f.Until.UnixMicro())
	}
	return c
}
