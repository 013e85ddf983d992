package lua_test

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/periscope-mesh/periscope/mirror"
	"github.com/periscope-mesh/periscope/mirror/event"
	"github.com/periscope-mesh/periscope/mirror/lua"
	"github.com/periscope-mesh/periscope/policy"
	"github.com/periscope-mesh/periscope/test/envoytest"
)

func TestEmbedded(t *testing.T) {
	b := lua.Embedded()
	if b.Version != "0.1.0" || b.Wire != event.Version || !regexp.MustCompile(`^[0-9a-f]{12}$`).MatchString(b.Digest) || !strings.Contains(b.Code, b.Digest) {
		t.Errorf("build %s, wire version %d", b.Name(), b.Wire)
	}
	again, err := lua.Read(b.Code)
	if err != nil || again != b {
		t.Errorf("read again, it is %s, %v", again.Name(), err)
	}
	other, err := lua.Read(b.Code + "\n-- changed")
	if err != nil || other.Digest == b.Digest {
		t.Errorf("a changed source has digest %s, %v", other.Digest, err)
	}
}

func TestRead(t *testing.T) {
	const version, wire, digest = "local VERSION = \"1.2.3\"\n", "local WIRE = 7\n", "local DIGEST = \"000000000000\"\n"
	if b, err := lua.Read(version + wire + digest); err != nil || b.Version != "1.2.3" || b.Wire != 7 {
		t.Errorf("%+v, %v", b, err)
	}
	for source, want := range map[string]string{
		"":                                  "local VERSION",
		version + digest:                    "local WIRE",
		version + wire:                      "local DIGEST",
		strings.Repeat(" ", 1+lua.MaxBytes): "at most",
		"local VERSION = \"" + strings.Repeat("9", 33) + "\"\n" + wire + digest: "local VERSION",
	} {
		if _, err := lua.Read(source); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", source, err, want)
		}
	}
}

