package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"reflect"
	"regexp"
	"sort"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Limits of one file. A larger one is refused as a whole, and documents after
// the last that is allowed are not read.
const (
	MaxFileBytes = 1 << 20
	MaxDocuments = 256
)

// maxDepth is well above what a policy needs.
const maxDepth = 32

// Document is one policy of a file, accepted or refused on its own.
type Document struct {
	Line   int
	ID     string        // "namespace/name"; empty when a faulty document does not tell
	Policy *MirrorPolicy // with defaults; nil when there are faults
	Faults []Fault       // in the file's order
	// Warnings are of an accepted policy: what it does less than it seems to.
	Warnings []Fault
}

// Parse reads the policies of a file: one YAML (or JSON) document each,
// separated by "---" as kubectl expects. Empty documents are skipped. What
// cannot be told apart as documents (the file is too large, or no text) gives
// one document without an id.
func Parse(file string, data []byte) []Document {
	refuse := func(line int, problem, remedy string) Document {
		return Document{Line: line, Faults: []Fault{{File: file, Line: line, Problem: problem, Remedy: remedy}}}
	}
	if len(data) > MaxFileBytes {
		return []Document{refuse(1, fmt.Sprintf("is larger than %d bytes", MaxFileBytes), "split the file")}
	}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")) // byte order mark
	if line := badText(data); line > 0 {
		return []Document{refuse(line, "is not UTF-8 text without control characters", "save the file as plain UTF-8")}
	}
	var docs []Document
	for line, text := range documents(data) {
		root, fault := parseYAML(text, line)
		switch {
		case root == nil && fault == nil:
			continue
		case len(docs) == MaxDocuments:
			return append(docs, refuse(line, fmt.Sprintf("has more than %d documents", MaxDocuments), "split the file"))
		case fault != nil:
			fault.File = file
			docs = append(docs, Document{Line: fault.Line, Faults: []Fault{*fault}})
		default:
			docs = append(docs, read(file, root, line-1))
		}
	}
	return docs
}

// badText finds the first line that YAML cannot hold; 0: there is none.
func badText(data []byte) int {
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		control := r < ' ' && r != '\n' && r != '\t' && r != '\r' || r >= 0x7f && r < 0xa0 && r != 0x85
		if control || r == utf8.RuneError && size == 1 {
			return 1 + bytes.Count(data[:i], []byte("\n"))
		}
		i += size
	}
	return 0
}

// documents yields the text of each document that holds anything, with its
// first line's number. A line that starts with "---" or "..." separates them
// wherever it stands, for YAML forbids it even within quotes. Reading each by
// itself keeps a document's syntax error from its neighbours.
func documents(data []byte) iter.Seq2[int, []byte] {
	return func(yield func(int, []byte) bool) {
		start, first := 0, 1 // of the document
		offset, number := 0, 0
		blank := true
		for line := range bytes.Lines(data) {
			number++
			content := bytes.TrimSpace(line)
			begins, ends := isMarker(line, "---"), isMarker(line, "...") && isBlank(content[3:])
			if begins || ends {
				if !blank && !yield(first, data[start:offset]) {
					return
				}
				start, first, blank = offset, number, true
				content = bytes.TrimSpace(content[3:])
			}
			offset += len(line)
			if ends {
				start, first = offset, number+1
			}
			blank = blank && isBlank(content)
		}
		if !blank {
			yield(first, data[start:])
		}
	}
}

func isMarker(line []byte, marker string) bool {
	return bytes.HasPrefix(line, []byte(marker)) && (len(line) == len(marker) || bytes.IndexByte([]byte(" \t\r\n"), line[len(marker)]) >= 0)
}

// isBlank says whether there is nothing in a line but a comment.
func isBlank(line []byte) bool {
	line = bytes.TrimSpace(line)
	return len(line) == 0 || line[0] == '#'
}

