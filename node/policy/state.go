package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/periscope-mesh/periscope/atomicfile"
)

// loadState reads the state file; nil without error: there is none.
func loadState(file string) (*revision, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxSetBytes+1))
	if err != nil {
		return nil, err
	}
	return decodeSet(raw)
}

// saveState replaces the state file in one step.
func saveState(file string, raw []byte) error {
	if err := atomicfile.Replace(file, raw); err != nil {
		return fmt.Errorf("save policy state: %w", err)
	}
	return nil
}
