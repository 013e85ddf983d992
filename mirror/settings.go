package mirror

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/periscope-mesh/periscope/policy"
)

// Settings is the gateway part of a policy: everything that changes without
// new plugin code. Encode gives the text that travels.
type Settings struct {
	Gateway   string // the gateway's id, which the plugin puts into batches
	PolicyID  string
	PolicyRev string // the governing policy's own revision, see NodePolicy
	Cluster   string // that mirrored traffic goes to; empty: periscope_mirror
	SharePPM  int    // sampling probability in parts per million: the policy's, load control's ceiling
	MinPPM    int    `json:"-"` // load control's floor; gateways are not told
	ByPod     bool   `json:"-"` // the gateway's pods are told apart, by their own word
	// Session is what tells the sessions that sampling keeps or leaves out as a
	// whole.
	Session policy.Session `json:",omitzero"`
	Mode    policy.Mode
	// Transport is ExtProc, or empty for Lua; the same for all policies of a
	// gateway. The plugin isn't told: with ExtProc there is none.
	Transport policy.Transport `json:",omitempty"`
	// Hosts, unless nil, are those that the policy is limited to, but for those
	// that Except names more closely, and Match is within them.
	Hosts    []string `json:",omitempty"`
	Except   []string `json:",omitempty"`
	Match    []policy.Match
	Exclude  []policy.Match
	Always   []policy.Class
	Request  policy.BodyLimit
	Response policy.BodyLimit
	Mask     policy.Mask
	// Next are the settings of the gateway's other policies by precedence. The
	// first that Hosts, Except and Match hold for governs an exchange; whether it
	// is mirrored is then that one's to say. Gateway, Cluster and ByPod are the
	// same for all.
	Next []Settings `json:",omitempty"`
	// Shares are load control's, for all policies; nil: none. They are no part of
	// the settings' revision.
	Shares *Shares `json:"-"`
}

// Everything is a share: all exchanges, in parts per million.
const Everything = 1_000_000

// StreamPPM is the share of exchanges that a gateway sends nodes by ext_proc,
// in parts per million: what the policy that wants most of them wants, or load
// control leaves it by default. Nodes leave out what is too much for another.
func (s Settings) StreamPPM() int {
	most := 0
	for i, p := range append([]Settings{s}, s.Next...) {
		if p.Mode == policy.ModeMonitor {
			most = max(most, min(p.SharePPM, s.Shares.At("", i).PPM))
		}
	}
	return most
}

// Copies tells whether the gateway may copy any exchange at all.
func (s Settings) Copies() bool {
	return slices.ContainsFunc(append([]Settings{s}, s.Next...), func(p Settings) bool {
		return p.Mode == policy.ModeMonitor && (p.SharePPM > 0 || len(p.Always) > 0)
	})
}

// Encode writes the settings as the plugin reads them: a record a line, its
// fields separated by tabs, bytes outside printable ASCII and % as %XX; an empty
// line between policies.
//
//	gateway ns/name          policy ns/name       rev R          cluster NAME
//	ppm N                    mode Off|Monitor     request N      response N
//	session cookie|header NAME                    by_pod
//	hosts   (h|w)VALUE…      except (h|w)VALUE…
//	match   (h|w|e|p)VALUE…  one record an entry: host, wildcard host's suffix,
//	exclude (h|w|e|p)VALUE…  exact path, path prefix without a slash at its end
//	request_types T…         response_types T…    always C…
//	mask_headers N…          mask_cookies NAME…   mask_query NAME…
//	mask_form NAME…          mask_json NAME…      detect_cards
func (s Settings) Encode() string {
	var b strings.Builder
	s.encode(&b)
	for _, next := range s.Next {
		b.WriteByte('\n')
		next.Gateway, next.Cluster, next.ByPod = s.Gateway, s.Cluster, s.ByPod
		next.encode(&b)
	}
	return b.String()
}

