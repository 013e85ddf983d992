// Package store keeps attacks and samples of their hits in one SQLite file:
// it groups hits into attacks as they are appended, answers the console's
// queries, and deletes what is too old or too much.
//
// It never keeps more than a stated number of samples per attack and hour (the
// rest is only counted), never logs payloads, and never changes a file that it
// did not make.
//
// Only cmd/periscope imports it: the console declares its own interface, whose
// types are the aliases in query.go.
package store

import (
	"compress/flate"
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/pressly/goose/v3"
	"github.com/prometheus/client_golang/prometheus"
	"modernc.org/sqlite"
)

//go:embed migrations/*.sql
var migrations embed.FS

// applicationID marks our files in SQLite's header ("PsCp").
const applicationID = 0x50734370

const (
	busyTimeout    = 5 * time.Second // waiting for another process's lock
	readers        = 4               // connections of the read pool
	recentIDs      = 1 << 16         // hit ids remembered against duplicates: 1 MiB or so
	sqliteHeader   = "SQLite format 3\x00"
	journalMaximum = 64 << 20 // the WAL file shrinks to this after a checkpoint
)

// Config is what Open needs. Zero limits mean the defaults named here.
type Config struct {
	Path             string                // the file; missing directories are made
	Logger           *slog.Logger          // required
	Registerer       prometheus.Registerer // required
	Now              func() time.Time      // default time.Now
	Retention        time.Duration         // attacks whose last hit is older are deleted; default 30 days
	MaxAttacks       int                   // the oldest beyond it are deleted; default 100,000
	MaxBytes         int64                 // pages in use beyond it cost the oldest attacks; default 4 GiB
	SamplesPerAttack int                   // distinct payloads kept per attack and hour; default 20; ten times that per attack in all
}

func (c *Config) setDefaults() error {
	switch {
	case c.Path == "":
		return errors.New("store: no path")
	case c.Logger == nil || c.Registerer == nil:
		return errors.New("store: logger and registerer are required")
	case c.Retention < 0 || c.MaxAttacks < 0 || c.MaxBytes < 0 || c.SamplesPerAttack < 0:
		return errors.New("store: negative limit")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Retention == 0 {
		c.Retention = 30 * 24 * time.Hour
	}
	if c.MaxAttacks == 0 {
		c.MaxAttacks = 100_000
	}
	if c.MaxBytes == 0 {
		c.MaxBytes = 4 << 30
	}
	if c.SamplesPerAttack == 0 {
		c.SamplesPerAttack = 20
	}
	return nil
}

// Store is an open file with one writing connection and a pool of readers.
// Its methods can be called by several goroutines, and other processes may
// read or write the same file.
type Store struct {
	*Reader
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	write   *sql.DB
	crowded chan struct{} // tells Run that many attacks were added

	mu     sync.Mutex // guards the fields below, and orders writers
	stmts  statements
	recent *recentSet
	packer *flate.Writer
	added  int // attacks since crowded was last signalled
}

// Open opens or makes the file at cfg.Path, readable by its owner alone, and
// brings its tables up to date. A file that is damaged, newer, or not ours is
// an error that says what to do, and stays as it is.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := makeFile(path); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if _, err := probe(ctx, path); err != nil {
		return nil, err
	}
	write, err := connect(path, 1, "_txlock=immediate&_journal_mode=WAL&_synchronous=NORMAL&_auto_vacuum=INCREMENTAL&_foreign_keys=1"+
		fmt.Sprintf("&_pragma=journal_size_limit(%d)", journalMaximum))
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg: cfg, log: cfg.Logger.With("component", "store"), write: write,
		crowded: make(chan struct{}, 1), recent: newRecentSet(recentIDs),
	}
	if err := s.prepare(ctx, path); err != nil {
		return nil, errors.Join(explain(fmt.Errorf("open store %s: %w", path, err)), s.Close())
	}
	return s, nil
}

