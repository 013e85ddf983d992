package detect

import (
	"net"
	"strconv"
	"strings"

	"github.com/corazawaf/coraza/v3"
	"github.com/corazawaf/coraza/v3/collection"
	"github.com/corazawaf/coraza/v3/experimental/plugins/plugintypes"
	"github.com/corazawaf/coraza/v3/types"
	"github.com/periscope-mesh/periscope/node/decode"
)

// Prefixes of the names under which ARGS_PATH gets what CRS does not cover.
const (
	headerArg  = "_header."
	segmentArg = "_segment"
)

// maxBodyVariable bounds REQUEST_BODY and RESPONSE_BODY as variables.
const maxBodyVariable = decode.MaxBodyBytes

// evaluate runs the rules and returns those that matched and say so.
func evaluate(waf coraza.WAF, x *Input, req *decode.Request, resp *decode.Response) []types.MatchedRule {
	tx := waf.NewTransaction()
	defer tx.Close() // returns it to its pool; what MatchedRules holds is not reused
	v := tx.(plugintypes.TransactionState).Variables()
	client, port := clientOf(x.Event.Source)
	tx.ProcessConnection(client, port, "", 0)
	setRequestLine(v, req, x.Event.Protocol)
	tx.SetServerName(req.Authority)
	addHeaders(v, req)
	for _, val := range req.Values {
		switch val.Kind {
		case decode.Query:
			tx.AddGetRequestArgument(unique(val.Key), val.Text)
		case decode.Cookie:
			v.RequestCookies().Add(unique(val.Key), val.Text)
		case decode.Path:
			for _, s := range suspectSegments(val.Text) {
				tx.AddPathRequestArgument(unique(segmentArg), s)
			}
		}
	}
	for _, h := range req.Headers {
		if inspectHeader(h.Name, h.Value) {
			tx.AddPathRequestArgument(headerArg+h.Name, h.Value)
		}
	}
	tx.ProcessRequestHeaders()
	addBody(tx, v, req)
	_, _ = tx.ProcessRequestBody() // fails only on body buffers, which are not used
	if resp != nil {
		status, _ := strconv.Atoi(resp.Status)
		for _, h := range resp.Headers {
			if h.Name != "content-encoding" { // undone already, and rules skip encoded bodies
				v.ResponseHeaders().Add(unique(h.Name), h.Value)
			}
		}
		tx.ProcessResponseHeaders(status, x.Event.Protocol)
		v.ResponseBody().(setter).Set(string(resp.Body[:min(len(resp.Body), maxBodyVariable)]))
		_, _ = tx.ProcessResponseBody()
	}
	var out []types.MatchedRule
	for _, m := range tx.MatchedRules() {
		if id := m.Rule().ID(); isJudgement(id) && len(m.MatchedDatas()) > 0 && hasMessage(m) {
			out = append(out, m)
		}
	}
	return out
}

// isJudgement tells rules about traffic from CRS's own bookkeeping.
func isJudgement(id int) bool { return id >= 913000 && id < 960000 || id >= ownRules }

// hasMessage tells rules that judge from those that only prepare.
func hasMessage(m types.MatchedRule) bool {
	for _, d := range m.MatchedDatas() {
		if d.Message() != "" {
			return true
		}
	}
	return m.Message() != ""
}

// unique copies a name. Coraza's cache of transformed values takes two values
// for one if their names share memory and their positions coincide, which
// repeated names would; every added name therefore has its own.
func unique(name string) string {
	if name == "" {
		name = "_" // a copy of nothing has no memory of its own
	}
	return strings.Clone(name)
}

