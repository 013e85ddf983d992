package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strconv"
	"time"
)

const (
	// timesOne is how often one gateway is edited a round: a single edit is too
	// short for its CPU time to mean anything.
	timesOne = 10
	// maxMemory is what all processes together may have.
	maxMemory = 8 << 30
)

// stage is one number of clients, connected to each server at the same time.
type stage struct {
	clients int
	mesh    bool // istiods, not gateways
}

func (s stage) String() string {
	if s.mesh {
		return strconv.Itoa(s.clients) + " istiods"
	}
	return strconv.Itoa(s.clients) + " gateways"
}

// servers are those under test: istiods are served by ours alone.
func (s stage) servers() []string {
	if s.mesh {
		return []string{ours}
	}
	return []string{ours, peer}
}

// edits are the kinds of edits that are measured.
func (s stage) edits() []string {
	if s.mesh {
		return []string{editOne}
	}
	return []string{editOne, editAll, editRest}
}

// push is what one kind of edit cost, a value for each round.
type push struct {
	millis []float64 // until the last acknowledgement, the median of the round
	cpu    []float64 // microseconds an edit
	bytes  []float64 // sent an edit
}

// figures are a server's of a stage.
type figures struct {
	edits     map[string]*push
	before    int64 // bytes of memory, of the process without clients and snapshots
	snapshots int64 // with snapshots
	connected int64 // with snapshots and clients
	peak      int64
}

// measured is a stage's result.
type measured struct {
	stage
	rounds  int
	figures map[string]figures // by server
}

// bench runs stages.
type bench struct {
	rounds   int
	deadline time.Time // after which a stage begins no further round
	profile  string    // file for a CPU profile of our server in the last stage
	progress io.Writer
}

// all runs the stages one after the other. Each has an equal share of the time
// that those before it have left.
func (b *bench) all(ctx context.Context, stages []stage) ([]measured, error) {
	var out []measured
	for i, s := range stages {
		fmt.Fprintf(b.progress, "%v\n", s)
		left := time.Until(b.deadline)
		file := ""
		if i == len(stages)-1 {
			file = b.profile
		}
		m, err := b.stage(ctx, s, time.Now().Add(left/time.Duration(len(stages)-i)), file)
		if err != nil {
			return nil, fmt.Errorf("%v: %w", s, err)
		}
		out = append(out, m)
		debug.FreeOSMemory()
	}
	return out, nil
}

// side is a server with its clients.
type side struct {
	name  string
	child *child
	fleet *fleet
	acks  int64 // of edits
	figures
}

func (b *bench) stage(ctx context.Context, s stage, until time.Time, profile string) (_ measured, err error) {
	var sides []*side
	defer func() {
		for _, d := range sides {
			err = errors.Join(err, d.stop())
		}
	}()
	material, err := newMaterial()
	if err != nil {
		return measured{}, err
	}
	for _, name := range s.servers() {
		c := serverConfig{Name: name, Clients: s.clients, Mesh: s.mesh}
		if name == ours {
			c.Profile = profile
		}
		d := &side{name: name, figures: figures{edits: map[string]*push{}}}
		sides = append(sides, d)
		if err := d.start(ctx, c, material.names, b.progress); err != nil {
			return measured{}, fmt.Errorf("%s: %w", name, err)
		}
		if err := checkMemory(sides); err != nil {
			return measured{}, err
		}
	}
	m := measured{stage: s, figures: map[string]figures{}}
	for m.rounds = 0; m.rounds < b.rounds && (m.rounds == 0 || time.Now().Before(until)); m.rounds++ {
		if err := s.round(ctx, sides, m.rounds); err != nil {
			return measured{}, fmt.Errorf("round %d: %w", m.rounds+1, err)
		}
		if err := checkMemory(sides); err != nil {
			return measured{}, err
		}
	}
	for _, d := range sides {
		had, err := d.child.memory()
		if err != nil {
			return measured{}, err
		}
		d.peak = had.Peak
		m.figures[d.name] = d.figures
	}
	return m, nil
}

// start starts a server, fills it, and connects its clients, reading its memory
// in between.
func (d *side) start(ctx context.Context, c serverConfig, names map[string][]string, stderr io.Writer) error {
	var err error
	if d.child, err = startChild(ctx, c, stderr); err != nil {
		return err
	}
	if d.before, err = d.memory(ctx); err != nil {
		return err
	}
	if _, err := d.child.ask(ctx, request{Op: opFill}); err != nil {
		return err
	}
	if d.snapshots, err = d.memory(ctx); err != nil {
		return err
	}
	if d.fleet, err = startFleet(ctx, d.child.address, c.Clients, c.Mesh, names); err != nil {
		return err
	}
	if err := d.child.acknowledged(ctx, d.fleet.acks.Load()); err != nil {
		return err
	}
	d.connected, err = d.memory(ctx)
	return err
}

func (d *side) memory(ctx context.Context) (int64, error) {
	r, err := d.child.ask(ctx, request{Op: opMemory})
	return r.Memory.Resident, err
}

func (d *side) stop() error {
	var err error
	if d.fleet != nil {
		err = d.fleet.stop()
	}
	if d.child != nil {
		err = errors.Join(err, d.child.stop())
	}
	return err
}

// round makes every kind of edit at each server. The order of servers
// alternates, so that what changes slowly favours none.
func (s stage) round(ctx context.Context, sides []*side, n int) error {
	order := slices.Clone(sides)
	if n%2 == 1 {
		slices.Reverse(order)
	}
	for _, kind := range s.edits() {
		times := 1
		if kind == editOne {
			times = timesOne
		}
		for _, d := range order {
			if err := d.edit(ctx, kind, times); err != nil {
				return fmt.Errorf("%s: %w", d.name, err)
			}
		}
	}
	return nil
}

func (d *side) edit(ctx context.Context, kind string, times int) error {
	debug.FreeOSMemory() // the clients' own garbage, between edits
	before := d.fleet.acks.Load()
	r, err := d.child.ask(ctx, request{Op: opEdit, Edit: kind, Times: times})
	if err != nil {
		return err
	}
	d.acks += r.Acks - before
	if got := d.fleet.updates.Load(); got != d.acks {
		return fmt.Errorf("edit %s: clients have %d new settings, but acknowledged %d", kind, got, d.acks)
	}
	p := d.edits[kind]
	if p == nil {
		p = &push{}
		d.edits[kind] = p
	}
	slices.Sort(r.Millis)
	p.millis = append(p.millis, r.Millis[len(r.Millis)/2])
	p.cpu = append(p.cpu, r.CPU*1e6/float64(times))
	p.bytes = append(p.bytes, float64(r.Bytes)/float64(times))
	return nil
}

// checkMemory fails if all processes together have more than maxMemory.
func checkMemory(sides []*side) error {
	own, err := processMemory("self")
	if err != nil {
		return err
	}
	sum := own.Resident
	for _, d := range sides {
		had, err := d.child.memory()
		if err != nil {
			return err
		}
		sum += had.Resident
	}
	if sum > maxMemory {
		return fmt.Errorf("servers and clients have %d MB of memory, more than %d", sum>>20, int64(maxMemory)>>20)
	}
	return nil
}
