package main

import (
	"errors"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/policy/source"
	"github.com/periscope-mesh/periscope/xds/debug"
)

// policyState is /debug/policyz: what was read, and what became of it.
type policyState struct {
	Revision    string              `json:"revision"`
	Source      string              `json:"source"`
	Policies    []source.Status     `json:"policies"`
	Attachments []mirror.Attachment `json:"attachments"`
}

func (c *control) debugConfig() debug.Config {
	return debug.Config{
		Logger:      c.cfg.logger,
		Policies:    func() any { return c.policyState() },
		Configs:     c.objects,
		Connections: c.server.Connections,
		Plan:        func() any { return c.state.Load().plan },
		Info:        c.cfg.info,
		Ready:       c.ready,
		Version:     currentVersion(),
		Gatherer:    c.registry,
	}
}

func (c *control) policyState() policyState {
	s := c.state.Load()
	state := policyState{Revision: s.plan.Revision, Source: c.cfg.policy, Policies: s.set.Statuses, Attachments: s.plan.Attachments}
	if c.source == nil {
		state.Source = "built in: mirror everything"
	}
	return state
}

// objects are the policies in force.
func (c *control) objects() []debug.Object {
	s := c.state.Load()
	hashes := map[string]string{}
	for _, status := range s.set.Statuses {
		hashes[status.ID] = status.Hash
	}
	out := []debug.Object{}
	for _, p := range s.set.Policies {
		m := p.Metadata
		out = append(out, debug.Object{Kind: p.Kind, APIVersion: p.APIVersion, Spec: p.Spec, Metadata: debug.Metadata{
			Name: m.Name, Namespace: m.Namespace, ResourceVersion: hashes[p.ID()], CreationTimestamp: m.CreationTimestamp, Labels: m.Labels, Annotations: m.Annotations}})
	}
	return out
}

func (c *control) ready() error {
	if c.state.Load() == nil {
		return errors.New("no plan is being served yet")
	}
	return nil
}
