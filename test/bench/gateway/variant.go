package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/bench/sink"
)

// copies says how a variant copies exchanges.
type copies int

const (
	copiesNothing   copies = iota
	copiesEvents           // our plugin: batches of events
	copiesRequests         // request_mirror_policies: requests only
	copiesProcessor        // ext_proc: a gRPC stream per exchange
)

// variant is one Envoy configuration under test.
type variant struct {
	name    string // for -variants
	title   string // in the table
	copies  copies
	script  string     // Lua filter's code, if any
	share   float64    // percent of exchanges that the plugin copies
	against string     // a candidate: the variant of our plugin at the same share
	fault   sink.Fault // of the node that copies go to, if any
}

// node says what the variant's copies meet.
func (v variant) node() string {
	if v.fault == "" {
		return "node well"
	}
	return "node " + string(v.fault)
}

// ours tells whether v is our plugin as it is.
func (v variant) ours() bool { return v.copies == copiesEvents && v.against == "" }

// whole tells whether v has all exchanges to do with, not a share of them.
func (v variant) whole() bool { return v.copies != copiesEvents || v.share == 100 }

// baseline is what every other variant is compared with.
const baseline = "none"

// ours are the variants of our plugin, which candidates are compared with besides.
const ours = "periscope"

const emptyScript = "function envoy_on_request(h) end\nfunction envoy_on_response(h) end\n"

// variants lists what can be measured. Candidates are files with other plugin
// code, by which they are named: a.lua is the variants a, a-10 and a-0.
func variants(candidates []string) ([]variant, error) {
	plugin := lua.Embedded().Code
	all := []variant{
		{name: baseline, title: "no filter"},
		{name: "empty-lua", title: "empty Lua filter", script: emptyScript},
	}
	all = append(all, shares(ours, "Periscope", plugin, "")...)
	for _, f := range []struct {
		fault sink.Fault
		title string
	}{
		{sink.Slow, "node answers after 5 s"},
		{sink.Stalled, "node takes connections, never reads"},
		{sink.Dead, "node refuses connections"},
		{sink.Unavailable, "node answers 503"},
	} {
		all = append(all, variant{name: ours + "-" + string(f.fault), title: "Periscope, " + f.title, copies: copiesEvents, script: plugin, share: 100, fault: f.fault})
	}
	all = append(all,
		variant{name: "shadow", title: "`request_mirror_policies` (requests only)", copies: copiesRequests},
		variant{name: "ext_proc", title: "`ext_proc`, observability mode", copies: copiesProcessor},
		variant{name: "none-again", title: "no filter, again (the noise)"})
	for _, file := range candidates {
		code, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read plugin: %w", err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".lua")
		if !fileName.MatchString(name) || slices.Contains(names(all), name) {
			return nil, fmt.Errorf("plugin %s: rename the file: a variant can't be called %q, or is already", file, name)
		}
		all = append(all, shares(name, "`"+name+"`", string(code), ours)...)
	}
	return all, nil
}

// fileName is of names that make a folder, and stand in a list.
var fileName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// shares are a plugin that copies everything, a tenth, and nothing. Against is
// the name of the one that it is compared with, if any.
func shares(name, title, code, against string) []variant {
	var out []variant
	for _, s := range []struct {
		suffix string
		share  float64
	}{{"", 100}, {"-10", 10}, {"-0", 0}} {
		v := variant{name: name + s.suffix, title: fmt.Sprintf("%s, %g %%", title, s.share), copies: copiesEvents, script: code, share: s.share}
		if against != "" {
			v.against = against + s.suffix
		} else if s.share == 100 {
			v.title = "**" + v.title + "**"
		}
		out = append(out, v)
	}
	return out
}

// choose gives the variants named, in the order of all, and always the
// baseline. An empty list is all of them.
func choose(all []variant, list string) ([]variant, error) {
	if list != "" {
		list += "," + baseline
	}
	return named(all, list, func(v variant) string { return v.name })
}

// named gives what a comma-separated list names, in the order of all. An empty
// list is all.
func named[T any](all []T, list string, name func(T) string) ([]T, error) {
	if list == "" {
		return all, nil
	}
	var there []string
	for _, x := range all {
		there = append(there, name(x))
	}
	want := strings.Split(list, ",")
	for _, n := range want {
		if !slices.Contains(there, n) {
			return nil, fmt.Errorf("there is no %q; there are: %s", n, strings.Join(there, ", "))
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(x T) bool { return !slices.Contains(want, name(x)) }), nil
}

func names(all []variant) []string {
	out := make([]string, len(all))
	for i, v := range all {
		out[i] = v.name
	}
	return out
}

// settings is the text that the plugin gets: the default policy's, at a share,
// and with one limit for bodies both ways unless that is 0.
func settings(share float64, limit int) mirror.Settings {
	p := policy.Default()
	p.Spec.Sampling.Percent = share
	if limit > 0 {
		p.Spec.Body.Request.MaxBytes = policy.Quantity(limit)
		p.Spec.Body.Response.MaxBytes = policy.Quantity(limit)
	}
	return plan("bench", p).Settings
}

// plan is a gateway's part of one policy, with its nodes' endpoints.
func plan(gateway string, p policy.MirrorPolicy, nodes ...mirror.Endpoint) mirror.GatewayPlan {
	return mirror.Compile([]policy.MirrorPolicy{p}, mirror.Topology{
		Gateways: []mirror.Gateway{standIn(gateway)},
		Nodes:    []mirror.NodeService{{StandIn: true, Endpoints: nodes}},
	}).Gateways[0]
}

func standIn(gateway string) mirror.Gateway {
	return mirror.Gateway{Namespace: "default", Name: gateway, StandIn: true}
}
