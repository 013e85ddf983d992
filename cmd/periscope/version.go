package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
)

// version is set by the linker (-X main.version=…).
var version = "dev"

// buildVersion is what /version and periscope version show.
type buildVersion struct {
	Version      string `json:"version"`
	Plugin       string `json:"plugin"`
	PluginDigest string `json:"pluginDigest"`
	Wire         int    `json:"wire"`
	Go           string `json:"go"`
	Platform     string `json:"platform"`
}

func currentVersion() buildVersion {
	plugin := lua.Embedded()
	return buildVersion{version, plugin.Version, plugin.Digest, event.Version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
}

func newVersion(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of the binary, the gateway plugin and the wire contract",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := currentVersion()
			_, err := fmt.Fprintf(o.stdout, "periscope %s (plugin %s %s, wire %d, %s %s)\n", v.Version, v.Plugin, v.PluginDigest, v.Wire, v.Go, v.Platform)
			return err
		},
	}
}
