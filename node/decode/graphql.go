package decode

import "strings"

// graphqlStrings takes a GraphQL document apart into its string literals. Its
// skeleton (names, punctuation, comments) is what clients' programs consist
// of: rules take it for SQL and shell by its parentheses and braces, while a
// server refuses whatever is not well formed there. So the document must be
// nothing but GraphQL's tokens, its brackets balanced; else ok is false, and
// it is inspected as the text it is.
func graphqlStrings(s string) (literals []string, ok bool) {
	s = strings.TrimSpace(s)
	if !startsGraphQL(s) {
		return nil, false
	}
	var open []byte
	for i := 0; i < len(s); {
		switch c := s[i]; {
		case strings.HasPrefix(s[i:], `"""`):
			end := strings.Index(s[i+3:], `"""`)
			if end < 0 {
				return nil, false
			}
			literals = append(literals, s[i+3:i+3+end])
			i += end + 6
		case c == '"':
			end := i + 1
			for end < len(s) && s[end] != '"' && s[end] != '\n' {
				if s[end] == '\\' {
					end++
				}
				end++
			}
			if end >= len(s) || s[end] != '"' {
				return nil, false
			}
			literals = append(literals, unescapeJSON([]byte(s[i+1:end])))
			i = end + 1
		case c == '#': // a comment may hold anything, so it is inspected
			end := strings.IndexByte(s[i:], '\n')
			if end < 0 {
				end = len(s) - i
			}
			literals = append(literals, s[i+1:i+end])
			i += end
		case c == '{' || c == '(' || c == '[':
			if len(open) >= maxDepth {
				return nil, false
			}
			open = append(open, c)
			i++
		case c == '}' || c == ')' || c == ']':
			if len(open) == 0 || !pairs(open[len(open)-1], c) {
				return nil, false
			}
			open = open[:len(open)-1]
			i++
		case isWord(c) || strings.IndexByte(" \t\r\n,:!$@=|&.-+", c) >= 0:
			i++
		default:
			return nil, false
		}
	}
	return literals, len(open) == 0
}

func startsGraphQL(s string) bool {
	for _, p := range []string{"{", "query", "mutation", "subscription", "fragment", "#"} {
		if rest, ok := strings.CutPrefix(s, p); ok {
			return strings.IndexByte(rest, '{') >= 0 || p == "{"
		}
	}
	return false
}

func pairs(open, end byte) bool {
	return open == '{' && end == '}' || open == '(' && end == ')' || open == '[' && end == ']'
}

func isWord(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_'
}
