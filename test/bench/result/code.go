package result

import (
	"errors"
	"flag"
	"fmt"
	"io"
)

// Code is the exit code of a benchmark of this name that ended with err, and tells the
// error. Who asked for help has had it.
func Code(name string, err error, stderr io.Writer) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	fmt.Fprintf(stderr, "%s: %v\n", name, err)
	return 1
}
