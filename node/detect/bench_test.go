package detect

import (
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror/event"
)

// BenchmarkInspect measures one core: run it with -cpu 1.
func BenchmarkInspect(b *testing.B) {
	var j strings.Builder
	j.WriteString(`{"customer":{"name":"Sinéad O'Connor","email":"s@example.org"},"items":[`)
	for i := range 9 {
		if i > 0 {
			j.WriteByte(',')
		}
		j.WriteString(`{"sku":"A-` + strings.Repeat("x", i) + `","title":"Blue chair, oak and pine","qty":2,"price":12.5,"gift":false}`)
	}
	j.WriteString(`],"note":"` + strings.Repeat("please ring twice ", 8) + `"}`)
	ordinary := []string{
		"Accept-Language: en-GB,en;q=0.5", "Referer: https://shop.example/list?page=2", "Authorization: Bearer " + jwt,
		"Cookie: session=3f2a9c1b; theme=dark", "X-Request-Id: 0190163d-8694-739b-aea5-966c26f8ad91",
		"X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https",
	}
	for _, c := range []struct {
		name  string
		event *event.Event
	}{
		{"get", get("/api/v1/items?page=2&q=chair", ordinary...)},
		{"json-1k", post(jsonType, j.String(), ordinary...)},
		{"attack", get("/x?file=../../../etc/passwd", ordinary...)},
	} {
		b.Run(c.name, func(b *testing.B) {
			e := newEngine(b)
			b.ReportAllocs()
			for b.Loop() {
				inspect(b, e, c.event)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "exchanges/s")
		})
	}
}
