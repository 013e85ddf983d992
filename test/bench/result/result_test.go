package result

import (
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOver(t *testing.T) {
	for _, tc := range []struct {
		in   []float64
		want Spread
	}{
		{[]float64{3}, Spread{3, 3, 3}},
		{[]float64{3, 1, 2}, Spread{2, 1, 3}},
		{[]float64{4, 1, 2, 3}, Spread{2.5, 1, 4}},
	} {
		if got := Over(tc.in); got != tc.want {
			t.Errorf("%v: got %v, want %v", tc.in, got, tc.want)
		}
	}
	// 95 %: exact tables give these ranks, counted from 0.
	for n, want := range map[int]int{1: 0, 5: 0, 8: 0, 9: 1, 11: 1, 12: 2, 15: 3, 20: 5, 31: 9, 100: 39, 500: 227, 501: 228, 100000: 49690} {
		if got := cut(n); got != want {
			t.Errorf("%d values: cut %d, want %d", n, got, want)
		}
	}
	nine := []float64{9, 1, 8, 2, 7, 3, 6, 4, 5}
	if got, want := Over(nine), (Spread{5, 2, 8}); got != want {
		t.Errorf("nine values: got %v, want %v", got, want)
	}
	if got := Over(nil); !math.IsNaN(got.Mid) {
		t.Errorf("nothing has the median %v", got.Mid)
	}
}

func TestPaired(t *testing.T) {
	// Rounds 2 and 3 were disturbed: for both alike.
	a, b := []float64{20, 60, 40}, []float64{10, 30, 20}
	if got, want := Paired(a, b, Ratio), (Spread{2, 2, 2}); got != want {
		t.Errorf("ratio %v, want %v", got, want)
	}
	if got, want := Paired(a, b[:2], Delta), (Spread{20, 10, 30}); got != want {
		t.Errorf("delta %v, want %v", got, want)
	}
}

func TestSlope(t *testing.T) {
	var x, line, flat []float64
	for i := range 40 {
		x = append(x, float64(i))
		line = append(line, 3+2*float64(i))
		flat = append(flat, float64(i%2))
	}
	line[20] += 1000 // one outlier moves nothing
	if s := Slope(x, line); s.Mid != 2 || s.Low > 2 || s.High < 2 || s.High-s.Low > 0.1 {
		t.Errorf("a line of slope 2 has %v", s)
	}
	if s := Slope(x, flat); s.Mid != 0 || s.Low > 0 || s.High < 0 {
		t.Errorf("what goes up and down has the slope %v", s)
	}
	if s := Slope(x[:1], flat[:1]); !math.IsNaN(s.Mid) {
		t.Errorf("a point has the slope %v", s)
	}
}

func TestSpreadInWords(t *testing.T) {
	s := Spread{1.5, 1, 2.25}
	if got, want := s.Times(), "×1.50, 1.00–2.25"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := s.Signed(), "+1.5, 1.0 to 2.2"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestMachine(t *testing.T) {
	if got, want := (Machine{Cores: 2, Kernel: "6.1.0"}).String(), "unknown, 2 CPUs, Linux 6.1.0"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if m := ReadMachine(); m.Cores < 1 || m.Kernel == "" {
		t.Errorf("this machine is %+v", m)
	}
}

func TestWriteInto(t *testing.T) {
	begin, end := marks("bench-x")
	file := filepath.Join(t.TempDir(), "doc.md")
	if err := os.WriteFile(file, []byte("a\n"+begin+"\nold\n"+end+"\nb\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time changes nothing
		if err := WriteInto(file, "bench-x", "new\n\n"); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff("a\n"+begin+"\nnew\n"+end+"\nb\n", string(b)); d != "" {
			t.Error(d)
		}
	}
	if err := WriteInto(file, "bench-y", "new"); err == nil {
		t.Error("another benchmark's marks are accepted")
	}
	if err := Check(file, "bench-x"); err != nil {
		t.Error(err)
	}
	if Check(file, "bench-y") == nil || Check(file+"x", "bench-x") == nil {
		t.Error("marks are found that aren't there")
	}
	left, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(left) != 1 {
		t.Errorf("files left behind: %v, %v", left, err)
	}
	for _, doc := range []string{"", begin, end + begin, begin + begin + end} {
		if _, err := splice(doc, "bench-x", "x"); err == nil {
			t.Errorf("marks of %q are accepted", doc)
		}
	}
}
