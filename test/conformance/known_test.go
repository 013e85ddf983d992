package conformance

const (
	noResponseHeader = "a response that began and was cut has no trace in the event"
	noServerName     = "our HTTPS listener has no TLS inspector, which alone tells Lua the server name"
	noRequestEnd     = "the request's end is not written"
	noTunnel         = "a CONNECT tunnel is taken for a download"
)

// known are cases that fail, and why, by name or by name and protocol: the suite
// asserts that they still do.
var known = map[string]string{
	"TLS":                               noServerName,
	"TLS with the client's certificate": noServerName,
	"times":                             noRequestEnd,
	"response trailers without a body":  "trailers are asked for only behind a body",
	"burst with aborts, then silence":   "an aborted exchange counts as one whose end could still send the batch",
	"CONNECT":                           noTunnel,
	"endless response, client leaves":   noResponseHeader,
	"client aborts after the response's header":      noResponseHeader,
	"client aborts amid the response":                noResponseHeader,
	"upstream resets after the response's header":    noResponseHeader,
	"upstream closes after the response's header":    noResponseHeader,
	"upstream resets amid the response":              noResponseHeader,
	"upstream closes amid the response":              noResponseHeader,
	"h2 upstream resets after the response's header": noResponseHeader,
	"h2 upstream resets amid the response":           noResponseHeader,
}
