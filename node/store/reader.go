package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

// Reader answers queries. Its methods can be called by several goroutines.
type Reader struct{ db *sql.DB }

// Stats are sizes of the store.
type Stats struct {
	Attacks int64
	Hits    int64     // seen by nodes, of the attacks that are still there
	Samples int64     // hits kept whole
	Bytes   int64     // in use in the file
	Oldest  time.Time // last hit of the attack that retention takes next; zero if there is none
}

// OpenReader opens an existing file for reading alone, while another process
// may be writing it.
func OpenReader(ctx context.Context, path string) (*Reader, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	version, err := probe(ctx, path)
	if err != nil {
		return nil, err
	}
	db, err := connect(path, readers, "mode=ro&_query_only=1")
	if err != nil {
		return nil, err
	}
	latest, err := latestVersion(db)
	if err == nil && version < latest {
		err = &FileError{Path: path, Problem: fmt.Sprintf("has schema %d, this periscope needs %d", version, latest),
			Remedy: "start the process that writes it once: it brings the file up to date"}
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &Reader{db: db}, nil
}

// Close closes the connections.
func (r *Reader) Close() error { return r.db.Close() }

// attackColumns in the order of scanAttack.
const attackColumns = `id, akey, type, severity, tenant, application, policy, gateway, client, method, host, path,
	place, name, rule_ids, payload, status, first_us, last_us, hits, estimated, variance`

func scanAttack(row interface{ Scan(...any) error }) (attack.Attack, error) {
	var a attack.Attack
	var rules string
	var payload []byte
	var first, last int64
	err := row.Scan(&a.ID, &a.Key, &a.Type, &a.Severity, &a.Tenant, &a.Application, &a.Policy, &a.Gateway, &a.Client,
		&a.Method, &a.Host, &a.Path, &a.Location.Place, &a.Location.Name, &rules, &payload, &a.Status, &first, &last, &a.Hits, &a.Estimated, &a.Variance)
	if err != nil {
		return attack.Attack{}, err
	}
	a.Payload, a.First, a.Last = string(payload), fromMicro(first), fromMicro(last)
	if err := json.Unmarshal([]byte(rules), &a.RuleIDs); err != nil {
		return attack.Attack{}, fmt.Errorf("rule ids of attack %s: %w", a.ID, err)
	}
	return a, nil
}

// Attacks lists the attacks that f chooses, newest last hit first. next is the
// cursor of the page after, empty if there is none.
func (r *Reader) Attacks(ctx context.Context, f Filter, p Page) (list []attack.Attack, next string, err error) {
	after, ok, err := parseCursor(p.Cursor)
	if err != nil {
		return nil, "", err
	}
	where, limit := conditionsOf(f), limitOf(p)
	if ok {
		where.add("(last_us, id) < (?, ?)", after.us, after.id)
	}
	rows, err := r.db.QueryContext(ctx, "SELECT "+attackColumns+" FROM attacks"+where.where()+
		" ORDER BY last_us DESC, id DESC LIMIT ?", append(where.args, limit+1)...)
	if err != nil {
		return nil, "", explain(fmt.Errorf("list attacks: %w", err))
	}
	defer rows.Close()
	list = make([]attack.Attack, 0, limit)
	for rows.Next() {
		a, err := scanAttack(rows)
		if err != nil {
			return nil, "", explain(fmt.Errorf("list attacks: %w", err))
		}
		if len(list) == limit {
			last := list[limit-1]
			return list, position{last.Last.UnixMicro(), last.ID}.cursor(), nil
		}
		list = append(list, a)
	}
	if err := rows.Err(); err != nil {
		return nil, "", explain(fmt.Errorf("list attacks: %w", err))
	}
	return list, "", nil
}

// Attack returns one attack, or ErrNotFound.
func (r *Reader) Attack(ctx context.Context, id string) (attack.Attack, error) {
	a, err := scanAttack(r.db.QueryRowContext(ctx, "SELECT "+attackColumns+" FROM attacks WHERE id = ?", id))
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return attack.Attack{}, ErrNotFound
	case err != nil:
		return attack.Attack{}, explain(fmt.Errorf("read attack: %w", err))
	}
	return a, nil
}

