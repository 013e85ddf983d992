// Package atomicfile replaces files in one step.
//
// It never leaves half of a file: after a crash there is the old content or the
// new. It is for files that one process writes. Any package that keeps state
// may import it; it imports nothing of ours.
package atomicfile

import (
	"errors"
	"os"
	"path/filepath"
)

// Replace writes a file that its owner alone may read. It returns when the
// content is on disk.
func Replace(name string, data []byte) (err error) {
	dir := filepath.Dir(name)
	temp := filepath.Join(dir, "."+filepath.Base(name)+".new")
	_ = os.Remove(temp) // a crash may have left one
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(temp)
		}
	}()
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err = os.Rename(temp, name); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
