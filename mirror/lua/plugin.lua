-- Periscope gateway plugin: copies each exchange, asynchronously, to an analysis node.
--
-- Promises: nothing is held (bodies stream through, never body()), nothing is
-- changed, nothing is awaited (asynchronous httpCall), memory is bounded, and
-- each exchange ends in one event or one counter. The wire contract is
-- mirror/event; the settings' text is mirror.Settings.Encode.
--
-- Runs in Envoy's LuaJIT, one VM per worker; all state below is the worker's.
local VERSION = "0.1.0"
local DIGEST = "000000000000" -- of this source: whoever sends it puts it in
local WIRE = 1

-- The JIT does not pay for code that spends its time in C calls (measured:
-- 3 to 7 µs an exchange dearer with it), nor does an eager collector.
jit.off()
collectgarbage("setpause", 300)

local buffer = require("string.buffer")
local bit = require("bit")
local band, rshift, bor = bit.band, bit.rshift, bit.bor
local char, byte, sub, find, gsub, lower = string.char, string.byte, string.sub, string.find, string.gsub, string.lower
local floor, random = math.floor, math.random

-- Bounds.
local MAX_FIELDS = 1000            -- header lines copied per message
local MAX_FIELD_BYTES = 262144     -- and their bytes
local MAX_OPEN = 4096              -- exchanges awaiting their response
local MAX_OPEN_BYTES = 33554432    -- and the bytes of their copies
local MAX_WAIT_MS = 30000          -- then they are sent request-only
local BATCH_EVENTS = 32
local BATCH_BYTES = 262144
local BATCH_MS = 100
local CALL_TIMEOUT_MS = 1000
local MAX_CACHE = 1024             -- entries of each cache of header names, content types, endpoints

local NO_RESPONSE, REQUEST_CUT, RESPONSE_CUT, RESPONSE_SKIP, STREAM, HEADERS_CUT, MASKED, REQUEST_OPEN = 1, 2, 4, 8, 16, 32, 64, 128

-- ------------------------------------------------------------------ MessagePack

local STR, UINT = {}, {}
for n = 0, 255 do
  STR[n] = n < 32 and char(0xa0 + n) or char(0xd9, n)
  UINT[n] = n < 128 and char(n) or char(0xcc, n)
end
local function be16(n) return char(rshift(n, 8), band(n, 255)) end
local function be32(n) return char(floor(n / 16777216) % 256, floor(n / 65536) % 256, floor(n / 256) % 256, n % 256) end
local function str(n) -- header of a string of n bytes
  return STR[n] or (n < 65536 and "\218" .. be16(n)) or "\219" .. be32(n)
end
local function uint(n)
  if n < 256 then return UINT[n] end
  if n < 65536 then return "\205" .. be16(n) end
  if n < 4294967296 then return "\206" .. be32(n) end
  return "\207" .. be32(floor(n / 4294967296)) .. be32(n % 4294967296)
