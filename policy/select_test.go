package policy

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// readVectors reads cases that the gateway's plugin is held to as well.
func readVectors(t testing.TB, file string, into any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatal(err)
	}
}

func TestNormalizePath(t *testing.T) {
	var cases [][2]string
	readVectors(t, "testdata/normalize.json", &cases)
	for _, c := range cases {
		if got := NormalizePath(c[0]); got != c[1] {
			t.Errorf("NormalizePath(%q) = %q, want %q", c[0], got, c[1])
		}
	}
}

func TestSelects(t *testing.T) {
	var cases []struct {
		Name           string
		Match, Exclude []Match
		Host, Path     string
		Want           bool
	}
	readVectors(t, "testdata/select.json", &cases)
	for _, c := range cases {
		if got := Selects(&Spec{Match: c.Match, Exclude: c.Exclude}, c.Host, c.Path); got != c.Want {
			t.Errorf("%s: %v, want %v", c.Name, got, c.Want)
		}
	}
	// Parse writes prefixes without their last slash, others may not have.
	slash := &Spec{Match: []Match{{Paths: []PathMatch{{Type: PathPrefix, Value: "/api/"}}}}}
	for path, want := range map[string]bool{"/api": true, "/api/": true, "/api/x": true, "/apix": false} {
		if got := Selects(slash, "", path); got != want {
			t.Errorf("/api/ and %s: %v, want %v", path, got, want)
		}
	}
}

func FuzzNormalizePath(f *testing.F) {
	var cases [][2]string
	readVectors(f, "testdata/normalize.json", &cases)
	for _, c := range cases {
		f.Add(c[0])
	}
	f.Fuzz(func(t *testing.T, path string) {
		got := NormalizePath(path)
		if len(got) > len(path)+1 {
			t.Errorf("%q grew to %q", path, got)
		}
		if got != path {
			if got[0] != '/' || strings.ContainsAny(got, `;\`) || strings.Contains(got, "//") ||
				strings.Contains(got+"/", "/./") || strings.Contains(got+"/", "/../") {
				t.Errorf("%q became %q, which is not normal", path, got)
			}
		}
		if again := NormalizePath(got); again != got && !strings.Contains(got, "%") {
			t.Errorf("%q became %q and then %q", path, got, again)
		}
	})
}

// FuzzSelects checks that no spelling of a path makes an exclusion reach what
// neither of its forms lies in, and that a prefix always selects itself.
func FuzzSelects(f *testing.F) {
	f.Add("shop.example", "/static/../etc/passwd")
	f.Add("[::1]:1", "/api/%2e%2e;/x?y")
	f.Fuzz(func(t *testing.T, host, path string) {
		static := []Match{{Paths: []PathMatch{{Type: PathPrefix, Value: "/static"}}}}
		if !Selects(&Spec{Exclude: static}, host, path) && !Selects(&Spec{Match: static}, host, path) {
			t.Errorf("%q is excluded by what does not match it", path)
		}
		if !Selects(&Spec{Match: static}, host, "/static/"+path) {
			t.Errorf("%q is not below /static", "/static/"+path)
		}
	})
}

func TestHostPattern(t *testing.T) {
	for in, want := range map[string]string{
		"*": "*", "Shop.Example.": "shop.example", "*.SHOP.example": "*.shop.example", "a": "a", "192.0.2.1": "192.0.2.1",
		"": "", "*.": "", ".": "", "**": "", "*.*.a": "", "a*.b": "", "a..b": "", "a.b:80": "", "a/b": "", "[::1]": "", "a\tb": "", "a.b..": "",
		"\u212a.example": "", strings.Repeat("a.", 127) + "a": "",
	} {
		if got, ok := HostPattern(in); ok != (want != "") || ok && got != want {
			t.Errorf("HostPattern(%q) = %q, %v; want %q", in, got, ok, want)
		}
	}
}
