package main

import (
	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/xds/gateway"
)

func newBootstrap(o *options) *cobra.Command {
	var f controlFlags
	var xdsAddr, admin string
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Print the bootstrap of an Envoy that periscope control configures",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			gw, err := f.gatewayID()
			if err != nil {
				return err
			}
			b, err := gateway.Bootstrap(gateway.BootstrapConfig{Gateway: gw, XDS: xdsAddr, Admin: admin})
			if err != nil {
				return err
			}
			_, err = o.stdout.Write(b)
			return err
		},
	}
	cmd.Flags().StringVar(&f.gateway, "gateway", "default/gateway", "NAMESPACE/NAME of the gateway, as periscope control has it")
	cmd.Flags().StringVar(&xdsAddr, "xds", "127.0.0.1:15051", "address of the control plane's xDS server")
	cmd.Flags().StringVar(&admin, "admin", "127.0.0.1:15000", "loopback address of Envoy's admin page")
	return cmd
}
