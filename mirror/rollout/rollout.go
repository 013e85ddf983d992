// Package rollout decides which gateway runs which build of the plugin while a
// new build replaces the one before: one gateway first, the canary, then one
// after the other, each only when the one before has shown that it runs the new
// build. The first refusal by Envoy, the first rise in the plugin's errors, or
// silence that ends with the build before, ends the roll-out and puts that one
// back everywhere.
//
// It is pure: Step reads no clock and no network, and the same State and Input
// give the same State. It never takes a lack of evidence for success: a gateway
// of which nothing is known keeps the roll-out waiting, and the reason says so.
//
// The commands may import it; it imports nothing of ours.
package rollout

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	// DefaultSoak is how long the canary runs a new build before another
	// gateway gets it.
	DefaultSoak = time.Minute
	// followerShare of the soak is what each gateway after the canary has.
	followerShare = 10
	// silenceFactor of the soak is how long a gateway that had exchanges may
	// send none of them by its new build, and then by the one before.
	silenceFactor = 3

	// A gateway whose old build had errors already, or is known by few
	// exchanges, is judged by more of them.
	maxErrorRise   = 2 // times the rate before
	minErrorsToEnd = 5

	maxReasonBytes = 1 << 10
	maxFailed      = 64 // builds remembered
)

// Phase of a roll-out.
type Phase string

const (
	Complete   Phase = "complete"    // every gateway has the target
	Rolling    Phase = "rolling"     // some have it, others follow
	Held       Phase = "held"        // no further gateway gets it for now: the reason says why
	RolledBack Phase = "rolled back" // the target failed: every gateway has the build before
)

// Build is what counts of one.
type Build struct {
	Name string `json:"name"` // "version+digest"
	Wire int    `json:"wire"` // version of the wire contract that it writes
}

// Assignment is the build that a gateway is to run.
type Assignment struct {
	Build string    `json:"build"`
	Since time.Time `json:"since"`
	// Heard tells that the gateway was sending exchanges when it got the build.
	Heard bool `json:"heard,omitempty"`
	// Confirmed tells that the gateway has shown that it runs the build.
	Confirmed bool `json:"confirmed,omitempty"`
	// Doubt is why the target was taken from the gateway for a while: if it is
	// heard again by the build before, the target is at fault.
	Doubt string `json:"doubt,omitempty"`
}

// State is what has been decided. Step makes a new one; nobody changes one.
type State struct {
	Target   Build                 `json:"target"`
	Stable   Build                 `json:"stable"` // what gateways run that don't have the target
	Phase    Phase                 `json:"phase"`
	Reason   string                `json:"reason,omitempty"`
	Gateways map[string]Assignment `json:"gateways"`         // by id
	Failed   map[string]string     `json:"failed,omitempty"` // reasons, by the build's name
}

// Delivery is what is known of the way of a gateway's present build to it.
type Delivery string

const (
	Unknown      Delivery = ""             // nobody tells
	Pending      Delivery = "pending"      // it has not got there yet
	Acknowledged Delivery = "acknowledged" // Envoy has it in force, or no pod is there that could
	Refused      Delivery = "refused"      // Envoy refuses it
)

// Gateway is what is known of one gateway. Delivery is that of the build which
// State assigns it; one older than the assignment must be left out.
type Gateway struct {
	ID       string
	Delivery Delivery
	Reason   string           // why it is refused or unknown
	Runs     map[string]Count // by build: what nodes heard from it
}

// Count is what nodes heard from a gateway by one build.
type Count struct {
	Seen   uint64    // exchanges
	Errors uint64    // of the plugin, which spoil no exchange of a user's
	Last   time.Time // when nodes heard of it last
}

// Node is an analysis node that is connected to the control plane.
type Node struct {
	Name  string
	Wires []int // versions of the wire contract that it reads; none: it doesn't say
}

// Input is what there is now.
type Input struct {
	Now      time.Time
	Target   Build
	Gateways []Gateway
	Nodes    []Node
	Soak     time.Duration // 0: DefaultSoak
	// Settled is when nodes and istiods had had the time to say what they know,
	// after the start of whoever asks; zero: they have not had it yet, and no
	// further gateway gets the target until then.
	Settled time.Time
}

