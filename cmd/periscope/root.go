package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

// env is what a command may know of the process around it.
type env struct {
	stdout, stderr io.Writer
	getenv         func(string) string
}

// options are the flags that every command has.
type options struct {
	env
	logLevel  string
	logFormat string
}

// run executes a command line. Exit codes: 0 done, 1 a fault that the message
// explains.
func run(ctx context.Context, args []string, e env) int {
	root := newRoot(e)
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(e.stderr, "periscope: %v\n", err)
		return 1
	}
	return 0
}

func newRoot(e env) *cobra.Command {
	o := &options{env: e}
	root := &cobra.Command{
		Use:           "periscope",
		Short:         "Finds attacks on APIs behind Envoy and Istio gateways, without standing in the traffic's way",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	root.PersistentFlags().StringVar(&o.logLevel, "log-level", "info", "least level of log lines: debug, info, warn or error")
	root.PersistentFlags().StringVar(&o.logFormat, "log-format", "text", "log lines as text or json")
	root.AddCommand(newUp(o), newControl(o), newNode(o), newConsole(o), newCheck(o), newBootstrap(o), newRender(o), newBench(o), newVersion(o))
	return root
}

// logger makes the process's logger from the flags.
func (o *options) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is not a level; use debug, info, warn or error", o.logLevel)
	}
	handler := &slog.HandlerOptions{Level: level}
	switch o.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(o.stderr, handler)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(o.stderr, handler)), nil
	}
	return nil, fmt.Errorf("--log-format: %q is neither text nor json", o.logFormat)
}

// stateDir is where a process keeps what must survive it, unless --data says
// otherwise: $XDG_STATE_HOME/periscope (XDG Base Directory Specification).
func (e env) stateDir() string {
	if dir := e.getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "periscope")
	}
	if home := e.getenv("HOME"); filepath.IsAbs(home) {
		return filepath.Join(home, ".local", "state", "periscope")
	}
	return "periscope-data"
}

// makeDataDir makes the directory, for the user alone: it holds payloads and a
// private key.
func makeDataDir(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("--data: %w", err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", fmt.Errorf("--data: %w; name a directory that this user may write to", err)
	}
	return abs, nil
}

// storePath is the console's and the node's common file.
func storePath(dataDir string) string { return filepath.Join(dataDir, "attacks.db") }
