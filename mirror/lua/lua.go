// Package lua is the gateway plugin: its source, which runs in Envoy's Lua
// filter, and its version.
//
// It never changes at run time: what changes travels as mirror.Settings.
// Anything that sends the plugin to gateways may import it; it imports nothing
// of ours.
package lua

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
)

// Version of the plugin, as batches carry it.
const Version = "0.1.0"

// MaxBytes is what Istio's TrafficExtension can carry
// (extensions.istio.io/v1alpha1, lua.inlineCode).
const MaxBytes = 64 << 10

//go:embed plugin.lua
var source string

// Source is the plugin's Lua code.
func Source() string { return source }

// Digest identifies Source: 12 hex digits of its SHA-256.
func Digest() string {
	sum := sha256.Sum256([]byte(source))
	return hex.EncodeToString(sum[:6])
}