// Step gives what follows from what was decided before and what there is now.
// With a State that has no Stable, there is nothing to fall back to: every
// gateway gets the target.
func Step(s State, in Input) State {
	if in.Soak <= 0 {
		in.Soak = DefaultSoak
	}
	in.Gateways = slices.SortedFunc(slices.Values(in.Gateways), func(a, b Gateway) int { return strings.Compare(a.ID, b.ID) })
	next := State{Target: in.Target, Stable: s.Stable, Failed: maps.Clone(s.Failed), Gateways: map[string]Assignment{}}
	if next.Stable.Name == "" {
		next.Stable = in.Target // there is nothing to fall back to
	}
	for _, g := range in.Gateways {
		a, known := s.Gateways[g.ID]
		if !known || a.Build != next.Target.Name && a.Build != next.Stable.Name {
			a = Assignment{Build: next.Stable.Name, Since: in.Now}
		}
		if s.Target.Name != in.Target.Name {
			a.Doubt = "" // of another target
		}
		next.Gateways[g.ID] = a
	}
	switch reason, failed := next.Failed[in.Target.Name]; {
	case in.Target.Name == next.Stable.Name:
		return next.complete(in.Now)
	case failed:
		return next.back(in.Now, reason)
	}
	return next.roll(in)
}

// roll judges the gateways that have the target, and gives it to one more when
// all of them have shown that they run it.
func (s State) roll(in Input) State {
	s.Phase = Rolling
	soak := in.Soak
	for _, a := range s.Gateways {
		if a.Build == s.Target.Name && a.Confirmed { // the canary is through
			soak = in.Soak / followerShare
		}
	}
	waiting, why := "", ""
	for i := range in.Gateways {
		g := &in.Gateways[i]
		a := s.Gateways[g.ID]
		wait := ""
		switch {
		case a.Build == s.Target.Name:
			if reason := s.fault(g); reason != "" {
				return s.fail(in.Now, clip(fmt.Sprintf("gateway %s: %s", g.ID, reason)))
			}
			a, wait = s.watch(g, a, in, soak)
		case a.Doubt != "":
			if g.Runs[s.Stable.Name].Last.After(a.Since) {
				return s.fail(in.Now, clip(fmt.Sprintf("gateway %s: %s; it is heard again by the build before", g.ID, a.Doubt)))
			}
			a, wait = doubted(a, in)
		}
		s.Gateways[g.ID] = a
		if wait != "" {
			waiting, why = g.ID, wait
		}
	}
	if waiting != "" {
		s.Reason = clip(fmt.Sprintf("gateway %s: %s", waiting, why))
		return s
	}
	return s.extend(in)
}

// watch says what a gateway that has the target lacks to count as running it.
// One that has fallen silent gets the build before again, to see whether that
// is heard.
func (s State) watch(g *Gateway, a Assignment, in Input, soak time.Duration) (Assignment, string) {
	if a.Confirmed {
		return a, ""
	}
	silent := in.Now.Sub(latest(a.Since, in.Settled))
	if a.Heard && g.Runs[s.Target.Name].Seen == 0 && !in.Settled.IsZero() && silent >= silenceFactor*in.Soak {
		reason := fmt.Sprintf("nothing came from it in %v since it got the build, though it was sending before", silent.Round(time.Second))
		return Assignment{Build: s.Stable.Name, Since: in.Now, Doubt: reason}, "it has the build before again, to see whether that is heard"
	}
	if reason := unconfirmed(g, a, s.Target.Name, in.Now, soak); reason != "" {
		return a, reason
	}
	a.Confirmed = true
	return a, ""
}

