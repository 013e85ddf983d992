package gateway

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	matching "github.com/envoyproxy/go-control-plane/envoy/extensions/common/matching/v3"
	composite "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	extproc "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	fraction "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/periscope-mesh/periscope/mirror"
)

// What the first message of a stream says of it, as gRPC metadata; package
// node/extproc reads it.
const (
	gatewayKey  = "periscope-gateway"
	settingsKey = "periscope-settings" // revision of the settings
	shareKey    = "periscope-share"    // in parts per million
	sharesKey   = "periscope-shares"   // each policy's, of several
	peerKey     = "periscope-peer"     // the connection's own remote address
)

// deferredClose is how long Envoy keeps a stream of an exchange that has ended,
// for what is still to be sent; its own default is 5 s, and each stream counts
// towards the cluster's limit. Nodes end streams before.
const deferredClose = 200 * time.Millisecond

// streamAttributes are what ext_proc sends besides headers and bodies.
var (
	requestAttributes = []string{
		"source.address", "destination.address", "request.protocol", "request.time", "xds.route_name",
		"connection.requested_server_name", "connection.tls_version", "connection.subject_peer_certificate",
		"connection.uri_san_peer_certificate", "connection.dns_san_peer_certificate",
	}
	responseAttributes = []string{"response.flags", "response.code_details"}
)

// StreamExtension is what the plugin's filter discovers where the transport is
// ExtProc: a filter that streams a copy of each exchange to the nodes, without
// waiting for them. Envoy samples; without nodes, or with every policy off, it
// opens no stream.
//
// It always comes wrapped in a matcher. That is part of every Envoy, while
// ext_proc can be left out of a build, and a listener that so much as names the
// type of a filter which is not there is refused. Where all is mirrored the
// matcher is empty, and there is no sampling filter to pay for.
func StreamExtension(plan mirror.GatewayPlan) (*core.TypedExtensionConfig, error) {
	share := plan.Settings.StreamPPM()
	if len(plan.Endpoints) == 0 {
		share = 0
	}
	stream, err := extension(PluginFilter, streamConfig(plan.Settings, share))
	if err != nil {
		return nil, err
	}
	if share == mirror.Everything {
		return extension(PluginFilter, &matching.ExtensionWithMatcher{ExtensionConfig: stream, XdsMatcher: &xdsmatcher.Matcher{}})
	}
	sampled, err := pack(&composite.ExecuteFilterAction{
		TypedConfig: stream,
		SamplePercent: &core.RuntimeFractionalPercent{DefaultValue: &fraction.FractionalPercent{
			Numerator: uint32(share), Denominator: fraction.FractionalPercent_MILLION,
		}},
	})
	if err != nil {
		return nil, err
	}
	outer, err := pack(&composite.Composite{})
	if err != nil {
		return nil, err
	}
	return extension(PluginFilter, &matching.ExtensionWithMatcher{
		ExtensionConfig: &core.TypedExtensionConfig{Name: "envoy.filters.http.composite", TypedConfig: outer},
		XdsMatcher: &xdsmatcher.Matcher{OnNoMatch: &xdsmatcher.Matcher_OnMatch{OnMatch: &xdsmatcher.Matcher_OnMatch_Action{
			Action: &xdscore.TypedExtensionConfig{Name: "sample", TypedConfig: sampled},
		}}},
	})
}

func streamConfig(s mirror.Settings, share int) *extproc.ExternalProcessor {
	metadata := func(key, value string) *core.HeaderValue { return &core.HeaderValue{Key: key, Value: value} }
	names := masked(s)
	var shares []*core.HeaderValue
	if len(s.Next) > 0 {
		var list []string
		for i, p := range append([]mirror.Settings{s}, s.Next...) {
			list = append(list, strconv.Itoa(min(p.SharePPM, s.Shares.At("", i).PPM)))
		}
		shares = append(shares, metadata(sharesKey, strings.Join(list, ",")))
	}
	return &extproc.ExternalProcessor{
		ObservabilityMode:        true,
		FailureModeAllow:         true,
		DisableImmediateResponse: true,
		StatPrefix:               statPrefix,
		DeferredCloseTimeout:     durationpb.New(deferredClose),
		GrpcService: &core.GrpcService{
			TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: MirrorCluster}},
			InitialMetadata: append([]*core.HeaderValue{
				metadata(gatewayKey, literal(s.Gateway)),
				metadata(settingsKey, s.Revision()),
				metadata(shareKey, strconv.Itoa(share)),
				metadata(peerKey, "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"),
			}, shares...),
		},
		ProcessingMode: &extproc.ProcessingMode{
			RequestHeaderMode: extproc.ProcessingMode_SEND, ResponseHeaderMode: extproc.ProcessingMode_SEND,
			RequestBodyMode: extproc.ProcessingMode_STREAMED, ResponseBodyMode: extproc.ProcessingMode_STREAMED,
			RequestTrailerMode: extproc.ProcessingMode_SEND, ResponseTrailerMode: extproc.ProcessingMode_SEND,
		},
		RequestAttributes:  append(presence("request", names), requestAttributes...),
		ResponseAttributes: append(presence("response", names), responseAttributes...),
		ForwardRules:       withheld(names),
	}
}

// masked are the headers that any of the gateway's policies masks.
func masked(s mirror.Settings) []string {
	var names []string
	for _, p := range append([]mirror.Settings{s}, s.Next...) {
		names = append(names, p.Mask.Headers...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// presence are expressions (CEL) that tell of headers whether they are there.
func presence(message string, names []string) []string {
	var out []string
	for _, n := range names {
		out = append(out, fmt.Sprintf("%q in %s.headers", n, message))
	}
	return out
}

// withheld keeps headers in the gateway.
func withheld(names []string) *extproc.HeaderForwardingRules {
	if len(names) == 0 {
		return nil
	}
	out := &matcher.ListStringMatcher{}
	for _, n := range names {
		out.Patterns = append(out.Patterns, &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: n}, IgnoreCase: true})
	}
	return &extproc.HeaderForwardingRules{DisallowedHeaders: out}
}

// literal keeps Envoy from reading a value as a format.
func literal(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// typeURLs are those of messages.
func typeURLs(messages ...proto.Message) []string {
	var out []string
	for _, m := range messages {
		out = append(out, fmt.Sprintf("type.googleapis.com/%s", m.ProtoReflect().Descriptor().FullName()))
	}
	return out
}
