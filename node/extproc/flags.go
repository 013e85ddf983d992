package extproc

import "strings"

// responseFlags writes the attribute response.flags as access logs do. The names
// are in the order of Envoy's CoreResponseFlag
// (envoy/stream_info/stream_info.h), which gives each its bit.
func responseFlags(bits float64) string {
	names := [...]string{
		"LH", "UH", "UT", "LR", "UR", "UF", "UC", "UO", "NR", "DI", "FI", "RL", "UAEX", "RLSE", "DC", "URX", "SI", "IH", "DPE", "UMSDR",
		"RFCF", "NFCF", "DT", "UPE", "NC", "OM", "DF", "DO", "DR", "UDO",
	}
	if !(bits >= 1 && bits < 1<<53) {
		return ""
	}
	var out []string
	for i, name := range names {
		if uint64(bits)>>i&1 == 1 {
			out = append(out, name)
		}
	}
	return strings.Join(out, ",")
}
