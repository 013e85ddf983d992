package detect

import (
	"bytes"
	"cmp"
	"slices"
	"strings"

	"github.com/corazawaf/coraza/v3/types"
	"github.com/periscope-mesh/periscope/node/attack"
	"github.com/periscope-mesh/periscope/node/decode"
)

// Bounds of what is kept of one inspection.
const (
	maxRuleLocations = 64   // of one rule
	maxMatches       = 1024 // of one exchange
	maxMessageBytes  = 256
	maxNameBytes     = 256
	maxTags          = 24
)

// source is a value of the exchange that a match can lie in.
type source struct {
	location attack.Location
	raw      []byte
	key      string   // the name by CRS's conventions
	targets  []string // CRS's variables that hold it
	order    int      // position in the exchange
}

// match is a match with what scoring needs.
type match struct {
	attack.Match
	order int
	weak  bool
}

// sources finds values by the variables and keys of matches.
type sources struct {
	args     map[string][]*source // by lower-case key
	headers  map[string][]*source
	cookies  map[string][]*source
	response map[string][]*source
	uri      []*source // path first, then query parameters
	body     []*source
	files    []*source // names of files
	parts    []*source // head lines of multipart bodies
	whole    *source   // the request line
	content  *source   // the response body
	n        int
}

func newSources(req *decode.Request, resp *decode.Response) *sources {
	s := &sources{
		args: map[string][]*source{}, headers: map[string][]*source{}, cookies: map[string][]*source{},
		response: map[string][]*source{},
	}
	s.whole = s.source(attack.InRequest, "", "", []byte(req.Target), "REQUEST_LINE", "REQUEST_URI", "REQUEST_URI_RAW")
	for i := range req.Values {
		s.value(&req.Values[i])
	}
	for _, h := range req.Headers {
		src := s.source(attack.InHeader, h.Name, h.Name, h.Raw, "REQUEST_HEADERS")
		s.headers[h.Name] = append(s.headers[h.Name], src)
	}
	if resp != nil {
		for _, h := range resp.Headers {
			src := s.source(attack.InRespHeader, h.Name, h.Name, h.Raw, "RESPONSE_HEADERS")
			s.response[h.Name] = append(s.response[h.Name], src)
		}
		s.content = s.source(attack.InResponse, "", "", resp.Body, "RESPONSE_BODY")
	}
	return s
}

func (s *sources) source(place attack.Place, name, key string, raw []byte, targets ...string) *source {
	s.n++
	return &source{
		location: attack.Location{Place: place, Name: printable(name[:min(len(name), maxNameBytes)])}, raw: raw, key: key, targets: targets, order: s.n,
	}
}

// printable makes text from traffic valid UTF-8.
func printable(text string) string { return strings.ToValidUTF8(text, "?") }

func (s *sources) value(v *decode.Value) {
	key := strings.ToLower(v.Key)
	switch v.Kind {
	case decode.Path:
		src := s.source(attack.InPath, "", "", v.Raw, "REQUEST_FILENAME", "REQUEST_URI", "REQUEST_URI_RAW", "REQUEST_BASENAME")
		s.uri = append(s.uri, src)
		s.args[segmentArg] = append(s.args[segmentArg], src)
	case decode.Query:
		src := s.source(attack.InQuery, v.Name, v.Key, v.Raw, "ARGS", "ARGS_GET")
		s.uri = append(s.uri, src)
		s.args[argKey(key)] = append(s.args[argKey(key)], src)
	case decode.Cookie:
		src := s.source(attack.InCookie, v.Name, v.Key, v.Raw, "REQUEST_COOKIES")
		s.cookies[argKey(key)] = append(s.cookies[argKey(key)], src)
	case decode.Multipart:
		if v.Name == "filename" {
			s.files = append(s.files, s.source(attack.InMultipart, v.Name, v.Key, v.Raw, "FILES", "FILES_NAMES"))
		} else {
			s.parts = append(s.parts, s.source(attack.InMultipart, v.Name, v.Key, v.Raw, "MULTIPART_PART_HEADERS"))
		}
	default:
		place := map[decode.Kind]attack.Place{
			decode.Form: attack.InForm, decode.JSON: attack.InJSON, decode.XML: attack.InXML, decode.Body: attack.InBody,
		}[v.Kind]
		src := s.source(place, v.Name, v.Key, v.Raw, "ARGS", "ARGS_POST")
		if v.Kind == decode.Body {
			src.targets = append(src.targets, "REQUEST_BODY")
		}
		s.body = append(s.body, src)
		s.args[argKey(key)] = append(s.args[argKey(key)], src)
	}
}

