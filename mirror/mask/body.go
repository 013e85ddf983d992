package mask

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
)

// inJSON hides the values of the names at any depth. It looks for names in
// quotes before a colon, so a value that does not end is hidden to the end.
func inJSON(body []byte, names map[string]bool) []byte {
	var out cutter
	for from := 0; ; {
		quote := index(body, '"', from)
		if quote < 0 {
			return out.rest(body)
		}
		from = quote + 1
		end := from
		for end < len(body) && isNameByte(body[end]) {
			end++
		}
		if end == len(body) || body[end] != '"' || !names[lower(unescape(body[from:end]))] {
			continue
		}
		value := skipSpace(body, end+1)
		if value == len(body) || body[value] != ':' {
			continue
		}
		value = skipSpace(body, value+1)
		from = valueEnd(body, value)
		out.hide(body, value, from, `"`+Hidden+`"`)
	}
}

// isNameByte tells the bytes of a policy's JSON names, and of escapes.
func isNameByte(c byte) bool {
	return c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'z' || c == '_' || c == '-' || c == '\\'
}

// unescape undoes the escapes of JSON that can stand for a name's letters.
func unescape(name []byte) []byte {
	out := make([]byte, 0, len(name))
	for i := 0; i < len(name); i++ {
		if i+5 < len(name) && string(name[i:i+4]) == `\u00` && isHex(name[i+4]) && isHex(name[i+5]) {
			out = append(out, fromHex(name[i+4])<<4|fromHex(name[i+5]))
			i += 5
			continue
		}
		out = append(out, name[i])
	}
	return out
}

func skipSpace(b []byte, i int) int {
	for i < len(b) && (b[i] == ' ' || b[i] >= '\t' && b[i] <= '\r') {
		i++
	}
	return i
}

// stringEnd gives the place after the closing quote of the string that begins
// at i; -1: it does not end.
func stringEnd(b []byte, i int) int {
	for i++; i < len(b); i++ {
		switch b[i] {
		case '\\':
			i++
		case '"':
			return i + 1
		}
	}
	return -1
}

// valueEnd gives the place after the JSON value that begins at i.
func valueEnd(b []byte, i int) int {
	if i == len(b) {
		return i
	}
	switch b[i] {
	case '"':
		if end := stringEnd(b, i); end >= 0 {
			return end
		}
		return len(b)
	case '{', '[':
		for depth := 0; i < len(b); i++ {
			switch b[i] {
			case '"':
				end := stringEnd(b, i)
				if end < 0 {
					return len(b)
				}
				i = end - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1
				}
			}
		}
		return i
	}
	for i < len(b) && b[i] != ',' && b[i] != '}' && b[i] != ']' && skipSpace(b[i:i+1], 0) == 0 {
		i++
	}
	return i
}

// inMultipart hides parts (RFC 7578) by the name in their Content-Disposition,
// from the end of that line to the next boundary, or to the end where there is
// none or the boundary is not known.
func (n names) inMultipart(body []byte, boundary string) []byte {
	const header, hidden = "content-disposition", "\r\n\r\n" + Hidden
	var out cutter
	folded := []byte(lower(body))
	newline := "\n"
	if bytes.Contains(body, []byte("\r\n")) {
		newline = "\r\n"
	}
	for from := 0; ; {
		i := bytes.Index(folded[from:], []byte(header))
		if i < 0 {
			break
		}
		from += i + len(header)
		colon := skipSpace(body, from)
		if colon == len(body) || body[colon] != ':' {
			continue
		}
		end := lineEnd(body, colon+1)
		if end < 0 {
			break
		}
		value := body[colon+1 : end]
		if from = end; !n.inDisposition(value) {
			continue
		}
		from = nextPart(body, end, newline+"--", boundary)
		out.hide(body, end, from, hidden)
	}
	return out.rest(body)
}

// lineEnd gives the end of the header line in which i is, with the lines that
// continue it; -1: the body ends first.
func lineEnd(body []byte, i int) int {
	for {
		if i = index(body, '\n', i); i < 0 || i+1 == len(body) {
			return -1
		}
		if c := body[i+1]; c != ' ' && c != '\t' {
			if body[i-1] == '\r' {
				return i - 1
			}
			return i
		}
		i++
	}
}

var boundaryEnd = regexp.MustCompile(`^(--)?[ \t]*(\r?\n|$)`)

// nextPart finds the line break before the next boundary.
func nextPart(body []byte, from int, dashes, boundary string) int {
	if boundary == "" {
		return len(body)
	}
	delimiter := []byte(dashes + boundary)
	for {
		i := bytes.Index(body[from:], delimiter)
		if i < 0 {
			return len(body)
		}
		from += i
		if boundaryEnd.Match(body[from+len(delimiter):]) {
			return from
		}
		from++
	}
}

var (
	boundaryStart = regexp.MustCompile(`boundary[\t-\r ]*[=*]`)
	boundaryForm  = regexp.MustCompile(`^[\t-\r ]*(?:"([^"\\]+)"|([^";,\\\t-\r ]+)[\t-\r ]*(?:;|$))`)
)

