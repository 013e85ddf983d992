package store

import (
	"errors"
	"fmt"
	"io/fs"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// Sentinels wrap those of io/fs, so that a consumer can tell them apart
// without importing this package.
var (
	// ErrNotFound is an attack id that is not in the store, perhaps no more.
	ErrNotFound = fmt.Errorf("attack: %w", fs.ErrNotExist)
	// ErrCursor is a cursor that no query of this store returned.
	ErrCursor = fmt.Errorf("cursor: %w", fs.ErrInvalid)
)

const (
	remedyForeign = "choose another path for the store, or move this file away"
	remedyDamaged = "stop periscope, move the file (with its -wal and -shm files) away and start again with an empty store; `sqlite3 FILE .recover` can save its rows"
)

// FileError is a store file that cannot be used, with what to do about it.
type FileError struct {
	Path    string // empty if the error names it already
	Problem string
	Remedy  string
	Err     error // SQLite's own error, if any
}

func (e *FileError) Error() string {
	text := e.Problem
	if e.Path != "" {
		text = "store file " + e.Path + " " + text
	}
	return text + ": " + e.Remedy
}

func (e *FileError) Unwrap() error { return e.Err }

// explain adds the remedy to errors of SQLite that an operator can do
// something about.
func explain(err error) error {
	var file *FileError
	var lite *sqlite.Error
	if err == nil || errors.As(err, &file) || !errors.As(err, &lite) {
		return err
	}
	remedy := ""
	switch lite.Code() & 0xff { // the low byte is the primary code
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		remedy = remedyDamaged
	case sqlite3.SQLITE_FULL:
		remedy = "free space on the store's disk, or lower the store's limits"
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		remedy = "another process holds the store's lock: stop it, or give this one another file"
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
		remedy = "let this user read and write the store's file and its directory"
	case sqlite3.SQLITE_IOERR:
		remedy = "check the store's disk"
	default:
		return err
	}
	return &FileError{Problem: err.Error(), Remedy: remedy, Err: err}
}
