package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxFaults bounds how many faults of one document are reported.
const maxFaults = 100

// maxEchoBytes bounds how much of a value a fault repeats.
const maxEchoBytes = 64

// Fault is one mistake in a policy: where it is, what is wrong and what to
// write instead. A policy that does not come from a file has neither File nor
// Line.
type Fault struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`
	Column  int    `json:"column,omitempty"`
	Path    string `json:"path,omitempty"` // spec.match[0].hosts[1]; empty: the whole document or file
	Problem string `json:"problem"`
	Remedy  string `json:"remedy,omitempty"`
}

// Error is the fault on one line: "file:line: path: problem; remedy".
func (f Fault) Error() string {
	var b strings.Builder
	if f.File != "" {
		b.WriteString(printable(f.File))
		if f.Line > 0 {
			fmt.Fprintf(&b, ":%d", f.Line)
		}
		b.WriteString(": ")
	}
	if f.Path != "" {
		b.WriteString(f.Path + ": ")
	}
	b.WriteString(f.Problem)
	if f.Remedy != "" {
		b.WriteString("; " + f.Remedy)
	}
	return b.String()
}

// inOrder sorts faults as they stand in the file and cuts them to maxFaults.
func inOrder(faults []Fault) []Fault {
	slices.SortStableFunc(faults, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column), cmp.Compare(a.Path, b.Path))
	})
	if len(faults) <= maxFaults {
		return faults
	}
	last := faults[maxFaults]
	faults = faults[:maxFaults]
	return append(faults, Fault{File: last.File, Line: last.Line, Column: last.Column,
		Problem: fmt.Sprintf("has more faults than the %d listed", maxFaults), Remedy: "correct these first"})
}

// quote repeats a value in a fault: cut, and with everything that is not
// printable escaped, for it may be hostile.
func quote(s string) string {
	if len(s) <= maxEchoBytes {
		return fmt.Sprintf("%q", s)
	}
	cut := maxEchoBytes
	for cut > maxEchoBytes-utf8.UTFMax && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return fmt.Sprintf("%q…", s[:cut])
}

// printable gives s as it is where a terminal may show it, and quoted where not.
func printable(s string) string {
	if utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	return fmt.Sprintf("%q", s)
}

// nearest finds the candidate that a misspelt or shortened word most likely
// means, or "".
func nearest(word string, candidates []string) string {
	if len(word) > maxEchoBytes {
		return ""
	}
	best, bestDistance := "", 1+max(1, min(3, len(word)/3))
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < bestDistance {
			best, bestDistance = c, d
		}
	}
	if best != "" || len(word) < 3 {
		return best
	}
	for _, c := range candidates {
		if strings.HasPrefix(strings.ToLower(c), strings.ToLower(word)) {
			return c
		}
	}
	return ""
}

// distance is the number of letters to insert, remove, replace or swap with
// their neighbour to make a into b.
func distance(a, b string) int {
	before, row := make([]int, len(b)+1), make([]int, len(b)+1)
	next := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		next[0] = i + 1
		for j := range len(b) {
			d := row[j]
			if a[i] != b[j] {
				d++
			}
			d = min(d, row[j+1]+1, next[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				d = min(d, before[j-1]+1)
			}
			next[j+1] = d
		}
		before, row, next = row, next, before
	}
	return row[len(b)]
}

// list joins words for a sentence: "a", "a or b", "a, b or c".
func list[S ~string](words []S) string {
	var b strings.Builder
	for i, w := range words {
		switch {
		case i > 0 && i == len(words)-1:
			b.WriteString(" or ")
		case i > 0:
			b.WriteString(", ")
		}
		b.WriteString(string(w))
	}
	return b.String()
}
