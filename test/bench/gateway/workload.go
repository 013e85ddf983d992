package main

import (
	"fmt"

	"github.com/periscope-mesh/periscope/test/bench/load"
	"github.com/periscope-mesh/periscope/test/bench/sink"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// workload is a kind of exchange.
type workload struct {
	name     string // for -workloads
	title    string
	request  int  // bytes of the request's body; none: GET
	response int  // bytes of the response's
	limit    int  // of the policy for bodies both ways; 0: the default policy's limits
	shares   bool // the plugin is measured with smaller shares as well
	goals    []cpuGoal
}

// cpuGoal is how many µs of CPU an exchange may cost one variant more than
// another.
type cpuGoal struct {
	what, variant, than string
	limit               float64
}

func workloads() []workload {
	whole := func(limit float64) cpuGoal { return cpuGoal{"added CPU", ours, baseline, limit} }
	peer := cpuGoal{"CPU above `request_mirror_policies`", ours, "shadow", 0}
	return []workload{
		{
			name: "get", title: "GET, 1 KiB response", response: kib, shares: true,
			goals: []cpuGoal{
				whole(27), {"added CPU at a share of 10 %", ours + "-10", baseline, 8},
				{"added CPU at a share of 0 %", ours + "-0", baseline, 2}, peer,
			},
		},
		{name: "post", title: "POST 1 KiB, 1 KiB response", request: kib, response: kib, shares: true, goals: []cpuGoal{whole(30), peer}},
		{
			name: "whole", title: "POST 64 KiB, 64 KiB response, bodies copied whole", request: 64 * kib, response: 64 * kib, limit: 64 * kib,
			goals: []cpuGoal{whole(250), {"CPU above `ext_proc`", ours, "ext_proc", 0}},
		},
		{
			name: "cut", title: "POST 64 KiB, 64 KiB response, bodies cut at 4 KiB", request: 64 * kib, response: 64 * kib, limit: 4 * kib,
			goals: []cpuGoal{whole(80), peer},
		},
		{name: "download", title: "GET, 1 MiB response, cut at 16 KiB", response: mib},
	}
}

// measures tells whether v is measured under w when saturated.
func (w workload) measures(v variant) bool {
	return v.fault == "" && (w.shares || v.whole())
}

// call looks like a browser's call of an API.
func (w workload) call() load.Request {
	method, body, fields := "GET", []byte(nil), ""
	if w.request > 0 {
		method, body = "POST", sink.JSON(w.request)
		fields = fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	head := method + fmt.Sprintf(" /api/v1/catalog/products/4711?view=full&lang=en&bytes=%d HTTP/1.1\r\n", w.response) +
		"Host: shop.example.com\r\n" +
		"User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n" +
		"Accept: application/json, text/plain, */*\r\n" +
		"Accept-Language: en-US,en;q=0.5\r\n" +
		"Accept-Encoding: gzip, deflate, br\r\n" +
		"Referer: https://shop.example.com/catalog?page=3\r\n" +
		"Origin: https://shop.example.com\r\n" +
		"Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; consent=1\r\n" +
		"Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2lnbmF0dXJlLW9mLXRoZS10b2tlbg\r\n" +
		"Sec-Fetch-Dest: empty\r\n" +
		"Sec-Fetch-Mode: cors\r\n" +
		"Sec-Fetch-Site: same-origin\r\n" + fields
	return load.Request{Raw: append([]byte(head+"\r\n"), body...), BodyBytes: w.response}
}