// Revision names the settings of a gateway and all of its policies: of what
// Encode leaves out, too.
func (s Settings) Revision() string { return digest(s) }

// encode writes the settings of one policy.
func (s Settings) encode(b *strings.Builder) {
	record(b, "gateway", s.Gateway)
	record(b, "policy", s.PolicyID)
	record(b, "rev", s.PolicyRev)
	if s.Cluster != "" {
		record(b, "cluster", s.Cluster)
	}
	record(b, "mode", string(s.Mode))
	record(b, "ppm", strconv.Itoa(s.SharePPM))
	if s.Session.Cookie != "" {
		record(b, "session", "cookie", s.Session.Cookie)
	} else if s.Session.Header != "" {
		record(b, "session", "header", s.Session.Header)
	}
	if s.ByPod {
		b.WriteString("by_pod\n")
	}
	record(b, "hosts", hostFields(s.Hosts)...)
	record(b, "except", hostFields(s.Except)...)
	for _, m := range s.Match {
		record(b, "match", matchFields(m)...)
	}
	for _, m := range s.Exclude {
		record(b, "exclude", matchFields(m)...)
	}
	record(b, "always", asStrings(s.Always)...)
	record(b, "request", strconv.FormatInt(int64(s.Request.MaxBytes), 10))
	record(b, "request_types", s.Request.ContentTypes...)
	record(b, "response", strconv.FormatInt(int64(s.Response.MaxBytes), 10))
	record(b, "response_types", s.Response.ContentTypes...)
	record(b, "mask_headers", s.Mask.Headers...)
	record(b, "mask_cookies", s.Mask.Cookies...)
	record(b, "mask_query", s.Mask.QueryParameters...)
	record(b, "mask_form", s.Mask.FormFields...)
	record(b, "mask_json", s.Mask.JSONNames()...)
	for _, d := range s.Mask.Detectors {
		if d == policy.DetectorCreditCard {
			b.WriteString("detect_cards\n")
		}
	}
}

// EncodeLua writes the settings as a line of Lua for the plugin's end, where
// nothing but its source can be sent. The plugin reads them only on requests
// that carry no settings of their own.
func (s Settings) EncodeLua() string {
	var b strings.Builder
	b.WriteString(`embedded = "`)
	for _, c := range []byte(s.Encode()) {
		if c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			fmt.Fprintf(&b, "\\%03d", c)
		} else {
			b.WriteByte(c)
		}
	}
	b.WriteString("\"\n")
	return b.String()
}

func matchFields(m policy.Match) []string {
	out := hostFields(m.Hosts)
	for _, p := range m.Paths {
		if p.Type == policy.PathExact {
			out = append(out, "e"+p.Value)
		} else {
			out = append(out, "p"+cmp.Or(strings.TrimSuffix(p.Value, "/"), "/"))
		}
	}
	return out
}

func hostFields(hosts []string) []string {
	var out []string
	for _, h := range hosts {
		if suffix, ok := strings.CutPrefix(h, "*."); ok {
			out = append(out, "w."+suffix)
		} else {
			out = append(out, "h"+h)
		}
	}
	return out
}

func asStrings[T ~string](in []T) []string {
	out := make([]string, len(in))
	for i, v := range in {
		out[i] = string(v)
	}
	return out
}

// record writes one line, or nothing when there is nothing to say, except for
// an entry of match or exclude that matches everything.
func record(b *strings.Builder, key string, fields ...string) {
	if len(fields) == 0 && key != "match" && key != "exclude" {
		return
	}
	b.WriteString(key)
	for _, f := range fields {
		b.WriteByte('\t')
		for i := range len(f) {
			if c := f[i]; c <= ' ' || c >= 0x7f || c == '%' {
				fmt.Fprintf(b, "%%%02X", c)
			} else {
				b.WriteByte(c)
			}
		}
	}
	b.WriteByte('\n')
}
