package sockstat

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// DefaultPin is where programs are pinned, unless told otherwise.
const DefaultPin = "/sys/fs/bpf/periscope"

// Names of what is pinned.
const (
	pinnedOpened  = "tag_opened"
	pinnedSockets = "sockets"
)

// pinned is the iterator that somebody else pinned, as a plain file.
func pinned(dir string) *iterator {
	return &iterator{backend: Pinned, shut: func() error { return nil },
		open: func() (io.ReadCloser, error) { return os.Open(filepath.Join(dir, pinnedSockets)) }}
}

func openPinned(c Config) (*iterator, error) {
	i := pinned(c.Pin)
	_, f, err := i.readAll()
	if err != nil {
		return nil, explain(c.Pin, err)
	}
	if ports := f.ports(); !slices.Contains(ports, c.Listen.Port()) {
		return nil, fmt.Errorf("what is pinned in %s is for port %s, not %d", c.Pin, join(ports), c.Listen.Port())
	}
	return i, nil
}

// explain tells what to do about a pinned iterator that can't be read.
func explain(dir string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("nothing is loaded in %s (periscope node bpf load)", dir)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; uid %d needs the right to read this file and to enter its directories", err, os.Getuid())
	}
	return fmt.Errorf("read what is pinned in %s: %w", dir, err)
}

func join(ports []uint16) string {
	names := make([]string, len(ports))
	for i, p := range ports {
		names[i] = fmt.Sprint(p)
	}
	return strings.Join(names, ", ")
}