// Hits lists the samples kept of an attack, newest first; next is as in
// Attacks.
func (r *Reader) Hits(ctx context.Context, attackID string, p Page) (list []attack.Hit, next string, err error) {
	after, ok, err := parseCursor(p.Cursor)
	if err != nil {
		return nil, "", err
	}
	limit := limitOf(p)
	where := &conditions{}
	where.add("attack_id = ?", attackID)
	if ok {
		where.add("(ts_us, id) < (?, ?)", after.us, after.id)
	}
	rows, err := r.db.QueryContext(ctx, "SELECT id, ts_us, record FROM hits"+where.where()+
		" ORDER BY ts_us DESC, id DESC LIMIT ?", append(where.args, limit+1)...)
	if err != nil {
		return nil, "", explain(fmt.Errorf("list hits: %w", err))
	}
	defer rows.Close()
	list = make([]attack.Hit, 0, min(limit, 16))
	var last position
	for rows.Next() {
		var at position
		var record sql.RawBytes
		if err := rows.Scan(&at.id, &at.us, &record); err != nil {
			return nil, "", explain(fmt.Errorf("list hits: %w", err))
		}
		if len(list) == limit {
			return list, last.cursor(), nil
		}
		h, err := decodeSample(record)
		if err != nil {
			return nil, "", fmt.Errorf("hit %s: %w", at.id, err)
		}
		list, last = append(list, h), at
	}
	if err := rows.Err(); err != nil {
		return nil, "", explain(fmt.Errorf("list hits: %w", err))
	}
	return list, "", nil
}

// maxTimeline bounds a timeline: a week.
const maxTimeline = 7 * 24 * 60

// Timeline counts an attack's hits by minute, oldest first, minutes without
// hits left out, the newest ones if there are more than a week's.
func (r *Reader) Timeline(ctx context.Context, attackID string) ([]Minute, error) {
	rows, err := r.db.QueryContext(ctx,
		"SELECT minute, hits, estimated, variance FROM attack_minute WHERE attack_id = ? ORDER BY minute DESC LIMIT ?", attackID, maxTimeline)
	if err != nil {
		return nil, explain(fmt.Errorf("read timeline: %w", err))
	}
	defer rows.Close()
	var list []Minute
	for rows.Next() {
		var minute int64
		var m Minute
		if err := rows.Scan(&minute, &m.Hits, &m.Estimated, &m.Variance); err != nil {
			return nil, explain(fmt.Errorf("read timeline: %w", err))
		}
		m.Start = time.Unix(minute*60, 0).UTC()
		list = append(list, m)
	}
	if err := rows.Err(); err != nil {
		return nil, explain(fmt.Errorf("read timeline: %w", err))
	}
	slices.Reverse(list)
	return list, nil
}

// Stats reads the store's sizes. It looks at every attack: not for each
// request.
func (r *Reader) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	var oldest int64
	err := r.db.QueryRowContext(ctx, `SELECT count(*), coalesce(sum(hits), 0), coalesce(min(last_us), 0),
		(SELECT count(*) FROM hits) FROM attacks`).Scan(&s.Attacks, &s.Hits, &oldest, &s.Samples)
	if err == nil {
		s.Bytes, err = bytesInUse(ctx, r.db)
	}
	if err != nil {
		return Stats{}, explain(fmt.Errorf("read statistics: %w", err))
	}
	if s.Attacks > 0 {
		s.Oldest = fromMicro(oldest)
	}
	return s, nil
}

func bytesInUse(ctx context.Context, db *sql.DB) (int64, error) {
	var used int64
	err := db.QueryRowContext(ctx, `SELECT (page_count - freelist_count) * page_size
		FROM pragma_page_count, pragma_freelist_count, pragma_page_size`).Scan(&used)
	return used, err
}

func fromMicro(us int64) time.Time { return time.UnixMicro(us).UTC() }
