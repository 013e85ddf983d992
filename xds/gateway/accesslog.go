package gateway

import (
	"time"

	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	grpclog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	otellog "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	otlp "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/periscope-mesh/periscope/mirror/event"
)

const (
	// A log entry should be at the node before its exchange's event, which may
	// wait 100 ms for its batch; calls are few all the same.
	logFlush = 50 * time.Millisecond
	logBytes = 64 << 10
)

// AccessLogs tell nodes of what the plugin cannot know, in two logs with
// filters of their own: how exchanges ended that Envoy has flagged, where the
// plugin copies any, and exchanges that ended before any filter, refused by the
// codec or the connection manager. Others cost the filters' look, and are not
// logged. Which ones the plugin copied, only their events tell: metadata for each is
// too dear.
//
// gateway names the gateway to nodes; when empty, Envoy's own cluster name does,
// as our bootstrap sets it.
//
// It is Envoy's OpenTelemetry log: http_grpc would send all dynamic metadata
// with each entry, the settings' text and what other filters put there.
func AccessLogs(gateway string) ([]*accesslog.AccessLog, error) {
	copied := &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_AndFilter{AndFilter: &accesslog.AndFilter{Filters: []*accesslog.AccessLogFilter{
		{FilterSpecifier: &accesslog.AccessLogFilter_ResponseFlagFilter{ResponseFlagFilter: &accesslog.ResponseFlagFilter{}}}, // any flag
		metadataFilter(revisionNamespace, "on", &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_PresentMatch{PresentMatch: true}}, false),
	}}}}
	// Whatever value the settings filter sets there, null it is not: an entry
	// is logged only if that filter has not run.
	unseen := metadataFilter(revisionNamespace, "r", &matcher.ValueMatcher{MatchPattern: &matcher.ValueMatcher_NullMatch_{NullMatch: &matcher.ValueMatcher_NullMatch{}}}, true)
	var out []*accesslog.AccessLog
	for _, l := range []struct {
		filter *accesslog.AccessLogFilter
		fields []event.LogField
	}{{copied, event.CopiedLog()}, {unseen, event.UnseenLog()}} {
		typed, err := pack(logConfig(gateway, l.fields))
		if err != nil {
			return nil, err
		}
		out = append(out, &accesslog.AccessLog{
			Name:       "envoy.access_loggers.open_telemetry",
			Filter:     l.filter,
			ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: typed},
		})
	}
	return out, nil
}

func logConfig(gateway string, fields []event.LogField) *otellog.OpenTelemetryAccessLogConfig {
	out := &otellog.OpenTelemetryAccessLogConfig{
		//lint:ignore SA1019 what replaces it is not in the Envoys of Istio's releases
		CommonConfig: &grpclog.CommonGrpcAccessLogConfig{
			LogName:             "periscope",
			TransportApiVersion: core.ApiVersion_V3,
			GrpcService: &core.GrpcService{
				TargetSpecifier: &core.GrpcService_EnvoyGrpc_{EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: MirrorCluster}},
			},
			BufferFlushInterval: durationpb.New(logFlush),
			BufferSizeBytes:     wrapperspb.UInt32(logBytes),
		},
		StatPrefix: statPrefix,
		Attributes: &otlp.KeyValueList{},
	}
	if gateway != "" {
		out.DisableBuiltinLabels = true
		out.ResourceAttributes = &otlp.KeyValueList{Values: []*otlp.KeyValue{text(event.LogGateway, gateway)}}
	}
	for _, f := range fields {
		out.Attributes.Values = append(out.Attributes.Values, text(f.Key, f.Format))
	}
	return out
}

func text(key, value string) *otlp.KeyValue {
	return &otlp.KeyValue{Key: key, Value: &otlp.AnyValue{Value: &otlp.AnyValue_StringValue{StringValue: value}}}
}

func metadataFilter(namespace, key string, value *matcher.ValueMatcher, absent bool) *accesslog.AccessLogFilter {
	return &accesslog.AccessLogFilter{FilterSpecifier: &accesslog.AccessLogFilter_MetadataFilter{MetadataFilter: &accesslog.MetadataFilter{
		Matcher: &matcher.MetadataMatcher{
			Filter: namespace,
			Path:   []*matcher.MetadataMatcher_PathSegment{{Segment: &matcher.MetadataMatcher_PathSegment_Key{Key: key}}},
			Value:  value,
		},
		MatchIfKeyNotFound: wrapperspb.Bool(absent),
	}}}
}
