package policy

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// The gateways that a policy may target.
const (
	GroupGatewayAPI = "gateway.networking.k8s.io"
	GroupIstio      = "networking.istio.io"
	KindGateway     = "Gateway"
)

// Bounds of a policy's lists and values.
const (
	maxTargetRefs   = 16
	maxEntries      = 64 // of every other list
	maxExclusions   = 256
	maxPathBytes    = 1024
	maxNameBytes    = 128 // of a header, a masked name, a media type or an excluded target
	maxJSONPath     = 256
	maxBodyBytes    = 1 << 20
	minRuleID       = 900_000
	maxRuleID       = 999_999
	maxParanoia     = 4
	maxDNSNameBytes = 253
)

var (
	labelForm  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	headerForm = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9a-z-]+$")
	// As they are once decoded, in lower case.
	parameterForm = regexp.MustCompile(`^[^\x00-\x20\x7f"#%&+;=?A-Z\\]+$`)
	mediaTypeForm = regexp.MustCompile(`^(\*/\*|[a-z0-9!#$&^_.+-]+/(\*|[a-z0-9!#$&^_.+-]+))$`)
	jsonPathForm  = regexp.MustCompile(`^\$(\.[A-Za-z0-9_-]+(\[\*\])?)*\.[A-Za-z0-9_-]+$`)
	// No quotes, commas, bars and backslashes: a target becomes part of a rule.
	targetForm = regexp.MustCompile(`^([A-Z_]+)(:[A-Za-z0-9_.$@\[\]*-]+)?$`)
)

// Validate reports everything that is wrong with a policy, wherever it comes
// from. Defaults are not applied: names, media types and hosts must be lower
// case, and whatever must be set, set.
func (p *MirrorPolicy) Validate() []Fault {
	var c checker
	c.equal("apiVersion", p.APIVersion, APIVersion)
	c.equal("kind", p.Kind, Kind)
	if c.required("metadata.name", p.Metadata.Name, "name the policy") && !isSubdomain(p.Metadata.Name) {
		c.add("metadata.name", "must be a DNS name, got "+quote(p.Metadata.Name), remedyName)
	}
	if c.required("metadata.namespace", p.Metadata.Namespace, "name the gateways' namespace") {
		c.label("metadata.namespace", p.Metadata.Namespace)
	}
	p.Spec.check(&c)
	return c.faults
}

func (s *Spec) check(c *checker) {
	if s.Tenant != "" {
		c.label("spec.tenant", s.Tenant)
	}
	if s.Application != "" {
		c.label("spec.application", s.Application)
	}
	s.checkTargets(c)
	if s.Mode == ModeEnforce {
		c.add("spec.mode", "Enforce is not available: Periscope registers attacks and does not block them", "write "+string(ModeMonitor))
	} else {
		oneOf(c, "spec.mode", s.Mode, ModeOff, ModeMonitor)
	}
	oneOf(c, "spec.transport", s.Transport, TransportLua, TransportExtProc)
	c.matches("spec.match", s.Match, false)
	c.matches("spec.exclude", s.Exclude, true)
	s.Sampling.check(c)
	if s.Transport == TransportExtProc && len(s.Sampling.Always) > 0 {
		c.add("spec.sampling.always", "is not possible with transport ExtProc: there Envoy samples, before anybody has seen the exchange",
			"remove it, or write transport: "+string(TransportLua))
	}
	if s.Transport == TransportExtProc && s.Sampling.Session != (Session{}) {
		c.add("spec.sampling.session", "is not possible with transport ExtProc: there Envoy samples, exchange by exchange",
			"remove it, or write transport: "+string(TransportLua))
	}
	c.body("spec.body.request", s.Body.Request)
	c.body("spec.body.response", s.Body.Response)
	s.Mask.check(c)
	s.Detection.check(c)
	s.Nodes.check(c)
}

// Warnings tells what a valid policy does less than its reader may think.
func (p *MirrorPolicy) Warnings() []Fault {
	var c checker
	if p.Spec.Transport == TransportExtProc {
		const problem = "is masked by the nodes with transport ExtProc: the values leave the gateway before"
		remedy := "keep the way to the nodes as safe as the gateway, or write transport: " + string(TransportLua)
		m := p.Spec.Mask
		for _, field := range []struct {
			name string
			set  int
		}{
			{"cookies", len(m.Cookies)}, {"queryParameters", len(m.QueryParameters)}, {"formFields", len(m.FormFields)},
			{"jsonPaths", len(m.JSONPaths)}, {"detectors", len(m.Detectors)},
		} {
			if field.set > 0 {
				c.add("spec.mask."+field.name, problem, remedy)
			}
		}
	}
	return c.faults
}

