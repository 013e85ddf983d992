package conformance

// known are cases that fail, and why, by name or by name and protocol: the suite
// asserts that they still do.
var known = map[string]string{}
