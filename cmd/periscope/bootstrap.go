package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/periscope-mesh/periscope/atomicfile"
	"github.com/periscope-mesh/periscope/xds/gateway"
)

func newBootstrap(o *options) *cobra.Command {
	var f controlFlags
	var tls controlTLSFlags
	var xdsAddr, admin, sdsDir string
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Print the bootstrap of an Envoy that periscope control configures",
		Long: `Print the bootstrap of an Envoy that periscope control configures.

With --control-ca, Envoy reaches the control plane by TLS. It follows the files
of its certificates by small files that are written to --sds-dir, which have to
be at the same place where Envoy runs. Put new certificates in place by moving
them: Envoy doesn't see files that are written to.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			gw, err := f.gatewayID()
			if err != nil {
				return err
			}
			if err := tls.check("--xds", xdsAddr); err != nil {
				return err
			}
			side, err := tls.envoy(sdsDir)
			if err != nil {
				return err
			}
			config := gateway.BootstrapConfig{Gateway: gw, XDS: xdsAddr, Admin: admin, TLS: side}
			b, err := gateway.Bootstrap(config)
			if err != nil {
				return err
			}
			if err := writeSecrets(config); err != nil {
				return fmt.Errorf("--sds-dir: %w", err)
			}
			_, err = o.stdout.Write(b)
			return err
		},
	}
	cmd.Flags().StringVar(&f.gateway, "gateway", "default/gateway", "NAMESPACE/NAME of the gateway, as periscope control has it")
	cmd.Flags().StringVar(&xdsAddr, "xds", "127.0.0.1:15051", "address of the control plane's xDS server")
	cmd.Flags().StringVar(&admin, "admin", "127.0.0.1:15000", "loopback address of Envoy's admin page")
	tls.add(cmd.Flags())
	cmd.Flags().StringVar(&sdsDir, "sds-dir", "", "directory, which must be there, for the files by which Envoy follows those of --control-ca, --control-cert and --control-key")
	return cmd
}

func writeSecrets(c gateway.BootstrapConfig) error {
	secrets, err := gateway.Secrets(c)
	if err != nil {
		return err
	}
	for path, content := range secrets {
		if err := atomicfile.Replace(path, content); err != nil {
			return err
		}
	}
	return nil
}
