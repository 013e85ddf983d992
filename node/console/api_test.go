package console

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/periscope-mesh/periscope/node/attack"
)

// getJSON decodes an answer of the API into a tree.
func getJSON(t *testing.T, h http.Handler, target string, status int) map[string]any {
	t.Helper()
	w := get(t, h, target)
	if w.Code != status {
		t.Fatalf("%s: status %d, want %d: %s", target, w.Code, status, w.Body)
	}
	want := "application/json"
	if status >= 400 {
		want = "application/problem+json"
	}
	if got := w.Header().Get("Content-Type"); got != want {
		t.Errorf("%s: content type %q", target, got)
	}
	var tree map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &tree); err != nil {
		t.Fatalf("%s: %v: %s", target, err, w.Body)
	}
	return tree
}

func TestAPIAttacks(t *testing.T) {
	store := &fakeStore{}
	now := time.Now()
	id := seed(store, now)
	h := newHandler(t, store)
	tree := getJSON(t, h, "/api/v1/attacks?limit=4", 200)
	list := tree["attacks"].([]any)
	if len(list) != 4 || tree["next"] != "4" {
		t.Fatalf("%d attacks, next %v", len(list), tree["next"])
	}
	first := list[0].(map[string]any)
	last := now.Add(-4 * time.Second).UTC().Format(time.RFC3339Nano)
	for name, want := range map[string]any{"id": id, "type": "path-traversal", "typeTitle": "Path traversal", "severity": "critical",
		"gateway": "istio-ingress/public-5d9c7", "client": "203.0.113.47", "method": "GET", "host": "shop.example", "payload": "etc/passwd",
		"status": 404., "hits": 128., "estimatedHits": 128., "estimatedHitsError": 0., "last": last, "location": map[string]any{"place": "path"}, "ruleIds": []any{930100., 930120.}} {
		if diff := cmp.Diff(want, first[name]); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if second := list[1].(map[string]any); second["hits"] != 2317. || second["estimatedHits"] != 46340. || second["estimatedHitsError"] != math.Sqrt(2317*20*19) {
		t.Errorf("of a sample: %v", second)
	}
	seen := len(list)
	for next := tree["next"]; next != nil; next = tree["next"] {
		tree = getJSON(t, h, fmt.Sprint("/api/v1/attacks?limit=4&cursor=", next), 200)
		seen += len(tree["attacks"].([]any))
	}
	if seen != len(store.attacks) {
		t.Errorf("%d attacks in all pages, want %d", seen, len(store.attacks))
	}
	empty := get(t, newHandler(t, &fakeStore{}), "/api/v1/attacks").Body.String()
	if strings.TrimSpace(empty) != `{"attacks":[]}` {
		t.Errorf("empty: %s", empty)
	}
}

func TestAPIFilter(t *testing.T) {
	store := &fakeStore{}
	h := newHandler(t, store)
	getJSON(t, h, "/api/v1/attacks?type=xss&type=ssrf&severity=warning&gateway=g&client=c&host=h&path=/p&tenant=t&application=a&q=s"+
		"&since=2026-05-04T10:00:00Z&until=2026-05-04T13:00:00%2B02:00", 200)
	want := Filter{Types: []attack.Type{attack.XSS, attack.SSRF}, MinSeverity: attack.Warning, Gateway: "g", Client: "c", Host: "h", PathPrefix: "/p",
		Tenant: "t", Application: "a", Search: "s", Since: time.Date(2026, 5, 4, 10, 0, 0, 0, time.UTC), Until: time.Date(2026, 5, 4, 11, 0, 0, 0, time.UTC)}
	if diff := cmp.Diff(want, store.filter); diff != "" {
		t.Error(diff)
	}
	for _, typ := range attack.Types() { // the tag lists them by hand
		getJSON(t, h, "/api/v1/attacks?type="+string(typ), 200)
	}
	field, _ := reflect.TypeFor[attacksInput]().FieldByName("Type")
	if n := len(strings.Split(field.Tag.Get("enum"), ",")); n != len(attack.Types()) {
		t.Errorf("the API knows %d types, package attack %d", n, len(attack.Types()))
	}
}

// TestAPIErrors: each says which parameter is wrong and what would be right.
func TestAPIErrors(t *testing.T) {
	store := &fakeStore{}
	id := seed(store, time.Now())
	h := newHandler(t, store)
	tests := map[string]struct {
		target           string
		status           int
		location, remedy string
	}{
		"type":       {"/api/v1/attacks?type=nonsense", 422, "query.type", "path-traversal"},
		"severity":   {"/api/v1/attacks?severity=high", 422, "query.severity", "critical"},
		"limit":      {"/api/v1/attacks?limit=1000", 422, "query.limit", "100"},
		"limit, 0":   {"/api/v1/attacks?limit=0", 422, "query.limit", "1"},
		"limit, x":   {"/api/v1/attacks?limit=x", 422, "query.limit", "integer"},
		"since":      {"/api/v1/attacks?since=yesterday", 422, "query.since", "date/time"},
		"cursor":     {"/api/v1/attacks?cursor=nonsense", 422, "query.cursor", "leave it out"},
		"typo":       {"/api/v1/attacks?gatway=x", 422, "query.gatway", "unknown"},
		"long":       {"/api/v1/attacks?q=" + strings.Repeat("a", 300), 422, "query.q", "256"},
		"attack":     {"/api/v1/attacks/none", 404, "path.id", "unknown"},
		"hits":       {"/api/v1/attacks/none/hits", 404, "path.id", "unknown"},
		"timeline":   {"/api/v1/attacks/none/timeline", 404, "path.id", "unknown"},
		"hit cursor": {"/api/v1/attacks/" + id + "/hits?cursor=x", 422, "query.cursor", "leave it out"},
		"resource":   {"/api/v1/nothing", 404, "", ""},
		"version":    {"/api/v2/attacks", 404, "", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tree := getJSON(t, h, tt.target, tt.status)
			if tree["status"] != float64(tt.status) || tree["title"] == "" || tree["detail"] == "" {
				t.Errorf("not a problem: %v", tree)
			}
			if tt.location == "" {
				return
			}
			fault := tree["errors"].([]any)[0].(map[string]any)
			if !strings.HasPrefix(fault["location"].(string), tt.location) || !strings.Contains(fault["message"].(string), tt.remedy) {
				t.Errorf("%v does not name %s and say %q", fault, tt.location, tt.remedy)
			}
		})
	}
}

