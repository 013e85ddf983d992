package mirror

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// MaxSharePods is how many pods of a gateway can have shares of their own; the
// others have the default.
const MaxSharePods = 256

// Share is what load control leaves a policy at a gateway, in parts per million.
type Share struct {
	PPM      int // of routine exchanges; a policy's own sampling stays the ceiling
	Priority int // of those of a class that sampling spares
}

// Shares are those of a gateway's pods, a share a policy in the order of Settings
// and its Next; missing ones leave a policy as it is. They travel beside the
// settings, as they change far more often.
type Shares struct {
	Revision string   // names them, 32 bits in hex: the plugin looks at them anew when it changes
	Policies []string // whose they are, by id: a plan may have others since, see For
	Default  []Share
	Pods     map[string][]Share // by the pod's name; at most MaxSharePods count, see Seal
}

// Encode writes them as the plugin reads them, in the form of Settings.Encode:
// a line "POD N[:N]…" for each pod, and one of the pod * for all others; behind the
// colon stands the share of classes, unless it is all.
//
// No shares are an empty text.
func (s *Shares) Encode() string {
	if s == nil || s.Default == nil && len(s.Pods) == 0 {
		return ""
	}
	var b strings.Builder
	record(&b, "*", shareFields(s.Default)...)
	for i, pod := range slices.Sorted(maps.Keys(s.Pods)) {
		if i == MaxSharePods {
			break
		}
		record(&b, pod, shareFields(s.Pods[pod])...)
	}
	return b.String()
}

// Seal leaves out the pods that are too many, and names the shares by what they are.
func (s *Shares) Seal() {
	if len(s.Pods) > MaxSharePods {
		for _, pod := range slices.Sorted(maps.Keys(s.Pods))[MaxSharePods:] {
			delete(s.Pods, pod)
		}
	}
	sum := sha256.Sum256([]byte(s.Encode()))
	s.Revision = hex.EncodeToString(sum[:4])
}

// For are the shares of these policies, in their order; those of which there are none
// have all.
func (s *Shares) For(policies []string) *Shares {
	if s == nil || slices.Equal(s.Policies, policies) {
		return s
	}
	pick := func(from []Share) []Share {
		out := make([]Share, len(policies))
		for i, id := range policies {
			out[i] = Share{Everything, Everything}
			if at := slices.Index(s.Policies, id); at >= 0 && at < len(from) {
				out[i] = from[at]
			}
		}
		return out
	}
	next := &Shares{Policies: policies, Default: pick(s.Default), Pods: map[string][]Share{}}
	for pod, shares := range s.Pods {
		next.Pods[pod] = pick(shares)
	}
	next.Seal()
	return next
}

// At gives the share of the policy at a place, by a pod of this name; all when
// there is none.
func (s *Shares) At(pod string, place int) Share {
	if s == nil {
		return Share{Everything, Everything}
	}
	shares, ok := s.Pods[pod]
	if !ok {
		shares = s.Default
	}
	if place >= len(shares) {
		return Share{Everything, Everything}
	}
	return shares[place]
}

// InForce is At, with the policy's own sampling for a ceiling.
func (s *Shares) InForce(pod string, place int, policy *Settings) Share {
	share := s.At(pod, place)
	share.PPM = min(share.PPM, policy.SharePPM)
	return share
}

func shareFields(in []Share) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = strconv.Itoa(s.PPM)
		if s.Priority < Everything {
			out[i] += ":" + strconv.Itoa(s.Priority)
		}
	}
	return out
}