// parseYAML gives the document's root, nil if it is empty. line is the
// number of the text's first line.
func parseYAML(text []byte, line int) (*yaml.Node, *Fault) {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	err := decoder.Decode(&doc)
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	if err == nil {
		err = decoder.Decode(&second)
	}
	switch {
	case err == nil:
		return nil, &Fault{Line: line, Problem: "holds two documents in one", Remedy: `put "---" on a line of its own between them`}
	case !errors.Is(err, io.EOF):
		return nil, syntaxFault(err, text, line)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.ShortTag() == "!!null" && root.Anchor == "" {
		return nil, nil
	}
	return root, nil
}

var (
	yamlError     = regexp.MustCompile(`(?s)^yaml: (?:line [0-9]+: )?(.*)$`)
	unknownAnchor = regexp.MustCompile(`(?s)^unknown anchor '(.*)' referenced$`)
)

// syntaxFault makes the best of the library's error. line is the number of
// the text's first line.
func syntaxFault(err error, text []byte, line int) *Fault {
	message := err.Error()
	if m := yamlError.FindStringSubmatch(message); m != nil {
		message = m[1]
	}
	fault := &Fault{Line: line + failingLine(err, text)}
	if unknownAnchor.MatchString(message) {
		fault.Problem, fault.Remedy = problemAlias, remedyAlias
		return fault
	}
	if len(message) > maxEchoBytes || printable(message) != message {
		message = quote(message)
	}
	fault.Problem, fault.Remedy = "is not valid YAML: "+message, "correct the syntax in this line or just above"
	return fault
}

// failingLine finds the line, from 0, at which the text stops being YAML. The
// library names none, or the one above, or the first of the mapping around the
// mistake; but the shortest part of the text that gives the same error ends at
// the mistake. Texts too long to be read again get their first line.
func failingLine(err error, text []byte) int {
	const maxBytes = 64 << 10
	if len(text) > maxBytes {
		return 0
	}
	var ends []int // of the lines
	for line := range bytes.Lines(text) {
		end := len(line)
		if len(ends) > 0 {
			end += ends[len(ends)-1]
		}
		ends = append(ends, end)
	}
	return sort.Search(len(ends)-1, func(i int) bool {
		var n yaml.Node
		e := yaml.Unmarshal(text[:ends[i]], &n)
		return e != nil && e.Error() == err.Error()
	})
}

// read turns a document into a policy. shift is what to add to its lines.
func read(file string, root *yaml.Node, shift int) Document {
	w := walker{file: file, shift: shift, marks: map[string]mark{"": {root.Line, root.Column}}, broken: map[string]bool{}}
	p := blank()
	if deeperThan(root, maxDepth) {
		w.fault("", root, fmt.Sprintf("is nested deeper than %d levels", maxDepth), "keep to the fields of a "+Kind)
	} else {
		w.value("", root, reflect.ValueOf(&p).Elem())
	}
	if _, set := w.marks["spec.sampling.adaptive.minPercent"]; !set {
		p.Spec.Sampling.Adaptive.MinPercent = max(0, min(maxDefaultMinPercent, p.Spec.Sampling.Percent))
	}
	p.normalize()
	faults := w.faults
	for _, f := range p.Validate() {
		if w.isBroken(f.Path) {
			continue // what follows from a mistake is not another one
		}
		faults = append(faults, w.placed(f))
	}
	doc := Document{Line: root.Line + shift, Faults: inOrder(faults)}
	if len(faults) == 0 {
		doc.Policy = &p
		for _, f := range p.Warnings() {
			if _, written := w.marks[f.Path]; written { // not what defaults say
				doc.Warnings = append(doc.Warnings, w.placed(f))
			}
		}
	}
	if p.Kind == Kind && isSubdomain(p.Metadata.Name) && isLabel(p.Metadata.Namespace) &&
		w.isClear("metadata") && w.isClear("metadata.name") && w.isClear("metadata.namespace") {
		doc.ID = p.ID()
	}
	return doc
}

func deeperThan(n *yaml.Node, levels int) bool {
	if levels < 0 {
		return true
	}
	for _, c := range n.Content {
		if deeperThan(c, levels-1) {
			return true
		}
	}
	return false
}
