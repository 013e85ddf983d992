package mirror

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// MaxSharePods is how many pods of a gateway can have shares of their own; the
// others have the default.
const MaxSharePods = 256

// Shares are the shares of exchanges that load control leaves the pods of a
// gateway, in parts per million, a share a policy in the order of Settings and
// its Next. They travel beside the settings, as they change far more often. A
// policy's own sampling stays the ceiling; missing shares leave it alone.
type Shares struct {
	Revision string // names them: the plugin looks at them anew when it changes
	Default  []int
	Pods     map[string][]int // by the pod's name; at most MaxSharePods count
}

// Encode writes them as the plugin reads them, in the form of Settings.Encode:
//
//   - N…        the default
//     POD N…      a line a pod
//
// No shares are an empty text.
func (s *Shares) Encode() string {
	if s == nil || s.Default == nil && len(s.Pods) == 0 {
		return ""
	}
	var b strings.Builder
	record(&b, "*", numbers(s.Default)...)
	for i, pod := range slices.Sorted(maps.Keys(s.Pods)) {
		if i == MaxSharePods {
			break
		}
		record(&b, pod, numbers(s.Pods[pod])...)
	}
	return b.String()
}

// At gives the share of the policy at a place, by a pod of this name; Everything
// when there is none.
func (s *Shares) At(pod string, place int) int {
	if s == nil {
		return Everything
	}
	shares, ok := s.Pods[pod]
	if !ok {
		shares = s.Default
	}
	if place >= len(shares) {
		return Everything
	}
	return shares[place]
}

func numbers(in []int) []string {
	out := make([]string, len(in))
	for i, n := range in {
		out[i] = strconv.Itoa(n)
	}
	return out
}
