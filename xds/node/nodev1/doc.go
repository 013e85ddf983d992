// Package nodev1 is what control plane and nodes say to each other: the message
// by which nodes get their part of the plan, and the service that takes their
// reports. Generated from the .proto files by hack/proto/generate.sh.
//
// It never holds anything but generated code and this comment.
//
// Package xds/node, which speaks for the control plane, and packages node/policy
// and node/report, which speak for the node, may import it: it is the contract
// between the two, and all that they share.
package nodev1
