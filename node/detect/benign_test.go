package detect

import (
	"os"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/node/attack"
)

const jwt = "eyJhbGciOiJSUzI1NiIsImtpZCI6IjEifQ.eyJpc3MiOiJodHRwczovL2lkcC5leGFtcGxlIiwic3ViIjoiNDIifQ.c2lnbmF0dXJl-_c2lnbmF0dXJl"

const graphql = `{"operationName":"Q","query":"query Q($id: ID!, $first: Int = 10) {\n  user(id: $id) { id, name\n    posts(first: $first, orderBy: {field: DATE, direction: DESC}) { edges { node { title } } }\n  }\n}","variables":{"id":"42"}}`

const markdown = "# Release notes\n\n* fixed *bold* and `code` spans; see [docs](https://docs.example/a?b=1#c)\n* 3 < 4 && 5 > 2\n\n> \"quoted\" text -- with dashes, isn't it?\n"

// lookAlikes are exchanges of benign clients that resemble attacks.
func lookAlikes() map[string]*event.Event {
	return map[string]*event.Event{
		"health check":              exchangeOf("GET /healthz", ""),
		"no accept, numeric host":   exchangeOf("GET /api/v1/items\nHost: 10.0.0.7:8080\nUser-Agent: curl/8.5.0", ""),
		"PUT":                       exchangeOf("PUT /api/v1/items/7\nContent-Type: application/json\n\n{\"name\":\"x\"}", ""),
		"DELETE without body":       exchangeOf("DELETE /api/v1/items/7\n"+browser, ""),
		"PATCH":                     exchangeOf("PATCH /api/v1/items/7\nContent-Type: application/json-patch+json\n\n[{\"op\":\"replace\",\"path\":\"/price\",\"value\":9.5}]", ""),
		"JSON CRUD":                 post(jsonType, `{"id":7,"name":"Blue chair","tags":["home","oak & pine"],"price":{"amount":12.50,"currency":"EUR"},"active":true,"note":null}`),
		"JSON with names":           post(jsonType, `{"firstName":"Sinéad","lastName":"O'Connor","company":"AT&T","motto":"it's what's next; always"}`),
		"JSON with large numbers":   post(jsonType, `{"max":2147483647,"min":-2147483648,"limit":"4294967295"}`),
		"JSON with timestamps":      post(jsonType, `{"at":"2024-05-01T12:00:00.000+02:00","cron":"0 */5 * * *","tz":"Europe/Zurich"}`),
		"JSON with markdown":        post(jsonType, `{"body":`+quote(markdown)+`}`),
		"markdown":                  post("text/markdown", markdown),
		"GraphQL":                   post(jsonType, graphql),
		"GraphQL, short":            post(jsonType, `{"query":"{user(id:1){id,name}}"}`),
		"GraphQL batch":             post(jsonType, `[`+graphql+`]`),
		"GraphQL string":            post(jsonType, `{"query":"mutation { addNote(text: \"it's nice; really\") { id } }"}`),
		"JWT":                       get("/api/me", "Authorization: Bearer "+jwt),
		"JWT in JSON":               post(jsonType, `{"token":"`+jwt+`"}`),
		"JWT in cookie":             get("/api/me", "Cookie: session="+jwt+"; theme=dark; _ga=GA1.2.1234567890.1700000000"),
		"basic auth":                get("/api/me", "Authorization: Basic dXNlcjpwYXNzd29yZA=="),
		"tracing":                   get("/x", "Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "X-Request-Id: 0190163d-8694-739b-aea5-966c26f8ad91", "X-B3-Traceid: 463ac35c9f6413ad"),
		"forwarded":                 get("/x", "X-Forwarded-For: 203.0.113.9, 2001:db8::7", "X-Forwarded-Proto: https", "X-Envoy-External-Address: 203.0.113.9"),
		"client hints":              get("/x", `Sec-Ch-Ua: "Not_A Brand";v="8", "Chromium";v="120"`, "Sec-Fetch-Mode: cors", "If-None-Match: W/\"5f-17\""),
		"client description":        get("/x", "X-Client-Info: shop-app/4.2.1 (iPhone14,2; iOS 17.1; java; sl)"),
		"apostrophe in query":       get("/search?q=O%27Brien"),
		"apostrophes in query":      get("/search?q=rock+%27n%27+roll"),
		"union, select":             get("/search?q=union+was+a+great+select"),
		"selection and union":       get("/search?q=select+committee+of+the+credit+union"),
		"drop, table":               get("/search?q=drop+leaf+table+and+4+chairs"),
		"or, and":                   get("/search?q=red+or+blue+and+green"),
		"plus address":              get("/search?email=john%2Border%40shop.example"),
		"script word":               get("/search?q=java+script+tutorial"),
		"less than":                 get("/search?filter=price+%3C+10"),
		"filter expression":         get("/items?filter=status+eq+%27open%27+and+price+gt+5"),
		"field list":                get("/items?fields=id,name,price&sort=-created,name"),
		"URL parameter":             get("/login?redirect_uri=https%3A%2F%2Fapp.example%2Fcallback%3Fa%3D1%26b%3D2&state=xyz"),
		"file name":                 get("/files?name=report%20final%20(2).pdf"),
		"file name, dots":           get("/files/v1..v2.diff"),
		"browser config":            get("/browserconfig.xml"),
		"version path":              get("/packages/@scope/name/-/name-1.2.3.tgz"),
		"OData path":                get("/odata/Products(42)/Category?$select=Name,Price&$top=5"),
		"matrix path":               get("/maps;z=3/tiles/5"),
		"unicode":                   get("/search?q=caf%C3%A9+%E6%97%A5%E6%9C%AC%E8%AA%9E"),
		"base64 parameter":          get("/x?cursor=eyJpZCI6NDIsInMiOiJhc2MifQ%3D%3D"),
		"form":                      post(form, "name=Anna+O%27Neil&email=anna%40example.org&text=Hello%2C+how+are+you%3F%0D%0ABest+wishes"),
		"password":                  post(form, "username=anna&password=pa%24%24w0rd%21%23x"),
		"upload":                    post(multipart, part(`name="file"; filename="O'Brien CV (final).pdf"`, "%PDF-1.7\x00\x01")),
		"XML":                       post("application/xml", `<?xml version="1.0" encoding="UTF-8"?><order id="7"><item sku="A-1">2 &lt; 3 &amp; more</item></order>`),
		"SOAP":                      post("application/soap+xml", `<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope"><s:Body><Get xmlns="urn:x"><Id>7</Id></Get></s:Body></s:Envelope>`),
		"XHTML":                     post("application/xhtml+xml", `<!DOCTYPE html><html><body>hello</body></html>`),
		"gRPC":                      post("application/grpc", "\x00\x00\x00\x00\x10\x0a\x05Alice\x12\x07Builder"),
		"protobuf":                  post("application/x-protobuf", "\x0a\x10alice@example.org\x12\x0bO'Brien Ltd"),
		"msgpack":                   post("application/msgpack", "\x82\xa4name\xa5Alice\xa3age\x1e"),
		"octets":                    post("application/octet-stream", "\x00\x01\x02\xff\xfe binary data here \x80\x81"),
		"image":                     post("image/png", "\x89PNG\r\n\x1a\n<script>"),
		"ndjson":                    post("application/x-ndjson", "{\"a\":\"b\"}\n{\"a\":\"c\"}\n"),
		"log lines":                 post("text/plain", "2024-05-01 12:00:00 INFO started in 1.2s\n2024-05-01 12:00:01 WARN slow query: 120 ms\n"),
		"problem response":          exchangeOf("GET /x\n"+browser, "404\ncontent-type: application/problem+json\n\n{\"title\":\"Not found\",\"status\":404,\"detail\":\"no such item\"}"),
		"HTML response":             exchangeOf("GET /x\n"+browser, "200\ncontent-type: text/html\n\n<!doctype html><html><head><title>Shop</title><script>let a=1</script></head><body>Hi</body></html>"),
		"server error":              exchangeOf("GET /x\n"+browser, "500\ncontent-type: application/json\n\n{\"error\":\"internal error\",\"id\":\"7f3\"}"),
		"websocket":                 get("/ws", "Connection: Upgrade", "Upgrade: websocket", "Sec-Websocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
		"session id without origin": get("/api/cart?sessionid=3f2a9c1b"),
	}
}

func quote(s string) string {
	r := strings.NewReplacer("\n", `\n`, `"`, `\"`)
	return `"` + r.Replace(s) + `"`
}

func TestLookAlikesAreSilent(t *testing.T) {
	e := newEngine(t)
	for name, ev := range lookAlikes() {
		t.Run(name, func(t *testing.T) {
			if res := inspect(t, e, ev); len(res.Hits) > 0 {
				t.Error(describe(res))
			}
		})
	}
}

// Benign text that CRS takes for an attack at paranoia level 1. It is written
// down so that a change for the better, or the worse, is seen.
func TestKnownFalseAlarms(t *testing.T) {
	e := newEngine(t)
	for name, c := range map[string]struct {
		event *event.Event
		typ   attack.Type
	}{
		"adjacent union select": {get("/search?q=the+union+selected+a+president+from+among+them"), attack.SQLInjection},
		"quoted operator":       {get("/search?q=%22like%22+stamp"), attack.SQLInjection},
		"number and word":       {get("/search?q=select+x+from+y+where"), attack.SQLInjection},
		"configuration file":    {get("/files/logstash/config.xml"), attack.PathTraversal},
		"callback by address":   {get("/hooks?url=http://10.1.2.3/done"), attack.FileInclusion},
	} {
		t.Run(name, func(t *testing.T) {
			if res := inspect(t, e, c.event); len(res.Hits) != 1 || res.Hits[0].Type != c.typ {
				t.Errorf("now: %s", describe(res))
			}
		})
	}
}

// The sample's source and licence are in testdata/benign/README.md.
func TestRealRequestsAreSilent(t *testing.T) {
	b, err := os.ReadFile("testdata/benign/requests.tsv")
	if err != nil {
		t.Fatal(err)
	}
	e := newEngine(t)
	n := 0
	for line := range strings.Lines(string(b)) {
		c := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(c) != 5 {
			t.Fatalf("line %q", line)
		}
		request := c[0] + " " + c[1] + "\nUser-Agent: " + c[4]
		if c[3] != "-" {
			request += "\nReferer: " + c[3]
		}
		for _, ev := range []*event.Event{
			exchangeOf(request, c[2]+"\ncontent-type: text/html\n\n<html></html>"),
			exchangeOf("GET /api/v1/x\n"+browser+"\nX-Client-Info: "+c[4], ""), // what a proxy might pass on
		} {
			n++
			if res := inspect(t, e, ev); len(res.Hits) > 0 {
				t.Errorf("%s: %s", request, describe(res))
			}
		}
	}
	if n < 400 {
		t.Errorf("only %d requests", n)
	}
}
