package debug

import (
	"fmt"

	udpa "github.com/cncf/xds/go/udpa/annotations"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// redacted is Envoy's own word, so that its dump and ours compare equal.
const redacted = "[redacted]"

// redact gives a resource without what Envoy's API marks as sensitive: private
// keys, even where they are file names. A message of unknown type stays as it
// is: nothing marks what is in it. The resource itself is never changed.
func redact(a *anypb.Any) (*anypb.Any, error) {
	return redactAny(a, false)
}

func redactAny(a *anypb.Any, sensitive bool) (*anypb.Any, error) {
	m, err := a.UnmarshalNew()
	if err != nil { // of unknown type
		return a, nil
	}
	changed, err := redactMessage(m.ProtoReflect(), sensitive)
	if err != nil || !changed {
		return a, err
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("redact %s: %w", a.GetTypeUrl(), err)
	}
	return &anypb.Any{TypeUrl: a.GetTypeUrl(), Value: value}, nil
}

// redactMessage changes m; all of a message in a sensitive field is sensitive.
func redactMessage(m protoreflect.Message, sensitive bool) (changed bool, err error) {
	if a, ok := m.Interface().(*anypb.Any); ok {
		out, err := redactAny(a, sensitive)
		if err != nil || out == a {
			return false, err
		}
		a.Value = out.GetValue()
		return true, nil
	}
	var set []protoreflect.FieldDescriptor // m must not change while it is walked
	m.Range(func(field protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		set = append(set, field)
		return true
	})
	for _, field := range set {
		is, err := redactField(m, field, sensitive || isSensitive(field))
		if err != nil {
			return false, err
		}
		changed = changed || is
	}
	return changed, nil
}

func isSensitive(field protoreflect.FieldDescriptor) bool {
	is, ok := proto.GetExtension(field.Options(), udpa.E_Sensitive).(bool)
	return ok && is
}

func redactField(m protoreflect.Message, field protoreflect.FieldDescriptor, sensitive bool) (changed bool, err error) {
	var inner []protoreflect.Message
	value := m.Get(field)
	switch {
	case field.IsMap() && field.MapValue().Message() != nil:
		value.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
			inner = append(inner, v.Message())
			return true
		})
	case field.IsList() && field.Message() != nil:
		for i := range value.List().Len() {
			inner = append(inner, value.List().Get(i).Message())
		}
	case !field.IsMap() && field.Message() != nil:
		inner = append(inner, value.Message())
	case !sensitive:
	case field.IsMap() || field.IsList():
		m.Clear(field)
		changed = true
	case field.Kind() == protoreflect.StringKind:
		m.Set(field, protoreflect.ValueOfString(redacted))
		changed = true
	case field.Kind() == protoreflect.BytesKind:
		m.Set(field, protoreflect.ValueOfBytes([]byte(redacted)))
		changed = true
	default:
		m.Clear(field)
		changed = true
	}
	for _, i := range inner {
		is, err := redactMessage(i, sensitive)
		if err != nil {
			return false, err
		}
		changed = changed || is
	}
	return changed, nil
}
