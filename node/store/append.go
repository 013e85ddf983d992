package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

// Registered is an attack that an append touched.
type Registered struct {
	Attack attack.Attack
	New    bool // this append opened it
}

// maxSkew is how far ahead of the store's clock a hit's time may be.
const maxSkew = time.Hour

// sessionCandidates bounds how many attacks of one key a batch can add to.
const sessionCandidates = 8

// statements are prepared once, on the writing connection.
type statements struct {
	known, sessions, insert, update, minute, digests, sample, samples, trim *sql.Stmt
}

func (s *statements) prepare(ctx context.Context, db *sql.DB) error {
	for _, p := range []struct {
		to   **sql.Stmt
		text string
	}{
		{&s.known, `SELECT id FROM hits WHERE id IN (SELECT value FROM json_each(?))`},
		{&s.sessions, `SELECT ` + attackColumns + ` FROM attacks WHERE akey = ? AND last_us >= ? AND first_us <= ? ORDER BY last_us DESC LIMIT ` + strconv.Itoa(sessionCandidates)},
		{&s.insert, `INSERT INTO attacks (` + attackColumns + `, search) VALUES (?` + strings.Repeat(", ?", 22) + `)`},
		{&s.update, `UPDATE attacks SET severity = ?, client = ?, rule_ids = ?, payload = ?, status = ?, first_us = ?, last_us = ?,
			hits = ?, estimated = ?, variance = ?, search = ? WHERE id = ?`},
		{&s.minute, `INSERT INTO attack_minute (attack_id, minute, hits, estimated, variance) VALUES (?, ?, ?, ?, ?)
			ON CONFLICT (attack_id, minute) DO UPDATE SET hits = attack_minute.hits + excluded.hits,
				estimated = attack_minute.estimated + excluded.estimated, variance = attack_minute.variance + excluded.variance`},
		{&s.digests, `SELECT digest FROM hits WHERE attack_id = ? AND ts_us >= ? AND ts_us < ?`},
		{&s.sample, `INSERT INTO hits (id, attack_id, ts_us, digest, record) VALUES (?, ?, ?, ?, ?)`},
		{&s.samples, `SELECT count(*) FROM hits WHERE attack_id = ?`},
		{&s.trim, `DELETE FROM hits WHERE id IN (SELECT id FROM hits WHERE attack_id = ? ORDER BY ts_us, id LIMIT ?)`},
	} {
		stmt, err := db.PrepareContext(ctx, p.text)
		if err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		*p.to = stmt
	}
	return nil
}

func (s *statements) close() error {
	var errs []error
	for _, stmt := range []*sql.Stmt{s.known, s.sessions, s.insert, s.update, s.minute, s.digests, s.sample, s.samples, s.trim} {
		if stmt != nil {
			errs = append(errs, stmt.Close())
		}
	}
	return errors.Join(errs...)
}