// functions runs inside Envoy's own LuaJIT, behind the plugin and with access
// to its local functions: the request's path names one, the body is its input,
// arguments apart by NUL.
const functions = `
local TESTED = {
  normalize = function(a) return normalize(a[1]) end,
  selects = function(a) return tostring(selects(parse_sections(a[1]), clean_host(a[2]), a[3]) ~= nil) end,
  governs = function(a) return (selects(parse_sections(a[1]), clean_host(a[2]), a[3]) or {}).policy or "" end,
  replaced = function(a)
    local sent = {}
    local h = { httpCall = function(_, _, _, body) sent[#sent + 1] = body end }
    local function md(rev, text)
      return { get = function(_, ns) return ns == "periscope.rev" and { r = rev } or ns == "periscope.settings" and { s = text } or nil end }
    end
    local function event(s, n)
      local p = new_exchange()
      p.n, p.s, p.prefix, p.t, p.place, p.qend = n, s, s.prefix, 1, constants("", "", ""), 1
      p.q.fields = 2
      reset(p.q.b)
      put(p.q.b, "\161a\161b")
      open[n] = p
      open_count = open_count + 1
      by_id = by_id + 1
      return p
    end
    local function see(rev, text, now)
      h.streamInfo = function() return { dynamicMetadata = function() return md(rev, text) end } end
      look(h, now)
      return settings
    end
    local before = see("1", a[1], 1)
    local early, late, other, last = event(before, 1), event(before, 2), event(before.next, 4), event(before, 5)
    finish(h, early, 2)
    local after = see("2", a[2], 3)
    finish(h, late, 4)
    finish(h, event(after, 3), 5)
    finish(h, other, 6)
    see("3", "", 7)
    finish(h, last, 8)
    return table.concat(sent, a[3])
  end,
  mask_json = function(a) return mask_json(a[1], json_names({ "", a[2], a[3] })) end,
  mask_cards = function(a) return mask_cards(a[1]) end,
  mask = function(a) -- the settings; then name or content type, content coding, value of each, with escapes
    for i = 1, #a do a[i] = unescape(a[i]) end
    local s, out = parse_settings(a[1]), {}
    for i = 2, #a, 3 do
      local name, coding, v, hidden, masked = a[i], a[i + 1], a[i + 2], "", nil
      if find(name, "/", 1, true) then
        local m, flags, f = message(), 0, 0
        m.count, m[1], m.got, m.len = 1, v, #v, #v
        m.max, m.mask, flags = body_mask(s, name, coding, 4 * #v + 100, 0)
        if m.max > 0 then
          hidden = v
          if m.mask or s.cards then hidden, f = masked_body(m, s, REQUEST_CUT) end
        end
        masked = band(bor(flags, f), MASKED) > 0
      else
        local b = buffer.new()
        local _, _, flags = encode_headers({ [name] = v }, s, b)
        local hs = b:get()
        masked = flags == MASKED
        local at = 1 + #key(name)
        hidden = sub(hs, at + (({ [0xd9] = 2, [0xda] = 3, [0xdb] = 5 })[byte(hs, at)] or 1))
      end
      out[#out + 1] = tostring(masked) .. gsub(hidden, "[%z%%]", { ["\0"] = "%00", ["%"] = "%25" })
    end
    return table.concat(out, "\0")
  end,
  methods = function(a) -- names that a handle's stream info lacks
    local lacks, said, si = {}, "", {}
    for _, name in ipairs(a) do lacks[name] = true end
    for _, name in ipairs({ "downstreamRemoteAddress", "downstreamLocalAddress", "protocol", "downstreamDirectRemoteAddress", "routeName", "downstreamSslConnection", "requestedServerName" }) do
      if not lacks[name] then si[name] = function() return "here" end end
    end
    methods({ streamInfo = function() return si end, logWarn = function(_, text) said = text end })
    return tostring(M.route(si)) .. " " .. tostring(M.ssl(si)) .. " " .. said
  end,
  place = function(a) -- the settings; then pairs of a header's name and value
    local hs = {}
    for i = 2, #a, 2 do hs[a[i]] = a[i + 1] end
    return tostring(place_of({ get = function(_, name) return hs[name] end }, parse_settings(a[1])))
  end,
  places = function(a) -- how many of so many sessions and of so many traces are in each tenth, and in 0.1 %
    local s, list = parse_settings(a[1]), {}
    for _, kind in ipairs({ "session", "trace" }) do
      local tenths, few = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, 0
      for i = 1, tonumber(a[2]) do
        local v = kind == "session" and { cookie = "a=b; SID=" .. i } or { traceparent = string.format("00-%032x-%016x-01", i, 7) }
        local at = place_of({ get = function(_, name) return v[name] end }, s)
        tenths[1 + floor(at * 10)] = tenths[1 + floor(at * 10)] + 1
        if at < 0.001 then few = few + 1 end
      end
      list[#list + 1] = table.concat(tenths, " ") .. " " .. few
    end
    return table.concat(list, " ")
  end,
  shares = function(a) -- the text; gives this pod's list
    POD = a[2]
    return table.concat(parse_shares(a[1]), " ", 2)
  end,
  tally = function(a) -- an exchange of the first settings, as the second ones' revision of the policy counts it
    local t = parse_settings(a[1]).tally
    t.eligible = t.eligible + 1
    return tostring(parse_settings(a[2]).tally.eligible)
  end,
  uint = function(a) return uint(tonumber(a[1])) end,
  class = function(a) return tostring(class_of({ [a[1]] = true }, "GET", a[2])) end,
  wants = function(a) return tostring(type_of(parse_settings(a[1]).rtypes, a[2]).wanted) end,
}
function envoy_on_request(h)
  local name = string.sub(h:headers():get(":path"), 2)
  local body = h:body()
  local text = body and body:getBytes(0, body:length()) or ""
  local args, from = {}, 1
  while true do
    local at = string.find(text, "\0", from, true)
    args[#args + 1] = string.sub(text, from, at and at - 1 or -1)
    if not at then break end
    from = at + 1
  end
  local ok, out = pcall(TESTED[name], args)
  h:respond({ [":status"] = ok and "200" or "500" }, out)
end
function envoy_on_response(h) end
`

// caller starts Envoy and gives a function that calls one of the plugin's.
func caller(t *testing.T) func(t *testing.T, name string, args ...string) string {
	addr := envoytest.FreeAddr(t)
	envoytest.Start(t, staticEnvoy(addr, "", luaFilter(lua.Embedded().Code+functions)))
	return func(t *testing.T, name string, args ...string) string {
		t.Helper()
		res, err := http.Post("http://"+addr+"/"+name, "text/plain", strings.NewReader(strings.Join(args, "\x00")))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		out, _ := io.ReadAll(res.Body)
		if res.StatusCode != http.StatusOK {
			t.Fatalf("%s(%q): %s", name, args, out)
		}
		return string(out)
	}
}

