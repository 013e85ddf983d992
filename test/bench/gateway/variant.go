package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
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
	name   string // for -variants
	title  string // in the table
	copies copies
	script string  // Lua filter's code, if any
	share  float64 // percent of exchanges that the plugin copies
}

// baseline is what every other variant is compared with.
const baseline = "none"

const emptyScript = "function envoy_on_request(h) end\nfunction envoy_on_response(h) end\n"

// variants lists what can be measured. candidate is a file with other plugin
// code to compare ours with, or empty.
func variants(candidate string) ([]variant, error) {
	plugin := lua.Embedded().Code
	all := []variant{
		{name: baseline, title: "no filter"},
		{name: "empty-lua", title: "empty Lua filter", script: emptyScript},
		{name: "periscope", title: "**Periscope**, 100 %", copies: copiesEvents, script: plugin, share: 100},
		{name: "periscope-10", title: "Periscope, 10 %", copies: copiesEvents, script: plugin, share: 10},
		{name: "periscope-0", title: "Periscope, 0 %", copies: copiesEvents, script: plugin, share: 0},
		{name: "shadow", title: "`request_mirror_policies` (requests only)", copies: copiesRequests},
		{name: "ext_proc", title: "`ext_proc`, observability mode", copies: copiesProcessor},
		{name: "none-again", title: "no filter, again (the noise)"},
	}
	if candidate != "" {
		b, err := os.ReadFile(candidate)
		if err != nil {
			return nil, fmt.Errorf("read plugin: %w", err)
		}
		all = append(all,
			variant{name: "candidate", title: "Periscope with other code, 100 %", copies: copiesEvents, script: string(b), share: 100},
			variant{name: "candidate-10", title: "Periscope with other code, 10 %", copies: copiesEvents, script: string(b), share: 10})
	}
	return all, nil
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

// settings is the text that the plugin gets: the default policy's, at a share.
func settings(share float64) (text, digest string) {
	p := policy.Default()
	p.Spec.Sampling.Percent = share
	plan := mirror.Compile([]policy.MirrorPolicy{p}, mirror.Topology{
		Gateways: []mirror.Gateway{{Namespace: "default", Name: "bench", StandIn: true}},
		Nodes:    []mirror.NodeService{{StandIn: true}},
	})
	text = plan.Gateways[0].Settings.Encode()
	sum := sha256.Sum256([]byte(text))
	return text, hex.EncodeToString(sum[:6])
}