// boundary reads the boundary of a content type; "" if it is missing or can be
// read in more than one way.
func boundary(contentType string) string {
	all := boundaryStart.FindAllStringIndex(lower([]byte(contentType)), 2)
	if len(all) != 1 || contentType[all[0][1]-1] != '=' {
		return ""
	}
	m := boundaryForm.FindStringSubmatch(contentType[all[0][1]:])
	if m == nil {
		return ""
	}
	return m[1] + m[2]
}

var nameParameter = regexp.MustCompile(`^name(?:(\*)([0-9]*)(\*?))?$`)

// inDisposition says whether a Content-Disposition names a masked field, by any
// of its name parameters, as RFC 7578, RFC 5987 and RFC 2231 write them.
func (n names) inDisposition(v []byte) bool {
	continued := map[int][]byte{}
	equals, quote := 0, 0
	for at := index(v, ';', 0); at >= 0; {
		at++
		if equals < at {
			equals = index(v, '=', at)
		}
		if equals < 0 {
			break
		}
		if next := index(v, ';', at); next >= 0 && next < equals {
			at = next
			continue
		}
		form := nameParameter.FindStringSubmatch(letters(v[at:equals]))
		next := index(v, ';', equals)
		if quote >= 0 && quote < equals {
			quote = index(v, '"', equals)
		}
		quoted := quote >= 0 && (next < 0 || quote < next)
		end := next
		if end < 0 {
			end = len(v)
		}
		value := v[equals+1 : end]
		if quoted {
			if end = stringEnd(v, quote); end < 0 {
				value, next = v[quote+1:], -1
			} else {
				value, next = v[quote+1:end-1], index(v, ';', end)
			}
			if form != nil && n.has(v[equals+1:quote]) {
				return true
			}
		}
		if at = next; form == nil {
			continue
		}
		if form[1] != "" && (form[2] == "" || form[2]+form[3] == "0*") {
			if parts := bytes.SplitN(value, []byte{'\''}, 3); len(parts) == 3 {
				value = parts[2] // charset'language'value
			}
		}
		if form[2] != "" {
			if !quoted {
				value = visible(value)
			}
			if i, err := strconv.Atoi(form[2]); err == nil {
				continued[i] = value
			}
		} else if n.has(value) || n.has(unquote(value)) || !quoted && n.has(spaced(value)) {
			return true
		}
	}
	var name []byte
	for i := 0; continued[i] != nil; i++ {
		name = append(name, continued[i]...)
	}
	return len(name) > 0 && (n.has(name) || n.has(unquote(name)))
}

// letters gives a parameter's name in lower case without anything else that
// stands there.
func letters(v []byte) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '*' {
			return r
		}
		return -1
	}, lower(v))
}

// visible leaves out spaces, and what is beyond ASCII: there are spaces among it.
func visible(v []byte) []byte {
	return bytes.Map(func(r rune) rune {
		if r <= ' ' || r >= 0x80 {
			return -1
		}
		return r
	}, v)
}

// spaced has spaces for what is beyond ASCII.
func spaced(v []byte) []byte {
	return bytes.Map(func(r rune) rune {
		if r >= 0x80 {
			return ' '
		}
		return r
	}, v)
}

// unquote undoes backslashes.
func unquote(v []byte) []byte {
	out := make([]byte, 0, len(v))
	for i := 0; i < len(v); i++ {
		if v[i] == '\\' && i+1 < len(v) {
			i++
		}
		out = append(out, v[i])
	}
	return out
}

// inCards hides runs of whole digit groups, apart by spaces and dashes, that
// make 13 to 19 digits and satisfy the Luhn formula.
func inCards(v []byte) []byte {
	var out cutter
	for i := 0; i < len(v); i++ {
		if !isDigit(v[i]) {
			continue
		}
		start, end := i, i
		for ; i < len(v) && (isDigit(v[i]) || v[i] == ' ' || v[i] == '-'); i++ {
			if isDigit(v[i]) {
				end = i + 1
			}
		}
		if end-start >= 13 {
			inRun(&out, v, start, end)
		}
	}
	return out.rest(v)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// group is a group of digits and its part of a Luhn sum, with its last digit
// doubled or not.
type group struct{ from, to, plain, doubled int }

func inRun(out *cutter, v []byte, start, end int) {
	var groups []group
	for i := start; i < end; {
		if !isDigit(v[i]) {
			i++
			continue
		}
		g := group{from: i}
		for i < end && isDigit(v[i]) {
			d := int(v[i] - '0')
			g.plain, g.doubled = g.doubled+d, g.plain+2*d-d/5*9
			i++
		}
		g.to = i
		groups = append(groups, g)
	}
	for i := 0; i < len(groups); i++ {
		digits, plain, doubled := 0, 0, 0
		for j := i; j < len(groups); j++ {
			g := groups[j]
			if (g.to-g.from)%2 == 1 {
				plain, doubled = doubled, plain
			}
			digits, plain, doubled = digits+g.to-g.from, plain+g.plain, doubled+g.doubled
			if digits > 19 {
				break
			}
			if digits >= 13 && plain%10 == 0 {
				stars := bytes.Map(func(r rune) rune {
					if r >= '0' && r <= '9' {
						return '*'
					}
					return r
				}, v[groups[i].from:g.to])
				out.hide(v, groups[i].from, g.to, string(stars))
				i = j
				break
			}
		}
	}
}
