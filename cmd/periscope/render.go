package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds/mcp"
)

// renderFlags describe the one workload that is rendered.
type renderFlags struct {
	policy    string
	gateway   string
	namespace string
	selector  map[string]string
	targets   []string
	nodes     []string
	form      string
}

func newRender(o *options) *cobra.Command {
	var f renderFlags
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Print the Istio resources of one gateway as YAML, to apply without a control plane of ours",
		Long: `Print the Istio resources of one gateway as YAML, to apply without a control plane of ours.

They are those that periscope control supplies istiod with. Whoever applies them
applies them anew when policies, nodes or Periscope's version change, and takes
them away when nothing should be mirrored any more. Nodes need the policies
besides, from periscope control or periscope up.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			plan, err := f.plan()
			if err != nil {
				return err
			}
			objects, err := mcp.Objects(mcp.Config{Form: mcp.Form(f.form), Plugin: istioPlugin(lua.Embedded())}, plan)
			if err != nil {
				return err
			}
			if len(objects) == 0 {
				return fmt.Errorf("nothing to apply: policy %s has mode %s, and in form %s that means no resources", plan.Gateways[0].Policy, plan.Gateways[0].Settings.Mode, f.form)
			}
			return mcp.WriteYAML(o.stdout, objects)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.policy, "policy", "", "MirrorPolicy file, or directory of them")
	flags.StringVar(&f.gateway, "gateway", "", "NAMESPACE/NAME of the gateway's workload, as events will name it")
	flags.StringVarP(&f.namespace, "namespace", "n", "default", "namespace of the gateway where --gateway is only a NAME")
	flags.StringToStringVar(&f.selector, "selector", nil, "labels, KEY=VALUE,..., that pick exactly the gateway's pods in its namespace")
	flags.StringSliceVar(&f.targets, "target", nil, "NAMESPACE/NAME or NAMESPACE/NAME=HOST of a Gateway resource that the workload implements, for policies with targetRefs; may be repeated, for each of its hosts too; default: as --gateway")
	flags.StringSliceVar(&f.nodes, "node", nil, "host and port of an analysis node, as the gateway reaches it; may be repeated")
	flags.StringVar(&f.form, "form", string(mcp.FormEnvoyFilter), "EnvoyFilter: policies change without touching listeners; TrafficExtension: by Istio's own API, each change closes connections")
	for _, name := range []string{"policy", "gateway", "selector", "node"} {
		_ = cmd.MarkFlagRequired(name) // fails only for flags that don't exist
	}
	return cmd
}

// plan is of the one gateway; it is an error if no policy governs that.
func (f *renderFlags) plan() (mirror.Plan, error) {
	gw := mirror.Gateway{Labels: f.selector, Selector: f.selector}
	var ok bool
	if gw.Namespace, gw.Name, ok = splitID(f.gateway, f.namespace); !ok {
		return mirror.Plan{}, fmt.Errorf("--gateway: %q is neither NAMESPACE/NAME nor NAME", f.gateway)
	}
	if len(f.selector) == 0 {
		return mirror.Plan{}, errors.New("--selector: state at least one label of the gateway's pods")
	}
	for _, t := range f.targets {
		id, written, limited := strings.Cut(t, "=")
		namespace, name, ok := splitID(id, gw.Namespace)
		if !ok {
			return mirror.Plan{}, fmt.Errorf("--target: %q is neither NAMESPACE/NAME nor NAME", id)
		}
		host, ok := policy.HostPattern(written)
		if limited && !ok {
			return mirror.Plan{}, fmt.Errorf("--target: %q is not a host such as shop.example, *.shop.example or *", written)
		}
		for _, group := range []string{policy.GroupGatewayAPI, policy.GroupIstio} {
			gw.Targets = append(gw.Targets, mirror.Target{Group: group, Namespace: namespace, Name: name, Hosts: []string{cmp.Or(host, "*")}})
		}
	}
	nodes, err := parseNodes(f.nodes)
	if err != nil {
		return mirror.Plan{}, err
	}
	s, err := source.New(source.Config{Path: f.policy, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return mirror.Plan{}, err
	}
	set, err := s.Load()
	if err != nil {
		return mirror.Plan{}, err
	}
	if faults := set.Refused(); len(faults) > 0 {
		return mirror.Plan{}, faultError(faults)
	}
	plan := mirror.Compile(set.Policies, mirror.Topology{
		Gateways: []mirror.Gateway{gw},
		Nodes:    []mirror.NodeService{{Endpoints: nodes, StandIn: true}},
	})
	if plan.Gateways[0].Policy == "" {
		return mirror.Plan{}, ungoverned(gw, plan.Attachments)
	}
	return plan, nil
}

// ungoverned says why none of the policies governs the gateway.
func ungoverned(gw mirror.Gateway, attachments []mirror.Attachment) error {
	lines := []string{fmt.Sprintf("no policy governs gateway %s", gw.ID())}
	for _, a := range attachments {
		for _, p := range a.Problems {
			lines = append(lines, a.Policy+": "+p)
		}
	}
	return errors.New(strings.Join(lines, "\n"))
}

// splitID reads NAMESPACE/NAME, or NAME in the namespace given.
func splitID(s, namespace string) (ns, name string, ok bool) {
	ns, name, qualified := strings.Cut(s, "/")
	if !qualified {
		ns, name = namespace, s
	}
	return ns, name, ns != "" && name != "" && !strings.Contains(name, "/")
}

// parseNodes reads addresses of nodes as gateways look them up.
func parseNodes(addrs []string) ([]mirror.Endpoint, error) {
	var out []mirror.Endpoint
	for _, a := range addrs {
		host, port, err := net.SplitHostPort(a)
		n, errPort := strconv.ParseUint(port, 10, 16)
		if err != nil || errPort != nil || host == "" || n == 0 {
			return nil, fmt.Errorf("--node: %q is not a host and a port, such as periscope-node.istio-ingress.svc.cluster.local:5050", a)
		}
		out = append(out, mirror.Endpoint{Host: host, Port: int(n)})
	}
	return out, nil
}
