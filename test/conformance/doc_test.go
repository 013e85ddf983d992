// Package conformance tests the gateway plugin by what is true: a client and an
// upstream that record what they send and get, with a real Envoy between them,
// and the events that a real node took from it.
//
// Each way of exchanges to the node (transport) passes the same cases.
package conformance
