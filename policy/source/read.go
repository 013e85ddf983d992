package source

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/periscope-mesh/periscope/policy"
)

// reading is what was at the path at one moment.
type reading struct {
	fault *policy.Fault // why nothing is known of the path
	files []file        // by name
	dirs  []string      // where a change may happen, symbolic links resolved
	names map[string]bool
}

// file is one policy file. One that cannot be read has a document that says
// so.
type file struct {
	name string
	sum  [sha256.Size]byte
	docs []policy.Document
}

// equal says whether two readings give the same policies and faults.
func (r *reading) equal(other *reading) bool {
	if (r.fault == nil) != (other.fault == nil) || r.fault != nil && *r.fault != *other.fault {
		return false
	}
	return slices.EqualFunc(r.files, other.files, func(a, b file) bool { return a.name == b.name && a.sum == b.sum })
}

// concerns says whether a change of the named file may change the reading.
// Kubernetes swaps "..data", a link in a mounted ConfigMap.
func (r *reading) concerns(name string) bool {
	base := filepath.Base(name)
	return isPolicyFile(base) || strings.HasPrefix(base, "..") || r.names[base]
}

func isPolicyFile(name string) bool {
	ext := filepath.Ext(name)
	return (ext == ".yaml" || ext == ".yml") && !strings.HasPrefix(name, ".")
}

// read reads a file or a directory. Files that are as they were in the last
// reading are not parsed again.
func read(path string, last *reading) *reading {
	r := &reading{names: map[string]bool{}}
	r.watch(path)
	info, err := os.Stat(path)
	switch {
	case err != nil:
		r.refuse(path, reason(err), "create it, or correct the path")
	case info.IsDir():
		r.directory(path, last)
	default:
		f := readFile(path, last)
		if len(f.docs) == 0 {
			r.refuse(path, "holds no policy", "write one; to mirror nothing, set spec.mode to Off")
			break
		}
		r.files = []file{f}
	}
	return r
}

func (r *reading) directory(path string, last *reading) {
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		r.dirs = append(r.dirs, resolved)
	}
	names, err := list(path)
	if err != nil {
		r.refuse(path, reason(err), "make it a readable directory with fewer files")
		return
	}
	policies := 0
	for _, name := range names {
		full := filepath.Join(path, name)
		info, err := os.Lstat(full)
		if err == nil && info.Mode()&fs.ModeSymlink != 0 {
			r.watch(full)
			info, err = os.Stat(full)
		}
		if err == nil && info.IsDir() {
			continue
		}
		f := readFile(full, last)
		r.files = append(r.files, f)
		policies += len(f.docs)
	}
	if policies > maxPolicies {
		r.files = nil
		r.refuse(path, fmt.Sprintf("holds more than %d policies", maxPolicies), "remove some")
	}
}

func (r *reading) refuse(path, problem, remedy string) {
	r.fault = &policy.Fault{File: path, Problem: problem, Remedy: remedy}
}

// watch notes the directories in which path, and what it links to, may be
// exchanged.
func (r *reading) watch(path string) {
	add := func(p string) {
		r.names[filepath.Base(p)] = true
		if dir, err := filepath.EvalSymlinks(filepath.Dir(p)); err == nil && !slices.Contains(r.dirs, dir) {
			r.dirs = append(r.dirs, dir)
		}
	}
	add(path)
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		add(resolved)
	}
}

// list gives the names of a directory's policy files, in order.
func list(path string) ([]string, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var names []string
	for {
		entries, err := dir.ReadDir(maxFiles)
		for _, e := range entries {
			if isPolicyFile(e.Name()) {
				names = append(names, e.Name())
			}
		}
		switch {
		case len(names) > maxFiles:
			return nil, fmt.Errorf("holds more than %d files", maxFiles)
		case errors.Is(err, io.EOF):
			slices.Sort(names)
			return names, nil
		case err != nil:
			return nil, err
		}
	}
}

// readFile reads the policies of a file, unless they were read before.
func readFile(name string, last *reading) file {
	data, err := readRegular(name, policy.MaxFileBytes)
	if err != nil {
		return unreadable(name, reason(err), "make it a readable file")
	}
	if len(bytes.TrimSpace(data)) == 0 { // many programs empty a file before they write it
		return unreadable(name, "is empty", "write a policy, or remove the file")
	}
	f := file{name: name, sum: sha256.Sum256(data)}
	if last != nil {
		i, found := slices.BinarySearchFunc(last.files, name, func(f file, name string) int { return strings.Compare(f.name, name) })
		if found && last.files[i].sum == f.sum {
			return last.files[i]
		}
	}
	f.docs = policy.Parse(name, data)
	return f
}

func unreadable(name, problem, remedy string) file {
	return file{name: name, sum: sha256.Sum256([]byte("unreadable: " + problem)),
		docs: []policy.Document{{Faults: []policy.Fault{{File: name, Problem: problem, Remedy: remedy}}}}}
}

// reason puts a failure in the words of a fault.
func reason(err error) string {
	var pathError *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "does not exist"
	case errors.As(err, &pathError):
		return "cannot be read: " + pathError.Err.Error()
	}
	return err.Error()
}

// readRegular reads a regular file of at most maxBytes and one byte more, by
// which its reader knows that it is larger. Anything else (a pipe, a device)
// is not even opened, or not read if it has just taken a file's place.
func readRegular(name string, maxBytes int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errNotRegular
	}
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errNotRegular
	}
	return io.ReadAll(io.LimitReader(f, maxBytes+1))
}

var errNotRegular = errors.New("is not a regular file")
