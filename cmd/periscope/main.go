// Command periscope finds attacks on APIs behind Envoy and Istio ingress
// gateways without standing in the traffic's way.
//
// One file per sub-command; each wires packages that do not know each other,
// and adds nothing of its own to what happens to an exchange.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], env{stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv})
	stop()
	os.Exit(code)
}
