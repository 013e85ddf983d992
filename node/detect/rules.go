package detect

import (
	"slices"
	"strings"

	"github.com/corazawaf/coraza/v3/types"
	"github.com/periscope-mesh/periscope/node/attack"
)

// ownRules is the first id of rules of our own, see tuning.
const ownRules = 9100000

// typeOf is a rule's type of attack. Tags say it, except that CRS tags
// injections into an interpreter (934, 944) as command execution too; there
// the interpreter is what an analyst asks for.
func typeOf(id int, tags []string) attack.Type {
	has := func(tag string) bool { return slices.Contains(tags, tag) }
	switch {
	case id >= 950000 && id < ownRules:
		return attack.DataLeakage
	case has("attack-ssrf"):
		return attack.SSRF
	case id/1000 == 933 || id/1000 == 934 || id/1000 == 944, has("attack-injection-php"), has("attack-injection-java"),
		has("attack-injection-generic"), has("attack-injection-nodejs"), has("attack-ssti"):
		return attack.CodeInjection
	case has("attack-lfi"):
		return attack.PathTraversal
	case has("attack-rfi"):
		return attack.FileInclusion
	case has("attack-sqli"):
		return attack.SQLInjection
	case has("attack-xss"):
		return attack.XSS
	case has("attack-rce"):
		return attack.CommandInjection
	case has("attack-fixation"):
		return attack.SessionFixation
	case has("attack-reputation-scanner"):
		return attack.Scanner
	case has("attack-protocol"), has("attack-multipart-header"):
		return attack.ProtocolViolation
	}
	return attack.Other
}

func severityOf(s types.RuleSeverity) attack.Severity {
	switch {
	case s == types.RuleSeverityUnset:
		return attack.Notice
	case s <= types.RuleSeverityCritical:
		return attack.Critical
	case s == types.RuleSeverityError:
		return attack.Error
	case s == types.RuleSeverityWarning:
		return attack.Warning
	}
	return attack.Notice
}

// weak rules match text that is common in benign API traffic. They count only
// beside another rule in the same location.
var weak = map[int]string{
	921421: "a content type's parameter that names another type: multipart/related does",
	921250: "$Version in a cookie: old Java clients",
	922120: "Content-Transfer-Encoding of a part: older HTTP clients send it",
	932270: "~+ and ~-: prose",
	932280: "{a,b}: GraphQL selections and templates",
	932330: "!-1: prose and expressions",
	942220: "numbers at the ends of integer ranges: ordinary limits",
}

// odata names the system query options of OData 4.01, 5.1.1; as names of
// parameters, 942290 takes some of them for operators of MongoDB.
var odata = map[string]bool{
	"$apply": true, "$compute": true, "$count": true, "$expand": true, "$filter": true, "$format": true, "$index": true,
	"$levels": true, "$orderby": true, "$search": true, "$select": true, "$skip": true, "$skiptoken": true, "$top": true,
}

// isWeak reports whether a match counts only beside another one. want is the
// matched text.
func isWeak(id int, want string) bool {
	if id == 942190 {
		return isProse(strings.ToLower(want))
	}
	return weak[id] != ""
}

// isProse tells what 942190 takes for SQL: a function named user, and union
// and select with other words between them.
func isProse(want string) bool {
	if strings.HasPrefix(want, "user") {
		return true
	}
	rest, ok := strings.CutPrefix(want, "union")
	if !ok {
		return false
	}
	between, _, _ := strings.Cut(rest, "select")
	if strings.ContainsAny(between, "/*(#-;'\"") {
		return false
	}
	words := 0
	for _, w := range strings.FieldsFunc(between, func(r rune) bool { return r < 'a' || r > 'z' }) {
		if w != "all" && w != "distinct" {
			words++
		}
	}
	return words >= 2
}

// evidence names the rules that count where CRS itself does not look: headers,
// path segments, text in binary bodies. They need the shape of an attack, not
// single words or punctuation: 932125, 932235, 932370 and 932380, for
// instance, take "; java " and "; sl;" in a client's description for commands.
var evidence = map[int]bool{
	921110: true, 921120: true, 921140: true, 921150: true, 921160: true,
	930100: true, 930110: true, 930120: true, 930121: true, 930130: true,
	931100: true, 931110: true,
	932120: true, 932130: true, 932140: true, 932160: true, 932170: true, 932171: true, 932175: true,
	932230: true, 932340: true,
	933100: true, 933140: true, 933150: true, 933160: true, 933170: true, 933200: true, 933210: true,
	934100: true, 934110: true, 934130: true, 934150: true, 934170: true,
	941100: true, 941110: true, 941120: true, 941140: true, 941160: true, 941170: true, 941180: true, 941210: true,
	941230: true, 941390: true,
	942100: true, 942140: true, 942151: true, 942160: true, 942170: true, 942190: true, 942230: true, 942250: true,
	942270: true, 942280: true, 942290: true, 942320: true, 942350: true, 942360: true, 942500: true, 942540: true,
	942550: true, 944110: true, 944150: true, 9100010: true,
}