// doubted waits for a sound by the build before. Without one, the silence is no
// fault of the target's.
func doubted(a Assignment, in Input) (Assignment, string) {
	if in.Settled.IsZero() || in.Now.Sub(latest(a.Since, in.Settled)) < silenceFactor*in.Soak {
		return a, "it was silent by the new build, and has the build before again, to see whether that is heard"
	}
	a.Doubt = ""
	return a, ""
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// extend gives the target to the next gateway.
func (s State) extend(in Input) State {
	for i := range in.Gateways {
		g := &in.Gateways[i]
		if s.Gateways[g.ID].Build == s.Target.Name {
			continue
		}
		if in.Settled.IsZero() {
			s.Reason = "nodes and istiods are being asked what they know"
			return s
		}
		if reason := s.unreadable(in.Nodes); reason != "" {
			s.Phase, s.Reason = Held, clip(reason)
			return s
		}
		if g.Delivery == Refused {
			s.Phase, s.Reason = Held, clip(fmt.Sprintf("gateway %s refuses what it has: %s", g.ID, g.Reason))
			return s
		}
		s.Gateways[g.ID] = Assignment{Build: s.Target.Name, Since: in.Now, Heard: in.Now.Sub(g.last()) < in.Soak}
		s.Reason = clip(fmt.Sprintf("gateway %s: the target is on its way", g.ID))
		return s
	}
	if len(in.Gateways) == 0 { // nobody has shown anything
		s.Reason = "there is no gateway that would run it"
		return s
	}
	return s.complete(in.Now)
}

// unreadable says which node could not read what the target writes.
func (s State) unreadable(nodes []Node) string {
	if s.Target.Wire == s.Stable.Wire {
		return "" // no newer for nodes than what they read now
	}
	if len(nodes) == 0 {
		return fmt.Sprintf("plugin %s writes wire version %d, and no node is connected that could say whether it reads it", s.Target.Name, s.Target.Wire)
	}
	for _, n := range nodes {
		switch {
		case len(n.Wires) == 0:
			return fmt.Sprintf("plugin %s writes wire version %d, and node %s does not say which it reads: update it first", s.Target.Name, s.Target.Wire, n.Name)
		case !slices.Contains(n.Wires, s.Target.Wire):
			return fmt.Sprintf("plugin %s writes wire version %d, and node %s reads %v: update it first", s.Target.Name, s.Target.Wire, n.Name, n.Wires)
		}
	}
	return ""
}

// fault says why a gateway that has the target shows that the target is bad.
func (s State) fault(g *Gateway) string {
	if g.Delivery == Refused {
		return "it is refused: " + g.Reason
	}
	before, now := g.Runs[s.Stable.Name], g.Runs[s.Target.Name]
	switch {
	case now.Errors == 0:
	case before.Errors == 0 && (before.Seen >= now.Seen || now.Errors >= minErrorsToEnd):
		return fmt.Sprintf("%d errors of the plugin in %d exchanges, where there were none", now.Errors, now.Seen)
	case before.Errors > 0 && now.Errors >= minErrorsToEnd && float64(now.Errors)*float64(before.Seen) > maxErrorRise*float64(before.Errors)*float64(now.Seen):
		return fmt.Sprintf("%d errors of the plugin in %d exchanges, where there were %d in %d", now.Errors, now.Seen, before.Errors, before.Seen)
	}
	return ""
}

// unconfirmed says what is missing for a gateway to count as running the build.
func unconfirmed(g *Gateway, a Assignment, build string, now time.Time, soak time.Duration) string {
	ran := g.Runs[build].Seen > 0
	switch {
	case g.Delivery == Pending:
		return cmp.Or(g.Reason, "it has not acknowledged the new build yet")
	case a.Heard && !ran:
		return "no exchange has come from it by the new build yet"
	case ran, g.Delivery == Acknowledged:
	default:
		return "nobody tells whether it runs the new build: " + cmp.Or(g.Reason, "no exchange comes from it, and no istiod is asked")
	}
	if left := a.Since.Add(soak).Sub(now); left > 0 {
		return fmt.Sprintf("it runs the new build, and is watched until %s", a.Since.Add(soak).UTC().Format(time.RFC3339))
	}
	return ""
}

// last is when nodes heard of the gateway last, whatever it ran.
func (g *Gateway) last() (at time.Time) {
	for _, c := range g.Runs {
		if c.Last.After(at) {
			at = c.Last
		}
	}
	return at
}

// complete has every gateway run the target.
func (s State) complete(now time.Time) State {
	s.Stable, s.Phase, s.Reason = s.Target, Complete, ""
	s.assign(s.Target.Name, now)
	return s
}

// fail notes why the target is not to be tried again, and puts the build
// before back.
func (s State) fail(now time.Time, reason string) State {
	failed := maps.Clone(s.Failed)
	if failed == nil || len(failed) >= maxFailed {
		failed = map[string]string{}
	}
	failed[s.Target.Name] = reason
	s.Failed = failed
	return s.back(now, reason)
}

func (s State) back(now time.Time, reason string) State {
	s.Phase, s.Reason = RolledBack, reason
	s.assign(s.Stable.Name, now)
	return s
}

func (s State) assign(build string, now time.Time) {
	for id, a := range s.Gateways {
		if a.Build != build {
			a = Assignment{Build: build, Since: now}
		}
		a.Doubt = "" // it is decided
		s.Gateways[id] = a
	}
}

// Retry forgets that builds have failed.
func (s State) Retry() State {
	s.Failed = nil
	return s
}

func clip(s string) string {
	if len(s) > maxReasonBytes {
		s = s[:maxReasonBytes-3] + "..."
	}
	return strings.ToValidUTF8(s, "")
}