func (s *Spec) checkTargets(c *checker) {
	if c.atMost("spec.targetRefs", len(s.TargetRefs), maxTargetRefs) {
		for i, ref := range s.TargetRefs {
			path := item("spec.targetRefs", i)
			oneOf(c, path+".group", ref.Group, GroupGatewayAPI, GroupIstio)
			oneOf(c, path+".kind", ref.Kind, KindGateway)
			if c.required(path+".name", ref.Name, "name the gateway") && !isSubdomain(ref.Name) {
				c.add(path+".name", "must be a DNS name, got "+quote(ref.Name), remedyName)
			}
		}
	}
	if s.Selector == nil {
		return
	}
	if len(s.TargetRefs) > 0 {
		c.add("spec.selector", "cannot stand beside targetRefs", "keep one of the two")
	}
	if len(s.Selector.MatchLabels) == 0 {
		c.add("spec.selector.matchLabels", "is missing or empty", "set the gateway's labels, or remove selector for every gateway of the namespace")
	}
	c.atMost("spec.selector.matchLabels", len(s.Selector.MatchLabels), maxEntries)
	if _, ok := s.Selector.MatchLabels[""]; ok {
		c.add("spec.selector.matchLabels", "has an empty key", "name the label")
	}
}

func (s *Sampling) check(c *checker) {
	ceiling, name := 100.0, "100"
	if inRange(s.Percent, 0, 100) {
		ceiling, name = s.Percent, "percent ("+number(s.Percent)+")"
	} else {
		c.add("spec.sampling.percent", "must be between 0 and 100, got "+number(s.Percent), "set a percentage such as 100")
	}
	if least := s.Adaptive.MinPercent; !inRange(least, 0, ceiling) {
		c.add("spec.sampling.adaptive.minPercent", fmt.Sprintf("must be between 0 and %s, got %s", name, number(least)), "set a percentage such as 5")
	}
	allOf(c, "spec.sampling.always", s.Always, ClassNewEndpoint, ClassAuthentication, ClassSuspicious)
	s.Session.check(c)
}

func (s *Session) check(c *checker) {
	const path = "spec.sampling.session"
	if s.Cookie != "" && s.Header != "" {
		c.add(path, "has a cookie and a header", "keep one of the two")
	}
	if s.Cookie != "" && (len(s.Cookie) > maxNameBytes || !headerForm.MatchString(lowerASCII(s.Cookie))) {
		c.add(path+".cookie", "must be a cookie's name, got "+quote(s.Cookie), "write it as JSESSIONID")
	}
	if s.Header != "" && (len(s.Header) > maxNameBytes || !headerForm.MatchString(s.Header)) {
		c.add(path+".header", "must be an HTTP header's name, got "+quote(s.Header), "write it as x-session-id")
	}
}

func (m *Mask) check(c *checker) {
	c.names("spec.mask.headers", m.Headers, headerForm, "must be an HTTP header's name", "write it as authorization")
	c.names("spec.mask.cookies", m.Cookies, headerForm, "must be a cookie's name", "write it as session")
	c.names("spec.mask.queryParameters", m.QueryParameters, parameterForm, "must be a query parameter's name, without its value", "write it decoded, as access_token")
	c.names("spec.mask.formFields", m.FormFields, parameterForm, "must be a form field's name, without its value", "write it decoded, as password")
	if c.atMost("spec.mask.jsonPaths", len(m.JSONPaths), maxEntries) {
		for i, path := range m.JSONPaths {
			if len(path) > maxJSONPath || !jsonPathForm.MatchString(path) {
				c.add(item("spec.mask.jsonPaths", i), "must be a path to a JSON field, got "+quote(path), `write it as "$.password", "$.card.number" or "$.items[*].token"`)
			}
		}
	}
	allOf(c, "spec.mask.detectors", m.Detectors, DetectorCreditCard)
}

// names checks a list of names to mask.
func (c *checker) names(path string, names []string, form *regexp.Regexp, problem, remedy string) {
	if !c.atMost(path, len(names), maxEntries) {
		return
	}
	for i, name := range names {
		if len(name) > maxNameBytes || !form.MatchString(name) {
			c.add(item(path, i), problem+", got "+quote(name), remedy)
		}
	}
}