// argKey is the key under which evaluate adds a value without a name.
func argKey(key string) string {
	if key == "" {
		return "_"
	}
	return key
}

// find lists the values a match can lie in, most likely first; restricted
// says that CRS itself does not look there, names that the name matched.
func (s *sources) find(d types.MatchData) (candidates []*source, restricted, names bool) {
	key := strings.ToLower(d.Key())
	switch name := d.Variable().Name(); name {
	case "ARGS", "ARGS_GET", "ARGS_POST", "ARGS_PATH", "ARGS_NAMES", "ARGS_GET_NAMES", "ARGS_POST_NAMES":
		names = strings.HasSuffix(name, "_NAMES")
		candidates = s.args[key]
		if header, ok := strings.CutPrefix(key, headerArg); ok && len(candidates) == 0 {
			return s.headers[header], true, names
		}
		// Segments of the path, and text in binary bodies.
		restricted = len(candidates) > 0 && (key == segmentArg && candidates[0].location.Place == attack.InPath ||
			candidates[0].location == attack.Location{Place: attack.InBody, Name: "(text)"})
	case "REQUEST_HEADERS", "REQUEST_HEADERS_NAMES":
		names = strings.HasSuffix(name, "_NAMES")
		candidates = s.headers[key]
		if key == "cookie" {
			for _, c := range s.cookies {
				candidates = append(candidates[:len(candidates):len(candidates)], c...)
			}
		}
	case "REQUEST_COOKIES", "REQUEST_COOKIES_NAMES":
		names = strings.HasSuffix(name, "_NAMES")
		candidates = s.cookies[key]
	case "REQUEST_FILENAME", "REQUEST_BASENAME":
		candidates = s.uri[:min(1, len(s.uri))]
	case "REQUEST_URI", "REQUEST_URI_RAW", "REQUEST_LINE", "QUERY_STRING":
		candidates = append(append([]*source{}, s.uri...), s.whole)
	case "REQUEST_BODY":
		candidates = s.body
	case "FILES", "FILES_NAMES", "MULTIPART_FILENAME":
		candidates = s.files
	case "MULTIPART_PART_HEADERS":
		candidates = s.parts
	case "RESPONSE_BODY", "RESPONSE_STATUS":
		if s.content != nil {
			candidates = []*source{s.content}
		}
	case "RESPONSE_HEADERS":
		candidates = s.response[key]
	}
	return candidates, restricted, names
}

// resolve turns matched rules into matches with locations, each rule once per
// location.
func resolve(rules []types.MatchedRule, req *decode.Request, resp *decode.Response, exclusions []Exclusion) []match {
	s := newSources(req, resp)
	var out []match
	for _, r := range rules {
		seen := map[attack.Location]bool{}
		data := r.MatchedDatas()
		if len(data) > maxRuleLocations {
			// Coraza walks maps. Sorted, what exceeds the bound is the same for
			// every rule, and the locations kept get all of their matches.
			slices.SortStableFunc(data, func(a, b types.MatchData) int {
				return cmp.Or(cmp.Compare(a.ChainLevel(), b.ChainLevel()), cmp.Compare(a.Key(), b.Key()))
			})
		}
		want := ""
		for _, d := range data { // of a chain, only one of them has it
			if want == "" {
				want = matchedText(d.Data())
			}
		}
		kept := 0
		for _, d := range data {
			if w := matchedText(d.Data()); w != "" {
				want = w
			}
			if d.ChainLevel() > 0 && kept > 0 {
				continue // conditions of a chain, not what it is about
			}
			m, ok := s.match(r, d, want, exclusions)
			if !ok || seen[m.Location] {
				continue
			}
			// Excluded matches are not counted against the bound, or they could
			// crowd out others.
			if !m.Excluded {
				kept++
			}
			seen[m.Location] = true
			if out = append(out, m); kept >= maxRuleLocations || len(out) >= maxMatches {
				break
			}
		}
		if len(out) >= maxMatches {
			break
		}
	}
	return out
}

