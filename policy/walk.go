package policy

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

const (
	problemAlias = "anchors, aliases and merge keys are not supported"
	remedyAlias  = "write the value out"
)

// walker fills a struct from a YAML document by the struct's yaml tags. Where
// yaml.Decoder stops or guesses, it goes on and reports: every mistake once,
// with its place.
type walker struct {
	file   string
	shift  int // to add to the nodes' lines
	marks  map[string]mark
	broken map[string]bool // paths with a fault of their own
	faults []Fault
}

// mark is where a path stands in the document.
type mark struct{ line, column int }

func (w *walker) fault(path string, n *yaml.Node, problem, remedy string) {
	w.broken[path] = true
	w.report(path, n, problem, remedy)
}

// report adds a fault which does not keep the value from being judged.
func (w *walker) report(path string, n *yaml.Node, problem, remedy string) {
	if len(w.faults) <= maxFaults {
		w.faults = append(w.faults, Fault{File: w.file, Line: n.Line + w.shift, Column: n.Column, Path: path, Problem: problem, Remedy: remedy})
	}
}

// isBroken says whether path or something that holds it has a fault already.
func (w *walker) isBroken(path string) bool {
	for ; path != ""; path = parent(path) {
		if w.broken[path] {
			return true
		}
	}
	return w.broken[""]
}

// isClear says whether path was read, or left out, without any fault.
func (w *walker) isClear(path string) bool {
	return !w.isBroken(path) && !slices.ContainsFunc(w.faults, func(f Fault) bool { return f.Path == path })
}

// locate finds the line and column of the nearest thing that is written.
func (w *walker) locate(path string) (line, column int) {
	for ; path != ""; path = parent(path) {
		if m, ok := w.marks[path]; ok {
			return m.line + w.shift, m.column
		}
	}
	return w.marks[""].line + w.shift, w.marks[""].column
}

// placed gives a fault of the policy with its place in the file.
func (w *walker) placed(f Fault) Fault {
	f.File = w.file
	f.Line, f.Column = w.locate(f.Path)
	return f
}

var plainKey = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// child is the path of a key: spec.mode, metadata.labels["a.b/c"].
func child(path, key string) string {
	switch {
	case !plainKey.MatchString(key):
		return path + "[" + quote(key) + "]"
	case path == "":
		return key
	}
	return path + "." + key
}

func item(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

func parent(path string) string { return path[:max(0, strings.LastIndexAny(path, ".["))] }

// value reads n into v. Every failure is a fault and leaves v as it is.
func (w *walker) value(path string, n *yaml.Node, v reflect.Value) {
	if !w.plain(path, n) {
		return
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		// kubectl writes "creationTimestamp: null" for one that is not set.
		if v.Type() != reflect.TypeFor[time.Time]() {
			w.fault(path, n, "has no value", "give it one, or remove it")
		}
		return
	}
	switch out := v.Addr().Interface().(type) {
	case *time.Time:
		t, err := time.Parse(time.RFC3339, n.Value)
		if err != nil {
			w.wrongType(path, n, "a time", "write it as 2026-01-31T12:00:00Z")
			return
		}
		*out = t
		return
	case *Quantity:
		q, err := ParseQuantity(n.Value)
		if err != nil {
			w.fault(path, n, fmt.Sprintf("%v, got %s", err, describe(n)), "write it as 65536, 64Ki or 1Mi")
			return
		}
		*out = q
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		w.value(path, n, v.Elem())
	case reflect.Struct:
		w.object(path, n, v)
	case reflect.Map:
		w.table(path, n, v)
	case reflect.Slice:
		w.list(path, n, v)
	default:
		w.scalar(path, n, v)
	}
}

// plain refuses what makes a document mean more than it shows.
func (w *walker) plain(path string, n *yaml.Node) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		w.fault(path, n, problemAlias, remedyAlias)
		return false
	case n.Style&yaml.TaggedStyle != 0:
		w.fault(path, n, "YAML tags are not supported, got "+quote(n.Tag), "write the value without a tag")
		return false
	case n.Anchor != "":
		w.report(path, n, problemAlias, remedyAlias)
	}
	return true
}

// object reads a mapping with known keys.
func (w *walker) object(path string, n *yaml.Node, v reflect.Value) {
	fields := map[string]int{}
	var names []string
	for i := range v.NumField() {
		name := v.Type().Field(i).Tag.Get("yaml")
		fields[name] = i
		names = append(names, name)
	}
	var meant []string
	w.keys(path, n, func(key string, at, value *yaml.Node) {
		p := child(path, key)
		i, known := fields[key]
		if !known {
			remedy := "remove it; known here are " + list(names)
			if near := nearest(key, names); near != "" {
				remedy = fmt.Sprintf("did you mean %s?", near)
				meant = append(meant, child(path, near))
			}
			w.fault(p, at, "is not a known key", remedy)
			return
		}
		w.value(p, value, v.Field(i))
	})
	for _, p := range meant {
		if _, written := w.marks[p]; !written {
			w.broken[p] = true // misspelt rather than missing
		}
	}
}