func (d *Detection) check(c *checker) {
	if d.Paranoia < 1 || d.Paranoia > maxParanoia {
		c.add("spec.detection.paranoia", fmt.Sprintf("must be between 1 and %d, got %d", maxParanoia, d.Paranoia), "set 1 unless you know that you need more")
	}
	if !c.atMost("spec.detection.exclusions", len(d.Exclusions), maxExclusions) {
		return
	}
	for i, e := range d.Exclusions {
		path := item("spec.detection.exclusions", i)
		switch {
		case e.RuleID == 0:
			c.add(path+".ruleId", "is missing", "set the id of a CRS rule such as 942100")
		case e.RuleID < minRuleID || e.RuleID > maxRuleID:
			c.add(path+".ruleId", fmt.Sprintf("must be between %d and %d, got %d", minRuleID, maxRuleID, e.RuleID), "set the id of a CRS rule such as 942100")
		}
		c.target(path+".target", e.Target)
	}
}

func (n *Nodes) check(c *checker) {
	name, namespace, two := strings.Cut(n.Service, ".")
	if !isLabel(name) || two && !isLabel(namespace) {
		c.add("spec.nodes.service", "must be a service's name, got "+quote(n.Service), "write it as periscope-node or periscope-node.namespace")
	}
	if n.Port < 1 || n.Port > 65535 {
		c.add("spec.nodes.port", fmt.Sprintf("must be between 1 and 65535, got %d", n.Port), "set the port for mirrored traffic, usually 5050")
	}
}

const remedyName = "use lower-case letters, digits and dashes"

// checker gathers faults by path.
type checker struct{ faults []Fault }

func (c *checker) add(path, problem, remedy string) {
	c.faults = append(c.faults, Fault{Path: path, Problem: problem, Remedy: remedy})
}

func (c *checker) required(path, value, remedy string) bool {
	if value == "" {
		c.add(path, "is missing or empty", remedy)
	}
	return value != ""
}

func (c *checker) equal(path, value, want string) {
	if c.required(path, value, "write "+want) && value != want {
		c.add(path, fmt.Sprintf("must be %s, got %s", want, quote(value)), "write "+want)
	}
}

func (c *checker) label(path, value string) {
	if !isLabel(value) {
		c.add(path, "must be a DNS label of at most 63 characters, got "+quote(value), remedyName)
	}
}

// atMost says whether a list is short enough for a look at its items.
func (c *checker) atMost(path string, n, most int) bool {
	if n > most {
		c.add(path, fmt.Sprintf("has %d entries, at most %d are allowed", n, most), "remove some, or write a second policy")
	}
	return n <= most
}

func oneOf[S ~string](c *checker, path string, value S, allowed ...S) {
	if slices.Contains(allowed, value) {
		return
	}
	words := make([]string, len(allowed))
	for i, a := range allowed {
		words[i] = string(a)
	}
	remedy := "use " + list(words)
	if near := nearest(string(value), words); near != "" {
		remedy = fmt.Sprintf("did you mean %s?", near)
	}
	c.add(path, fmt.Sprintf("must be %s, got %s", list(words), quote(string(value))), remedy)
}

// allOf checks a list of allowed values, each at most once.
func allOf[S ~string](c *checker, path string, values []S, allowed ...S) {
	if !c.atMost(path, len(values), maxEntries) {
		return
	}
	for i, v := range values {
		if slices.Index(values, v) < i {
			c.add(item(path, i), "stands in the list before: "+quote(string(v)), "remove one of the two")
			continue
		}
		oneOf(c, item(path, i), v, allowed...)
	}
}

func (c *checker) matches(path string, entries []Match, exclude bool) {
	if !c.atMost(path, len(entries), maxEntries) {
		return
	}
	for i, m := range entries {
		hosts, paths := item(path, i)+".hosts", item(path, i)+".paths"
		if c.atMost(hosts, len(m.Hosts), maxEntries) {
			for j, h := range m.Hosts {
				c.host(item(hosts, j), h)
			}
		}
		if c.atMost(paths, len(m.Paths), maxEntries) {
			for j, p := range m.Paths {
				oneOf(c, item(paths, j)+".type", p.Type, PathExact, PathPrefix)
				c.path(item(paths, j)+".value", p.Value, exclude)
			}
		}
	}
}

func (c *checker) host(path, host string) {
	name := strings.TrimPrefix(host, "*.")
	if host == "*" || isSubdomain(name) {
		return
	}
	remedy := `write it as shop.example, "*.shop.example" or "*"`
	if clean := CleanHost(name); clean != name && isSubdomain(clean) {
		remedy = "write " + quote(host[:len(host)-len(name)]+clean)
	}
	c.add(path, "must be a host's name in lower case without a port, got "+quote(host), remedy)
}

