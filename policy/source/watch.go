package source

import (
	"fmt"
	"slices"

	"github.com/fsnotify/fsnotify"
)

// watch tells of changes in directories. A nil one never does.
type watch struct{ fs *fsnotify.Watcher }

func newWatch() (*watch, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	return &watch{w}, nil
}

// follow makes dirs those that are watched. The kernel drops a directory that
// is removed or moved, so another one in its place is watched anew.
func (w *watch) follow(dirs []string) error {
	if w == nil {
		return nil
	}
	watched := w.fs.WatchList()
	for _, dir := range watched {
		if !slices.Contains(dirs, dir) {
			// It may have gone meanwhile.
			_ = w.fs.Remove(dir)
		}
	}
	for _, dir := range dirs {
		if !slices.Contains(watched, dir) {
			if err := w.fs.Add(dir); err != nil {
				return fmt.Errorf("%s: %w", dir, err)
			}
		}
	}
	return nil
}

func (w *watch) events() <-chan fsnotify.Event {
	if w == nil {
		return nil
	}
	return w.fs.Events
}

func (w *watch) errors() <-chan error {
	if w == nil {
		return nil
	}
	return w.fs.Errors
}

func (w *watch) close() {
	if w != nil {
		_ = w.fs.Close()
	}
}
