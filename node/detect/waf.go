package detect

import (
	"errors"
	"fmt"
	"strings"

	coreruleset "github.com/corazawaf/coraza-coreruleset/v4"
	"github.com/corazawaf/coraza/v3"
	"github.com/corazawaf/coraza/v3/experimental"
	"github.com/corazawaf/coraza/v3/experimental/plugins/plugintypes"
)

// engineConfig comes before the rules. Bodies never enter Coraza's buffers,
// so that neither its limits nor temporary files matter; RESPONSE_BODY is set
// as a variable, too. The limit of arguments is above decode.MaxValues.
// SecRxPreFilter stays off: it gains a tenth to a third, but in Coraza 3.8.1
// it loses matches of rules 932311 and 942220 that CRS's own tests expect.
const engineConfig = `
SecRuleEngine DetectionOnly
SecRequestBodyAccess Off
SecResponseBodyAccess Off
SecAuditEngine Off
SecArgumentsLimit 4096
Include @crs-setup.conf.example
SecAction "id:100,phase:1,pass,t:none,nolog,\
  setvar:tx.blocking_paranoia_level=%[1]d,setvar:tx.detection_paranoia_level=%[1]d"
`

// ruleFiles are the parts of CRS that judge. Left out: 905 (spares a client
// for what it says of itself), 911 and 920 (protocol enforcement), 949, 959
// and 980 (they only sum up, and we score ourselves), 999 (empty).
var ruleFiles = []string{
	"REQUEST-901-INITIALIZATION", "REQUEST-913-SCANNER-DETECTION", "REQUEST-921-PROTOCOL-ATTACK",
	"REQUEST-922-MULTIPART-ATTACK", "REQUEST-930-APPLICATION-ATTACK-LFI", "REQUEST-931-APPLICATION-ATTACK-RFI",
	"REQUEST-932-APPLICATION-ATTACK-RCE", "REQUEST-933-APPLICATION-ATTACK-PHP",
	"REQUEST-934-APPLICATION-ATTACK-GENERIC", "REQUEST-941-APPLICATION-ATTACK-XSS",
	"REQUEST-942-APPLICATION-ATTACK-SQLI", "REQUEST-943-APPLICATION-ATTACK-SESSION-FIXATION",
	"REQUEST-944-APPLICATION-ATTACK-JAVA", "RESPONSE-950-DATA-LEAKAGES", "RESPONSE-951-DATA-LEAKAGES-SQL",
	"RESPONSE-952-DATA-LEAKAGES-JAVA", "RESPONSE-953-DATA-LEAKAGES-PHP", "RESPONSE-954-DATA-LEAKAGES-IIS",
	"RESPONSE-955-WEB-SHELLS", "RESPONSE-956-DATA-LEAKAGES-RUBY",
}

// tuning comes after the rules: own ones have ids from 9100000 on.
const tuning = `
# A file of the operating system asked for by its plain path.
SecRuleUpdateTargetById 930120 "REQUEST_FILENAME"
# APIs take session ids as parameters, and their clients send no Referer.
SecRuleRemoveById 943120
# CRS knows /etc/passwd as a shell's word, but at paranoia level 1 not a command
# that reads it: a separator, a command, and an argument like a path or option.
SecRule REQUEST_COOKIES|ARGS_NAMES|ARGS "@rx (?i)(?:[;|\x60\n\r]|&&|\$\()[\s\x0b]*(?:/(?:usr/)?s?bin/)?(?:cat|tac|less|more|head|tail|nl|od|xxd|strings|base64|ls|cp|mv|rm|chmod|chown|find|grep|sed|awk|curl|wget|nc|ncat|bash|sh|zsh|dash|python[23]?|perl|ruby|php|ping|nslookup|dig|type|dir)[\s\x0b]+(?:-{1,2}[a-z]|[/~.$*%][^\s\x0b]|[a-z]:\x5c|https?:)" \
  "id:9100010,phase:2,block,capture,t:none,t:urlDecodeUni,\
  msg:'Remote Command Execution: command with an argument after a separator',\
  logdata:'Matched Data: %{TX.0} found within %{MATCHED_VAR_NAME}: %{MATCHED_VAR}',\
  tag:'attack-rce',tag:'paranoia-level/1',tag:'PERISCOPE',severity:'CRITICAL'"
# External entities of XML (XXE).
SecRule ARGS "@rx (?i)<!ENTITY[\s\x0b]+(?:%[\s\x0b]*)?[^\s\x0b]+[\s\x0b]+(?:SYSTEM|PUBLIC)[\s\x0b]" \
  "id:9100020,phase:2,block,capture,t:none,t:urlDecodeUni,\
  msg:'XML External Entity',\
  logdata:'Matched Data: %{TX.0} found within %{MATCHED_VAR_NAME}: %{MATCHED_VAR}',\
  tag:'attack-injection-generic',tag:'paranoia-level/1',tag:'PERISCOPE',severity:'CRITICAL'"
`

// newWAF builds the rule set of a paranoia level.
func newWAF(paranoia int) (coraza.WAF, error) {
	var b strings.Builder
	fmt.Fprintf(&b, engineConfig, paranoia)
	for _, f := range ruleFiles {
		fmt.Fprintf(&b, "Include @owasp_crs/%s.conf\n", f)
	}
	b.WriteString(tuning)
	return coraza.NewWAF(coraza.NewWAFConfig().WithRootFS(coreruleset.FS).WithDirectives(b.String()))
}

// setter is what Coraza's single variables offer beside their interface. The
// built-in body processors rely on the same method.
type setter interface{ Set(value string) }

// checkSetters makes sure that variables can be set: a Coraza that hides its
// setters must be noticed at start, not by missed attacks.
func checkSetters(waf coraza.WAF) error {
	tx := waf.NewTransaction()
	defer tx.Close()
	state, ok := tx.(plugintypes.TransactionState)
	if !ok {
		return errors.New("this version of coraza hides its transaction's variables")
	}
	v := state.Variables()
	for _, s := range []any{
		v.RequestMethod(), v.RequestProtocol(), v.RequestURIRaw(), v.RequestURI(), v.RequestLine(), v.RequestFilename(),
		v.RequestBasename(), v.QueryString(), v.RequestBody(), v.ResponseBody(),
	} {
		if _, ok := s.(setter); !ok {
			return fmt.Errorf("this version of coraza hides the setter of %T", s)
		}
	}
	if _, ok := waf.(experimental.WAFCloser); !ok {
		return errors.New("this version of coraza cannot be closed")
	}
	return nil
}
