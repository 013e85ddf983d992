package attack

import (
	"fmt"
	"strings"
)

// Title is the type's name in prose, such as "Path traversal".
func (t Type) Title() string {
	switch t {
	case PathTraversal:
		return "Path traversal"
	case FileInclusion:
		return "File inclusion"
	case SQLInjection:
		return "SQL injection"
	case XSS:
		return "Cross-site scripting"
	case CommandInjection:
		return "Command injection"
	case CodeInjection:
		return "Code injection"
	case SSRF:
		return "Server-side request forgery"
	case SessionFixation:
		return "Session fixation"
	case Scanner:
		return "Scanner"
	case ProtocolViolation:
		return "Protocol violation"
	case DataLeakage:
		return "Data leakage"
	default:
		return "Other"
	}
}

// Types lists every type, in the order in which they are shown and in which
// ties of their scores are settled: the kind that names the target of an
// attack goes before the kind that names only its means.
func Types() []Type {
	return []Type{
		PathTraversal, SQLInjection, XSS, CommandInjection, CodeInjection, SSRF, FileInclusion,
		SessionFixation, ProtocolViolation, Scanner, DataLeakage, Other,
	}
}

// String is the severity's word; "unknown" if it has none.
func (s Severity) String() string {
	switch s {
	case Critical:
		return "critical"
	case Error:
		return "error"
	case Warning:
		return "warning"
	case Notice:
		return "notice"
	default:
		return "unknown"
	}
}

// ParseSeverity reads the word back, in any case.
func ParseSeverity(word string) (Severity, error) {
	for s := Notice; s <= Critical; s++ {
		if strings.EqualFold(word, s.String()) {
			return s, nil
		}
	}
	return 0, fmt.Errorf("severity %.20q is none of critical, error, warning and notice", word)
}

// Score is what a match of this severity adds to an anomaly score, as in CRS.
func (s Severity) Score() int {
	switch s {
	case Critical:
		return 5
	case Error:
		return 4
	case Warning:
		return 3
	case Notice:
		return 2
	default:
		return 0
	}
}

// MarshalText makes the word the severity's form in JSON.
func (s Severity) MarshalText() ([]byte, error) {
	if s < Notice || s > Critical {
		return nil, fmt.Errorf("severity %d has no word", int(s))
	}
	return []byte(s.String()), nil
}

// UnmarshalText is the inverse of MarshalText.
func (s *Severity) UnmarshalText(text []byte) error {
	v, err := ParseSeverity(string(text))
	if err != nil {
		return err
	}
	*s = v
	return nil
}