// TestAPIHits: bytes that are no text are there in base64.
func TestAPIHits(t *testing.T) {
	store := &fakeStore{}
	raw := "<\xff\x00>"
	hit := sample(time.Now(), "192.0.2.1", "POST", "/"+raw, 200, raw, match(7, attack.XSS, "message", attack.Location{Place: attack.InBody}, raw, "\xff"))
	hit.Exchange.Request.Headers = []attack.Field{{Name: "a", Value: raw}, {Name: "b", Value: "text"}}
	id := store.add(3, hit)
	h := newHandler(t, store)
	tree := getJSON(t, h, "/api/v1/attacks/"+id+"/hits", 200)
	got := tree["hits"].([]any)[0].(map[string]any)
	exchange := got["exchange"].(map[string]any)
	request := exchange["request"].(map[string]any)
	text, coded := "<\ufffd\x00>", base64.StdEncoding.EncodeToString([]byte(raw))
	want := map[string]any{
		"match": map[string]any{"ruleId": 7., "type": "xss", "severity": "critical", "message": "message", "tags": []any{"application-multi", "OWASP_CRS", "paranoia-level/1"},
			"location": map[string]any{"place": "body"}, "value": text, "valueBase64": coded, "start": 1., "end": 2.},
		"body": text, "bodyBase64": coded,
		"headers": []any{map[string]any{"name": "a", "value": text, "valueBase64": coded}, map[string]any{"name": "b", "value": "text"}},
		"path":    base64.StdEncoding.EncodeToString([]byte("/" + raw)),
	}
	have := map[string]any{"match": got["matches"].([]any)[0], "body": request["body"], "bodyBase64": request["bodyBase64"],
		"headers": request["headers"], "path": exchange["pathBase64"]}
	if diff := cmp.Diff(want, have); diff != "" {
		t.Error(diff)
	}
	attackTree := getJSON(t, h, "/api/v1/attacks/"+id, 200)
	if attackTree["payload"] != "\ufffd" || attackTree["payloadBase64"] != "/w==" {
		t.Errorf("payload: %v %v", attackTree["payload"], attackTree["payloadBase64"])
	}
	line := getJSON(t, h, "/api/v1/attacks/"+id+"/timeline", 200)["minutes"].([]any)
	if len(line) != 1 || line[0].(map[string]any)["hits"] != 3. || line[0].(map[string]any)["estimatedHits"] != 3. {
		t.Errorf("timeline: %v", line)
	}
}

func TestAPIGateways(t *testing.T) {
	store := &fakeStore{}
	h := newHandler(t, store)
	if list, ok := getJSON(t, h, "/api/v1/gateways", 200)["gateways"].([]any); !ok || len(list) != 0 {
		t.Errorf("none: %v", list)
	}
	store.hear(time.Now())
	list := getJSON(t, h, "/api/v1/gateways", 200)["gateways"].([]any)
	if len(list) != 4 {
		t.Fatalf("%d gateways", len(list))
	}
	for i, want := range []map[string]any{
		{"gateway": "istio-ingress/internal", "running": true, "seen": 129384.},
		{"gateway": "istio-ingress/public", "running": true, "plugin": "0.1.1+5f0c3a9b2d17"},
		{"gateway": "istio-ingress/public", "running": false, "plugin": "0.1.0+cd9da490b2dd", "errors": 3.},
	} {
		for name, value := range want {
			if got := list[i].(map[string]any)[name]; got != value {
				t.Errorf("%d: %s is %v, want %v", i, name, got, value)
			}
		}
	}
	store.err = errors.New("disk on fire")
	getJSON(t, h, "/api/v1/gateways", 500)
}

func TestOpenAPI(t *testing.T) {
	h := newHandler(t, &fakeStore{})
	w := get(t, h, "/api/v1/openapi.json")
	var doc struct {
		OpenAPI string                    `json:"openapi"`
		Paths   map[string]map[string]any `json:"paths"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || w.Header().Get("Content-Type") != "application/openapi+json" {
		t.Fatal(err, w.Header())
	}
	for _, path := range []string{"/api/v1/attacks", "/api/v1/attacks/{id}", "/api/v1/attacks/{id}/hits", "/api/v1/attacks/{id}/timeline"} {
		if doc.Paths[path]["get"] == nil {
			t.Errorf("%s is not described", path)
		}
	}
	if yaml := get(t, h, "/api/v1/openapi.yaml").Body.String(); !strings.HasPrefix(yaml, "components:") && !strings.Contains(yaml, "openapi: 3.1") {
		t.Errorf("yaml: %.100s", yaml)
	}
	for _, target := range []string{"/docs", "/api/v1/docs", "/schemas/ErrorModel.json"} {
		if w := get(t, h, target); w.Code != http.StatusNotFound {
			t.Errorf("%s: %d", target, w.Code)
		}
	}
}
