package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/periscope-mesh/periscope/node/sockstat"
)

// costRounds is how often each back end has its turn.
const costRounds = 15

// cost is the CPU time of one sample, in microseconds, by back end: a value for
// each round.
type cost struct {
	conns  int
	micros map[string][]float64
}

func (b *bench) costs(ctx context.Context, conns int) (_ cost, err error) {
	out := cost{conns: conns, micros: map[string][]float64{}}
	r, err := b.startNode(ctx, nodeConfig{Hold: true}, true)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, r.close(b)) }()
	closeAll, err := holdOpen(listenAddress, conns)
	if err != nil {
		return out, err
	}
	defer closeAll()
	all := sockstat.Backends()
	for range costRounds {
		for _, i := range rand.Perm(len(all)) {
			a, err := r.ask(ctx, nodeRequest{Op: opCost, Backend: all[i], Conns: conns})
			if err != nil {
				return out, err
			}
			out.micros[all[i]] = append(out.micros[all[i]], a.Micros)
		}
	}
	for _, name := range all {
		fmt.Fprintf(b.progress, "%d connections, %s: %.0f µs\n", conns, name, out.micros[name])
	}
	return out, ctx.Err()
}
