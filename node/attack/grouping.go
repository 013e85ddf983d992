package attack

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of a path template.
const (
	maxTemplateBytes    = 256
	maxTemplateSegments = 16
	templateEllipsis    = "…"
	placeholder         = "{id}"
)

// Key groups hits into attacks: one client's one kind of attack on one place
// of one endpoint. It is stable across processes and releases, 32 hex digits.
func Key(h Hit) string {
	sum := sha256.New()
	var n [4]byte
	for _, part := range [...]string{
		h.Tenant, h.Application, h.Gateway, string(h.Type), strings.ToLower(h.Exchange.Host), h.Exchange.Method,
		PathTemplate(h.Exchange.Path), string(h.Location.Place), h.Location.Name, clientGroup(h.Client),
	} {
		// The length goes first, so that no two lists of parts run together.
		binary.BigEndian.PutUint32(n[:], uint32(len(part)))
		sum.Write(n[:])
		sum.Write([]byte(part))
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// clientGroup is the client's address, or its /64 if it is IPv6: whoever has
// one address of a /64 usually has all of them.
func clientGroup(client string) string {
	addr, err := netip.ParseAddr(client)
	if err != nil {
		return client
	}
	addr = addr.Unmap().WithZone("")
	if addr.Is4() {
		return addr.String()
	}
	prefix, err := addr.Prefix(64)
	if err != nil {
		return client
	}
	return prefix.String()
}

// ID names the attack that a hit with this key opens at first: short, safe in
// URLs, the same for the same arguments.
func ID(key string, first time.Time) string {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(first.UnixNano()))
	sum := sha256.Sum256(append(n[:], key...))
	return strings.ToLower(base32.HexEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:10]))
}

// PathTemplate is the path's shape: without query and fragment, identifiers
// replaced by {id}. Whatever goes in, what comes out is printable UTF-8 of at
// most 256 bytes and 16 segments.
func PathTemplate(path string) string {
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		path = path[:i]
	}
	var b strings.Builder
	for segments := 0; ; segments++ {
		segment, rest, more := strings.Cut(path, "/")
		if segments > maxTemplateSegments { // the first one is what precedes the leading slash
			b.WriteString(templateEllipsis)
			break
		}
		if isIdentifier(segment) {
			segment = placeholder
		}
		if !appendPrintable(&b, segment) {
			break
		}
		if !more {
			break
		}
		if !appendPrintable(&b, "/") {
			break
		}
		path = rest
	}
	if b.Len() == 0 {
		return "/"
	}
	return b.String()
}

// appendPrintable appends s, each rune that is not printable as "?". It
// reports whether all of it fitted; if not, an ellipsis ends the template.
func appendPrintable(b *strings.Builder, s string) bool {
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			r = '?'
		}
		if b.Len()+utf8.RuneLen(r) > maxTemplateBytes-len(templateEllipsis) {
			b.WriteString(templateEllipsis)
			return false
		}
		b.WriteRune(r)
	}
	return true
}

// isIdentifier tells an identifier from a word: decimal numbers, UUIDs, hex of
// at least 8 with a digit, and base64-like strings of at least 16 that mix
// digits and letters of both cases.
func isIdentifier(s string) bool {
	if s == "" || len(s) > 4096 {
		return len(s) > 4096 && isToken(s)
	}
	var digits, lower, upper, hexLetters, dashes, others int
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= '0' && c <= '9':
			digits++
		case c >= 'a' && c <= 'f', c >= 'A' && c <= 'F':
			hexLetters++
			if c >= 'a' {
				lower++
			} else {
				upper++
			}
		case c >= 'a' && c <= 'z':
			lower++
		case c >= 'A' && c <= 'Z':
			upper++
		case c == '-', c == '_', c == '=', c == '~':
			dashes++
		default:
			others++
		}
	}
	switch {
	case others > 0:
		return false
	case digits == len(s):
		return true
	case digits+hexLetters == len(s):
		return len(s) >= 8 && digits > 0
	case digits+hexLetters+dashes == len(s) && isUUID(s):
		return true
	}
	return len(s) >= 16 && digits >= 2 && lower > 0 && upper > 0 || len(s) >= 24 && digits >= 4 && dashes <= 2
}

// isToken reports whether s holds only characters of identifiers.
func isToken(s string) bool {
	return strings.IndexFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && r != '-' && r != '_' && r != '='
	}) < 0
}

func isUUID(s string) bool {
	return len(s) == 36 && s[8] == '-' && s[13] == '-' && s[18] == '-' && s[23] == '-' && strings.Count(s, "-") == 4
}
