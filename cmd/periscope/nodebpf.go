package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/node/sockstat"
)

// newNodeBPF loads what a node without capabilities then reads as a file.
func newNodeBPF(o *options) *cobra.Command {
	var pin string
	cmd := &cobra.Command{
		Use:   "bpf",
		Short: "Load, remove or show the programs that count what waits in a node's sockets",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&pin, "pin", sockstat.DefaultPin, "directory of the pinned programs, in a BPF file system")
	cmd.AddCommand(newNodeBPFLoad(o, &pin), newNodeBPFUnload(o, &pin), newNodeBPFStatus(o, &pin))
	return cmd
}

func newNodeBPFLoad(o *options, pin *string) *cobra.Command {
	var cgroup string
	var ports []uint
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Load the programs and pin them, in place of those loaded before",
		Long: `Load the programs and pin them, in place of those loaded before.

A node reads them without any capability. This command needs CAP_BPF,
CAP_PERFMON and CAP_NET_ADMIN, and ends; the programs stay. Start it before the
node, or in the node's network namespace.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			p := sockstat.Programs{Cgroup: cgroup, Pin: *pin, Version: version}
			for _, port := range ports {
				if port == 0 || port > 65535 {
					return fmt.Errorf("--port: %d is not a port", port)
				}
				p.Ports = append(p.Ports, uint16(port))
			}
			warnings, err := sockstat.Load(p)
			if err != nil {
				return fmt.Errorf("load the programs: %w", err)
			}
			for _, w := range warnings {
				fmt.Fprintf(o.stderr, "warning: %s\n", w)
			}
			return printBPFStatus(o, *pin)
		},
	}
	cmd.Flags().StringVar(&cgroup, "cgroup", "", "directory of the node's control group, of version 2; default: this process's")
	cmd.Flags().UintSliceVar(&ports, "port", []uint{5050}, "ports that the node listens on for mirrored traffic, up to 8")
	return cmd
}

func newNodeBPFUnload(o *options, pin *string) *cobra.Command {
	return &cobra.Command{
		Use:   "unload",
		Short: "Remove the programs; nodes that read them go on without",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := sockstat.Unload(*pin); err != nil {
				return fmt.Errorf("remove the programs: %w", err)
			}
			_, err := fmt.Fprintf(o.stdout, "removed from %s\n", *pin)
			return err
		},
	}
}

func newNodeBPFStatus(o *options, pin *string) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show what is loaded, as far as this user may read it; exit code 1: nothing",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return printBPFStatus(o, *pin) },
	}
}

func printBPFStatus(o *options, pin string) error {
	s, err := sockstat.ReadStatus(pin)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.stdout, "programs in %s\n  version:  %s\n  loaded:   %s\n  cgroup:   %s\n  ports:    %d\n  sockets:  listening %d, accepted %d\n  readable: yes, by uid %d\n",
		pin, s.Version, s.Loaded.Format(time.RFC3339), s.Cgroup, s.Ports, s.Listeners, s.Sockets, os.Getuid())
	return err
}
