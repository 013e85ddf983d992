// Package conformance tests what gateways copy by what is true: a client and an
// upstream that record what they send and get, with a real Envoy between them,
// and the events that a real node took from it.
//
// Each way of exchanges to the node (transport), the gateway plugin's and Envoy's
// ext_proc, passes the same cases; deviations lists what events tell otherwise,
// and why.
package conformance
