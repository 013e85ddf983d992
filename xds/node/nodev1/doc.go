// Package nodev1 is the message by which nodes get their part of the plan,
// generated from node_policy.proto by hack/proto/generate.sh.
//
// It never holds anything but generated code and this comment.
//
// Package xds/node, which sends the message, and package node/policy, which
// takes it, may import it: it is the contract between control plane and node,
// and all that the two share.
package nodev1
