package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/policy/source"
)

func newCheck(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "check FILE|DIRECTORY...",
		Short: "Check MirrorPolicy files; every fault is told with its line and remedy",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, paths []string) error {
			var faults []policy.Fault
			policies := 0
			for _, p := range paths {
				s, err := source.New(source.Config{Path: p, Logger: slog.New(slog.DiscardHandler)})
				if err != nil {
					return err
				}
				set, err := s.Load()
				if err != nil {
					return err
				}
				faults = append(faults, set.Refused()...)
				for _, f := range set.Warnings() {
					fmt.Fprintf(o.stderr, "warning: %v\n", f)
				}
				policies += len(set.Policies)
			}
			if len(faults) > 0 {
				return faultError(faults)
			}
			if policies == 0 {
				return fmt.Errorf("no policy in %s", strings.Join(paths, ", "))
			}
			_, err := fmt.Fprintf(o.stdout, "%d valid\n", policies)
			return err
		},
	}
}

// faultError tells all faults, one a line.
func faultError(faults []policy.Fault) error {
	lines := make([]string, len(faults))
	for i, f := range faults {
		lines[i] = f.Error()
	}
	return errors.New("the policy is refused\n" + strings.Join(lines, "\n"))
}
