package main

import (
	"fmt"
	"slices"
	"strings"

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
}

func workloads() []workload {
	return []workload{
		{name: "get", title: "GET, 1 KiB response", response: kib, shares: true},
		{name: "post", title: "POST 1 KiB, 1 KiB response", request: kib, response: kib, shares: true},
		{name: "whole", title: "POST 64 KiB, 64 KiB response, bodies copied whole", request: 64 * kib, response: 64 * kib, limit: 64 * kib},
		{name: "cut", title: "POST 64 KiB, 64 KiB response, bodies cut at 4 KiB", request: 64 * kib, response: 64 * kib, limit: 4 * kib},
		{name: "download", title: "GET, 1 MiB response, cut at 16 KiB", response: mib},
	}
}

// chooseWorkloads gives those named; an empty list is all of them.
func chooseWorkloads(list string) ([]workload, error) {
	all := workloads()
	if list == "" {
		return all, nil
	}
	want := strings.Split(list, ",")
	for _, name := range want {
		if !slices.ContainsFunc(all, func(w workload) bool { return w.name == name }) {
			return nil, fmt.Errorf("no workload %q; there are: get, post, whole, cut, download", name)
		}
	}
	return slices.DeleteFunc(all, func(w workload) bool { return !slices.Contains(want, w.name) }), nil
}

// measures tells whether v is measured under w.
func (w workload) measures(v variant) bool {
	return w.shares || v.copies != copiesEvents || v.share == 100
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
