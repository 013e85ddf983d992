package mcp

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/periscope-mesh/periscope/mirror"
)

// Object is an Istio resource as Kubernetes takes it.
type Object struct {
	APIVersion string         `json:"apiVersion" yaml:"apiVersion"`
	Kind       string         `json:"kind" yaml:"kind"`
	Metadata   Metadata       `json:"metadata" yaml:"metadata"`
	Spec       map[string]any `json:"spec" yaml:"spec"`
}

// Metadata is an Object's.
type Metadata struct {
	Name        string            `json:"name" yaml:"name"`
	Namespace   string            `json:"namespace" yaml:"namespace"`
	Labels      map[string]string `json:"labels,omitempty" yaml:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty" yaml:"annotations,omitempty"`
}

// Objects makes the resources of Snapshot as objects for those who apply them
// themselves; its errors are Snapshot's.
func Objects(c Config, plan mirror.Plan) ([]Object, error) {
	b := newBuilder(c)
	out := []Object{}
	err := b.each(plan, func(g mirror.GatewayPlan) ([]string, error) {
		list, err := b.gateway(g)
		if err != nil {
			return nil, err
		}
		var ids []string
		for _, r := range list {
			spec, err := r.fields()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", r.id(), err)
			}
			ids = append(ids, r.id())
			out = append(out, Object{
				APIVersion: r.kind.apiVersion(),
				Kind:       r.kind.name,
				Metadata:   Metadata{Name: r.name, Namespace: r.namespace, Labels: labels(), Annotations: r.annotations},
				Spec:       spec,
			})
		}
		return ids, nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// fields is the resource's spec in Istio's JSON.
func (r resource) fields() (map[string]any, error) {
	raw, err := protojson.Marshal(r.spec)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var out map[string]any
	if err := d.Decode(&out); err != nil {
		return nil, err
	}
	return integers(out).(map[string]any), nil
}

// integers makes whole numbers of JSON's: as floating-point numbers, large ones
// would be written with an exponent, which is no integer to Kubernetes.
func integers(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = integers(v[k])
		}
	case []any:
		for i := range v {
			v[i] = integers(v[i])
		}
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, _ := v.Float64() // JSON's decoder let it through
		return f
	}
	return v
}

// WriteYAML writes objects as documents of one YAML file: the same objects give
// the same bytes.
func WriteYAML(w io.Writer, objects []Object) error {
	for _, o := range objects {
		if _, err := io.WriteString(w, "---\n"); err != nil {
			return fmt.Errorf("write objects: %w", err)
		}
		e := yaml.NewEncoder(w)
		e.SetIndent(2)
		if err := e.Encode(o); err != nil {
			return fmt.Errorf("write objects: %s %s: %w", o.Kind, o.Metadata.Name, err)
		}
		if err := e.Close(); err != nil {
			return fmt.Errorf("write objects: %w", err)
		}
	}
	return nil
}
