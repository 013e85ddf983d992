package conformance

const noServerName = "our HTTPS listener has no TLS inspector, which alone tells Lua the server name"

// known are cases that fail, and why, by name or by name and protocol: the suite
// asserts that they still do.
var known = map[string]string{
	"TLS":                               noServerName,
	"TLS with the client's certificate": noServerName,
}
