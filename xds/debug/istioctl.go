package debug

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	admin "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	csds "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/periscope-mesh/periscope/xds"
)

// Instance is how istioctl shows this control plane.
type Instance struct {
	ID    string // of the process, such as its pod's name
	Build BuildInfo
}

// BuildInfo is Istio's description of a binary.
type BuildInfo struct {
	Version     string `json:"version"`
	GitRevision string `json:"revision"`
	GoVersion   string `json:"golang_version"`
	Status      string `json:"status"`
	GitTag      string `json:"tag"`
}

// identifier is Istio's form of a control plane's identity.
func (i Instance) identifier() (string, error) {
	raw, err := json.Marshal(struct {
		Component string
		ID        string
		Info      BuildInfo
	}{"periscope", i.ID, i.Build})
	if err != nil {
		return "", fmt.Errorf("identify the control plane: %w", err)
	}
	return string(raw), nil
}

// Debug answers istioctl, from the same pages as HTTP.
func (p *Pages) Debug(ctx context.Context, typeURL string, names []string) (*discovery.DiscoveryResponse, error) {
	var (
		resources []*anypb.Any
		err       error
	)
	switch typeURL {
	case xds.DebugType:
		resources, err = p.named(ctx, names)
	case xds.DebugSyncType:
		resources, err = p.clientConfigs()
	case xds.DebugConfigDumpType:
		resources, err = p.namedDump(names)
	default:
		err = status.Errorf(codes.InvalidArgument, "%s is none of the types that istioctl asks for", typeURL)
	}
	if err != nil {
		return nil, err
	}
	return &discovery.DiscoveryResponse{Resources: resources, ControlPlane: &core.ControlPlane{Identifier: p.identifier}}, nil
}

// named gives one page, as raw bytes. What is no page has the words that make
// istioctl show the list.
func (p *Pages) named(ctx context.Context, names []string) ([]*anypb.Any, error) {
	if len(names) != 1 {
		return nil, status.Error(codes.InvalidArgument, "exactly one debug request is required")
	}
	u, err := url.Parse(names[0])
	if err != nil || u.Path == "" || strings.ContainsAny(u.Path, "/.") || u.IsAbs() || u.Host != "" || u.Fragment != "" {
		u = &url.URL{Path: "unknown"}
	}
	r := (&http.Request{Method: http.MethodGet, URL: &url.URL{Path: "/debug/" + u.Path, RawQuery: u.RawQuery}, Header: http.Header{}}).WithContext(ctx)
	w := &capture{header: http.Header{}}
	p.debug.ServeHTTP(w, r)
	return []*anypb.Any{{TypeUrl: xds.DebugType, Value: bytes.TrimRight(w.body.Bytes(), "\n")}}, nil
}

// capture is an http.ResponseWriter of which the body is all that matters:
// istioctl tells faults by their words.
type capture struct {
	header http.Header
	body   bytes.Buffer
}

func (c *capture) Header() http.Header         { return c.header }
func (c *capture) WriteHeader(int)             {}
func (c *capture) Write(p []byte) (int, error) { return c.body.Write(p) }

// namedDump is for istioctl proxy-status POD: no resources for a proxy that
// isn't connected here.
func (p *Pages) namedDump(names []string) ([]*anypb.Any, error) {
	if len(names) != 1 || names[0] == "" || p.config.Connections == nil || p.config.Deliveries == nil {
		return nil, nil
	}
	c, ok := find(p.config.Connections(), names[0])
	if !ok {
		return nil, nil
	}
	return dump(p.config.Deliveries(c.ID), false)
}

// clientConfigs tells the state of each gateway.
func (p *Pages) clientConfigs() ([]*anypb.Any, error) {
	if p.config.Connections == nil {
		return nil, nil
	}
	var out []*anypb.Any
	for _, c := range p.config.Connections() {
		if _, _, ok := gatewayOf(c); !ok {
			continue
		}
		config, err := clientConfig(c)
		if err != nil {
			return nil, err
		}
		a, err := anypb.New(config)
		if err != nil {
			return nil, fmt.Errorf("state of %s: %w", c.ID, err)
		}
		out = append(out, a)
	}
	return out, nil
}

func clientConfig(c xds.Connection) (*csds.ClientConfig, error) {
	fields := map[string]any{}
	for key, value := range metadata(c) {
		fields[key] = value
	}
	m, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, fmt.Errorf("state of %s: %w", c.ID, err)
	}
	config := &csds.ClientConfig{Node: &core.Node{Id: proxyName(c), Metadata: m}}
	for _, typeURL := range slices.Sorted(maps.Keys(c.Types)) {
		t := c.Types[typeURL]
		g := &csds.ClientConfig_GenericXdsConfig{TypeUrl: typeURL, ConfigStatus: configStatus(t), VersionInfo: cmp.Or(t.Acked, t.Sent)}
		if !t.SentAt.IsZero() {
			g.LastUpdated = timestamppb.New(t.SentAt)
		}
		if t.LastError != "" {
			g.ErrorState = &admin.UpdateFailureState{LastUpdateAttempt: g.LastUpdated, Details: t.LastError, VersionInfo: t.Sent}
		}
		config.GenericXdsConfigs = append(config.GenericXdsConfigs, g)
	}
	return config, nil
}

func configStatus(t xds.TypeState) csds.ConfigStatus {
	switch {
	case t.LastError != "":
		return csds.ConfigStatus_ERROR
	case t.Sent == "":
		return csds.ConfigStatus_NOT_SENT
	case t.Sent == t.Acked:
		return csds.ConfigStatus_SYNCED
	default:
		return csds.ConfigStatus_STALE
	}
}
