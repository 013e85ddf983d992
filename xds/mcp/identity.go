package mcp

import (
	"cmp"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// defaultRevision is the revision of an istiod that says none.
const defaultRevision = "default"

// Key is the key of the snapshot for the istiods of a revision; empty: of the
// default one.
func Key(revision string) string { return "istiod/" + cmp.Or(revision, defaultRevision) }

// Select recognises an istiod that takes us for a config source, and gives the
// key of its snapshot. Gateways and nodes of ours state a role (see
// xds.SelectByRole), and istioctl another generator.
//
// A key that has no snapshot gets no answer, and an istiod without an answer
// doesn't become ready: whoever doesn't make a snapshot for each revision has to
// serve all of them Key("").
func Select(n *core.Node) (key string, ok bool) {
	fields := n.GetMetadata().GetFields()
	if fields["GENERATOR"].GetStringValue() != "api" || fields["role"].GetStringValue() != "" {
		return "", false
	}
	return Key(fields["ISTIO_REVISION"].GetStringValue()), true
}
