package policy

import (
	"bytes"
	"strings"
)

// Selects says whether an exchange's host and path are among those that a
// policy wants mirrored. It is the reference for the gateway's plugin, which
// computes the same.
//
// It errs towards mirroring, so that no spelling of a path hides an attack:
// the path is looked at as it came and as NormalizePath makes it. Some entry
// of Match must hold for either form, and the exchange is left out only if
// some entry of Exclude holds for the one and some entry for the other.
//
// The host may carry a port, the path a query.
func Selects(s *Spec, host, path string) bool {
	host = CleanHost(host)
	raw := path
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		raw = path[:i]
	}
	normal := NormalizePath(raw)
	if len(s.Match) > 0 && !anyMatches(s.Match, host, raw) && !anyMatches(s.Match, host, normal) {
		return false
	}
	return !anyMatches(s.Exclude, host, raw) || !anyMatches(s.Exclude, host, normal)
}

func anyMatches(entries []Match, host, path string) bool {
	for i := range entries {
		if hostMatches(entries[i].Hosts, host) && pathMatches(entries[i].Paths, path) {
			return true
		}
	}
	return false
}

func hostMatches(patterns []string, host string) bool {
	for _, p := range patterns {
		if p == "*" || p == host {
			return true
		}
		if suffix, ok := strings.CutPrefix(p, "*"); ok && len(host) > len(suffix) && strings.HasSuffix(host, suffix) {
			return true
		}
	}
	return len(patterns) == 0
}

func pathMatches(patterns []PathMatch, path string) bool {
	for _, p := range patterns {
		if p.Type == PathExact {
			if path == p.Value {
				return true
			}
			continue
		}
		rest, ok := strings.CutPrefix(path, strings.TrimSuffix(p.Value, "/"))
		if ok && (p.Value == "/" || rest == "" || rest[0] == '/') {
			return true
		}
	}
	return len(patterns) == 0
}

// CleanHost gives a Host or :authority in lower case, without its port and
// one trailing dot.
func CleanHost(host string) string {
	host = lowerASCII(host)
	if strings.HasPrefix(host, "[") { // [::1]:8080
		if end := strings.IndexByte(host, ']'); end >= 0 {
			host = host[:end+1]
		}
	} else if i := strings.LastIndexByte(host, ':'); i >= 0 && strings.Trim(host[i+1:], "0123456789") == "" {
		host = host[:i]
	}
	return strings.TrimSuffix(host, ".")
}

// HostPattern gives a host in the form that Match.Hosts takes: in lower case
// and without a dot at its end. It is false for what can't be one.
func HostPattern(s string) (string, bool) {
	if s == "*" {
		return s, true
	}
	s = strings.TrimSuffix(lowerASCII(s), ".")
	return s, isSubdomain(strings.TrimPrefix(s, "*."))
}

// NormalizePath gives a path, without its query, as a server may come to
// understand it: percent-decoded once, with slashes for backslashes, without
// ;parameters, dot segments and repeated slashes. A path that names a
// directory by its end ("/a/", "/a/.", "/a/b/..") ends with a slash.
//
// What it returns is its own normal form, unless it holds a percent sign,
// which decoding once has left there.
func NormalizePath(path string) string {
	if !strings.ContainsAny(path, `%;\`) && !strings.Contains(path, "//") && !strings.Contains(path, "/.") {
		return path
	}
	path = strings.ReplaceAll(decodeOnce(path), `\`, "/")
	out := make([]byte, 0, len(path)+1)
	directory := false // whether the last segment names one
	for segment := range strings.SplitSeq(path, "/") {
		segment, _, _ = strings.Cut(segment, ";")
		switch segment {
		case "", ".":
			directory = true
		case "..":
			directory = true
			out = out[:max(0, bytes.LastIndexByte(out, '/'))]
		default:
			directory = false
			out = append(append(out, '/'), segment...)
		}
	}
	if directory || len(out) == 0 {
		out = append(out, '/')
	}
	return string(out)
}

// decodeOnce replaces each valid percent escape and leaves the others.
func decodeOnce(s string) string {
	if strings.IndexByte(s, '%') < 0 {
		return s
	}
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			hi, lo := unhex(s[i+1]), unhex(s[i+2])
			if hi >= 0 && lo >= 0 {
				out = append(out, byte(hi<<4|lo))
				i += 2
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}

func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// lowerASCII leaves other letters alone, of which some have an ASCII lower
// case (the Kelvin sign), and bytes that are no letters at all.
func lowerASCII(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return 'A' <= r && r <= 'Z' }) < 0 {
		return s
	}
	out := []byte(s)
	for i, c := range out {
		if 'A' <= c && c <= 'Z' {
			out[i] = c + 'a' - 'A'
		}
	}
	return string(out)
}
