package store

import (
	"context"
	"fmt"
	"time"
)

// maxGateways bounds the table: the builds heard of least recently go first.
const maxGateways = 10_000

// Gateway is what was heard from a gateway by one build of the plugin. An
// alias, as in query.go.
type Gateway = struct {
	Gateway string
	Plugin  string // the build's "version+digest", in the gateway's own words
	First   time.Time
	Last    time.Time
	Seen    int64 // exchanges
	Errors  int64 // of the plugin
}

// maxCount is where counts stay: gateways write them, and SQLite would make
// what overflows a floating-point number.
const maxCount = 1 << 53

func clamp(n int64) int64 { return max(0, min(n, maxCount)) }

// AddGateways adds to what was heard: Seen and Errors are what is new, First
// is not looked at.
func (s *Store) AddGateways(ctx context.Context, list []Gateway) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return explain(fmt.Errorf("write gateways: %w", err))
	}
	defer tx.Rollback() //nolint:errcheck // after Commit there is nothing left
	for _, g := range list {
		_, err := tx.ExecContext(ctx, `INSERT INTO gateways (gateway, plugin, first_us, last_us, seen, errors) VALUES (?1, ?2, ?3, ?3, ?4, ?5)
			ON CONFLICT DO UPDATE SET last_us = max(last_us, ?3), seen = min(seen + ?4, ?6), errors = min(errors + ?5, ?6)`,
			g.Gateway, g.Plugin, g.Last.UnixMicro(), clamp(g.Seen), clamp(g.Errors), maxCount)
		if err != nil {
			return explain(fmt.Errorf("write gateways: %w", err))
		}
	}
	if err := tx.Commit(); err != nil {
		return explain(fmt.Errorf("write gateways: %w", err))
	}
	return nil
}

// forgetGateways deletes what was not heard of since oldest, and what is too
// much.
func (s *Store) forgetGateways(ctx context.Context, oldest time.Time) error {
	_, err := s.write.ExecContext(ctx, `DELETE FROM gateways WHERE last_us < ? OR (gateway, plugin) IN
		(SELECT gateway, plugin FROM gateways ORDER BY last_us DESC LIMIT -1 OFFSET ?)`, oldest.UnixMicro(), maxGateways)
	return err
}

// Gateways lists what was heard, the gateway's newest build first, at most
// 1,000.
func (r *Reader) Gateways(ctx context.Context) ([]Gateway, error) {
	rows, err := r.db.QueryContext(ctx, `SELECT gateway, plugin, first_us, last_us, seen, errors FROM gateways
		ORDER BY gateway, last_us DESC, plugin LIMIT 1000`)
	if err != nil {
		return nil, explain(fmt.Errorf("list gateways: %w", err))
	}
	defer rows.Close()
	list := []Gateway{}
	for rows.Next() {
		var g Gateway
		var first, last int64
		if err := rows.Scan(&g.Gateway, &g.Plugin, &first, &last, &g.Seen, &g.Errors); err != nil {
			return nil, explain(fmt.Errorf("list gateways: %w", err))
		}
		g.First, g.Last = fromMicro(first), fromMicro(last)
		list = append(list, g)
	}
	if err := rows.Err(); err != nil {
		return nil, explain(fmt.Errorf("list gateways: %w", err))
	}
	return list, nil
}
