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
local WIRE = 2

-- The JIT does not pay for code that spends its time in C calls (measured:
-- 3 to 7 µs an exchange dearer with it), nor does an eager collector.
jit.off()
collectgarbage("setpause", 300)

local buffer = require("string.buffer")
local bit = require("bit")
local band, bor, bxor, rshift, rol, tobit = bit.band, bit.bor, bit.bxor, bit.rshift, bit.rol, bit.tobit
local char, byte, sub, find, gsub, lower = string.char, string.byte, string.sub, string.find, string.gsub, string.lower
local floor, random = math.floor, math.random

-- Bounds.
local MAX_FIELD_BYTES = 262144     -- header lines copied per message, with 128 for each
local MAX_OPEN = 4096              -- exchanges awaiting their response
local MAX_OPEN_BYTES = 33554432    -- and the bytes of their copies
local MAX_WAIT_MS = 30000          -- then they are sent as far as they were seen
local MAX_POOL = 64                -- exchanges kept for use again
local MAX_POOL_BYTES = 32768       -- unless their headers were longer
local LONG_MS = 10000              -- a body that goes on after its copy's end for so long is not waited for
local BATCH_EVENTS = 48
local BATCH_BYTES = 98304          -- below what LuaJIT's allocator maps anew each time: 128 KiB
local BATCH_MS = 100
local SINGLES = 40                -- events that may go out by themselves while others are open …
local SINGLES_PER_MS = 0.25       -- … and how many more each ms
local SETTINGS_MS = 10             -- how old a look at the settings may be
local TELL_MS = 10000              -- counters travel at least so often while there are requests
local TELL_DEMAND_MS = 500         -- and a policy's, while less than all of what it wants is copied
local CALL_TIMEOUT_MS = 1000
local MAX_CACHE = 1024             -- entries of each cache of header names, content types, endpoints
local MAX_KEY = 128                -- bytes of what is cached: clients write it

local NO_RESPONSE, REQUEST_CUT, RESPONSE_CUT, RESPONSE_SKIP, STREAM, HEADERS_CUT, MASKED, REQUEST_OPEN = 1, 2, 4, 8, 16, 32, 64, 128
local RESPONSE_OPEN = 512

-- ------------------------------------------------------------------ MessagePack

local STR, UINT = {}, {}
for n = 0, 255 do
  STR[n] = n < 32 and char(0xa0 + n) or char(0xd9, n)
  UINT[n] = n < 128 and char(n) or char(0xcc, n)
end
local function be32(n) return char(rshift(n, 24), band(rshift(n, 16), 255), band(rshift(n, 8), 255), band(n, 255)) end
local function str(n) -- header of a string of n bytes
  return STR[n] or n < 65536 and char(0xda, rshift(n, 8), band(n, 255)) or "\219" .. be32(n)
end
local NUMBERS, numbers = {}, 0 -- encoded before
local function uint(n)
  if n < 256 then return UINT[n] end
  if n >= 65536 then
    if n < 4294967296 then return char(0xce, rshift(n, 24), band(rshift(n, 16), 255), band(rshift(n, 8), 255), band(n, 255)) end
    return "\207" .. be32(floor(n / 4294967296)) .. be32(n % 4294967296)
  end
  local e = NUMBERS[n]
  if not e then
    e = char(0xcd, rshift(n, 8), band(n, 255))
    if numbers < MAX_CACHE then NUMBERS[n] = e; numbers = numbers + 1 end
  end
  return e
