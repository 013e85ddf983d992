package istiod

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	kubefake "k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/periscope-mesh/periscope/test/envoytest"
)

// istiodPod is a ready one, with changes.
func istiodPod(name, ip string, changes ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name, Labels: map[string]string{"app": "istiod"}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
	for _, change := range changes {
		change(p)
	}
	return p
}

func port(value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations = map[string]string{portAnnotation: value} }
}

func TestAddresses(t *testing.T) {
	pods := []any{
		istiodPod("b", "10.0.0.8", port("8080"), func(p *corev1.Pod) { p.Labels["istio.io/rev"] = "canary" }),
		istiodPod("a", "10.0.0.7"),
		istiodPod("same", "10.0.0.7", port("15014")),
		istiodPod("six", "2001:db8::7"),
		istiodPod("mapped", "::ffff:10.0.0.9"),
		istiodPod("port", "10.0.0.10", port("https")),
		istiodPod("no-port", "10.0.0.11", port("0")),
		istiodPod("large", "10.0.0.12", port("65536")),
		istiodPod("no-ip", ""),
		istiodPod("zone", "fe80::1%eth0"),
		istiodPod("name", "example.com"),
		istiodPod("ending", "10.0.1.1", func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: epoch} }),
		istiodPod("pending", "10.0.1.2", func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }),
		istiodPod("unready", "10.0.1.3", func(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse }),
		istiodPod("unknown", "10.0.1.4", func(p *corev1.Pod) { p.Status.Conditions = nil }),
		"not a pod",
	}
	want := []string{
		"http://10.0.0.10:15014", "http://10.0.0.11:15014", "http://10.0.0.12:15014", "http://10.0.0.7:15014",
		"http://10.0.0.8:8080", "http://10.0.0.9:15014", "http://[2001:db8::7]:15014",
	}
	if diff := cmp.Diff(want, addresses(pods)); diff != "" {
		t.Error(diff)
	}
}

// follow runs a Discovery until the test ends, and gives a wait for what it
// finds: URLs, and a part of the error, empty for none.
func follow(t *testing.T, client *kubefake.Clientset) func(what, problem string, urls ...string) {
	t.Helper()
	d, err := NewDiscovery(client, "istio-system")
	if err != nil {
		t.Fatal(err)
	}
	var told atomic.Pointer[[]string] // what Endpoints gave when changed was last called
	tell := func() {
		urls, _ := d.Endpoints()
		told.Store(&urls)
	}
	background(t, func(ctx context.Context) error { return d.Run(ctx, tell) })
	return func(what, problem string, urls ...string) {
		t.Helper()
		envoytest.Eventually(t, 20*time.Second, what, func() bool {
			got, err := d.Endpoints()
			if !slices.Equal(got, urls) || (err == nil) != (problem == "") {
				return false
			}
			heard := told.Load()
			return (err == nil || strings.Contains(err.Error(), problem)) && (len(urls) == 0 || heard != nil && slices.Equal(*heard, urls))
		})
	}
}

// Pods come, change and go; those of other namespaces are no istiods.
func TestDiscovery(t *testing.T) {
	client := kubefake.NewClientset()
	await := follow(t, client)
	pods := client.CoreV1().Pods("istio-system")
	await("there are none", "no pod with label app=istiod is ready in namespace istio-system")
	create := func(p *corev1.Pod) {
		t.Helper()
		if _, err := client.CoreV1().Pods(p.Namespace).Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	create(istiodPod("elsewhere", "10.0.9.1", func(p *corev1.Pod) { p.Namespace = "other" }))
	create(istiodPod("one", "10.0.0.7"))
	await("one", "", "http://10.0.0.7:15014")
	create(istiodPod("two", "10.0.0.8"))
	await("two", "", "http://10.0.0.7:15014", "http://10.0.0.8:15014")
	unready := istiodPod("one", "10.0.0.7", func(p *corev1.Pod) { p.Status.Conditions[0].Status = corev1.ConditionFalse })
	if _, err := pods.UpdateStatus(t.Context(), unready, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	await("one is no longer ready", "", "http://10.0.0.8:15014")
	if err := pods.Delete(t.Context(), "two", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await("two is gone", "no pod with label app=istiod is ready")
}

// Every request names the label, so that the API sends no other pods; who may
// not ask hears why, until he may.
func TestDiscoveryForbidden(t *testing.T) {
	client := kubefake.NewClientset(istiodPod("one", "10.0.0.7"))
	var allowed atomic.Bool
	client.PrependReactor("list", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
		list, ok := action.(clienttesting.ListAction)
		if !ok || list.GetListRestrictions().Labels.String() != podSelector {
			t.Errorf("asked for %v", action)
		}
		if allowed.Load() {
			return false, nil, nil
		}
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", errors.New("no role"))
	})
	await := follow(t, client)
	await("a reason", "find istiods' pods in namespace istio-system: pods is forbidden: no role")
	allowed.Store(true)
	await("the pod", "", "http://10.0.0.7:15014")
}

func TestNewDiscoveryRefuses(t *testing.T) {
	if _, err := NewDiscovery(nil, "istio-system"); err == nil {
		t.Error("made without a client")
	}
	if _, err := NewDiscovery(kubefake.NewClientset(), ""); err == nil {
		t.Error("made without a namespace")
	}
}
