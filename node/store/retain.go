package store

import (
	"context"
	"fmt"
	"time"
)

const (
	retainEvery  = time.Minute
	deleteAtOnce = 200  // attacks per transaction: an append never waits long behind one
	vacuumPages  = 2000 // pages given back to the file system per round
)

// Run deletes what Config's limits say, in small transactions, until ctx ends.
// Errors are logged and tried again a minute later: a store that cannot delete
// still takes hits.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(retainEvery)
	defer tick.Stop()
	failing := false
	for {
		err := s.retain(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			s.log.Error("retention stopped", "error", err)
		case err == nil && failing:
			s.log.Info("retention resumed")
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-s.crowded:
		}
	}
}

// retain enforces the limits once.
func (s *Store) retain(ctx context.Context) error {
	oldest := s.cfg.Now().Add(-s.cfg.Retention)
	if err := s.deleteOld(ctx, oldest); err != nil {
		return explain(fmt.Errorf("delete old attacks: %w", err))
	}
	if err := s.forgetGateways(ctx, oldest); err != nil {
		return explain(fmt.Errorf("forget gateways: %w", err))
	}
	if err := s.deleteExcess(ctx); err != nil {
		return explain(fmt.Errorf("delete excess attacks: %w", err))
	}
	if err := s.deleteToFit(ctx); err != nil {
		return explain(fmt.Errorf("shrink store: %w", err))
	}
	if _, err := s.write.ExecContext(ctx, fmt.Sprintf("PRAGMA incremental_vacuum(%d)", vacuumPages)); err != nil {
		return explain(fmt.Errorf("give pages back: %w", err))
	}
	return nil
}

// deleteOld deletes attacks that ended before oldest, and of those that go on
// the samples and minutes before it.
func (s *Store) deleteOld(ctx context.Context, oldest time.Time) error {
	us := oldest.UnixMicro()
	for {
		n, err := s.delete(ctx, "age", `DELETE FROM attacks WHERE id IN
			(SELECT id FROM attacks WHERE last_us < ? ORDER BY last_us LIMIT ?)`, us, deleteAtOnce)
		if err != nil {
			return err
		}
		if n < deleteAtOnce {
			break
		}
	}
	for _, text := range []string{
		`DELETE FROM hits WHERE id IN (SELECT id FROM hits WHERE ts_us < ? ORDER BY ts_us LIMIT ?)`,
		`DELETE FROM attack_minute WHERE (attack_id, minute) IN (SELECT attack_id, minute FROM attack_minute WHERE minute < ? / 60000000 LIMIT ?)`,
	} {
		const rows = 10 * deleteAtOnce
		for {
			result, err := s.write.ExecContext(ctx, text, us, rows)
			if err != nil {
				return err
			}
			if n, err := result.RowsAffected(); err != nil || n < rows {
				if err != nil {
					return err
				}
				break
			}
		}
	}
	return nil
}

func (s *Store) deleteExcess(ctx context.Context) error {
	var count int
	if err := s.db.QueryRowContext(ctx, "SELECT count(*) FROM attacks").Scan(&count); err != nil {
		return err
	}
	for excess := count - s.cfg.MaxAttacks; excess > 0; excess -= deleteAtOnce {
		if _, err := s.deleteOldest(ctx, "count", min(excess, deleteAtOnce)); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) deleteToFit(ctx context.Context) error {
	for {
		used, err := bytesInUse(ctx, s.db)
		if err != nil || used <= s.cfg.MaxBytes {
			return err
		}
		n, err := s.deleteOldest(ctx, "size", deleteAtOnce)
		if err != nil || n == 0 {
			return err
		}
	}
}

func (s *Store) deleteOldest(ctx context.Context, reason string, n int) (int64, error) {
	return s.delete(ctx, reason, `DELETE FROM attacks WHERE id IN (SELECT id FROM attacks ORDER BY last_us, id LIMIT ?)`, n)
}

// delete deletes attacks; their hits and minutes go with them.
func (s *Store) delete(ctx context.Context, reason, text string, args ...any) (int64, error) {
	result, err := s.write.ExecContext(ctx, text, args...)
	if err != nil {
		return 0, err
	}
	n, err := result.RowsAffected()
	s.metrics.deleted.WithLabelValues(reason).Add(float64(n))
	return n, err
}