// table reads a mapping with keys of the user's choice to strings.
func (w *walker) table(path string, n *yaml.Node, v reflect.Value) {
	out := map[string]string{}
	w.keys(path, n, func(key string, _, value *yaml.Node) {
		var s string
		w.value(child(path, key), value, reflect.ValueOf(&s).Elem())
		out[key] = s
	})
	v.Set(reflect.ValueOf(out))
}

// keys calls read for each key of a mapping, once, and marks its place.
func (w *walker) keys(path string, n *yaml.Node, read func(key string, at, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		w.wrongType(path, n, "a mapping", `write "key: value" pairs below it`)
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		p := child(path, key.Value)
		switch tag := key.ShortTag(); {
		case tag == "!!merge":
			w.fault(p, key, problemAlias, remedyAlias)
			continue
		case key.Kind != yaml.ScalarNode || tag == "!!null":
			w.fault(path, key, "has a key that is not a word", "write each key as a plain word")
			continue
		case !w.plain(p, key):
			continue
		}
		if first, ok := seen[key.Value]; ok {
			w.report(p, key, fmt.Sprintf("is set twice, first in line %d", first+w.shift), "keep one of the two")
			continue
		}
		seen[key.Value] = key.Line
		w.marks[p] = mark{key.Line, key.Column}
		if value.Kind == yaml.ScalarNode {
			w.marks[p] = mark{value.Line, value.Column}
		}
		read(key.Value, key, value)
	}
}

// list reads a sequence, each item from its defaults.
func (w *walker) list(path string, n *yaml.Node, v reflect.Value) {
	if n.Kind != yaml.SequenceNode {
		remedy := `write "- item" lines below it`
		if n.Kind == yaml.ScalarNode && v.Type().Elem().Kind() == reflect.String && len(n.Value) <= maxEchoBytes {
			remedy = fmt.Sprintf("write [%q]", n.Value)
		}
		w.wrongType(path, n, "a list", remedy)
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, c := range n.Content {
		p := item(path, i)
		w.marks[p] = mark{c.Line, c.Column}
		blankItem(out.Index(i).Addr().Interface())
		w.value(p, c, out.Index(i))
	}
	v.Set(out)
}

var (
	wholeNumber   = regexp.MustCompile(`^-?(0|[1-9][0-9]*)$`)
	decimalNumber = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?$`)
)

// scalar reads a string or a number. YAML's other ways to write numbers
// (octal, hexadecimal, 1_000, .inf) are refused: they are rarely meant.
func (w *walker) scalar(path string, n *yaml.Node, v reflect.Value) {
	tag, quoted := "", n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0
	if n.Kind == yaml.ScalarNode {
		tag = n.ShortTag()
	}
	switch v.Kind() {
	case reflect.String:
		if tag != "!!str" && tag != "!!timestamp" {
			remedy := "write a single value"
			if tag != "" {
				remedy = "put it in quotes: " + quote(n.Value)
			}
			w.wrongType(path, n, "a string", remedy)
			return
		}
		v.SetString(n.Value)
	case reflect.Int:
		i, err := strconv.ParseInt(n.Value, 10, 32)
		if tag == "" || quoted || err != nil || !wholeNumber.MatchString(n.Value) {
			w.wrongType(path, n, "a whole number", "write digits only, without quotes")
			return
		}
		v.SetInt(i)
	case reflect.Float64:
		f, err := strconv.ParseFloat(n.Value, 64)
		if tag == "" || quoted || err != nil || !decimalNumber.MatchString(n.Value) {
			w.wrongType(path, n, "a number", "write it as 100 or 2.5, without quotes")
			return
		}
		v.SetFloat(f)
	default:
		panic(fmt.Sprintf("policy: no way to read a %s", v.Type()))
	}
}

func (w *walker) wrongType(path string, n *yaml.Node, want, remedy string) {
	w.fault(path, n, "must be "+want+", got "+describe(n), remedy)
}

// describe names a node's type and value.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!int", "!!float":
		return "the number " + shorten(n.Value)
	case "!!bool":
		return "the boolean " + shorten(n.Value)
	}
	return "the string " + quote(n.Value)
}

// shorten repeats a number or boolean, which needs no quotes.
func shorten(s string) string {
	if len(s) > maxEchoBytes {
		return s[:maxEchoBytes] + "…"
	}
	return s
}
