package console

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/periscope-mesh/periscope/node/attack"
)

// piece is text of one kind.
type piece struct {
	Text string
	Kind string // "" as it is, "esc" stands for bytes that cannot be shown, "note" is ours
}

// run is pieces with the same marking.
type run struct {
	Mark   string // "", "hit" or "silenced"
	Pieces []piece
}

// span is a marked range of bytes.
type span struct {
	start, end int
	silenced   bool // of an excluded match
}

const (
	markContext  = 512 // bytes shown on either side of a mark in a long text
	maxCombining = 2   // marks on one letter that are shown as such
)

// runs renders bytes from traffic, with marks, as text that shows what it is:
// control characters, direction overrides, invisible characters and invalid
// UTF-8 become visible escapes. Of more than limit bytes only the beginning
// and the surroundings of marks are shown.
func runs(data []byte, marks []span, limit int) []run {
	kind := markKinds(len(data), marks)
	var out []run
	at := 0
	for _, w := range windows(len(data), marks, limit) {
		if w.start > at {
			out = append(out, run{Pieces: []piece{gapNote(w.start - at)}})
		}
		for at = w.start; at < w.end; {
			end := at + 1
			for end < w.end && kind(end) == kind(at) {
				end++
			}
			out = append(out, run{Mark: kind(at), Pieces: visible(data[at:end])})
			at = end
		}
	}
	if at < len(data) {
		out = append(out, run{Pieces: []piece{gapNote(len(data) - at)}})
	}
	return out
}

func gapNote(n int) piece {
	return piece{Text: fmt.Sprintf("[%s not shown]", plural(int64(n), "byte", "bytes")), Kind: "note"}
}

// markKinds tells the marking of each byte; a match that counts wins over a
// silenced one.
func markKinds(n int, marks []span) func(int) string {
	if len(marks) == 0 {
		return func(int) string { return "" }
	}
	kinds := make([]byte, n)
	for _, m := range marks {
		for i := max(m.start, 0); i < min(m.end, n); i++ {
			if !m.silenced {
				kinds[i] = 2
			} else if kinds[i] == 0 {
				kinds[i] = 1
			}
		}
	}
	names := [...]string{"", "silenced", "hit"}
	return func(i int) string { return names[kinds[i]] }
}

// windows are the ranges of n bytes to show, in order, without overlaps.
func windows(n int, marks []span, limit int) []span {
	if n <= limit {
		return []span{{start: 0, end: n}}
	}
	show := make([]bool, n)
	left := limit
	fill := func(from, to int) {
		for i := max(from, 0); i < min(to, n) && left > 0; i++ {
			if !show[i] {
				show[i] = true
				left--
			}
		}
	}
	fill(0, limit/4)
	for _, m := range marks {
		fill(m.start-markContext, m.end+markContext)
	}
	fill(0, n) // what is left of the limit, from the beginning
	var out []span
	for i := 0; i < n; i++ {
		if !show[i] {
			continue
		}
		start := i
		for i < n && show[i] {
			i++
		}
		out = append(out, span{start: start, end: i})
	}
	return out
}

// visible splits bytes into shown text and escapes.
func visible(b []byte) []piece {
	var out []piece
	var plain strings.Builder
	flush := func() {
		if plain.Len() > 0 {
			out = append(out, piece{Text: plain.String()})
			plain.Reset()
		}
	}
	escape := func(text string) {
		flush()
		if n := len(out); n > 0 && out[n-1].Kind == "esc" {
			out[n-1].Text += text
			return
		}
		out = append(out, piece{Text: text, Kind: "esc"})
	}
	combining := 0
	for len(b) > 0 {
		r, size := utf8.DecodeRune(b)
		if unicode.Is(unicode.M, r) {
			combining++
		} else {
			combining = 0
		}
		switch text, ok := escapeRune(r, size, b[0]); {
		case combining > maxCombining:
			escape(fmt.Sprintf("‹U+%04X›", r))
		case ok:
			escape(text)
		default:
			plain.WriteRune(r)
		}
		b = b[size:]
	}
	flush()
	return out
}

// escapeRune gives the visible form of what must not be shown as it is. Line
// feeds are: the pages show text as lines.
func escapeRune(r rune, size int, first byte) (string, bool) {
	switch {
	case r == utf8.RuneError && size <= 1:
		return fmt.Sprintf(`\x%02x`, first), true
	case r == '\n':
		return "", false
	case r == '\t':
		return `\t`, true
	case r == '\r':
		return `\r`, true
	case r < 0x20, r == 0x7f: // not ␀ ␛ and the like, which many fonts lack
		return fmt.Sprintf(`\x%02x`, r), true
	case !unicode.IsPrint(r): // C1 controls, direction marks, zero-width and other spaces, private use
		return fmt.Sprintf("‹U+%04X›", r), true
	}
	return "", false
}

// plain is visible as one string of one line, at most n bytes, for places that
// cannot have markup.
func plain(s string, n int) string {
	var b strings.Builder
	for _, p := range visible([]byte(s[:min(len(s), n)])) {
		b.WriteString(strings.ReplaceAll(p.Text, "\n", `\n`))
	}
	if len(s) > n {
		b.WriteString("…")
	}
	return b.String()
}

func plural(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return number(n) + " " + many
}

// about is a count for people: "≈ 120 ± 18" where it was estimated from a sample,
// without a line break in either part.
func about(c attack.Count) string {
	if !c.Sampled() {
		return number(c.Hits)
	}
	return "≈\u202f" + decimal(c.Estimated, c.Error()) + " ±\u202f" + decimal(c.Error(), c.Error())
}

// decimal writes v as closely as something of this error deserves.
func decimal(v, e float64) string {
	if e < 1 {
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return number(int64(min(math.Round(v), 1<<62)))
}

// number has spaces between thousands.
func number(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}
