package node

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/xds"
	"github.com/periscope-mesh/periscope/xds/node/nodev1"
)

func TestSnapshot(t *testing.T) {
	s, err := Snapshot(mirror.Plan{Revision: "abc", Nodes: []mirror.NodePolicy{
		{ID: "default/a", Revision: "abc1", Tenant: "shop", Application: "storefront", Mode: policy.ModeMonitor, Paranoia: 2,
			Exclusions: []policy.Exclusion{{RuleID: 942100, Target: "ARGS:q"}, {RuleID: 920350}}},
		{ID: "default/b", Mode: policy.ModeOff, Paranoia: 1},
		{ID: "default/c", Mode: policy.ModeEnforce, Paranoia: 4},
	}})
	if err != nil {
		t.Fatal(err)
	}
	list := s.Resources(xds.NodePolicyType)
	if len(list) != 1 || list[0].Name != ResourceName || list[0].Any.GetTypeUrl() != xds.NodePolicyType {
		t.Fatalf("resources: %v", list)
	}
	got := &nodev1.NodePolicySet{}
	if err := list[0].Any.UnmarshalTo(got); err != nil {
		t.Fatal(err)
	}
	want := &nodev1.NodePolicySet{Revision: "abc", Policies: []*nodev1.NodePolicy{
		{Id: "default/a", Revision: "abc1", Tenant: "shop", Application: "storefront", Mode: nodev1.Mode_MODE_MONITOR, Paranoia: 2,
			Exclusions: []*nodev1.Exclusion{{RuleId: 942100, Target: "ARGS:q"}, {RuleId: 920350}}},
		{Id: "default/b", Mode: nodev1.Mode_MODE_OFF, Paranoia: 1},
		{Id: "default/c", Mode: nodev1.Mode_MODE_ENFORCE, Paranoia: 4},
	}}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Error(d)
	}
}

// Nodes get the settings of gateways that stream, and of no others.
func TestSnapshotGateways(t *testing.T) {
	streams := mirror.Settings{Gateway: "ns/streams", PolicyID: "ns/p", Transport: policy.TransportExtProc, Mode: policy.ModeMonitor, Mask: policy.Mask{JSONPaths: []string{"$.a"}},
		Next: []mirror.Settings{{PolicyID: "ns/q", Transport: policy.TransportExtProc}}}
	s, err := Snapshot(mirror.Plan{Revision: "abc", Gateways: []mirror.GatewayPlan{
		{Gateway: mirror.Gateway{Namespace: "ns", Name: "batches"}, Settings: mirror.Settings{Gateway: "ns/batches"}},
		{Gateway: mirror.Gateway{Namespace: "ns", Name: "streams"}, Settings: streams},
	}})
	if err != nil {
		t.Fatal(err)
	}
	set := &nodev1.NodePolicySet{}
	if err := s.Resources(xds.NodePolicyType)[0].Any.UnmarshalTo(set); err != nil {
		t.Fatal(err)
	}
	if len(set.GetGateways()) != 1 || set.GetGateways()[0].GetGateway() != "ns/streams" || set.GetGateways()[0].GetRevision() != streams.Revision() {
		t.Fatalf("gateways: %v", set.GetGateways())
	}
	var got mirror.Settings
	if err := json.Unmarshal(set.GetGateways()[0].GetSettings(), &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(streams, got); d != "" {
		t.Error(d)
	}
}

func TestSnapshotFault(t *testing.T) {
	_, err := Snapshot(mirror.Plan{Nodes: []mirror.NodePolicy{{ID: "default/a", Mode: "Loud"}}})
	if err == nil || !strings.Contains(err.Error(), `default/a: unknown mode "Loud"`) {
		t.Errorf("error is %v", err)
	}
}

func TestIdentity(t *testing.T) {
	key, err := xds.SelectByRole(Identity("one"))
	if err != nil || key != xds.NodeKey {
		t.Errorf("key %q, error %v", key, err)
	}
}