end
local function key(k) return str(#k) .. k end
local function pair(k, v) return key(k) .. str(#v) .. v end

-- ------------------------------------------------------------------ settings

-- The fields behind a record's key, as a set; nil when there are none.
local function set(fields)
  local s
  for i = 2, #fields do s = s or {}; s[fields[i]] = true end
  return s
end

local function unescape(s)
  return (gsub(s, "%%(%x%x)", function(h) return char(tonumber(h, 16)) end))
end

-- One entry of match or exclude: hosts by name and by suffix, paths likewise.
local function parse_match(fields)
  local m = {}
  for i = 2, #fields do
    local kind, v = sub(fields[i], 1, 1), sub(fields[i], 2)
    if kind == "h" then m.hosts = m.hosts or {}; m.hosts[v] = true
    elseif kind == "w" then m.suffixes = m.suffixes or {}; m.suffixes[#m.suffixes + 1] = v
    elseif kind == "e" then m.exact = m.exact or {}; m.exact[v] = true
    elseif kind == "p" then m.prefixes = m.prefixes or {}; m.prefixes[#m.prefixes + 1] = v end
  end
  return m
end

local function parse_types(fields)
  local t = { cache = {}, cached = 0 }
  for i = 2, #fields do t[fields[i]] = true end
  t.any = t["*/*"]
  return t
end

local function parse_settings(text)
  local s = { match = nil, exclude = nil, qmax = 0, rmax = 0, ppm = 0, batch = buffer.new(), events = 0, since = 0, flushed = 0 }
  for line in string.gmatch(text, "[^\n]+") do
    local f = {}
    for field in string.gmatch(line, "[^\t]+") do f[#f + 1] = unescape(field) end
    local k, v = f[1], f[2]
    if k == "gateway" then s.gateway = v
    elseif k == "policy" then s.policy = v
    elseif k == "rev" then s.rev = v
    elseif k == "share_rev" then s.share_rev = v
    elseif k == "cluster" then s.cluster = v
    elseif k == "ppm" then s.ppm = tonumber(v) or 0
    elseif k == "mode" then s.on = v == "Monitor"
    elseif k == "hosts" then s.within = parse_match(f)
    elseif k == "except" then s.except = parse_match(f)
    elseif k == "match" then s.match = s.match or {}; s.match[#s.match + 1] = parse_match(f)
    elseif k == "exclude" then s.exclude = s.exclude or {}; s.exclude[#s.exclude + 1] = parse_match(f)
    elseif k == "always" then s.always = set(f)
    elseif k == "request" then s.qmax = tonumber(v) or 0
    elseif k == "response" then s.rmax = tonumber(v) or 0
    elseif k == "request_types" then s.qtypes = parse_types(f)
    elseif k == "response_types" then s.rtypes = parse_types(f)
    elseif k == "mask_headers" then s.mask = set(f)
    elseif k == "mask_json" then s.mask_json = {}; for i = 2, #f do s.mask_json[i - 1] = f[i] end
    elseif k == "detect_cards" then s.cards = true end
  end
  s.qtypes = s.qtypes or parse_types({})
  s.rtypes = s.rtypes or parse_types({})
  -- What every event of this revision begins with.
  s.prefix = pair("p", s.policy or "") .. key("s")
  return s
end

-- parse_sections gives the first policy's, and each one's next: an empty line
-- stands between them.
local function parse_sections(text)
  local first, last
  for section in string.gmatch(text .. "\n", "(.-\n)\n") do
    local s = parse_settings(section)
    if last then last.next = s else first = s end
    last = s
  end
  if first then first.selective = first.next or first.within or first.match or first.exclude end
  return first
end

-- ------------------------------------------------------------------ matching (reference: policy.Selects)

-- normalize gives the path as a server may understand it: decoded once,
-- without dot segments, repeated slashes and parameters.
local function normalize(path)
  if not find(path, "[%%;\\]") and not find(path, "//", 1, true) and not find(path, "/.", 1, true) then return path end
  local p = gsub(unescape(path), "\\", "/")
  local out, n, directory = {}, 0, false
  for seg in string.gmatch(p .. "/", "([^/]*)/") do
    local semi = find(seg, ";", 1, true)
    if semi then seg = sub(seg, 1, semi - 1) end
    if seg == ".." then
      if n > 0 then out[n] = nil; n = n - 1 end
      directory = true
    elseif seg == "." or seg == "" then directory = true
    else n = n + 1; out[n] = seg; directory = false end
  end
  local r = "/" .. table.concat(out, "/", 1, n)
  if n > 0 and directory then r = r .. "/" end
  return r
end

local function path_matches(m, path)
  if not m.exact and not m.prefixes then return true end
  if m.exact and m.exact[path] then return true end
  local list = m.prefixes
  if list then
    for i = 1, #list do
      local p = list[i]
      local n = #p
      if p == "/" then return true end
      if sub(path, 1, n) == p and (#path == n or byte(path, n + 1) == 47) then return true end
    end
  end
  return false
end

local function host_matches(m, host)
  if not m.hosts and not m.suffixes then return true end
  if m.hosts and (m.hosts[host] or m.hosts["*"]) then return true end
  local list = m.suffixes
  if list then
    for i = 1, #list do
      local s = list[i] -- ".shop.example"
      if #host > #s and sub(host, -#s) == s then return true end
    end
  end
  return false
end

local function any(list, host, path)
  for i = 1, #list do
    local m = list[i]
    if host_matches(m, host) and path_matches(m, path) then return true end
  end
  return false
end

-- closest tells how closely m names a host: by the length of what is fixed, one
-- more for a name without wildcard; -1 if it doesn't.
local function closest(m, host)
  if m.hosts and m.hosts[host] then return #host + 1 end
  local best, list = m.hosts and m.hosts["*"] and 0 or -1, m.suffixes
  if list then
    for i = 1, #list do
      local s = list[i]
      if #s > best and #host > #s and sub(host, -#s) == s then best = #s end
    end
  end
  return best
end

local function matches(s, host, raw, norm)
  if s.within then
    local c = closest(s.within, host)
    if c < 0 or s.except and closest(s.except, host) > c then return false end
  end
  return not s.match or any(s.match, host, raw) or norm ~= raw and any(s.match, host, norm)
end

-- selects gives the policy that governs an exchange, the first that matches,
-- unless that excludes it. It errs towards mirroring: a path matches if either
-- form does, and is excluded only if both are, so that no spelling of a path
-- hides an attack.
local function selects(s, host, target)
  local raw = string.match(target, "^[^?#]*")
  local norm = normalize(raw)
  while s and not matches(s, host, raw, norm) do s = s.next end
  if s and s.exclude and any(s.exclude, host, raw) and (norm == raw or any(s.exclude, host, norm)) then return nil end
  return s
end

local function clean_host(authority)
  local h = lower(authority or "")
  if byte(h, 1) == 91 then h = string.match(h, "^%[[^%]]*%]") or h -- [::1]:8080
  else h = gsub(h, ":%d*$", "") end
  if byte(h, #h) == 46 then h = sub(h, 1, -2) end
  return h
end

-- ------------------------------------------------------------------ always-classes

local endpoints, endpoint_count = {}, 0
local function class_of(always, method, target)
  if always.Suspicious and (find(target, "[<>'\"`|;\\$(){}]") or find(target, "..", 1, true) or find(target, "%%[0-3]") or find(target, "%%[57][BbCcDd]") or find(target, "/etc/", 1, true)) then return "Suspicious" end
  local path = string.match(target, "^[^?#]*")
  if always.Authentication then
    local p = lower(path)
    for _, w in ipairs({ "login", "signin", "auth", "token", "session", "password" }) do
      if find(p, w, 1, true) then return "Authentication" end
    end
  end
  if always.NewEndpoint then
    local shape = method .. gsub(path, "/[^/]*%d[^/]*", "/*")
    if not endpoints[shape] and endpoint_count < MAX_CACHE then
      endpoints[shape] = true
      endpoint_count = endpoint_count + 1
      return "NewEndpoint"
    end
  end
  return nil
end

-- ------------------------------------------------------------------ masking

local HIDDEN = "***"

local function luhn(digits)
  local total, double = 0, false
  for i = #digits, 1, -1 do
    local d = byte(digits, i) - 48
    if double then d = d * 2; if d > 9 then d = d - 9 end end
    total = total + d
    double = not double
  end
  return total % 10 == 0
end

-- mask_cards hides runs of whole digit groups that make 13 to 19 digits and
-- satisfy the Luhn formula.
local function mask_cards(v)
  if not find(v, "%d[%d %-]+%d") then return v end
  return (gsub(v, "%d[%d %-]+%d", function(run)
    if #run < 13 then return nil end
    local groups, out = {}, nil
    for at, digits in string.gmatch(run, "()(%d+)") do groups[#groups + 1] = { at, digits } end
    local i = 1
    while i <= #groups do
      local digits, skip = "", 1
      for j = i, #groups do
        digits = digits .. groups[j][2]
        if #digits > 19 then break end
        if #digits >= 13 and luhn(digits) then
          local from, to = groups[i][1], groups[j][1] + #groups[j][2] - 1
          out = sub(out or run, 1, from - 1) .. gsub(sub(run, from, to), "%d", "*") .. sub(run, to + 1)
          skip = j - i + 1
          break
        end
      end
      i = i + skip
    end
    return out
  end))
end

-- mask_json hides the values of the named keys at any depth. Works on text cut
-- anywhere: a value that does not end is hidden to the end.
local function mask_json(body, names)
  for i = 1, #names do
    local quoted, from = '"' .. names[i] .. '"', 1
    while true do
      local a, b = find(body, quoted, from, true)
      if not a then break end
      local _, colon = find(body, "^%s*:%s*", b + 1)
      if not colon then from = b + 1
      else
        local v, stop = byte(body, colon + 1), nil
        if v == 34 then -- string: to the closing quote that is not escaped
          stop = colon + 1
          repeat
            local q, e = find(body, '["\\]', stop + 1), nil
            if not q then stop = #body; break end
            e = byte(body, q)
            stop = e == 92 and q + 1 or q
          until e == 34
        elseif v == 123 or v == 91 then -- object or array: all of it, strings skipped
          local depth, at = 0, colon + 1
          while true do
            local q = find(body, '[%[%]{}"]', at)
            if not q then stop = #body; break end
            local c = byte(body, q)
            if c == 34 then
              repeat
                q = find(body, '["\\]', q + 1)
                if not q then break end
                local e = byte(body, q)
                if e == 92 then q = q + 1 end
              until e == 34
              if not q then stop = #body; break end
            elseif c == 123 or c == 91 then depth = depth + 1
            else depth = depth - 1 end
            at = q + 1
            if depth == 0 then stop = q; break end
          end
        else
          _, stop = find(body, "^[^,}%]%s]*", colon + 1)
        end
        if stop > #body then stop = #body end
        body = sub(body, 1, colon) .. '"' .. HIDDEN .. '"' .. sub(body, stop + 1)
        from = colon + #HIDDEN + 3
      end
    end
  end
  return body
end

-- ------------------------------------------------------------------ counters

local count = { seen = 0, mirrored = 0, off = 0, excluded = 0, sampled_out = 0, evicted = 0, unfinished = 0, cut_bytes = 0, errors = 0, lost_batches = 0, lost_events = 0 }
local COUNTERS = { "seen", "mirrored", "off", "excluded", "sampled_out", "evicted", "unfinished", "cut_bytes", "errors", "lost_batches", "lost_events" }

local function random_id()
  local ok, id = pcall(function()
    local f = io.open("/dev/urandom", "rb")
    local b = f:read(8)
    f:close()
    return (gsub(b, ".", function(c) return string.format("%02x", byte(c)) end))
  end)
  if ok and #id == 16 then return id end
  return string.format("%08x%08x", os.time() % 4294967296, tonumber(sub(tostring({}), 8)) % 4294967296)
end
local VM = random_id()
math.randomseed(tonumber(sub(VM, 1, 8), 16))

-- ------------------------------------------------------------------ headers

local NAMES, names_count = {}, 0
local hbuf = buffer.new(8192)

-- encode_headers gives the flat array of name, value, … as MessagePack, and
-- flags. Everything is read at once: header objects do not outlive a yield.
local function encode_headers(hs, s)
  hbuf:reset()
  local mask, cards = s.mask, s.cards
  local n, flags = 0, 0
  for k, v in pairs(hs) do
    if n >= MAX_FIELDS or #hbuf > MAX_FIELD_BYTES then flags = bor(flags, HEADERS_CUT); break end
    local e = NAMES[k]
    if not e then
      e = key(k)
      if names_count < MAX_CACHE then NAMES[k] = e; names_count = names_count + 1 end
    end
    if mask and mask[k] then v = HIDDEN; flags = bor(flags, MASKED)
    elseif cards then
      local hidden = mask_cards(v)
      if hidden ~= v then v = hidden; flags = bor(flags, MASKED) end
    end
    hbuf:put(e, STR[#v] or str(#v), v)
    n = n + 1
  end
  n = n * 2
  return (n < 16 and char(0x90 + n) or "\220" .. be16(n)) .. hbuf:get(), flags
end

local function wants_type(types, content_type)
  if types.any then return true end
  if not content_type then return false end
  local hit = types.cache[content_type]
  if hit ~= nil then return hit end
  local t = lower(string.match(content_type, "^%s*([^;%s]*)") or "")
  hit = types[t] or types[(string.match(t, "^[^/]*") or "") .. "/*"] or false
  if types.cached < MAX_CACHE then types.cache[content_type] = hit; types.cached = types.cached + 1 end
  return hit
end

-- ------------------------------------------------------------------ batches

local settings              -- the revision in force, parsed: the strongest policy's, and by next the others'
local settings_rev          -- its digest
local previous              -- the revision before: exchanges that began under it end under it
local embedded              -- the settings' text, where the source's end sets it: for want of a filter that does
local seq = 0
local CALL_HEADERS = { [":method"] = "POST", [":path"] = "/v1/events", [":authority"] = "periscope-node", ["content-type"] = "application/msgpack" }
local CALL_OPTIONS = { asynchronous = true, timeout_ms = CALL_TIMEOUT_MS, send_xff = false, trace_sampled = false }
local CLUSTER = "periscope_mirror"

local function batch_header(s, now)
  local c = { char(0x80 + #COUNTERS) }
  for i = 1, #COUNTERS do c[i + 1] = key(COUNTERS[i]) .. uint(count[COUNTERS[i]]) end
  return "\137" .. key("v") .. uint(WIRE) .. pair("gateway", s.gateway or "") .. pair("vm", VM) .. pair("plugin", VERSION .. "+" .. DIGEST)
    .. pair("policy_rev", s.rev or "") .. pair("share_rev", s.share_rev or "")
    .. key("seq") .. uint(seq) .. key("sent_us") .. uint(now * 1000) .. key("counters") .. table.concat(c)
end

-- flush hands a policy's batch over: every event of a batch is of one revision.
local function flush(h, s, now)
  if s.events == 0 then return end
  seq = seq + 1
  s.flushed = now
  local events = s.events
  s.events = 0
  local body = batch_header(s, now) .. s.batch:get()
  if #body > 4 * BATCH_BYTES then s.batch:free() end -- or each policy's would stay as large as its largest event
  local ok = pcall(h.httpCall, h, s.cluster or CLUSTER, CALL_HEADERS, body, CALL_OPTIONS)
  if not ok then
    count.lost_batches = count.lost_batches + 1
    count.lost_events = count.lost_events + events
  end
end

-- ------------------------------------------------------------------ exchanges

-- An exchange until its event is made. Fields: s settings, t start (ms), n
-- number, qh encoded headers, parts, got, len of the request body, qend, qt
-- trailers, flags, src, …; size is what it counts towards MAX_OPEN_BYTES.
local open, open_count, open_bytes, oldest, number = {}, 0, 0, 1, 0
local NS = "periscope"
local ebuf = buffer.new(16384)

local K = {}
for _, k in ipairs({ "n", "c", "t", "th", "te", "src", "peer", "dst", "proto", "sni", "tls", "route", "f", "qh", "qb", "qn", "qt", "rh", "rb", "rn", "rt" }) do K[k] = key(k) end

local function bin(n)
  if n < 256 then return char(0xc4, n) end
  if n < 65536 then return "\197" .. be16(n) end
  return "\198" .. be32(n)
end

local function put_body(b, name, parts, got, s, content_json)
  if not parts then return 0 end
  local masked = 0
  if s.cards or (s.mask_json and content_json) then
    local body = table.concat(parts)
    local hidden = body
    if s.mask_json and content_json then hidden = mask_json(hidden, s.mask_json) end
    if s.cards then hidden = mask_cards(hidden) end
    if hidden ~= body then masked = MASKED end
    b:put(K[name], bin(#hidden), hidden)
    return masked
  end
  b:put(K[name], bin(got))
  for i = 1, #parts do b:put(parts[i]) end
  return masked
end

local function close(p)
  if open[p.n] == p then
    open[p.n] = nil
    open_count = open_count - 1
    open_bytes = open_bytes - p.size
  end
  p.done = true
end

-- finish makes the event. r: the response's part, or nil.
local function finish(h, p, r, now)
  close(p)
  local s, b, flags, n = p.s, ebuf, p.flags, 8
  b:reset()
  b:put(s.prefix, uint(p.ppm), K.n, uint(p.n), K.t, uint(p.t * 1000), K.te, uint((now > p.t and now - p.t or 0) * 1000))
  b:put(K.src, str(#p.src), p.src)
  if p.class then b:put(K.c, str(#p.class), p.class); n = n + 1 end
  if p.peer then b:put(K.peer, str(#p.peer), p.peer); n = n + 1 end
  if p.dst then b:put(K.dst, str(#p.dst), p.dst); n = n + 1 end
  if p.proto then b:put(K.proto, str(#p.proto), p.proto); n = n + 1 end
  if p.sni then b:put(K.sni, str(#p.sni), p.sni); n = n + 1 end
  if p.tls then b:put(K.tls, str(#p.tls), p.tls); n = n + 1 end
  if p.route then b:put(K.route, str(#p.route), p.route); n = n + 1 end
  b:put(K.qh, p.qh)
  if p.parts then flags = bor(flags, put_body(b, "qb", p.parts, p.got, s, p.json)); n = n + 1 end
  if p.len > 0 then b:put(K.qn, uint(p.len)); n = n + 1 end
  if p.len > p.got then flags = bor(flags, REQUEST_CUT); count.cut_bytes = count.cut_bytes + p.len - p.got end
  if p.qt then b:put(K.qt, p.qt); n = n + 1 end
  if not p.qend then flags = bor(flags, REQUEST_OPEN) end
  if r then
    flags = bor(flags, r.flags)
    b:put(K.th, uint((r.t > p.t and r.t - p.t or 0) * 1000), K.rh, r.rh); n = n + 2
    if r.parts then flags = bor(flags, put_body(b, "rb", r.parts, r.got, s, r.json)); n = n + 1 end
    if r.len > 0 then b:put(K.rn, uint(r.len)); n = n + 1 end
    if r.len > r.got and band(r.flags, RESPONSE_SKIP) == 0 then flags = bor(flags, RESPONSE_CUT); count.cut_bytes = count.cut_bytes + r.len - r.got end
    if r.rt then b:put(K.rt, r.rt); n = n + 1 end
  else
    flags = bor(flags, NO_RESPONSE)
  end
  b:put(K.f, uint(flags))
  s.batch:put("\198", be32(#b + 3), "\222", be16(n), b)
  count.mirrored = count.mirrored + 1
  s.events = s.events + 1
  if s.events == 1 then s.since = now end
  if s.gone then flush(h, s, now) end -- send doesn't look at it any more
end

-- send hands a batch over when it is full or old, when the last one was long
-- ago, or when no exchange is open whose end could do so later.
local function send(h, now)
  local s, rest = settings, previous
  while s or rest do
    if not s then s, rest = rest, nil end
    if s.events > 0 and (s.events >= BATCH_EVENTS or #s.batch >= BATCH_BYTES or open_count == 0
        or now - s.since >= BATCH_MS or now - s.flushed >= BATCH_MS) then flush(h, s, now) end
    s = s.next
  end
end

-- sweep gives up on exchanges whose end never came (Lua has no hook for resets
-- and aborts), and on the oldest ones when there are too many.
local function sweep(h, now)
  while oldest <= number do
    local p = open[oldest]
    if p then
      if open_count >= MAX_OPEN or open_bytes > MAX_OPEN_BYTES then count.evicted = count.evicted + 1
      elseif now - p.t > MAX_WAIT_MS then count.unfinished = count.unfinished + 1
      else return end
      finish(h, p, nil, now)
    end
    oldest = oldest + 1
  end
end

local function load_settings(h, md, now)
  local r = md:get("periscope.rev")
  r = r and r.r or embedded -- the text is its own digest
  if r == settings_rev then return settings end
  local t = md:get("periscope.settings")
  t = t and t.s or embedded
  local parsed = t and parse_sections(t) or nil
  local s = previous
  while s do flush(h, s, now); s.gone = true; s = s.next end
  previous, settings_rev, settings = settings, r, parsed
  return parsed
end

local function begin(h)
  local now = h:timestamp()
  count.seen = count.seen + 1
  local si = h:streamInfo()
  local md = si:dynamicMetadata()
  local s = load_settings(h, md, now)
  if oldest <= number then sweep(h, now) end
  if not s or not (s.on or s.next) then count.off = count.off + 1; return send(h, now) end
  local hs = h:headers()
  if s.selective then
    s = selects(s, clean_host(hs:get(":authority")), hs:get(":path") or "")
    if not s then count.excluded = count.excluded + 1; return send(h, now) end
    if not s.on then count.off = count.off + 1; return send(h, now) end
  end
  local ppm, class = s.ppm, nil
  if ppm < 1000000 then
    class = s.always and class_of(s.always, hs:get(":method") or "", hs:get(":path") or "")
    if class then ppm = 1000000
    elseif random() * 1000000 >= ppm then count.sampled_out = count.sampled_out + 1; return send(h, now) end
  end
  local qh, flags = encode_headers(hs, s)
  number = number + 1
  local src = si:downstreamRemoteAddress() or ""
  local p = { s = s, n = number, t = now, ppm = ppm, class = class, qh = qh, flags = flags, got = 0, len = 0, size = #qh + 512, src = src,
    dst = si:downstreamLocalAddress(), proto = si:protocol(), route = si:routeName() }
  local peer = si:downstreamDirectRemoteAddress()
  if peer ~= src then p.peer = peer end
  local ssl = si:downstreamSslConnection()
  if ssl then p.tls = ssl:tlsVersion(); p.sni = si:requestedServerName() end
  local ct = hs:get("content-type")
  p.max = s.qmax > 0 and wants_type(s.qtypes, ct) and s.qmax or 0
  p.json = s.mask_json and ct and find(lower(ct), "json", 1, true) ~= nil
  open[number] = p
  open_count = open_count + 1
  open_bytes = open_bytes + p.size
  md:set(NS, "n", number)
  return p
end

local function failed(h, message)
  count.errors = count.errors + 1
  if count.errors <= 10 then h:logWarn("periscope: " .. tostring(message)) end
end

local function trailers(h, t, s)
  local ok, encoded = pcall(encode_headers, t, s)
  if ok then return encoded end
  failed(h, encoded)
end

-- follow copies a body as it streams by, up to max bytes, into part, and gives
-- true at its end; false when the exchange's event has been made meanwhile.
local function follow(h, p, part, max)
  local got, parts = 0, nil
  for chunk in h:bodyChunks() do
    if p.done then return false end
    local n = chunk:length()
    part.len = part.len + n
    if got < max and n > 0 then
      local take = got + n > max and max - got or n
      if not parts then parts = {}; part.parts = parts end
      parts[#parts + 1] = chunk:getBytes(0, take)
      got = got + take
      part.got = got
      p.size = p.size + take
      open_bytes = open_bytes + take
    end
  end
  return not p.done
end

function envoy_on_request(h)
  local ok, p = pcall(begin, h)
  if not ok then return failed(h, p) end
  if not p or not follow(h, p, p, p.max) then return end
  p.qend = true
  if p.len > 0 then
    local t = h:trailers()
    if t then p.qt = trailers(h, t, p.s) end
  end
end

-- respond reads the response's headers. Gives the exchange and the response's
-- part when the body is to be followed.
local function respond(h)
  if open_count == 0 then return end
  local md = h:streamInfo():dynamicMetadata():get(NS)
  local p = md and open[md.n]
  if not p then return end
  local now = h:timestamp()
  local hs = h:headers()
  local status = hs:get(":status") or ""
  local ct = hs:get("content-type")
  local rh, flags = encode_headers(hs, p.s)
  local r = { t = now, rh = rh, flags = flags, got = 0, len = 0, max = p.s.rmax }
  local kind = ct and lower(sub(ct, 1, 17)) or ""
  if status == "101" or kind == "text/event-stream" or sub(kind, 1, 16) == "application/grpc" then
    r.flags = bor(flags, STREAM)
    finish(h, p, r, now)
    send(h, now)
  elseif r.max == 0 or not wants_type(p.s.rtypes, ct) then
    r.flags = bor(flags, RESPONSE_SKIP)
    r.len = tonumber(hs:get("content-length") or "") or 0
    if r.len < 0 or r.len >= 9007199254740992 or r.len ~= floor(r.len) then r.len = 0 end
    finish(h, p, r, now)
    send(h, now)
  else
    r.json = p.s.mask_json and find(lower(ct), "json", 1, true) ~= nil
    return p, r
  end
end

local function complete(h, p, r)
  local now = h:timestamp()
  finish(h, p, r, now)
  send(h, now)
end

function envoy_on_response(h)
  local ok, p, r = pcall(respond, h)
  if not ok then return failed(h, p) end
  if not r or not follow(h, p, r, r.max) then return end
  if r.len > 0 then
    local t = h:trailers()
    if t then r.rt = trailers(h, t, p.s) end
  end
  local done, message = pcall(complete, h, p, r)
  if not done then failed(h, message) end
end
