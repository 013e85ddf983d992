package mcp

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/periscope-mesh/periscope/mirror"
)

const (
	maxLabelBytes    = 63  // of a DNS label (RFC 1123)
	maxHostBytes     = 253 // of a DNS name
	maxPrefixBytes   = 24
	maxSelectorBytes = 317 // of a label's key: a DNS name, a slash, 63 more
	nameHashDigits   = 10
)

// name makes the name of a workload's resource: at most a DNS label long, so
// that it can be part of a host name too. A workload's name that had to be
// changed for that is marked by its hash, to stay unique.
func name(prefix, workload, suffix string) string {
	room := maxLabelBytes - len(prefix) - len(suffix)
	fit := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(workload))
	if fit == workload && fit != "" && len(fit) <= room {
		return prefix + fit + suffix
	}
	fit = strings.Trim(fit[:min(len(fit), room-nameHashDigits-1)], "-")
	hash := digest([]byte(workload))[:nameHashDigits]
	if fit == "" {
		return prefix + hash + suffix
	}
	return prefix + fit + "-" + hash + suffix
}

func isLabelByte(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' }

// isLabel tells a DNS label, as names of namespaces are.
func isLabel(s string) bool {
	if s == "" || len(s) > maxLabelBytes || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if !isLabelByte(s[i]) {
			return false
		}
	}
	return true
}

func isPrefix(s string) bool {
	return len(s) <= maxPrefixBytes && s[0] >= 'a' && isLabel(strings.TrimSuffix(s, "-"))
}

// isHost tells an IP address or a DNS name.
func isHost(s string) bool {
	if addr, err := netip.ParseAddr(s); err == nil {
		return addr.Zone() == ""
	}
	if len(s) > maxHostBytes {
		return false
	}
	for part := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if !isLabel(part) {
			return false
		}
	}
	return true
}

// checkSelector refuses what istiod would refuse without telling anybody.
func checkSelector(selector map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(selector)) {
		v := selector[k]
		if k == "" || len(k) > maxSelectorBytes || len(v) > maxLabelBytes || strings.ContainsAny(k+v, "* \t\r\n") {
			return fmt.Errorf("%.64q: %.64q can't be a label to select by", k, v)
		}
	}
	return nil
}

// endpoints checks the nodes' and sorts them, without doubles: their order, as
// somebody found them, is no reason to change a resource.
func endpoints(in []mirror.Endpoint) ([]mirror.Endpoint, error) {
	for _, e := range in {
		if !isHost(e.Host) || e.Port < 1 || e.Port > 65535 {
			return nil, fmt.Errorf("node endpoint %.64q port %d can't be used: state an IP address or a DNS name, and a port", e.Host, e.Port)
		}
	}
	out := slices.Clone(in)
	slices.SortFunc(out, func(a, b mirror.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Host, b.Host), cmp.Compare(a.Port, b.Port), cmp.Compare(b.Machine, a.Machine))
	})
	return slices.CompactFunc(out, func(a, b mirror.Endpoint) bool { return a.Host == b.Host && a.Port == b.Port }), nil
}