// Append adds hits in one transaction: all of them or, with an error, none.
//
// A hit that is at most attack.SessionGap away from an attack with the same
// key belongs to it, otherwise it opens a new one. A hit whose id is among the
// last 65,536 or among the samples is a duplicate and changes nothing. The
// result has an entry for each attack touched.
func (s *Store) Append(ctx context.Context, hits []attack.Hit) ([]Registered, error) {
	if len(hits) == 0 {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	start := time.Now()
	b := &batch{store: s, ids: make([]string, 0, len(hits))}
	if err := b.run(ctx, hits); err != nil {
		return nil, explain(fmt.Errorf("append %d hits: %w", len(hits), err))
	}
	s.metrics.seconds.Observe(time.Since(start).Seconds())
	s.committed(b)
	return b.registered(), nil
}

// committed does what must not happen before the commit.
func (s *Store) committed(b *batch) {
	for _, id := range b.ids {
		s.recent.add(id)
	}
	s.metrics.hits.WithLabelValues("duplicate").Add(float64(b.duplicates))
	s.metrics.hits.WithLabelValues("sampled").Add(float64(b.sampled))
	s.metrics.hits.WithLabelValues("counted").Add(float64(b.counted - b.sampled))
	for _, t := range b.touched {
		if t.isNew {
			s.metrics.registered.Inc()
			s.added++
		}
	}
	if s.added > s.cfg.MaxAttacks/10 {
		s.added = 0
		select {
		case s.crowded <- struct{}{}:
		default: // Run has yet to answer the last one
		}
	}
}

// batch is one append in progress.
type batch struct {
	store                        *Store
	tx                           *sql.Tx
	ids                          []string
	touched                      []*session
	duplicates, counted, sampled int
}

// session is an attack that the batch may add to.
type session struct {
	attack  attack.Attack
	isNew   bool
	hits    []*attack.Hit // of this batch, in order of time
	minutes map[int64]*attack.Count
}

func (b *batch) registered() []Registered {
	list := make([]Registered, len(b.touched))
	for i, t := range b.touched {
		list[i] = Registered{Attack: t.attack, New: t.isNew}
	}
	return list
}

func (b *batch) run(ctx context.Context, hits []attack.Hit) (err error) {
	if b.tx, err = b.store.write.BeginTx(ctx, nil); err != nil {
		return err
	}
	defer b.tx.Rollback() // without effect after the commit
	fresh, err := b.fresh(ctx, hits)
	if err != nil {
		return err
	}
	for _, group := range groupByKey(fresh) {
		sessions, err := b.assign(ctx, group)
		if err != nil {
			return err
		}
		for _, t := range sessions {
			if err := b.write(ctx, t); err != nil {
				return err
			}
			b.touched = append(b.touched, t)
		}
	}
	return b.tx.Commit()
}

// fresh leaves duplicates out and puts the rest in order of time. The hits are
// copies, as their times may have to be put right.
func (b *batch) fresh(ctx context.Context, hits []attack.Hit) ([]*attack.Hit, error) {
	ids := make([]string, len(hits))
	unseen := make(map[string]bool, len(hits))
	for i := range hits {
		if ids[i] = plainID(hits[i].ID); !b.store.recent.has(ids[i]) {
			unseen[ids[i]] = true
		}
	}
	if err := b.dropKnown(ctx, unseen); err != nil {
		return nil, err
	}
	now := b.store.cfg.Now()
	list := make([]*attack.Hit, 0, len(unseen))
	for i := range hits {
		h := hits[i]
		h.ID = ids[i]
		if !unseen[h.ID] {
			b.duplicates++
			continue
		}
		delete(unseen, h.ID) // a second one in this batch is a duplicate too
		b.ids = append(b.ids, h.ID)
		// A clock that is wrong by years must not keep an attack at the top
		// of the list for ever, nor out of retention's reach.
		if h.Time.Year() < 1971 || h.Time.After(now.Add(maxSkew)) {
			h.Time = now
		}
		h.Time = h.Time.UTC().Truncate(time.Microsecond)
		h.Severity = min(max(h.Severity, attack.Notice), attack.Critical)
		list = append(list, &h)
	}
	slices.SortStableFunc(list, func(x, y *attack.Hit) int { return x.Time.Compare(y.Time) })
	return list, nil
}

// plainID is the id if it is short and printable ASCII, else a hash of it. A
// hit without an id, which nobody should make, gets a random one.
func plainID(id string) string {
	if id == "" {
		return "r-" + rand.Text()
	}
	for i := 0; i < len(id); i++ {
		if len(id) > maxIDBytes || id[i] <= ' ' || id[i] > '~' {
			sum := sha256.Sum256([]byte(id))
			return "h-" + hex.EncodeToString(sum[:16])
		}
	}
	return id
}

// dropKnown removes the ids of samples.
func (b *batch) dropKnown(ctx context.Context, ids map[string]bool) error {
	list := make([]string, 0, len(ids))
	for id := range ids {
		list = append(list, id)
	}
	text, err := json.Marshal(list)
	if err != nil {
		return err
	}
	rows, err := b.tx.StmtContext(ctx, b.store.stmts.known).QueryContext(ctx, string(text))
	if err != nil {
		return fmt.Errorf("look for duplicates: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return fmt.Errorf("look for duplicates: %w", err)
		}
		delete(ids, id)
	}
	return rows.Err()
}

type keyed struct {
	key  string
	hits []*attack.Hit
}

func groupByKey(hits []*attack.Hit) []keyed {
	var groups []keyed
	index := make(map[string]int)
	for _, h := range hits {
		key := attack.Key(*h)
		i, ok := index[key]
		if !ok {
			i = len(groups)
			index[key] = i
			groups = append(groups, keyed{key: key})
		}
		groups[i].hits = append(groups[i].hits, h)
	}
	return groups
}

// assign gives each hit of a group to an attack, old or new, and returns the
// attacks that got some.
func (b *batch) assign(ctx context.Context, g keyed) ([]*session, error) {
	gap := attack.SessionGap
	sessions, err := b.sessions(ctx, g.key, g.hits[0].Time.Add(-gap), g.hits[len(g.hits)-1].Time.Add(gap))
	if err != nil {
		return nil, fmt.Errorf("find attacks: %w", err)
	}
	for _, h := range g.hits {
		var home *session
		for _, t := range sessions {
			if !h.Time.Before(t.attack.First.Add(-gap)) && !h.Time.After(t.attack.Last.Add(gap)) &&
				(home == nil || t.attack.Last.After(home.attack.Last)) {
				home = t
			}
		}
		if home == nil {
			home = &session{isNew: true, attack: newAttack(g.key, h), minutes: map[int64]*attack.Count{}}
			sessions = append(sessions, home)
		}
		home.add(h)
		b.counted++
	}
	return slices.DeleteFunc(sessions, func(t *session) bool { return len(t.hits) == 0 }), nil
}

func (b *batch) sessions(ctx context.Context, key string, from, to time.Time) ([]*session, error) {
	rows, err := b.tx.StmtContext(ctx, b.store.stmts.sessions).QueryContext(ctx, key, from.UnixMicro(), to.UnixMicro())
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var list []*session
	for rows.Next() {
		a, err := scanAttack(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, &session{attack: a, minutes: map[int64]*attack.Count{}})
	}
	return list, rows.Err()
}

func newAttack(key string, h *attack.Hit) attack.Attack {
	x := &h.Exchange
	return attack.Attack{
		ID: attack.ID(key, h.Time), Key: key, Type: h.Type,
		Tenant: cut(h.Tenant, maxText), Application: cut(h.Application, maxText),
		Policy: cut(h.Policy, maxText), Gateway: cut(h.Gateway, maxText),
		Method: cut(x.Method, maxText), Host: cut(x.Host, maxText), Path: cut(attack.PathTemplate(x.Path), 2*maxText),
		Location: attack.Location{Place: h.Location.Place, Name: cut(h.Location.Name, maxText)},
		First:    h.Time, Last: h.Time,
	}
}

// add counts a hit in. The newest hit gives the attack's changing facts, and a
// late one only its count, rules and severity.
func (t *session) add(h *attack.Hit) {
	a := &t.attack
	if !h.Time.Before(a.Last) {
		a.Last, a.Client, a.Payload, a.Status = h.Time, cut(h.Client, maxText), payloadOf(h), h.Exchange.Status
	}
	if h.Time.Before(a.First) {
		a.First = h.Time
	}
	a.Severity = max(a.Severity, h.Severity)
	for i := range h.Matches {
		m := &h.Matches[i]
		if at, found := slices.BinarySearch(a.RuleIDs, m.RuleID); !found && !m.Excluded && len(a.RuleIDs) < maxRules {
			a.RuleIDs = slices.Insert(a.RuleIDs, at, m.RuleID)
		}
	}
	weight, minute := weightOf(h), floorDiv(h.Time.Unix(), 60)
	a.Add(weight)
	t.hits = append(t.hits, h)
	if t.minutes[minute] == nil {
		t.minutes[minute] = &attack.Count{}
	}
	t.minutes[minute].Add(weight)
}

// weightOf is at least 1, as a hit stands for itself, and at most what the
// lowest share of one in a million gives, whatever the arithmetic before.
func weightOf(h *attack.Hit) float64 {
	if !(h.Weight > 1) { // true for NaN too
		return 1
	}
	return min(h.Weight, 1e6)
}

func (b *batch) write(ctx context.Context, t *session) error {
	a, st := &t.attack, &b.store.stmts
	rules, err := json.Marshal(append([]int{}, a.RuleIDs...)) // [] rather than null
	if err != nil {
		return err
	}
	search := searchable(strings.Join([]string{a.Host + a.Path, a.Method, a.Location.Name, a.Payload, a.Client, a.Gateway, string(rules)}, "\n"))
	if t.isNew {
		_, err = b.tx.StmtContext(ctx, st.insert).ExecContext(ctx, a.ID, a.Key, string(a.Type), int(a.Severity), a.Tenant, a.Application, a.Policy,
			a.Gateway, a.Client, a.Method, a.Host, a.Path, string(a.Location.Place), a.Location.Name, string(rules), []byte(a.Payload), a.Status,
			a.First.UnixMicro(), a.Last.UnixMicro(), a.Hits, a.Estimated, a.Variance, search)
	} else {
		_, err = b.tx.StmtContext(ctx, st.update).ExecContext(ctx, int(a.Severity), a.Client, string(rules), []byte(a.Payload), a.Status,
			a.First.UnixMicro(), a.Last.UnixMicro(), a.Hits, a.Estimated, a.Variance, search, a.ID)
	}
	if err != nil {
		return fmt.Errorf("write attack: %w", err)
	}
	minute := b.tx.StmtContext(ctx, st.minute)
	for m, n := range t.minutes {
		if _, err := minute.ExecContext(ctx, a.ID, m, n.Hits, n.Estimated, n.Variance); err != nil {
			return fmt.Errorf("write timeline: %w", err)
		}
	}
	if err := b.writeSamples(ctx, t); err != nil {
		return fmt.Errorf("write samples: %w", err)
	}
	return nil
}

// writeSamples keeps the first distinct payloads of each hour.
func (b *batch) writeSamples(ctx context.Context, t *session) error {
	limit, wrote := b.store.cfg.SamplesPerAttack, 0
	insert := b.tx.StmtContext(ctx, b.store.stmts.sample)
	hours := make(map[int64]map[int64]bool) // digests kept, by hour
	for _, h := range t.hits {
		hour := floorDiv(h.Time.Unix(), 3600)
		kept, ok := hours[hour]
		if !ok {
			var err error
			if kept, err = b.digests(ctx, t, hour); err != nil {
				return err
			}
			hours[hour] = kept
		}
		digest := digestOf(h)
		if len(kept) >= limit || kept[digest] {
			continue
		}
		record, err := b.store.encodeSample(h)
		if err != nil {
			return err
		}
		if _, err := insert.ExecContext(ctx, h.ID, t.attack.ID, h.Time.UnixMicro(), digest, record); err != nil {
			return err
		}
		kept[digest] = true
		wrote++
	}
	b.sampled += wrote
	if wrote == 0 || t.isNew {
		return nil
	}
	return b.trim(ctx, t.attack.ID)
}

func (b *batch) digests(ctx context.Context, t *session, hour int64) (map[int64]bool, error) {
	kept := make(map[int64]bool)
	if t.isNew {
		return kept, nil
	}
	const hourMicro = 3600 * 1e6
	rows, err := b.tx.StmtContext(ctx, b.store.stmts.digests).QueryContext(ctx, t.attack.ID, hour*hourMicro, (hour+1)*hourMicro)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var digest int64
		if err := rows.Scan(&digest); err != nil {
			return nil, err
		}
		kept[digest] = true
	}
	return kept, rows.Err()
}

// trim deletes the oldest samples of an attack that lasts for many hours.
func (b *batch) trim(ctx context.Context, id string) error {
	var count int
	if err := b.tx.StmtContext(ctx, b.store.stmts.samples).QueryRowContext(ctx, id).Scan(&count); err != nil {
		return err
	}
	excess := count - 10*b.store.cfg.SamplesPerAttack
	if excess <= 0 {
		return nil
	}
	_, err := b.tx.StmtContext(ctx, b.store.stmts.trim).ExecContext(ctx, id, excess)
	return err
}

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}
