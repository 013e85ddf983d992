// Command sockets measures what it costs to count a node's sockets, and how soon
// the counters tell that the node falls behind, on the real kernel, and prints
// Markdown tables.
//
// It needs root, a kernel with BTF and control groups of version 2. It makes a
// network namespace, a mount namespace and control groups, talks to nobody outside
// them, and leaves nothing of them behind. Nobody imports it; `make bench-sockets`
// runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/periscope-mesh/periscope/test/bench/result"
)

// roleEnv makes this program one of the processes of a run.
const roleEnv = "PERISCOPE_BENCH_SOCKETS"

// Roles. The first process only makes the namespaces.
const (
	roleBench   = "bench"   // measures, and sends
	roleNode    = "node"    // is measured
	roleWatcher = "watcher" // samples the node's sockets from outside
)

func main() {
	if code, ok := act(); ok {
		os.Exit(code)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// act is the main of all processes but the first.
func act() (code int, ok bool) {
	var err error
	switch role := os.Getenv(roleEnv); role {
	case "":
		return 0, false
	case roleBench:
		os.Unsetenv(roleEnv)
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		var o options
		if o, err = parse(os.Args[1:], os.Stderr); err == nil {
			err = benchmark(ctx, o, os.Stdout, os.Stderr)
		}
	case roleNode:
		signal.Ignore(os.Interrupt) // it ends with its input
		err = nodeMain(os.Stdin, os.Stdout)
	case roleWatcher:
		signal.Ignore(os.Interrupt)
		err = watcherMain(os.Stdin, os.Stdout)
	default:
		err = fmt.Errorf("%s is set by this program only", roleEnv)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench-sockets: %v\n", err)
		return 1, true
	}
	return 0, true
}

// options of a run. What is 0 is left out.
type options struct {
	blocks int
	window time.Duration
	sizes  []int
	rounds int
	only   *regexp.Regexp // steps
	limit  time.Duration
	write  string
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench-sockets", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.IntVar(&o.blocks, "blocks", 200, "blocks of windows in which the overhead is measured; 0: it is not")
	fs.DurationVar(&o.window, "window", 200*time.Millisecond, "length of a window")
	sizes := fs.String("sizes", "100,1000,10000", "comma-separated `numbers` of connections whose sampling is measured; empty: none")
	fs.IntVar(&o.rounds, "rounds", 9, "times that each step is made; 0: none")
	only := fs.String("only", "", "regular `expression` of the steps to make; default: all")
	fs.DurationVar(&o.limit, "limit", 9*time.Minute, "time after which nothing more is begun: fewer blocks, fewer steps of each kind")
	fs.StringVar(&o.write, "write", "", "`file` whose marked section is replaced; default: print")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	for f := range strings.SplitSeq(*sizes, ",") {
		if f == "" && *sizes == "" {
			break
		}
		n, err := strconv.Atoi(f)
		if err != nil || n < 2 || n > 15_000 {
			return o, fmt.Errorf("-sizes: %q is not a number from 2 to 15000", f)
		}
		o.sizes = append(o.sizes, n)
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case o.blocks < 0 || o.blocks > 100_000:
		return o, fmt.Errorf("-blocks %d is not from 0 to 100000", o.blocks)
	case o.rounds < 0 || o.rounds > 1000:
		return o, fmt.Errorf("-rounds %d is not from 0 to 1000", o.rounds)
	case o.limit < time.Second || o.limit > 24*time.Hour:
		return o, fmt.Errorf("-limit %v is not from 1s to 24h", o.limit)
	case o.window < 10*time.Millisecond || o.window > time.Minute:
		return o, fmt.Errorf("-window %v is not from 10ms to 1m", o.window)
	}
	return o, nil
}

// run checks the arguments and starts this program again, in namespaces of its own.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if err == nil && o.write != "" {
		err = result.Check(o.write, section)
	}
	if err == nil {
		err = isolated(ctx, args, stdout, stderr)
	}
	if ended := new(exec.ExitError); errors.As(err, &ended) && ended.Exited() {
		return ended.ExitCode() // it has said why
	}
	return result.Code("bench-sockets", err, stderr)
}

func isolated(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own executable: %w", err)
	}
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+roleBench)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) } // it has to tidy up
	cmd.WaitDelay = 20 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // whose end is what Pdeathsig goes by
	defer runtime.UnlockOSThread()
	cpus, err := allowed()
	if err != nil {
		return err
	}
	g, err := newGroup()
	if err != nil {
		return err
	}
	err = g.start(cmd, cpus.sender())
	if err != nil {
		err = fmt.Errorf("start in new namespaces (needs root): %w", err)
	}
	if cmd.Process != nil {
		err = errors.Join(err, cmd.Wait())
	}
	return errors.Join(err, g.close())
}

// benchmark runs in its own namespaces:
//
//	this process, CPU 2             node, CPU 1, own cgroups      watcher, any CPU
//	sender ───────── HTTP ────────► node/ingest ─► ring
//	steps ────────── JSON lines ──► node/pressure, node/sockstat   node/sockstat ─► node's sockets
//	                 JSON lines ──────────────────────────────────►
func benchmark(ctx context.Context, o options, stdout, stderr io.Writer) error {
	r := &report{machine: result.ReadMachine(), date: time.Now(), window: o.window}
	b, err := newBench(ctx, stderr)
	if err != nil {
		return err
	}
	err = b.all(ctx, o, r)
	if err := errors.Join(err, b.close()); err != nil {
		return err
	}
	out := r.markdown()
	if o.write != "" {
		return result.WriteInto(o.write, section, out)
	}
	if _, err := io.WriteString(stdout, out); err != nil {
		return fmt.Errorf("print report: %w", err)
	}
	return nil
}