// setRequestLine does what ProcessURI does, but leaves the query to us.
func setRequestLine(v plugintypes.TransactionVariables, req *decode.Request, protocol string) {
	set := func(s collection.Single, value string) { s.(setter).Set(value) }
	set(v.RequestMethod(), req.Method)
	set(v.RequestProtocol(), protocol)
	set(v.RequestURIRaw(), req.Target)
	set(v.RequestURI(), req.Target)
	set(v.RequestLine(), req.Method+" "+req.Target+" "+protocol)
	path := req.Path
	if len(req.Values) > 0 && req.Values[0].Kind == decode.Path {
		path = req.Values[0].Text
	}
	set(v.RequestFilename(), path)
	base := path
	if i := strings.LastIndexAny(path, `/\`); i >= 0 && i+1 < len(path) {
		base = path[i+1:]
	}
	set(v.RequestBasename(), base)
	set(v.QueryString(), req.Query)
}

// addHeaders fills REQUEST_HEADERS directly: AddRequestHeader would also
// choose a body processor and parse cookies.
func addHeaders(v plugintypes.TransactionVariables, req *decode.Request) {
	host := false
	for _, h := range req.Headers {
		host = host || h.Name == "host"
		v.RequestHeaders().Add(unique(h.Name), h.Value)
	}
	if !host && req.Authority != "" {
		v.RequestHeaders().Add("host", req.Authority)
	}
}

// addBody puts body values where CRS looks for them. JSON and XML leaves are
// ARGS_POST like form fields: every rule that reads XML reads ARGS as well.
func addBody(tx types.Transaction, v plugintypes.TransactionVariables, req *decode.Request) {
	for _, val := range req.Values {
		switch val.Kind {
		case decode.Form, decode.JSON, decode.XML, decode.Body:
			tx.AddPostRequestArgument(unique(val.Key), val.Text)
		case decode.Multipart:
			if val.Name == "filename" {
				v.Files().Add(unique(val.Key), val.Text)
				v.FilesNames().Add(unique(val.Key), val.Key)
				v.MultipartFilename().Add(unique(val.Key), val.Text)
			} else {
				v.MultipartPartHeaders().Add(unique(val.Key), val.Text)
			}
		}
	}
	if req.BodyKind == decode.Form {
		v.RequestBody().(setter).Set(string(req.Body[:min(len(req.Body), maxBodyVariable)]))
	}
}

// clientOf splits "ip:port".
func clientOf(source string) (string, int) {
	host, port, err := net.SplitHostPort(source)
	if err != nil {
		return strings.Trim(source, "[]"), 0
	}
	n, _ := strconv.Atoi(port)
	return host, n
}

// suspectSegments are the path's segments that hold what paths rarely hold;
// they are inspected like parameters, as REST APIs use them.
func suspectSegments(path string) []string {
	if !strings.ContainsAny(path, "'\"<>;|&$`(){}\\* \n") {
		return nil
	}
	var out []string
	for rest, more := path, true; more && len(out) < 32; {
		var s string
		s, rest, more = strings.Cut(rest, "/")
		if strings.ContainsAny(s, "'\"<>;|&$`(){}\\* \n") {
			if more && rest != "" {
				s += "/" + rest // a payload may hold slashes itself
				more = false
			}
			out = append(out, s)
		}
	}
	return out
}

// knownHeaders are read by servers themselves, inspected as what they are
// (Cookie), by CRS's own targets (User-Agent, Referer), or hold only what the
// client's software writes. Prefixes end in "-".
var knownHeaders = map[string]bool{
	"accept": true, "accept-": true, "authorization": true, "proxy-authorization": true, "connection": true,
	"content-length": true, "content-type": true, "content-encoding": true, "cookie": true, "host": true,
	"user-agent": true, "referer": true, "origin": true, "if-": true, "sec-": true, "te": true, "range": true,
	"cache-control": true, "pragma": true, "upgrade": true, "upgrade-insecure-requests": true, "priority": true,
	"traceparent": true, "tracestate": true, "baggage": true, "x-request-id": true, "x-b3-": true, "x-envoy-": true,
	"x-forwarded-client-cert": true, "x-amzn-": true, "grpc-": true, "via": true, "forwarded": true, "keep-alive": true,
	"transfer-encoding": true, "dnt": true, "date": true, "expect": true, "proxy-connection": true, "dpop": true,
}

// inspectHeader reports whether a header is inspected like a parameter.
func inspectHeader(name, value string) bool {
	if knownHeaders[name] {
		return false
	}
	if i := strings.IndexByte(name, '-'); i > 0 && knownHeaders[name[:i+1]] {
		return false
	}
	if parts := strings.SplitAfterN(name, "-", 3); len(parts) == 3 && knownHeaders[parts[0]+parts[1]] {
		return false
	}
	return !isToken(value)
}

// isToken accepts what identifiers, addresses, dates and versions consist of.
func isToken(s string) bool {
	if strings.HasPrefix(s, ".") || strings.Contains(s, "..") {
		return false
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '-', c == '_', c == '.', c == ':', c == ',', c == '+', c == '=':
		default:
			return false
		}
	}
	return true
}
