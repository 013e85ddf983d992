package console

import (
	"bytes"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/periscope-mesh/periscope/node/attack"
)

const (
	maskMark   = "***"      // what the gateway plugin puts in place of a masked value
	maskText   = "<masked>" // what the command has instead
	maxCurl    = 32 << 10   // longer bodies are not made into a command
	dummyHost  = "HOST"     // for an authority that is none
	curlIndent = " \\\n  "
)

// maskedValue is a masked parameter, cookie, field or JSON value; stars in place
// of a card's digits are more than three.
var maskedValue = regexp.MustCompile(`(["=]|\r\n\r\n)\*\*\*([^*]|$)`)

func showMasks(s string) string {
	return maskedValue.ReplaceAllString(s, "${1}"+maskText+"${2}")
}

// curlCommand is a command for a POSIX shell with bash's $” that sends the
// exchange's request again. Every value from traffic is quoted, and nothing in
// it can be an option, a file name or another command.
func curlCommand(x *attack.Exchange) (command string, notes []string) {
	args := []string{"curl -i --path-as-is --globoff"}
	method := x.Method
	if !isToken(method) {
		method = http.MethodGet
		notes = append(notes, "The method was not a valid one; the command uses GET.")
	}
	body := x.Request.Body
	switch {
	case method == http.MethodHead:
		args = append(args, "--head")
	case method != http.MethodGet || len(body) > 0:
		args = append(args, "-X "+shellQuote(method))
	}
	headers, masked := curlHeaders(x)
	args = append(args, headers...)
	before := ""
	if len(body) > maxCurl {
		body = nil
		notes = append(notes, "The body is too long for a command line and was left out.")
	} else if shown := []byte(showMasks(string(body))); len(shown) > 0 {
		masked = masked || len(shown) != len(body)
		if bytes.IndexByte(shown, 0) >= 0 { // no argument can hold it
			before = "printf -- " + printfQuote(shown) + " | "
			args = append(args, "--data-binary @-")
		} else {
			args = append(args, "--data-raw "+shellQuote(string(shown)))
		}
	}
	if uint64(len(x.Request.Body)) < x.Request.BodyBytes {
		notes = append(notes, "The copy of the body was cut at the gateway, so the command sends less than the client did.")
	}
	if masked || showMasks(x.Path) != x.Path {
		notes = append(notes, "Values masked at the gateway are written "+maskText+": put yours in.")
	}
	return before + strings.Join(append(args, curlTarget(x)...), curlIndent), notes
}

// curlHeaders leaves out what curl, or the gateway, writes itself.
func curlHeaders(x *attack.Exchange) (args []string, masked bool) {
	for _, f := range x.Request.Headers {
		name := strings.ToLower(f.Name)
		switch name {
		case "content-length", "transfer-encoding", "connection", "host", "x-request-id", "x-forwarded-proto", "x-forwarded-for":
			continue
		}
		if !isToken(f.Name) || strings.HasPrefix(name, "x-envoy-") {
			continue
		}
		line := f.Name + ": " + showMasks(f.Value)
		masked = masked || len(line) != len(f.Name)+2+len(f.Value)
		switch f.Value {
		case "":
			line = f.Name + ";"
		case maskMark:
			line, masked = f.Name+": "+maskText, true
		}
		args = append(args, "-H "+shellQuote(line))
	}
	for _, f := range x.Request.Headers { // curl would add its own
		if strings.EqualFold(f.Name, "content-type") {
			return args, masked
		}
	}
	if len(x.Request.Body) > 0 {
		args = append(args, "-H 'content-type:'")
	}
	return args, masked
}

// curlTarget is the URL; a target that a URL cannot express goes beside it.
func curlTarget(x *attack.Exchange) []string {
	scheme, host := "http", x.Host
	if x.Scheme == "https" {
		scheme = "https"
	}
	if !isAuthority(host) {
		host = dummyHost
	}
	path := showMasks(x.Path)
	if path == "" {
		path = "/"
	}
	if path[0] == '/' && !strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' }) {
		return []string{shellQuote(scheme + "://" + host + path)}
	}
	return []string{"--request-target " + shellQuote(path), shellQuote(scheme + "://" + host + "/")}
}

// isToken reports whether s can be a method or a header name (RFC 9110).
func isToken(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != "" && len(s) <= 256 && s[0] != '-' && s[0] != '@'
}

// isAuthority reports whether s is a host with an optional port and nothing
// that a URL would read as something else.
func isAuthority(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') && strings.IndexByte(".-_:[]", c) < 0 {
			return false
		}
	}
	return s != "" && s[0] != '-'
}

// shellQuote makes one word of s: in single quotes if it is printable ASCII,
// else with escapes, so that what is pasted is what is seen.
func shellQuote(s string) string {
	s = strings.ReplaceAll(s, "\x00", "") // ends an argument; only bodies can have it
	simple := true
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			simple = false
		}
	}
	if simple {
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	var b strings.Builder
	b.WriteString("$'")
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '\'' || c == '\\':
			b.WriteByte('\\')
			b.WriteByte(c)
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\r':
			b.WriteString(`\r`)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	b.WriteByte('\'')
	return b.String()
}

// printfQuote is a format of printf that writes b.
func printfQuote(b []byte) string {
	var out strings.Builder
	out.WriteByte('\'')
	for _, c := range b {
		if c < ' ' || c > '~' || c == '\'' || c == '\\' || c == '%' {
			fmt.Fprintf(&out, `\%03o`, c)
		} else {
			out.WriteByte(c)
		}
	}
	out.WriteByte('\'')
	return out.String()
}