end
local function key(k) return str(#k) .. k end
local function pair(k, v) return key(k) .. str(#v) .. v end

-- ------------------------------------------------------------------ masking (reference: mirror/mask)

local HIDDEN = "***"

local function unescape(s)
  return (gsub(s, "%%(%x%x)", function(h) return char(tonumber(h, 16)) end))
end

-- name_set prepares the names behind a record's key: indexed with a name as it
-- was sent it gives true if that is masked, decoded, in lower case, as a whole
-- or by any of its parts: "user[password]" and "user.password" are masked with
-- password. It remembers what it was asked, within bounds.
local function name_set(fields)
  local names, asked, count = {}, {}, 0
  for i = 2, #fields do names[lower(fields[i])] = true end
  return setmetatable(asked, { __index = function(_, sent)
    local name = lower(unescape((gsub(sent, "%+", " "))))
    local hit = names[name] or false
    if not hit and find(name, "[%z\1-\32%[%].]") then
      local first = find(name, "[^%z\1-\32]")
      local last = first and string.match(name, "^.*[^%z\1-\32]()", first)
      hit = first and names[sub(name, first, last - 1)] or false
      for part in string.gmatch(name, "[^%z\1-\32%[%].]+") do hit = hit or names[part] or false end
    end
    if #sent <= 64 then
      if count == MAX_CACHE then
        for k in pairs(asked) do asked[k] = nil end
        count = 0
      end
      asked[sent] = hit
      count = count + 1
    end
    return hit
  end })
end

-- joined gives v with what was replaced: out has n pieces of it, up to done; nil:
-- nothing was.
local function joined(out, n, v, done)
  if not out then return v end
  out[n + 1] = sub(v, done)
  return table.concat(out)
end

-- string_end gives the place of the closing quote of the string that begins at
-- i; nil: it does not end.
local function string_end(v, i)
  while true do
    i = find(v, '["\\]', i + 1)
    if not i or byte(v, i) == 34 then return i end
    i = i + 1
  end
end

-- mask_pairs hides values of "name=value" between separators. keys and ends are
-- v itself, or v with the separators of which some readers know in place of
-- other bytes: a name begins after any in keys, a hidden value ends only at one
-- in ends.
local function mask_pairs(v, names, keys, ends, separator, quotes)
  local equals = find(v, "=", 1, true)
  local out, n, done, from = nil, 0, 1, 1
  while equals do
    local stop = find(keys, separator, from, true)
    if not stop or stop > equals then
      if names[sub(v, from, equals - 1)] then
        local at = equals + 1
        if quotes then
          local _, quote = find(v, '^%s*"', at)
          at = quote and string_end(v, quote) or at
        end
        stop = find(ends, separator, at, true)
        out = out or {}
        out[n + 1], out[n + 2] = sub(v, done, equals), HIDDEN
        n = n + 2
        done = stop or #v + 1
      end
      if not stop then break end
      equals = find(v, "=", stop + 1, true)
    end
    from = stop + 1
  end
  return joined(out, n, v, done)
end

-- mask_cookies masks a Cookie or Set-Cookie header's value. A comma may separate
-- cookies (RFC 2965, and proxies that fold header lines), or be part of one.
local function mask_cookies(v, names)
  local keys = find(v, ",", 1, true) and gsub(v, ",", ";") or v
  return mask_pairs(v, names, keys, v, ";", find(v, '"', 1, true))
end

-- separated has & for other separators of parameters.
local function separated(v)
  if not find(v, ";", 1, true) and not find(v, "?", 1, true) and not find(v, "#", 1, true) then return v end
  return (gsub(v, "[;?#]", "&"))
end

-- mask_url masks the parameters of a URL's query and fragment, and of its path
-- ("/a;name=value/b"). A semicolon or question mark may separate parameters, or
-- be part of one.
local function mask_url(v, names)
  if not find(v, "=", 1, true) then return v end
  local hash = find(v, "#", 1, true) or #v + 1
  local mark = find(v, "?", 1, true) or hash
  if mark > hash then mark = hash end
  local path, query, fragment = sub(v, 1, mark - 1), sub(v, mark + 1, hash - 1), sub(v, hash + 1)
  local p, q, f = path, query, fragment
  if find(path, "=", 1, true) then
    local keys = find(path, ";", 1, true) and gsub(path, ";", "/") or path
    p = mask_pairs(path, names, keys, keys, "/")
  end
  if query ~= "" then q = mask_pairs(query, names, separated(query), query, "&") end
  if fragment ~= "" then f = mask_pairs(fragment, names, separated(fragment), fragment, "&") end
  if p == path and q == query and f == fragment then return v end
  return p .. (mark < hash and "?" or "") .. q .. sub(v, hash, hash) .. f
end

-- mask_form masks the fields of a form: URL-encoded, or each on a line (HTML's
-- text/plain).
local function mask_form(v, names)
  local keys = v
  if find(v, ";", 1, true) or find(v, "\n", 1, true) or find(v, "\r", 1, true) then keys = gsub(v, "[;\r\n]", "&") end
  return mask_pairs(v, names, keys, v, "&")
end

-- masked_disposition says whether a Content-Disposition names a masked field, by
-- any of its name parameters, as RFC 7578, RFC 5987 and RFC 2231 write them.
local function masked_disposition(v, names)
  local at, equals, quote, continued = find(v, ";", 1, true), 0, 0, nil
  while at do
    local semicolon = find(v, ";", at + 1, true)
    if equals <= at then equals = find(v, "=", at + 1, true) end
    if not equals then break end
    if semicolon and semicolon < equals then at = semicolon
    else
      local star, number, last = string.match(gsub(lower(sub(v, at + 1, equals - 1)), "[^%l%d*]", ""), "^name(%*?)(%d*)(%*?)$")
      if star == "" and number .. last ~= "" then star = nil end
      if quote and quote < equals then quote = find(v, '"', equals, true) end
      local value = sub(v, equals + 1, (semicolon or #v + 1) - 1)
      local quoted = quote and (not semicolon or quote < semicolon)
      if quoted then
        local close = string_end(v, quote)
        value = sub(v, quote + 1, (close or #v + 1) - 1)
        semicolon = close and find(v, ";", close + 1, true)
        if star and names[sub(v, equals + 1, quote - 1)] then return true end
      end
      at = semicolon
      if star then
        if star ~= "" and (number == "" or number .. last == "0*") then value = string.match(value, "^[^']*'[^']*'(.*)") or value end
        if number ~= "" then
          continued = continued or {}
          continued[tonumber(number)] = quoted and value or gsub(value, "[%z\1-\32\128-\255]+", "")
        elseif names[value] or names[gsub(value, "\\(.)", "%1")] or not quoted and names[gsub(value, "[\128-\255]", " ")] then return true end
      end
    end
  end
  if not continued then return false end
  local parts = {}
  while continued[#parts] do parts[#parts + 1] = continued[#parts] end
  local name = table.concat(parts)
  return names[name] or names[gsub(name, "\\(.)", "%1")]
end

-- boundary_of reads the boundary of a content type; nil if it is missing or can
-- be read in more than one way.
local function boundary_of(content_type)
  local low = lower(content_type)
  local _, at = find(low, "boundary%s*[=*]")
  if not at or byte(low, at) ~= 61 or find(low, "boundary%s*[=*]", at + 1) then return nil end
  at = find(low, "%S", at + 1)
  if not at then return nil end
  local quoted = string.match(content_type, '^"([^"\\]+)"', at)
  if quoted then return quoted end
  local token, after = string.match(content_type, '^([^";,\\%s]+)%s*()', at)
  local c = token and byte(content_type, after)
  if token and (not c or c == 59) then return token end
end

-- mask_multipart hides parts (RFC 7578) by the name in their Content-Disposition,
-- from the end of that line to the next boundary, or to the end where there is
-- none or the boundary is not known.
local function mask_multipart(v, names, boundary)
  local low = lower(v)
  local delimiter = boundary and (find(v, "\r\n", 1, true) and "\r\n--" or "\n--") .. boundary
  local out, n, done, from = nil, 0, 1, 1
  while true do
    local _, header = find(low, "content-disposition", from, true)
    if not header then break end
    from = header + 1
    local _, colon = find(v, "^%s*:", from)
    if colon then
      local stop = find(v, "\r?\n[^ \t]", colon + 1)
      if not stop then break end
      from = stop
      if masked_disposition(sub(v, colon + 1, stop - 1), names) then
        local next_part = #v + 1
        local at, e = from, nil
        while delimiter do
          at, e = find(v, delimiter, at, true)
          if not at then break end
          local rest = find(v, "^%-%-", e + 1) and e + 3 or e + 1
          rest = find(v, "[^ \t]", rest)
          if not rest or find(v, "^\r?\n", rest) then next_part = at; break end
          at = at + 1
        end
        out = out or {}
        out[n + 1], out[n + 2] = sub(v, done, stop - 1), "\r\n\r\n" .. HIDDEN
        n = n + 2
        done, from = next_part, next_part
      end
    end
  end
  return joined(out, n, v, done)
end

-- json_names prepares the names behind a record's key for mask_json.
local function json_names(fields)
  local names = { is = {} }
  for i = 2, #fields do
    local name = lower(fields[i])
    names[i - 1], names.is[name] = name .. '"', true
  end
  return names
end

-- escaped_name finds the next name in quotes that is written with escapes: gives
-- the places of its quotes.
local function escaped_name(v, names, at)
  local from = at
  while true do
    at = find(v, "\\u00", at, true)
    if not at then return nil end
    local code = string.match(v, "^%x%x", at + 4)
    if code and find(char(tonumber(code, 16)), "[%w_-]") then
      local quote = string.match(sub(v, from, at - 1), '^.*()"')
      quote = quote and from + quote - 1
      local close = quote and string.match(v, '^[%w_%-\\]*()"', quote + 1)
      if close and names.is[lower(gsub(sub(v, quote + 1, close - 1), "\\u00(%x%x)", function(h) return char(tonumber(h, 16)) end))] then return quote, close end
      from = close or at + 4
      at = from
    else at = at + 4 end
  end
end

-- quoted_name finds a name in quotes, whose first quote is at i or later. Quotes
-- are too many to look for.
local function quoted_name(v, name, i)
  repeat i = find(v, name, i + 1, true) until not i or byte(v, i - 1) == 34
  return i and i - 1 or false
end

-- mask_json hides the values of the names at any depth. It looks for names in
-- quotes before a colon, so a value that does not end is hidden to the end.
local function mask_json(v, names)
  local low, escaped, escaped_end = lower(v), find(v, "\\u00", 1, true) and 0 or nil, nil
  local next_of, out, n, done, from = {}, nil, 0, 1, 1
  while true do
    local quote, close
    for i = 1, #names do
      local at = next_of[i]
      if at ~= false and (not at or at < from) then
        at = quoted_name(low, names[i], from)
        next_of[i] = at
      end
      if at and (not quote or at < quote) then quote, close = at, at + #names[i] end
    end
    if escaped and escaped < from then escaped, escaped_end = escaped_name(v, names, from) end
    if escaped and (not quote or escaped < quote) then quote, close = escaped, escaped_end end
    if not quote then break end
    from = quote + 1
    local _, colon = find(v, "^%s*:%s*", close + 1)
    if colon then
      local c, stop = byte(v, colon + 1), nil
      if c == 34 then stop = string_end(v, colon + 1) or #v
      elseif c == 123 or c == 91 then -- object or array: all of it, strings skipped
        local depth, at = 0, colon + 1
        while at and not stop do
          c = byte(v, at)
          if c == 34 then at = string_end(v, at)
          elseif c == 123 or c == 91 then depth = depth + 1
          else
            depth = depth - 1
            if depth == 0 then stop = at end
          end
          at = at and find(v, '[%[%]{}"]', at + 1)
        end
        stop = stop or #v
      else
        _, stop = find(v, "^[^,}%]%s]*", colon + 1)
      end
      out = out or {}
      out[n + 1], out[n + 2] = sub(v, done, colon), '"' .. HIDDEN .. '"'
      n = n + 2
      done, from = stop + 1, stop + 1
    end
  end
  return joined(out, n, v, done)
end

-- The last groups of digits that mask_run has read, and one before them: where
-- each begins and ends, how many digits there are up to its end, and their Luhn
-- sums, every odd one doubled or every even one.
local FROM, TO, DIGITS, EVEN, ODD = {}, {}, { [0] = 0 }, { [0] = 0 }, { [0] = 0 }

local function mask_run(v)
  if #v < 13 then return nil end
  DIGITS[0], EVEN[0], ODD[0] = 0, 0, 0
  local out, n, done = nil, 0, 1
  local i, j, read, at, ended = 1, 1, 0, 1, false -- groups: no card that begins at i ends before j
  while true do
    local before = band(i - 1, 31)
    local k, hit = j > i and j or i, nil
    while true do
      local g = band(k, 31)
      if k > read then
        local from, to = find(v, "%d+", at)
        if not from then ended = true; break end
        read, at = k, to + 1
        local last = band(k - 1, 31)
        local digits, even, odd = DIGITS[last], EVEN[last], ODD[last]
        if to - from < 19 then -- no card holds longer ones
          for d = from, to do
            local c = byte(v, d) - 48
            local twice = c < 5 and 2 * c or 2 * c - 9
            if (digits + d - from) % 2 == 1 then even, odd = even + c, odd + twice
            else even, odd = even + twice, odd + c end
          end
        end
        FROM[g], TO[g], DIGITS[g], EVEN[g], ODD[g] = from, to, digits + to - from + 1, even, odd
      end
      local digits = DIGITS[g] - DIGITS[before]
      if digits > 19 then break end
      if digits < 13 then j = k + 1
      elseif (DIGITS[g] % 2 == 0 and EVEN[g] - EVEN[before] or ODD[g] - ODD[before]) % 10 == 0 then hit = g; break end
      k = k + 1
    end
    if hit then
      local from = FROM[band(i, 31)]
      out = out or {}
      out[n + 1], out[n + 2] = sub(v, done, from - 1), gsub(sub(v, from, TO[hit]), "%d", "*")
      n = n + 2
      done, i = TO[hit] + 1, k + 1
    elseif ended and i >= read then break
    else i = i + 1 end
  end
  return joined(out, n, v, done)
end

-- mask_cards hides runs of whole digit groups, apart by spaces and dashes, that
-- make 13 to 19 digits and satisfy the Luhn formula.
local function mask_cards(v)
  return (gsub(v, "%d[%d %-]+%d", mask_run))
end

local URL_HEADERS = { ":path", "referer", "location", "content-location", "refresh", "link",
  "x-envoy-original-path", "x-envoy-original-url", "x-original-url", "x-original-uri", "x-rewrite-url", "x-forwarded-uri" }

-- header_masks gives, by header, true if its value is hidden, or what masks it;
-- nil when there are none.
local function header_masks(s)
  local masks = s.mask_headers or {}
  local function put(header, mask, names)
    masks[header] = masks[header] or function(v) return mask(v, names) end
  end
  if s.mask_cookies then put("cookie", mask_cookies, s.mask_cookies); put("set-cookie", mask_cookies, s.mask_cookies) end
  if s.mask_query then
    for i = 1, #URL_HEADERS do put(URL_HEADERS[i], mask_url, s.mask_query) end
  end
  return next(masks) and masks
end

-- body_mask gives how much of a body to copy, what masks it, if anything does,
-- and the flags. Text and bodies without a type may be JSON or a form; so may
-- what says it is a form, for curl says so of all that it sends. What is
-- compressed cannot be masked here, so none of it is copied.
local function body_mask(s, content_type, coding, max, flags)
  if max == 0 or not s.mask_json and not s.mask_form then return max, nil, flags end
  local t = lower(content_type or "")
  local form = t == "" or find(t, "urlencoded", 1, true) or find(t, "text/plain", 1, true)
  local json = s.mask_json and (form or find(t, "json", 1, true)) and s.mask_json
  local parts = find(t, "multipart/", 1, true) and s.mask_form
  form = form and s.mask_form
  if not json and not form and not parts then return max, nil, flags end
  if coding and coding ~= "" and lower(coding) ~= "identity" then return 0, nil, bor(flags, MASKED) end
  return max, function(v)
    if json then v = mask_json(v, json) end
    if form then v = mask_form(v, form) end
    if parts then v = mask_multipart(v, parts, boundary_of(content_type)) end
    return v
  end, flags
end

-- ------------------------------------------------------------------ identity

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
local POD = os.getenv("POD_NAME") or os.getenv("HOSTNAME") or "" -- Istio sets the first, Kubernetes the second
math.randomseed(tonumber(sub(VM, 1, 8), 16))
-- Exchanges' ids in Envoy's access log are unique among a gateway's VMs.
local FIRST_ID = tonumber(sub(VM, 1, 5), 16) * 4294967296

-- ------------------------------------------------------------------ settings

-- The fields behind a record's key, as a set; nil when there are none.
local function set(fields)
  local s
  for i = 2, #fields do s = s or {}; s[fields[i]] = true end
  return s
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
  local t = {}
  for i = 2, #fields do t[fields[i]] = true end
  return { list = t, any = t["*/*"], cache = {}, cached = 0 }
end

local tally_of
do
  -- What a policy wants, cumulative over its revisions: exchanges before sampling,
  -- those of an always-class among them, events in batches; told: of the first,
  -- what and when.
  local tallies, tally_count = {}, 0
  function tally_of(policy)
    local t = tallies[policy]
    if not t then
      t = { eligible = 0, priority = 0, mirrored = 0, told = 0, told_at = 0 }
      if tally_count < MAX_CACHE then tallies[policy] = t; tally_count = tally_count + 1 end
    end
    return t
  end
end

local function parse_settings(text)
  local s = { qmax = 0, rmax = 0, ppm = 0, batch = buffer.new(), events = 0, since = 0, flushed = 0, names = {}, named = 0 }
  for line in string.gmatch(text, "[^\n]+") do
    local f = {}
    for field in string.gmatch(line, "[^\t]+") do f[#f + 1] = unescape(field) end
    local k, v = f[1], f[2]
    if k == "gateway" then s.gateway = v
    elseif k == "policy" then s.policy = v
    elseif k == "rev" then s.rev = v
    elseif k == "cluster" then s.cluster = v
    elseif k == "ppm" then s.ppm = tonumber(v) or 0
    elseif k == "by_pod" then s.by_pod = true
    elseif k == "session" then s.session, s.session_name = v, f[3]
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
    elseif k == "mask_headers" then s.mask_headers = set(f)
    elseif k == "mask_cookies" then s.mask_cookies = name_set(f)
    elseif k == "mask_query" then s.mask_query = name_set(f)
    elseif k == "mask_form" then s.mask_form = name_set(f)
    elseif k == "mask_json" then s.mask_json = json_names(f)
    elseif k == "detect_cards" then s.cards = true end
  end
  s.qtypes = s.qtypes or parse_types({})
  s.rtypes = s.rtypes or parse_types({})
  s.mask = header_masks(s)
  s.tally = tally_of(s.policy or "")
  s.salt = tonumber(sub(s.rev or "", 1, 8), 16) or 0
  return s
end

-- share sets what load control leaves a policy, in parts per million and at most
-- the policy's own: of all, and of the classes that sampling spares. Until the next
-- one, events begin with it, and batches' headers hold its revision. A class comes
-- first, so that nodes see it without reading more.
local function share(s, text, rev)
  local all, classes = string.match(text or "", "^(%d+):?(%d*)$")
  all, classes = tonumber(all or ""), tonumber(classes or "")
  s.share, s.class_share = all and all < s.ppm and all or s.ppm, classes or 1000000
  local p = pair("p", s.policy or "") .. key("s")
  s.prefix, s.spared = p .. uint(s.share) .. key("t"), {}
  for class in pairs(s.always or {}) do s.spared[class] = pair("c", class) .. p .. uint(s.class_share) .. key("t") end
  s.header = "\142" .. key("v") .. uint(WIRE) .. pair("gateway", s.gateway or "") .. pair("pod", s.by_pod and POD or "") .. pair("vm", VM) .. pair("plugin", VERSION .. "+" .. DIGEST)
    .. pair("policy", s.policy or "") .. pair("policy_rev", s.rev or "") .. pair("share_rev", rev) .. key("seq")
end

-- parse_shares gives this pod's shares, or those of pods without any of their own.
local function parse_shares(text)
  local default
  for line in string.gmatch(text, "[^\n]+") do
    local list = {}
    for field in string.gmatch(line, "[^\t]+") do list[#list + 1] = unescape(field) end
    if list[1] == POD then return list elseif list[1] == "*" then default = list end
  end
  return default or {}
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

local class_of
do
  local endpoints, endpoint_count = {}, 0
  function class_of(always, method, target)
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
      if not endpoints[shape] and endpoint_count < MAX_CACHE and #shape <= MAX_KEY then
        endpoints[shape] = true
        endpoint_count = endpoint_count + 1
        return "NewEndpoint"
      end
    end
    return nil
  end
end

-- ------------------------------------------------------------------ sampling

local place_of
do
  -- mix spreads a number of 32 bits over all 32 (rounds of 16-bit factors, whose
  -- products doubles hold).
  local function mix(x)
    for _ = 1, 2 do
      x = tobit((x % 4294967296) * 0xB55B)
      x = tobit((bxor(x, rshift(x, 15)) % 4294967296) * 0xD36D)
      x = bxor(x, rshift(x, 16))
    end
    return x
  end

  local function hash(v, salt)
    local x = salt
    for i = 1, #v < 64 and #v or 64, 4 do
      local a, b, c, d = byte(v, i, i + 3)
      x = bxor(bxor(x, rol(x, 7)), a + (b or 0) * 256 + (c or 0) * 65536 + (d or 0) * 16777216)
      x = tobit((x % 4294967296) * 0x9E37)
    end
    return mix(x)
  end

  -- session_of gives what names the session that a request is part of.
  local function session_of(hs, s)
    if s.session == "header" then return hs:get(s.session_name) end
    local cookies = hs:get("cookie")
    local i = 1
    while cookies do
      local from, to = find(cookies, s.session_name .. "=", i, true)
      if not from then return end
      if from == 1 or find(sub(cookies, from - 1, from - 1), "[;,%s]") then return string.match(cookies, "^[^;,]*", to + 1) end
      i = to + 1
    end
  end

  -- place_of gives a request's place among all, from 0 to 1: those below the share
  -- are copied, so that a lower share's are among a higher one's. Requests of one
  -- session, or of one trace (W3C Trace Context), are at one place, the same at every
  -- worker. Clients choose both, but don't know the salt.
  function place_of(hs, s)
    local v = s.session and session_of(hs, s)
    if v and v ~= "" then return hash(v, s.salt) % 4294967296 / 4294967296 end
    v = hs:get("traceparent")
    local a, b = nil, nil
    if v and #v >= 35 then a, b = tonumber(sub(v, 20, 27), 16), tonumber(sub(v, 28, 35), 16) end
    if not b or not a then return random() end
    return mix(bxor(mix(bxor(s.salt, tobit(a))), tobit(b))) % 4294967296 / 4294967296
  end
end

-- ------------------------------------------------------------------ counters

local count = { seen = 0, mirrored = 0, off = 0, excluded = 0, sampled_out = 0, evicted = 0, unfinished = 0, cut_bytes = 0, errors = 0, lost_batches = 0, lost_events = 0 }
local COUNTERS = { "seen", "mirrored", "off", "excluded", "sampled_out", "evicted", "unfinished", "cut_bytes", "errors", "lost_batches", "lost_events" }


-- ------------------------------------------------------------------ headers

local scratch = buffer.new(4096)
local put, reset = scratch.put, scratch.reset

-- What the plugin itself reads of the header encoded last.
local SPECIAL = { ["content-type"] = "type", ["content-length"] = "length", ["content-encoding"] = "coding",
  [":method"] = "method", [":status"] = "status" }
local head = {} -- false where there is none: a table whose values come and go as nil is rebuilt again and again

local KEYS, keys_count = {}, 0

-- other gives the encoded name and the value of a header line that needs more
-- than a look into s.names, and the flags.
local function other(s, k, v, flags)
  local e, special, m = KEYS[k], SPECIAL[k], s.mask and s.mask[k]
  if not e then
    e = key(k)
    if keys_count < MAX_CACHE and #k <= MAX_KEY then KEYS[k] = e; keys_count = keys_count + 1 end
  end
  if special then head[special] = v end
  if m == true then return e, HIDDEN, bor(flags, MASKED) end
  if m or s.cards then
    local hidden = m and m(v) or v
    if s.cards then hidden = mask_cards(hidden) end
    if hidden ~= v then return e, hidden, bor(flags, MASKED) end
  elseif not special and s.named < MAX_CACHE and #k <= MAX_KEY then
    s.names[k] = e
    s.named = s.named + 1
  end
  return e, v, flags
end

-- encode_headers puts name, value, … into b as MessagePack, and gives how many
-- those are, about how many bytes, and flags. All is read at once: header objects
-- do not outlive a yield.
local function encode_headers(hs, s, b)
  head.type, head.length, head.coding, head.method, head.status = false, false, false, false, false
  reset(b)
  local names, put, STR, n, bytes, flags = s.names, put, STR, 0, 0, 0 -- locals: the loop is a third of the plugin's own time
  for k, v in pairs(hs) do
    local size, e = #v, names[k]
    if bytes > MAX_FIELD_BYTES then flags = bor(flags, HEADERS_CUT); break end
    n, bytes = n + 2, bytes + size + 128
    if e then put(b, e, STR[size] or str(size), v)
    else
      e, v, flags = other(s, k, v, flags)
      put(b, e, STR[#v] or str(#v), v)
    end
  end
  return n, bytes, flags
end

local function array(n) -- header of an array of n elements
  return n < 16 and char(0x90 + n) or char(0xdc, rshift(n, 8), band(n, 255))
end

-- Content types, classified once each: whether the policy wants such bodies, and
-- whether they are streams.
local function type_of(types, content_type)
  local t = types.cache[content_type]
  if t then return t end
  local name = lower(string.match(content_type or "", "^%s*([^;%s]*)") or "")
  t = { wanted = types.any or types.list[name] or types.list[(string.match(name, "^[^/]*") or "") .. "/*"] or false,
    events = name == "text/event-stream", grpc = sub(name, 1, 16) == "application/grpc" }
  if types.cached < MAX_CACHE and (not content_type or #content_type <= MAX_KEY) then types.cache[content_type] = t; types.cached = types.cached + 1 end
  return t
end

-- ------------------------------------------------------------------ batches

local settings              -- the revision in force, parsed: the strongest policy's, and by next the others'
local settings_rev          -- its digest
local settings_at, ticked_at = 0, 0 -- when it was looked at last, and what is due
local shares_rev            -- of load control's shares
local previous              -- the revision before: exchanges that began under it end under it
local embedded              -- the settings' text, where the source's end sets it: for want of a filter that does
local seq, told, told_at = 0, 0, 0 -- batches; of which count of exchanges seen, and when, the last one told
local singles, singles_at = SINGLES, 0
local open, open_count, open_bytes, oldest, number, last_begin = {}, 0, 0, 1, 0, 0
local CALL_HEADERS = { [":method"] = "POST", [":path"] = "/v1/events", [":authority"] = "periscope-node", ["content-type"] = "application/msgpack" }
local CALL_OPTIONS = { asynchronous = true, timeout_ms = CALL_TIMEOUT_MS, send_xff = false, trace_sampled = false }
local CLUSTER = "periscope_mirror"

local COUNTER_KEYS, exported = {}, {}
for i = 1, #COUNTERS do COUNTER_KEYS[i], exported[i] = key(COUNTERS[i]), 0 end
local NUMBER_OF_COUNTERS = key("counters") .. char(0x80 + #COUNTERS)

local writing -- the policy whose batch is being written to

-- failed counts an error. What it left half written is given up.
local function failed(h, message)
  count.errors = count.errors + 1
  local s = writing
  if s then
    writing = nil
    if s.events > 0 then count.lost_batches, count.lost_events = count.lost_batches + 1, count.lost_events + s.events end
    s.events = 0
    reset(s.batch)
  end
  if count.errors <= 10 then h:logWarn("periscope: " .. tostring(message)) end
end

-- export adds to Envoy's own counters, where Lua has them: from Envoy 1.38 on.
local function export(h)
  local stats = h:stats()
  for i = 1, #COUNTERS do
    local n = count[COUNTERS[i]]
    if n > exported[i] then
      local c = stats:counter(COUNTERS[i])
      if c.add then c:add(n - exported[i]) end
      exported[i] = n
    end
  end
end

-- flush hands a policy's batch over: every event of a batch is of one revision.
-- Its header is its last object, when all is counted: what is put in front of a
-- buffer costs a copy of it.
local function flush(h, s, now)
  seq = seq + 1
  told, told_at, s.flushed = count.seen, now, now
  local b, events, t = s.batch, s.events, s.tally
  writing = s
  t.mirrored, t.told, t.told_at = t.mirrored + events, t.eligible, now
  put(b, s.header, uint(seq), "\167sent_us", uint(now * 1000), "\168eligible", uint(t.eligible), "\168priority", uint(t.priority),
    "\168mirrored", uint(t.mirrored), NUMBER_OF_COUNTERS)
  for i = 1, #COUNTERS do put(b, COUNTER_KEYS[i], uint(count[COUNTERS[i]])) end
  local body = b:get()
  s.events, writing = 0, nil
  if #body > 2 * BATCH_BYTES then b:free() end -- or each policy's would stay as large as its largest event
  local ok = pcall(h.httpCall, h, s.cluster or CLUSTER, CALL_HEADERS, body, CALL_OPTIONS)
  if not ok then
    count.lost_batches = count.lost_batches + 1
    count.lost_events = count.lost_events + events
  end
  if h.stats then
    local done, message = pcall(export, h)
    if not done then failed(h, message) end
  end
end

-- due says whether a policy's batch goes out: it is full or old, or nothing else
-- may come that could send it later. Lua has no timer: whoever is open may end
-- without a word, so that events are held only while there is more traffic than
-- can go out one by one.
local function due(s, now)
  if s.events >= BATCH_EVENTS or #s.batch >= BATCH_BYTES or now - s.since >= BATCH_MS or now - s.flushed >= BATCH_MS
    or now < s.since or open_count == 0 or now - last_begin >= BATCH_MS then return true end
  if now > singles_at then
    singles = singles + (now - singles_at) * SINGLES_PER_MS
    if singles > SINGLES then singles = SINGLES end
    singles_at = now
  end
  if singles < 1 then return false end
  singles = singles - 1
  return true
end

local function send_all(h, now)
  local s, rest = settings, previous
  while s or rest do
    if not s then s, rest = rest, nil end
    if s.events > 0 and due(s, now) then flush(h, s, now) end
    s = s.next
  end
end

-- ------------------------------------------------------------------ exchanges

-- An exchange from its request's header on, until its event is made. n is its
-- number, 0 when it is none any more: whoever keeps one over a yield looks. q and
-- r are request and response: encoded header lines (b, fields), the body's parts
-- ([1] … [count], got bytes of len, at most max), trailers (t, tfields). Those
-- that were used are used again, so that none of it is made for each exchange.
local NS = "periscope"
local ebuf = buffer.new(1024)
local pool, pooled = {}, 0

-- Exchanges by HTTP/1 are found by connection, local address and then peer's, as
-- there is only one at a time on each; others by dynamic metadata, which costs
-- four times as much.
local H1 = { ["HTTP/1.1"] = true, ["HTTP/1.0"] = true }
local connections, by_connection, by_id = {}, 0, 0

local K = {}
for _, k in ipairs({ "n", "tq", "th", "te", "src", "peer", "tsan", "f", "qh", "qb", "qn", "qt", "rh", "rb", "rn", "rt" }) do K[k] = key(k) end

local function bin(n)
  if n < 256 then return char(0xc4, n) end
  if n < 65536 then return char(0xc5, rshift(n, 8), band(n, 255)) end
  return "\198" .. be32(n)
end

local function message() return { b = buffer.new(1024), fields = 0, count = 0, got = 0, len = 0, max = 0, mask = false, t = false, tfields = 0, declared = false } end

local function clear(m)
  for i = 1, m.count do m[i] = nil end
  m.fields, m.count, m.got, m.len, m.max, m.mask, m.t, m.tfields = 0, 0, 0, 0, 0, false, false, 0
end

local function new_exchange()
  if pooled == 0 then
    return { n = 0, t = 0, th = 0, qend = false, s = false, prefix = "", class = false, src = "", peer = false, place = false, tls = false, tls_pairs = 0, flags = 0,
      size = 0, head_bytes = 0, c = false, direct = "", method = "", grpc = false, q = message(), r = message() }
  end
  local p = pool[pooled]
  pool[pooled] = nil
  pooled = pooled - 1
  return p
end

-- hold counts bytes of an open exchange.
local function hold(p, bytes)
  p.size = p.size + bytes
  open_bytes = open_bytes + bytes
end

-- close takes an exchange off the open ones.
local function close(p)
  open[p.n] = nil
  open_count = open_count - 1
  open_bytes = open_bytes - p.size
  if p.c then
    by_connection = by_connection - 1
    if p.c[p.direct] == p then p.c[p.direct] = nil end
  else
    by_id = by_id - 1
  end
  p.n = 0
end

local constants
do
  -- constants caches how the local address, protocol and route are encoded.
  local PLACES, places = {}, 0
  function constants(dst, proto, route)
    local by_proto = PLACES[dst]
    local by_route = by_proto and by_proto[proto]
    local e = by_route and by_route[route]
    if e then return e end
    e = pair("dst", dst) .. pair("proto", proto) .. pair("route", route)
    if places < MAX_CACHE then
      places = places + 1
      by_proto = by_proto or {}
      by_route = by_route or {}
      PLACES[dst], by_proto[proto], by_route[route] = by_proto, by_route, e
    end
    return e
  end
end

-- masked_body gives a body as it may leave, and flags.
local function masked_body(m, s, cut)
  local body, flags = table.concat(m, "", 1, m.count), 0
  local hidden = m.mask and m.mask(body) or body
  if s.cards then hidden = mask_cards(hidden) end
  if hidden ~= body then flags = MASKED end
  if #hidden > m.max then hidden = sub(hidden, 1, m.max); flags = bor(flags, cut) end
  return hidden, flags
end

-- put_message puts what there is of a message behind its header into e, except
-- for the body's bytes, and gives the number of pairs, flags, and those bytes if
-- something had to be hidden.
local function put_message(e, m, s, cut, kn, kt)
  local n, flags, body = 0, 0, nil
  if m.len > 0 then put(e, kn, uint(m.len)); n = 1 end
  if m.t then put(e, kt, array(m.tfields), m.t); n = n + 1 end
  if m.count > 0 then
    n = n + 1
    if m.mask or s.cards then body, flags = masked_body(m, s, cut) end
  end
  return n, flags, body
end

local function put_body(b, m, k, body)
  if body then put(b, k, bin(#body), body)
  elseif m.count > 0 then
    put(b, k, bin(m.got))
    for i = 1, m.count do put(b, m[i]) end
  end
end

local function size(n) return n < 256 and n + 2 or n < 65536 and n + 3 or n + 5 end -- of n bytes as bin

local start
do
  local last_t, last_t_encoded = -1, nil
  function start(t)
    if t ~= last_t then last_t, last_t_encoded = t, uint(t * 1000) end
    return last_t_encoded
  end
end

-- finish makes the event and puts it into its policy's batch, which goes out if it
-- is due, unless held is set. The exchange may not be used any more.
local function finish(h, p, now, held)
  local number = p.n
  close(p)
  local s, e, q, r, t, flags = p.s, ebuf, p.q, p.r, p.t, p.flags
  reset(e)
  put(e, p.prefix, start(t), K.n, uint(number), K.src, STR[#p.src] or str(#p.src), p.src, p.place,
    K.te, uint(now > t and (now - t) * 1000 or 0))
  local n = 11 -- p, s, t, n, src, dst, proto, route, te, f, qh
  if p.class then n = n + 1 end
  if p.peer then put(e, K.peer, str(#p.peer), p.peer); n = n + 1 end
  if p.tls then put(e, p.tls); n = n + p.tls_pairs end
  if p.qend then
    if p.qend > t then put(e, K.tq, uint((p.qend - t) * 1000)); n = n + 1 end
  else flags = bor(flags, REQUEST_OPEN) end
  local pairs_q, flags_q, qbody = put_message(e, q, s, REQUEST_CUT, K.qn, K.qt)
  n, flags = n + pairs_q, bor(flags, flags_q)
  if q.len > q.got then count.cut_bytes = count.cut_bytes + q.len - q.got; flags = bor(flags, REQUEST_CUT) end
  local qh, rh, rbody = array(q.fields), nil, nil
  if r.fields > 0 then
    rh = array(r.fields)
    put(e, K.th, uint(p.th > t and (p.th - t) * 1000 or 0))
    local pairs_r, flags_r, b = put_message(e, r, s, RESPONSE_CUT, K.rn, K.rt)
    n, flags, rbody = n + pairs_r + 2, bor(flags, flags_r), b
    if r.len > r.got and band(flags, RESPONSE_SKIP) == 0 then count.cut_bytes = count.cut_bytes + r.len - r.got; flags = bor(flags, RESPONSE_CUT) end
  else
    flags = bor(flags, NO_RESPONSE)
  end
  put(e, K.f, uint(flags))
  local bytes = 3 + #e + 3 + #qh + #q.b -- a map's header, keys of two letters
  if q.count > 0 then bytes = bytes + 3 + size(qbody and #qbody or q.got) end
  if rh then
    bytes = bytes + 3 + #rh + #r.b
    if r.count > 0 then bytes = bytes + 3 + size(rbody and #rbody or r.got) end
  end
  local b = s.batch
  writing = s
  put(b, char(0xc6, rshift(bytes, 24), band(rshift(bytes, 16), 255), band(rshift(bytes, 8), 255), band(bytes, 255), 0xde, 0, n), e, K.qh, qh, q.b)
  put_body(b, q, K.qb, qbody)
  if rh then
    put(b, K.rh, rh, r.b)
    put_body(b, r, K.rb, rbody)
  end
  count.mirrored = count.mirrored + 1
  s.events, writing = s.events + 1, nil
  if s.events == 1 then s.since = now end
  if pooled < MAX_POOL and p.head_bytes <= MAX_POOL_BYTES and q.count + r.count <= 256 then
    clear(q)
    clear(r)
    p.s, p.class, p.peer, p.tls, p.qend, p.c, p.place, p.grpc = false, false, false, false, false, false, false, false
    pooled = pooled + 1
    pool[pooled] = p
  end
  if held then return
  elseif s.gone then flush(h, s, now) -- send_all doesn't look at it any more
  elseif s ~= settings or settings.next or previous and previous.events > 0 then send_all(h, now)
  elseif due(s, now) then flush(h, s, now) end
end

-- finish_open makes the event of an exchange whose end was not seen. Whether the
-- response's body had ended, its length tells, if it was declared.
local function finish_open(h, p, now)
  local r = p.r
  if r.fields > 0 and not (r.declared and tonumber(r.declared) == r.len) then p.flags = bor(p.flags, RESPONSE_OPEN) end
  finish(h, p, now)
end

-- sweep ends exchanges whose end never came (Lua has no hook for resets and
-- aborts), and the oldest ones when there are too many.
local function sweep(h, now)
  while oldest <= number do
    local p = open[oldest]
    if p then
      if open_count >= MAX_OPEN or open_bytes > MAX_OPEN_BYTES then count.evicted = count.evicted + 1
      elseif now - p.t > MAX_WAIT_MS or now < p.t - MAX_WAIT_MS then count.unfinished = count.unfinished + 1
      else return end
      finish_open(h, p, now)
    end
    oldest = oldest + 1
  end
end

-- tick does what is due, and tells what was counted, of each policy too, when
-- nothing else has for long.
local function tick(h, now)
  ticked_at = now
  if by_connection == 0 then connections = {} end -- of each local address there was
  sweep(h, now)
  send_all(h, now)
  local s = settings
  while s do
    local t = s.tally
    if t.told_at == 0 then t.told_at = now end
    if t.told ~= t.eligible and now - t.told_at >= (s.share < 1000000 and TELL_DEMAND_MS or TELL_MS) then flush(h, s, now) end
    s = s.next
  end
  if told_at == 0 then told_at = now end
  if settings and now - told_at >= TELL_MS and told ~= count.seen then flush(h, settings, now) end
end

-- look looks for new settings, as a request has them when it begins.
local function look(h, now)
  settings_at = now
  local md = h:streamInfo():dynamicMetadata()
  local r = md:get("periscope.rev")
  r = r and r.r or embedded -- the text is its own digest
  if r ~= settings_rev then
    local t = md:get("periscope.settings")
    t = t and t.s or embedded
    local parsed = t and parse_sections(t) or nil
    local s = previous
    while s do
      if s.events > 0 then flush(h, s, now) end
      s.gone = true
      s = s.next
    end
    previous, settings_rev, settings, shares_rev = settings, r, parsed, nil
  end
  local shares = md:get("periscope.share")
  r = shares and shares.r or ""
  if r ~= shares_rev then
    local list, s, i = parse_shares(shares and shares.t or ""), settings, 1
    while s do
      if s.events > 0 then flush(h, s, now) end -- a batch is of one share
      i = i + 1
      share(s, list[i], r)
      s = s.next
    end
    shares_rev = r
  end
  tick(h, now)
end

local function names_of(list) -- an array of texts, encoded
  local n = #list < 16 and #list or 15
  local out = { char(0x90 + n) }
  for i = 1, n do out[i + 1] = str(#list[i]) .. list[i] end
  return table.concat(out)
end

-- Methods, looked up once: to find each through its object costs as much as some
-- of them do. What an Envoy lacks is left out of events, and said once.
local M
local function methods(h)
  local si, lacks = h:streamInfo(), {}
  local function optional(name)
    if si[name] then return si[name] end
    lacks[#lacks + 1] = name
    return function() return nil end
  end
  local m = { timestamp = h.timestamp, headers = h.headers, streamInfo = h.streamInfo, bodyChunks = h.bodyChunks, trailers = h.trailers,
    remote = si.downstreamRemoteAddress, localAddress = si.downstreamLocalAddress, protocol = si.protocol,
    direct = optional("downstreamDirectRemoteAddress"), route = optional("routeName"), ssl = optional("downstreamSslConnection"),
    sni = optional("requestedServerName") }
  if #lacks > 0 then h:logWarn("periscope: this Envoy's Lua has no " .. table.concat(lacks, ", ") .. ": events go without") end
  M = m
end

-- tls_facts gives what the handshake told, encoded, and the number of pairs.
local function tls_facts(si, ssl)
  local out, n = pair("tls", ssl:tlsVersion() or ""), 1
  local sni = M.sni(si)
  if sni and sni ~= "" then out = out .. pair("sni", sni); n = n + 1 end
  if ssl:peerCertificatePresented() then
    local sans = ssl:uriSanPeerCertificate() or {}
    for _, name in ipairs(ssl:dnsSansPeerCertificate() or {}) do sans[#sans + 1] = name end
    out = out .. pair("tsub", ssl:subjectPeerCertificate() or "") .. K.tsan .. names_of(sans)
    n = n + 2
  end
  return out, n
end

-- superseded ends what is still open on an HTTP/1 connection that has a new
-- request: its response will not come any more.
local function superseded(h, si, dst, peer, now)
  local c = connections[dst]
  local p = c and c[peer]
  if p and H1[M.protocol(si)] then
    count.unfinished = count.unfinished + 1
    finish_open(h, p, now)
  end
end

-- skip counts a request that is not copied.
local function skip(h, now, why)
  count[why] = count[why] + 1
  if by_connection == 0 then return end
  local si = M.streamInfo(h)
  superseded(h, si, M.localAddress(si), M.direct(si), now)
end

-- begin decides about a request, and copies its header. Gives the exchange when
-- its body is to be followed.
local function begin(h)
  if not M then methods(h) end
  local now = M.timestamp(h)
  count.seen = count.seen + 1
  if now - settings_at >= SETTINGS_MS or now < settings_at then look(h, now) end
  local s = settings
  if not s or not (s.on or s.next) then return skip(h, now, "off") end
  local hs
  if s.selective then
    hs = M.headers(h)
    s = selects(s, clean_host(hs:get(":authority")), hs:get(":path") or "")
    if not s then return skip(h, now, "excluded") end
    if not s.on then return skip(h, now, "off") end
  end
  local class, t = nil, s.tally
  t.eligible = t.eligible + 1
  if s.always then -- nodes spare them, too, when they are late
    hs = hs or M.headers(h)
    class = class_of(s.always, hs:get(":method") or "", hs:get(":path") or "")
    if class then t.priority = t.priority + 1 end
  end
  local part = class and s.class_share or s.share
  if part < 1000000 then
    hs = hs or M.headers(h)
    if place_of(hs, s) * 1000000 >= part then return skip(h, now, "sampled_out") end
  end
  if open_count >= MAX_OPEN or open_bytes > MAX_OPEN_BYTES then sweep(h, now) end
  hs = hs or M.headers(h)
  local si = M.streamInfo(h)
  local src, dst, peer, proto = M.remote(si) or "", M.localAddress(si) or "", M.direct(si) or "", M.protocol(si) or ""
  if by_connection > 0 then superseded(h, si, dst, peer, now) end
  local p = new_exchange()
  local q = p.q
  local fields, bytes, flags = encode_headers(hs, s, q.b)
  number = number + 1
  last_begin = now
  p.n, p.t, p.s, p.prefix, p.class, p.src, p.flags, p.size, p.head_bytes, q.fields = number, now, s, class and s.spared[class] or s.prefix, class or false, src, flags, bytes + 2048, bytes, fields
  p.place = constants(dst, proto, M.route(si) or "")
  if peer ~= src and peer ~= "" then p.peer = peer end
  local ssl = M.ssl(si)
  if ssl then p.tls, p.tls_pairs = tls_facts(si, ssl) end
  p.method = head.method
  local max = s.qmax
  if max > 0 and not type_of(s.qtypes, head.type).wanted then max = 0 end
  q.max, q.mask, p.flags = body_mask(s, head.type, head.coding, max, flags)
  open[number] = p
  open_count = open_count + 1
  open_bytes = open_bytes + p.size
  if H1[proto] and find(peer, ":%d+$") then
    local c = connections[dst]
    if not c then c = {}; connections[dst] = c end
    by_connection = by_connection + 1
    p.c, p.direct = c, peer
    c[peer] = p
  else
    by_id = by_id + 1
    si:dynamicMetadata():set(NS, "n", FIRST_ID + number)
  end
  return p
end

local function trailers(h, p, m)
  local t = M.trailers(h)
  if not t then return end
  m.tfields = encode_headers(t, p.s, scratch)
  m.t = scratch:get()
  hold(p, #m.t)
end

-- follow copies a body as it streams by, and gives true at its end; false when
-- the exchange's event has been made meanwhile.
local function follow(h, p, m)
  local n, max, chunks, full_at = p.n, m.max, 0, nil
  for chunk in M.bodyChunks(h) do
    if p.n ~= n then return false end
    local length, got = chunk:length(), m.got
    m.len = m.len + length
    if got < max and length > 0 then
      local take = got + length > max and max - got or length
      local i = m.count + 1
      m.count, m[i], m.got = i, chunk:getBytes(0, take), got + take
      hold(p, take + 64)
    end
    chunks = chunks + 1
    if chunks % 16 == 0 then -- long bodies do what nobody else may come to do
      local now = M.timestamp(h)
      if now - ticked_at >= BATCH_MS then tick(h, now) end
      if m.got >= max and not full_at then full_at = now end
      if p.n == n and m == p.r and (full_at and now - full_at > LONG_MS or p.grpc and now - p.th > LONG_MS) then
        finish_open(h, p, now)
      end
      if p.n ~= n then return false end
    end
  end
  return p.n == n
end

local function request(h, p)
  if follow(h, p, p.q) then
    local n = p.n
    trailers(h, p, p.q)
    if p.n == n then p.qend = p.q.len > 0 and M.timestamp(h) or p.t end
  else -- a tunnel's first bytes, perhaps
    send_all(h, M.timestamp(h))
  end
end

-- guarded runs what may fail for an exchange, which then has no event.
local function guarded(f, h, p)
  local n = p.n
  local ok, message = pcall(f, h, p)
  if ok then return end
  failed(h, message)
  if p.n ~= n then return end
  ok, message = pcall(close, p)
  if not ok then failed(h, message) end
end

function envoy_on_request(h)
  local ok, p = pcall(begin, h)
  if not ok then return failed(h, p) end
  if p then guarded(request, h, p) end
end

-- exchange_of finds the exchange that a response belongs to.
local function exchange_of(h)
  if open_count == 0 then return end
  local si = M.streamInfo(h)
  if by_connection > 0 then
    local c = connections[M.localAddress(si)]
    local p = c and c[M.direct(si)]
    if p and H1[M.protocol(si)] then return p end
  end
  if by_id > 0 then
    local md = si:dynamicMetadata():get(NS)
    return md and open[md.n - FIRST_ID]
  end
end

local function content_length()
  local n = tonumber(head.length or "") or 0
  if n < 0 or n >= 9007199254740992 or n ~= floor(n) then return 0 end
  return n
end

-- finish_early makes the event at the response's header. The header is on its way
-- when the first bytes behind it are: only then something goes out.
local function finish_early(h, p, now)
  local s = p.s
  finish(h, p, now, true)
  if s.events == 0 or not s.gone and not due(s, now) then return end
  for _ in M.bodyChunks(h) do break end
  if s.events > 0 then flush(h, s, M.timestamp(h)) end
end

local function response(h, p)
  if p.r.fields > 0 then return finish_open(h, p, M.timestamp(h)) end -- it has one: this is another's, which we never saw
  local now, s, r = M.timestamp(h), p.s, p.r
  local fields, bytes, flags = encode_headers(M.headers(h), s, r.b)
  hold(p, bytes)
  r.fields, r.declared, p.th, p.flags, p.head_bytes = fields, head.length, now, bor(p.flags, flags), p.head_bytes + bytes
  local t, status = type_of(s.rtypes, head.type), head.status
  p.grpc = t.grpc
  if status == "101" or t.events or p.method == "CONNECT" and status and byte(status) == 50 then
    p.flags = bor(p.flags, STREAM)
    return finish_early(h, p, now)
  end
  if status == "204" or status == "304" or p.method == "HEAD" or head.length == "0" and not t.grpc then -- RFC 9110, section 6.4.1: no body follows,
    return finish(h, p, now) -- and what ends it may not pass here: to HTTP/1 it has ended
  end
  local max = t.wanted and s.rmax or 0
  if max == 0 then
    p.flags = bor(p.flags, RESPONSE_SKIP)
    if not t.grpc then -- whose trailers say how it ended
      r.len = content_length()
      return finish_early(h, p, now)
    end
  end
  r.max, r.mask, p.flags = body_mask(s, head.type, head.coding, max, p.flags)
  if follow(h, p, r) then
    local n = p.n
    trailers(h, p, r)
    if p.n == n then finish(h, p, M.timestamp(h)) end
  end
end

function envoy_on_response(h)
  local ok, p = pcall(exchange_of, h)
  if not ok then return failed(h, p) end
  if p then guarded(response, h, p) end
end