func TestFunctions(t *testing.T) {
	call := caller(t)
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"uint", []string{"0"}, "\x00"},
		{"uint", []string{"127"}, "\x7f"},
		{"uint", []string{"128"}, "\xcc\x80"},
		{"uint", []string{"65535"}, "\xcd\xff\xff"},
		{"uint", []string{"65536"}, "\xce\x00\x01\x00\x00"},
		{"uint", []string{"1790000000000000"}, "\xcf\x00\x06\x5b\xfe\xda\x25\xe0\x00"},
		{"mask_json", []string{`{"password":"s3\"cret","x":1}`, "password", "z"}, `{"password":"***","x":1}`},
		{"mask_json", []string{`{"a":{"password" : 12.5e3 },"b":[{"password":null}]}`, "password", "z"}, `{"a":{"password" : "***" },"b":[{"password":"***"}]}`},
		{"mask_json", []string{`{"card":{"pan":"1}","cvv":[1,2]},"y":2}`, "card", "z"}, `{"card":"***","y":2}`},
		{"mask_json", []string{`{"password":"cut of`, "password", "z"}, `{"password":"***"`},
		{"mask_json", []string{`{"password":"cut\`, "password", "z"}, `{"password":"***"`},
		{"mask_json", []string{`{"password":{"a":"cut`, "password", "z"}, `{"password":"***"`},
		{"mask_json", []string{`{"passwords":"kept","t":"password"}`, "password", "z"}, `{"passwords":"kept","t":"password"}`},
		{"mask_json", []string{`{"password":"one","token":"two"}`, "password", "token"}, `{"password":"***","token":"***"}`},
		{"mask_cards", []string{"pay 4111 1111 1111 1111 now"}, "pay **** **** **** **** now"},
		{"mask_cards", []string{`{"pan":"4111-1111-1111-1111"}`}, `{"pan":"****-****-****-****"}`},
		{"mask_cards", []string{"5555555555554444"}, "****************"},
		{"mask_cards", []string{"order 1234567890123456 at 12"}, "order 1234567890123456 at 12"},
		{"mask_cards", []string{"4111111111111111 12 29, 5555555555554444 01"}, "**************** 12 29, **************** 01"},
		{"mask_cards", []string{"tel 0123 456 789"}, "tel 0123 456 789"},
		{"methods", []string{"none"}, "here here "},
		{"methods", []string{"routeName", "downstreamDirectRemoteAddress"}, "nil here periscope: this Envoy's Lua has no downstreamDirectRemoteAddress, routeName: events go without"},
		{"shares", []string{"*\t1\t2\ngw-0\t3\t4\n", "gw-0"}, "3 4"},
		{"shares", []string{"*\t1\t2\ngw-0\t3\t4\n", "gw-1"}, "1 2"},
		{"shares", []string{"gw-0\t3\t4\n", "gw-1"}, ""},
		{"shares", []string{"", "gw-1"}, ""},
		{"tally", []string{"policy\tns/a\nrev\t1\n", "policy\tns/a\nrev\t2\n"}, "1"},
		{"tally", []string{"policy\tns/a\nrev\t3\n", "policy\tns/b\nrev\t3\n"}, "0"},
		{"class", []string{"Suspicious", "/etc/passwd"}, "Suspicious"},
		{"class", []string{"Suspicious", "/a?q=%27"}, "Suspicious"},
		{"class", []string{"Suspicious", "/a?q=1"}, "nil"},
		{"class", []string{"Authentication", "/v1/Login?x"}, "Authentication"},
		{"class", []string{"NewEndpoint", "/users/17"}, "NewEndpoint"},
		{"class", []string{"NewEndpoint", "/users/18"}, "nil"},
		{"wants", []string{"response_types\tapplication/json\ttext/*\n", "application/json; charset=utf-8"}, "true"},
		{"wants", []string{"response_types\tapplication/json\ttext/*\n", "TEXT/HTML"}, "true"},
		{"wants", []string{"response_types\tapplication/json\ttext/*\n", "image/png"}, "false"},
		{"wants", []string{"response_types\t*/*\n", "image/png"}, "true"},
		{"wants", []string{"response 1\n", "image/png"}, "false"},
	} {
		if got := call(t, tc.name, tc.args...); got != tc.want {
			t.Errorf("%s(%q)\n got %q\nwant %q", tc.name, tc.args, got, tc.want)
		}
	}
}

// Requests of a session, or of a trace, are at one place, whatever else they are;
// sessions and traces are spread evenly.
func TestPlace(t *testing.T) {
	call := caller(t)
	sid := mirror.Settings{PolicyRev: "0123456789ab", Session: policy.Session{Cookie: "SID"}}.Encode()
	header := mirror.Settings{PolicyRev: "0123456789ab", Session: policy.Session{Header: "x-session"}}.Encode()
	plain := mirror.Settings{PolicyRev: "0123456789ab"}.Encode()
	other := mirror.Settings{PolicyRev: "1123456789ab"}.Encode()
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	of := func(settings string, headers ...string) string {
		return call(t, "place", append([]string{settings}, headers...)...)
	}
	a := of(sid, "cookie", "SID=abc")
	for _, same := range [][]string{
		{sid, "cookie", "a=b; SID=abc"}, {sid, "cookie", "a=b,SID=abc; c=d"}, {sid, "cookie", "XSID=no; SID=abc", "traceparent", trace}, {header, "x-session", "abc"},
	} {
		if got := of(same[0], same[1:]...); got != a {
			t.Errorf("%q is at %s, not %s", same[1:], got, a)
		}
	}
	b := of(plain, "traceparent", trace)
	for _, same := range [][]string{
		{plain, "traceparent", trace[:len(trace)-18] + "ffffffffffffffff-00"}, {sid, "traceparent", trace}, {sid, "traceparent", trace, "cookie", "XSID=a; SID="},
	} {
		if got := of(same[0], same[1:]...); got != b {
			t.Errorf("%q is at %s, not %s", same[1:], got, b)
		}
	}
	for _, another := range []string{
		of(sid, "cookie", "SID=abd"), of(other, "traceparent", trace), of(plain, "traceparent", "00-x"), of(plain, "traceparent", strings.Repeat("z", 55)), of(plain), of(plain),
	} {
		if v, err := strconv.ParseFloat(another, 64); err != nil || v < 0 || v >= 1 || another == a || another == b {
			t.Errorf("at %s", another)
		}
	}
	counts := strings.Fields(call(t, "places", sid, "20000"))
	for i, text := range counts {
		n, _ := strconv.Atoi(text)
		if low, high := 1800, 2200; i%11 < 10 && (n < low || n > high) || i%11 == 10 && (n < 5 || n > 45) {
			t.Errorf("not spread evenly: %v", counts)
			break
		}
	}
}

// The plugin selects as the reference does, whatever the spelling of a path.
func TestSelectsAsPolicy(t *testing.T) {
	call := caller(t)
	specs := []policy.Spec{
		{},
		{Match: []policy.Match{{Hosts: []string{"shop.example", "*.shop.example"}, Paths: []policy.PathMatch{{Type: policy.PathPrefix, Value: "/api"}, {Type: policy.PathExact, Value: "/x%20y"}}}}},
		{Exclude: []policy.Match{{Paths: []policy.PathMatch{{Type: policy.PathExact, Value: "/healthz"}, {Type: policy.PathPrefix, Value: "/static/"}}}}},
		{Match: []policy.Match{{Hosts: []string{"a.example"}}, {Paths: []policy.PathMatch{{Type: policy.PathPrefix, Value: "/"}}}}, Exclude: []policy.Match{{Hosts: []string{"*.b.example"}}}},
		{Exclude: []policy.Match{{}}},
	}
	hosts := []string{"shop.example", "SHOP.example:8080", "a.shop.example.", "a.b.shop.example", "notshop.example", "x.b.example:1", "[::1]:80", "", "a.example"}
	parts := []string{"/", "/api", "/apix", "/healthz", "/static", "/static/", "..", ".", "//", "/%2e%2e", "%2f", "%61pi", "/x%20y", ";v=1", "\\", "?q=/api", "#f", "a", "%", "%zz", "%25", "\xff", "/./", "/.../"}
	var paths [][2]string
	readJSON(t, "../../policy/testdata/normalize.json", &paths)
	for _, v := range paths {
		if got := call(t, "normalize", v[0]); got != v[1] {
			t.Errorf("normalize(%q) = %q, want %q", v[0], got, v[1])
		}
	}
	var cases []struct {
		Name           string
		Match, Exclude []policy.Match
		Host, Path     string
		Want           bool
	}
	readJSON(t, "../../policy/testdata/select.json", &cases)
	for _, c := range cases {
		if got := call(t, "selects", mirror.Settings{Match: c.Match, Exclude: c.Exclude}.Encode(), c.Host, c.Path); got != fmt.Sprint(c.Want) {
			t.Errorf("%s: selects %s, want %v", c.Name, got, c.Want)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	n := 1500
	if os.Getenv("CI") != "" {
		n = 5000
	}
	for range n {
		spec := &specs[rng.IntN(len(specs))]
		host := hosts[rng.IntN(len(hosts))]
		path := "/"
		if rng.IntN(20) == 0 {
			path = ""
		}
		for range rng.IntN(5) {
			path += parts[rng.IntN(len(parts))]
		}
		raw, _, _ := strings.Cut(strings.ReplaceAll(path, "#", "?"), "?")
		if got, want := call(t, "normalize", raw), policy.NormalizePath(raw); got != want {
			t.Fatalf("normalize(%q) = %q, policy says %q", raw, got, want)
		}
		settings := mirror.Settings{Match: spec.Match, Exclude: spec.Exclude}.Encode()
		want := fmt.Sprint(policy.Selects(spec, host, path))
		if got := call(t, "selects", settings, host, path); got != want {
			t.Fatalf("selects(%+v, %q, %q) = %s, policy says %s", spec, host, path, got, want)
		}
	}
}

// Of several policies the first whose hosts and match hold governs, and it alone
// says whether it excludes.
func TestGovernsAsPolicy(t *testing.T) {
	call := caller(t)
	rng := rand.New(rand.NewPCG(3, 4))
	names := []string{"shop.example", "*.shop.example", "a.shop.example", "*.a.shop.example", "*.example", "b.example", "*"}
	hosts := []string{"shop.example", "SHOP.example:8080", "a.shop.example.", "b.a.shop.example", "b.example", "x.b.example", "example", ""}
	prefixes := []string{"/", "/api", "/api/v1", "/x y"}
	targets := []string{"/", "/api", "/apix?q=1", "/api/v1/", "/%61pi/v1", "/b/../api", "/x%20y", ""}
	pick := func(from []string, most int) []string {
		var out []string
		for range rng.IntN(most + 1) {
			out = append(out, from[rng.IntN(len(from))])
		}
		return out
	}
	entries := func(most int) []policy.Match {
		var out []policy.Match
		for range rng.IntN(most + 1) {
			m := policy.Match{Hosts: pick(names, 2)}
			for _, v := range pick(prefixes, 2) {
				m.Paths = append(m.Paths, policy.PathMatch{Type: policy.PathPrefix, Value: v})
			}
			out = append(out, m)
		}
		return out
	}
	n := 1500
	if os.Getenv("CI") != "" {
		n = 5000
	}
	for range n {
		var all []mirror.Settings
		for i := range 1 + rng.IntN(4) {
			s := mirror.Settings{Gateway: "ns/gw", PolicyID: fmt.Sprint("ns/", i), Match: entries(2), Exclude: entries(1), Hosts: pick(names, 2)}
			if s.Hosts != nil {
				s.Except = pick(names, 2)
			}
			all = append(all, s)
		}
		host, target := hosts[rng.IntN(len(hosts))], targets[rng.IntN(len(targets))]
		settings := all[0]
		settings.Next = all[1:]
		got, want := call(t, "governs", settings.Encode(), host, target), governs(all, host, target)
		if got != want {
			t.Fatalf("%q governs %q %q, want %q, of\n%s", got, host, target, want, settings.Encode())
		}
		// So do nodes, for gateways without the plugin.
		s, excluded := mirror.NewSelector(settings).Select(host, target)
		if s != nil && !excluded && s.PolicyID != want || (s == nil || excluded) && want != "" {
			t.Fatalf("the selector gives %+v, excluded %v, for %q %q, want %q, of\n%s", s, excluded, host, target, want, settings.Encode())
		}
	}
}

// governs is the reference: the policy that mirrors an exchange, or none.
func governs(all []mirror.Settings, host, target string) string {
	// closest tells how closely the closest of hosts names the host: -1, not at all.
	closest := func(hosts []string) int {
		best := -1
		for _, h := range hosts {
			fixed := len(strings.TrimPrefix(h, "*"))
			if h[0] != '*' {
				fixed++
			}
			if policy.Selects(&policy.Spec{Match: []policy.Match{{Hosts: []string{h}}}}, host, target) {
				best = max(best, fixed)
			}
		}
		return best
	}
	for _, s := range all {
		if s.Hosts != nil && (closest(s.Hosts) < 0 || closest(s.Except) > closest(s.Hosts)) || !policy.Selects(&policy.Spec{Match: s.Match}, host, target) {
			continue
		}
		if policy.Selects(&policy.Spec{Exclude: s.Exclude}, host, target) {
			return s.PolicyID
		}
		return ""
	}
	return ""
}

// What began under settings that were replaced since goes out under their
// revision.
func TestReplacedSettings(t *testing.T) {
	call := caller(t)
	before, after := settings(nil), settings(func(s *mirror.Settings) { s.PolicyID, s.PolicyRev = "ns/after", "after" })
	before.Next = []mirror.Settings{settings(func(s *mirror.Settings) { s.PolicyID, s.PolicyRev = "ns/other", "other" })}
	const between = "\xc1between\xc1" // never in MessagePack of such names
	var got []string
	for i, batch := range strings.Split(call(t, "replaced", before.Encode(), after.Encode(), between), between) {
		b, err := event.Decode([]byte(batch), event.DefaultLimits())
		if err != nil || len(b.Rejected) > 0 || b.Header.Seq != uint64(i+1) {
			t.Fatal(b, err)
		}
		for _, e := range b.Events {
			got = append(got, fmt.Sprint(b.Header.PolicyRev, " ", e.Policy, " ", e.N))
		}
	}
	want := []string{"r1 default/default 1", "r1 default/default 2", "after ns/after 3", "other ns/other 4", "r1 default/default 5"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func readJSON(t *testing.T, file string, v any) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		t.Fatal(err)
	}
}

func luaFilter(code string) map[string]any {
	return map[string]any{"name": "periscope.mirror", "typed_config": map[string]any{
		"@type":               "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
		"default_source_code": map[string]any{"inline_string": code},
		"stat_prefix":         "periscope",
	}}
}

func settingsFilter(rev, text string) map[string]any {
	return map[string]any{"name": "periscope.settings", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config",
		"metadata": []any{
			map[string]any{"metadata_namespace": "periscope.rev", "value": map[string]any{"r": rev}},
			map[string]any{"metadata_namespace": "periscope.settings", "value": map[string]any{"s": text}},
		},
	}}
}

// staticEnvoy is a bootstrap with one listener; upstream and node are clusters
// when addresses are given.
func staticEnvoy(listen, upstream string, filters ...map[string]any) map[string]any {
	filters = append(filters, map[string]any{"name": "envoy.filters.http.router", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}})
	route := map[string]any{"name": "default", "match": map[string]any{"prefix": "/"}, "direct_response": map[string]any{"status": 204}}
	clusters := []any{}
	if upstream != "" {
		delete(route, "direct_response")
		route["route"] = map[string]any{"cluster": "upstream", "timeout": "0s"}
		clusters = append(clusters, cluster("upstream", upstream, false))
	}
	return map[string]any{
		"node": map[string]any{"id": "test", "cluster": "test"},
		"static_resources": map[string]any{
			"listeners": []any{map[string]any{"name": "http", "address": socket(listen), "filter_chains": []any{map[string]any{
				"filters": []any{map[string]any{"name": "hcm", "typed_config": map[string]any{
					"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
					"stat_prefix": "ingress", "use_remote_address": true, "generate_request_id": false,
					"upgrade_configs": []any{map[string]any{"upgrade_type": "websocket"}},
					"route_config":    map[string]any{"name": "r", "virtual_hosts": []any{map[string]any{"name": "v", "domains": []string{"*"}, "routes": []any{route}}}},
					"http_filters":    filters,
				}}}}}}},
			"clusters": clusters,
		},
	}
}

func cluster(name, addr string, h2 bool) map[string]any {
	c := map[string]any{"name": name, "type": "STATIC", "connect_timeout": "0.25s", "load_assignment": map[string]any{
		"cluster_name": name, "endpoints": []any{map[string]any{"lb_endpoints": []any{map[string]any{"endpoint": map[string]any{"address": socket(addr)}}}}}}}
	if h2 {
		c["typed_extension_protocol_options"] = map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
			"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
			"explicit_http_config": map[string]any{"http2_protocol_options": map[string]any{}}}}
	}
	return c
}

func socket(addr string) map[string]any {
	i := strings.LastIndexByte(addr, ':')
	var port int
	_, _ = fmt.Sscan(addr[i+1:], &port)
	return map[string]any{"socket_address": map[string]any{"address": addr[:i], "port_value": port}}
}
