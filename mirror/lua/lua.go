// Package lua is the gateway plugin, which runs in Envoy's Lua filter: the
// build that is part of this binary, and how any build is told by its source.
//
// It never changes a plugin at run time: what changes travels as
// mirror.Settings. It never judges whether a source runs: Envoy does.
// Anything that sends the plugin to gateways may import it; it imports nothing
// of ours.
package lua

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
)

// MaxBytes is what Istio's TrafficExtension can carry
// (extensions.istio.io/v1alpha1, lua.inlineCode).
const MaxBytes = 64 << 10

//go:embed plugin.lua
var embedded string

// What a build says of itself, each on a line of its own.
var (
	versionLine = regexp.MustCompile(`(?m)^local VERSION = "([0-9A-Za-z.-]{1,32})"$`)
	digestLine  = regexp.MustCompile(`(?m)^local DIGEST = "([0-9a-f]{12})"`)
	wireLine    = regexp.MustCompile(`(?m)^local WIRE = ([0-9]{1,3})$`)
)

// blankDigest stands for the digest in the source that it is made of.
const blankDigest = "000000000000"

// Build is one build of the plugin.
type Build struct {
	Version string
	Digest  string // 12 hex digits of its source's SHA-256
	Wire    int    // version of the wire contract that it writes, see mirror/event
	Code    string // Lua, its digest in it
}

// Name is how batches name the build that made them: "0.1.0+0123456789ab".
func (b Build) Name() string { return b.Version + "+" + b.Digest }

// Embedded is the build that is part of this binary.
func Embedded() Build {
	b, err := Read(embedded)
	if err != nil {
		panic(err) // a test reads it
	}
	return b
}

// Read tells which build a source is, and puts its digest into it. The source
// may be a Build's Code, or as it stands in the tree.
func Read(source string) (Build, error) {
	if len(source) > MaxBytes {
		return Build{}, fmt.Errorf("the plugin has %d bytes; at most %d can be carried to gateways", len(source), MaxBytes)
	}
	version, wire, digest := versionLine.FindStringSubmatch(source), wireLine.FindStringSubmatch(source), digestLine.FindStringSubmatchIndex(source)
	switch {
	case version == nil:
		return Build{}, missing(`local VERSION = "0.1.0"`)
	case wire == nil:
		return Build{}, missing(`local WIRE = 1`)
	case digest == nil:
		return Build{}, missing(`local DIGEST = "` + blankDigest + `"`)
	}
	before, after := source[:digest[2]], source[digest[3]:]
	sum := sha256.Sum256([]byte(before + blankDigest + after))
	b := Build{Version: version[1], Digest: hex.EncodeToString(sum[:6])}
	b.Wire, _ = strconv.Atoi(wire[1])
	b.Code = before + b.Digest + after
	return b, nil
}

func missing(line string) error {
	return fmt.Errorf("this is no build of the plugin: it has no line %s, by which gateways and nodes tell it", line)
}
