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
	script  string  // Lua filter's code, if any
	share   float64 // percent of exchanges that the plugin copies
	against string  // a candidate: the variant of our plugin at the same share
}

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
	all = append(all, shares(ours, "**Periscope**", plugin, "")...)
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

// shares are a plugin that copies everything, a tenth, and nothing.
func shares(name, title, code, against string) []variant {
	var out []variant
	for _, s := range []struct {
		suffix string
		share  float64
	}{{"", 100}, {"-10", 10}, {"-0", 0}} {
		v := variant{name: name + s.suffix, title: fmt.Sprintf("%s, %g %%", title, s.share), copies: copiesEvents, script: code, share: s.share}
		if against != "" {
			v.against = against + s.suffix
		}
		out = append(out, v)
	}
	return out
}

// choose gives the variants named, in the order of all, and always the
// baseline. An empty list is all of them.
func choose(all []variant, list string) ([]variant, error) {
	if list == "" {
		return all, nil
	}
	want := map[string]bool{baseline: true}
	for name := range strings.SplitSeq(list, ",") {
		if !slices.ContainsFunc(all, func(v variant) bool { return v.name == name }) {
			return nil, fmt.Errorf("no variant %q; there are: %s", name, strings.Join(names(all), ", "))
		}
		want[name] = true
	}
	return slices.DeleteFunc(slices.Clone(all), func(v variant) bool { return !want[v.name] }), nil
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
func settings(share float64, limit int) string {
	p := policy.Default()
	p.Spec.Sampling.Percent = share
	if limit > 0 {
		p.Spec.Body.Request.MaxBytes = policy.Quantity(limit)
		p.Spec.Body.Response.MaxBytes = policy.Quantity(limit)
	}
	plan := mirror.Compile([]policy.MirrorPolicy{p}, mirror.Topology{
		Gateways: []mirror.Gateway{{Namespace: "default", Name: "bench", StandIn: true}},
		Nodes:    []mirror.NodeService{{StandIn: true}},
	})
	return plan.Gateways[0].Settings.Encode()
}