func (s *Store) prepare(ctx context.Context, path string) error {
	if err := migrate(ctx, s.write); err != nil {
		return err
	}
	if err := s.stmts.prepare(ctx, s.write); err != nil {
		return err
	}
	read, err := connect(path, readers, "mode=ro&_query_only=1")
	if err != nil {
		return err
	}
	s.Reader = &Reader{db: read}
	if s.packer, err = flate.NewWriter(io.Discard, flate.BestSpeed); err != nil {
		return err
	}
	s.metrics, err = newMetrics(s.cfg.Registerer)
	return err
}

// Close closes the file. Run and Append must have returned.
func (s *Store) Close() error {
	var errs []error
	if s.Reader != nil {
		errs = append(errs, s.Reader.Close())
	}
	errs = append(errs, s.stmts.close(), s.write.Close())
	return errors.Join(errs...)
}

// migrate brings the tables up to date.
func migrate(ctx context.Context, db *sql.DB) error {
	// Marked before any table exists, so that a crash in between leaves a
	// file that we recognise.
	if _, err := db.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID)); err != nil {
		return fmt.Errorf("mark the file: %w", err)
	}
	provider, err := newProvider(db)
	if err != nil {
		return err
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

func newProvider(db *sql.DB) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, files,
		goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	return provider, nil
}

// latestVersion is the schema version of this build.
func latestVersion(db *sql.DB) (int64, error) {
	provider, err := newProvider(db)
	if err != nil {
		return 0, err
	}
	sources := provider.ListSources()
	return sources[len(sources)-1].Version, nil
}

// makeFile makes the file and its directories if they are missing, and takes
// the file away from other users. SQLite gives its side files the same mode.
func makeFile(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return f.Chmod(0o600)
	}
	return nil
}

// probe looks at a file without changing it and returns its schema version, 0
// for an empty one.
func probe(ctx context.Context, path string) (version int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("open store: %w", err)
	}
	head := make([]byte, len(sqliteHeader))
	n, err := io.ReadFull(f, head)
	f.Close()
	switch {
	case n == 0 && errors.Is(err, io.EOF):
		return 0, nil
	case string(head[:n]) != sqliteHeader:
		return 0, &FileError{Path: path, Problem: "is not a SQLite file", Remedy: remedyForeign}
	}
	db, err := connect(path, 1, "mode=ro&_query_only=1")
	if err != nil {
		return 0, err
	}
	defer db.Close()
	if version, err = inspect(ctx, db, path); err != nil {
		return 0, explain(fmt.Errorf("open store %s: %w", path, err))
	}
	return version, nil
}

func inspect(ctx context.Context, db *sql.DB, path string) (version int64, err error) {
	var id int64
	var tables, versions int
	err = db.QueryRowContext(ctx, `SELECT (SELECT application_id FROM pragma_application_id), count(*),
		count(*) FILTER (WHERE name = 'goose_db_version') FROM sqlite_schema`).Scan(&id, &tables, &versions)
	switch {
	case err != nil:
		return 0, err
	case id != applicationID && (id != 0 || tables > 0):
		return 0, &FileError{Path: path, Problem: "is another program's SQLite file", Remedy: remedyForeign}
	case versions == 0:
		return 0, nil
	}
	if err := db.QueryRowContext(ctx, `SELECT coalesce(max(version_id), 0) FROM goose_db_version WHERE is_applied`).Scan(&version); err != nil {
		return 0, err
	}
	latest, err := latestVersion(db)
	if err != nil {
		return 0, err
	}
	if version > latest {
		return 0, &FileError{Path: path, Problem: fmt.Sprintf("was made by a newer periscope (schema %d, this one knows %d)", version, latest),
			Remedy: "update periscope, or start with another file"}
	}
	return version, nil
}

// connect opens a pool on an existing file. Only SQLite's own parameters and
// constants go into params.
func connect(path string, conns int, params string) (*sql.DB, error) {
	u := url.URL{Scheme: "file", Path: path}
	dsn := fmt.Sprintf("%s?_busy_timeout=%d&_defensive=1&_error_rc=1&%s", u.String(), busyTimeout.Milliseconds(), params)
	c, err := sqlite.NewConnector(dsn)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}