func (c *checker) path(path, value string, exclude bool) {
	if !c.required(path, value, "write a path such as /api") {
		return
	}
	switch {
	case value[0] != '/':
		c.add(path, "must start with a slash, got "+quote(value), "write "+quote("/"+value))
	case len(value) > maxPathBytes:
		c.add(path, fmt.Sprintf("is longer than %d bytes", maxPathBytes), "write a shorter prefix")
	case strings.ContainsAny(value, "?#"):
		c.add(path, "must have no query or fragment, got "+quote(value), "write "+quote(value[:strings.IndexAny(value, "?#")]))
	case strings.IndexFunc(value, unicode.IsControl) >= 0:
		c.add(path, "must have no control characters, got "+quote(value), "remove them")
	case exclude && NormalizePath(value) != value:
		// Both forms of a path must be excluded, and this one never is in its second.
		c.add(path, "never excludes anything: paths are decoded and cleaned before they are excluded, got "+quote(value), "write "+quote(NormalizePath(value)))
	}
}

func (c *checker) body(path string, b BodyLimit) {
	if b.MaxBytes < 0 || b.MaxBytes > maxBodyBytes {
		c.add(path+".maxBytes", fmt.Sprintf("must be between 0 and 1Mi, got %d bytes", b.MaxBytes), "set a size such as 64Ki")
	}
	if !c.atMost(path+".contentTypes", len(b.ContentTypes), maxEntries) {
		return
	}
	for i, t := range b.ContentTypes {
		if len(t) > maxNameBytes || !mediaTypeForm.MatchString(t) {
			c.add(item(path+".contentTypes", i), "must be a media type without parameters, got "+quote(t), `write it as application/json, "text/*" or "*/*"`)
		}
	}
}

// target checks what an exclusion names: a variable of the rule language,
// with a selector where the variable is a collection.
func (c *checker) target(path, target string) {
	if target == "" {
		return
	}
	form := targetForm.FindStringSubmatch(target)
	if form == nil || len(target) > maxNameBytes {
		c.add(path, "must be VARIABLE or VARIABLE:name, got "+quote(target), "write it as ARGS:q, REQUEST_HEADERS:user-agent or REQUEST_BODY")
		return
	}
	variables := targetVariables()
	collection, known := variables[form[1]]
	switch {
	case !known:
		remedy := "use one such as ARGS, REQUEST_HEADERS, REQUEST_COOKIES or REQUEST_URI"
		if near := nearest(form[1], slices.Sorted(maps.Keys(variables))); near != "" {
			remedy = fmt.Sprintf("did you mean %s?", near)
		}
		c.add(path, "is not a known variable: "+quote(form[1]), remedy)
	case form[2] != "" && !collection:
		c.add(path, form[1]+" has no named parts, got "+quote(target), "write "+form[1])
	}
}

// targetVariables are the variables of the rule language that hold parts of
// an exchange, and whether they are collections of named parts.
func targetVariables() map[string]bool {
	return map[string]bool{
		"ARGS": true, "ARGS_NAMES": true, "ARGS_COMBINED_SIZE": false,
		"ARGS_GET": true, "ARGS_GET_NAMES": true, "ARGS_POST": true, "ARGS_POST_NAMES": true,
		"FILES": true, "FILES_NAMES": true, "FILES_COMBINED_SIZE": false,
		"MULTIPART_FILENAME": true, "MULTIPART_NAME": true, "MULTIPART_PART_HEADERS": true,
		"QUERY_STRING": false, "REQUEST_BASENAME": false, "REQUEST_BODY": false,
		"REQUEST_COOKIES": true, "REQUEST_COOKIES_NAMES": true,
		"REQUEST_FILENAME": false, "REQUEST_HEADERS": true, "REQUEST_HEADERS_NAMES": true,
		"REQUEST_LINE": false, "REQUEST_METHOD": false, "REQUEST_PROTOCOL": false,
		"REQUEST_URI": false, "REQUEST_URI_RAW": false,
		"RESPONSE_BODY": false, "RESPONSE_HEADERS": true, "RESPONSE_HEADERS_NAMES": true,
		"RESPONSE_STATUS": false, "XML": false, "JSON": true,
	}
}

// isLabel says whether s is a DNS-1123 label.
func isLabel(s string) bool { return labelForm.MatchString(s) }

// isSubdomain says whether s is a DNS-1123 subdomain: labels with dots
// between them.
func isSubdomain(s string) bool {
	if len(s) > maxDNSNameBytes {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isLabel(label) {
			return false
		}
	}
	return true
}

func inRange(f, least, most float64) bool { return f >= least && f <= most } // NaN is in no range

func number(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