// match makes a match of one rule in one variable; false if it is none.
func (s *sources) match(r types.MatchedRule, d types.MatchData, want string, exclusions []Exclusion) (match, bool) {
	rule := r.Rule()
	candidates, restricted, names := s.find(d)
	if restricted && (names || !evidence[rule.ID()]) {
		return match{}, false
	}
	if id := rule.ID(); id/1000 == 941 && strings.EqualFold(d.Key(), decode.DoctypeKey) {
		return match{}, false // markup by nature: 941 matches every declaration
	}
	if names && rule.ID() == 942290 && odata[strings.ToLower(d.Key())] {
		return match{}, false
	}
	m := match{weak: isWeak(rule.ID(), want)}
	m.RuleID, m.Type, m.Severity = rule.ID(), typeOf(rule.ID(), rule.Tags()), severityOf(rule.Severity())
	m.Message, m.Tags = message(r), tags(rule.Tags())
	src, start, end := s.choose(candidates, d, want, names)
	if src == nil {
		if d.Variable().Name() == "TX" || strings.HasPrefix(d.Variable().Name(), "MATCHED_VAR") {
			src = s.whole
		} else {
			return match{}, false
		}
	}
	raw := src.raw
	if src.location.Place == attack.InPath && (m.RuleID == 930120 || m.RuleID == 930130) && insideWord(raw, want) {
		return match{}, false
	}
	if names {
		raw = []byte(d.Key())
		start, end = span(raw, want)
	}
	m.Location, m.order = src.location, src.order
	m.Value, m.Start, m.End = window(raw, start, end)
	m.Excluded = excluded(exclusions, rule.ID(), src, d, names)
	return m, true
}

// choose picks the value that holds the matched text.
func (s *sources) choose(candidates []*source, d types.MatchData, want string, names bool) (*source, int, int) {
	if len(candidates) == 0 {
		return nil, 0, 0
	}
	if names || len(candidates) == 1 {
		c := candidates[0]
		start, end := span(c.raw, want)
		return c, start, end
	}
	for _, c := range candidates {
		if start, end, ok := locate(c.raw, want); ok {
			return c, start, end
		}
	}
	// Without a trace of the text, the whole transformed value may tell.
	for _, c := range candidates {
		if _, _, ok := locate(c.raw, d.Value()); ok {
			return c, 0, len(c.raw)
		}
	}
	c := candidates[0]
	if last := candidates[len(candidates)-1]; last == s.whole {
		c = last // the request line, of which path and parameters are parts
	}
	return c, 0, len(c.raw)
}

// span is where the text stands in raw; the whole value if that is unknown.
func span(raw []byte, want string) (int, int) {
	if start, end, ok := locate(raw, want); ok {
		return start, end
	}
	return 0, len(raw)
}

// insideWord reports whether a file name, looked for as a part of the path,
// stands there only as the end of longer words: browserconfig.xml is not
// config.xml.
func insideWord(path []byte, want string) bool {
	hay, needle := lower(path), lower([]byte(want))
	if len(needle) == 0 || !isLetter(needle[0]) || !bytes.Contains(hay, needle) {
		return false
	}
	for from := 0; ; {
		i := bytes.Index(hay[from:], needle)
		if i < 0 {
			return true
		}
		if i += from; i == 0 || !isLetter(hay[i-1]) {
			return false
		}
		from = i + 1
	}
}

func isLetter(c byte) bool { return c >= 'a' && c <= 'z' }

// matchedText takes the matched part out of CRS's log data.
func matchedText(data string) string {
	_, rest, ok := strings.Cut(data, "Matched Data: ")
	if !ok {
		return ""
	}
	text, _, ok := strings.Cut(rest, " found within ")
	if !ok {
		return ""
	}
	return text
}

func message(r types.MatchedRule) string {
	text := r.Message()
	for _, d := range r.MatchedDatas() {
		if text == "" {
			text = d.Message()
		}
	}
	return printable(text[:min(len(text), maxMessageBytes)])
}

// tags copies those that say something about the rule.
func tags(all []string) []string {
	out := make([]string, 0, len(all))
	for _, t := range all {
		if len(out) < maxTags && !strings.HasPrefix(t, "application-") && t != "OWASP_CRS" {
			out = append(out, t)
		}
	}
	return out
}

// excluded reports whether a policy silences the rule there.
func excluded(list []Exclusion, id int, src *source, d types.MatchData, names bool) bool {
	for _, x := range list {
		if x.RuleID != id {
			continue
		}
		variable, key, _ := strings.Cut(x.Target, ":")
		if variable == "" {
			return true
		}
		own := strings.EqualFold(variable, d.Variable().Name())
		if own && (key == "" || strings.EqualFold(key, d.Key())) {
			return true
		}
		if names {
			continue
		}
		for _, t := range src.targets {
			if strings.EqualFold(variable, t) &&
				(key == "" || strings.EqualFold(key, src.key) || strings.EqualFold(key, src.location.Name)) {
				return true
			}
		}
	}
	return false
}
