package policy

import "strings"

// maxDefaultMinPercent is the share that load control leaves of what a policy
// asks for, if the policy says nothing of it.
const maxDefaultMinPercent = 5

// Default is the policy in force where nobody has written one: everything of
// every host is mirrored.
func Default() MirrorPolicy {
	p := blank()
	p.APIVersion, p.Kind, p.Metadata.Name = APIVersion, Kind, "default"
	return p
}

// blank is what a document starts from: every default, and nothing in the
// fields that it must set itself.
func blank() MirrorPolicy {
	var p MirrorPolicy
	p.Metadata.Namespace = "default"
	p.Spec.Mode = ModeMonitor
	p.Spec.Transport = TransportLua
	p.Spec.Sampling.Percent = 100
	p.Spec.Sampling.Adaptive.MinPercent = maxDefaultMinPercent
	p.Spec.Body.Request = BodyLimit{MaxBytes: 64 << 10, ContentTypes: []string{"*/*"}}
	p.Spec.Body.Response = BodyLimit{MaxBytes: 16 << 10, ContentTypes: []string{
		"application/json", "application/problem+json", "application/xml",
		"application/x-www-form-urlencoded", "application/graphql-response+json", "text/*",
	}}
	p.Spec.Mask.Headers = []string{"authorization", "proxy-authorization"}
	p.Spec.Mask.QueryParameters = []string{"access_token"}
	p.Spec.Detection.Paranoia = 1
	p.Spec.Nodes = Nodes{Service: "periscope-node", Port: 5050}
	return p
}

// blankItem sets the defaults of a list's item, given by its address.
func blankItem(item any) {
	switch it := item.(type) {
	case *TargetRef:
		it.Group, it.Kind = GroupGatewayAPI, KindGateway
	case *PathMatch:
		it.Type = PathPrefix
	}
}

// normalize writes what may be written in several ways in the one that
// Validate demands and readers of a policy rely on.
func (p *MirrorPolicy) normalize() {
	lower := func(list []string) {
		for i := range list {
			list[i] = lowerASCII(list[i])
		}
	}
	p.Spec.Sampling.Session.Header = lowerASCII(p.Spec.Sampling.Session.Header)
	lower(p.Spec.Mask.Headers)
	lower(p.Spec.Mask.Cookies)
	lower(p.Spec.Mask.QueryParameters)
	lower(p.Spec.Mask.FormFields)
	lower(p.Spec.Body.Request.ContentTypes)
	lower(p.Spec.Body.Response.ContentTypes)
	for _, entries := range [][]Match{p.Spec.Match, p.Spec.Exclude} {
		for _, m := range entries {
			for i, path := range m.Paths {
				if path.Type == PathPrefix && len(path.Value) > 1 {
					// Gateway API: a prefix's trailing slash means nothing.
					m.Paths[i].Value = strings.TrimSuffix(path.Value, "/")
				}
			}
		}
	}
}
