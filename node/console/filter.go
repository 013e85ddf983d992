package console

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

const maxValueBytes = 256 // of one filter

// timeRange is a choice of the filter bar.
type timeRange struct {
	ID, Title string
	length    time.Duration
}

func timeRanges() []timeRange {
	return []timeRange{
		{"", "Any time", 0},
		{"15m", "Last 15 minutes", 15 * time.Minute},
		{"1h", "Last hour", time.Hour},
		{"24h", "Last 24 hours", 24 * time.Hour},
		{"7d", "Last 7 days", 7 * 24 * time.Hour},
		{"30d", "Last 30 days", 30 * 24 * time.Hour},
	}
}

// query is the state of the Attacks page, all of it in its URL.
type query struct {
	Type     string
	Severity string
	Gateway  string
	Client   string
	Search   string
	Range    string
	Cursor   string
	extra    map[string]string // filters without a control: host, path, tenant, application, since, until
	filter   Filter
}

// parameterError is a query parameter that cannot be used.
type parameterError struct{ name, problem string }

func (e *parameterError) Error() string {
	return fmt.Sprintf("The parameter %q %s.", e.name, e.problem)
}

// parseQuery reads the page's URL. Unknown parameters are left to others, such
// as the tracking ones that link shorteners add.
func parseQuery(values url.Values, now time.Time) (query, error) {
	q := query{extra: make(map[string]string)}
	get := func(name string) string { return strings.TrimSpace(values.Get(name)) }
	for name, all := range values {
		for _, v := range all {
			if len(v) > maxValueBytes {
				return query{}, &parameterError{name, fmt.Sprintf("is longer than %d bytes", maxValueBytes)}
			}
		}
	}
	q.Type, q.Severity, q.Range = get("type"), get("severity"), get("range")
	q.Gateway, q.Client, q.Search, q.Cursor = get("gateway"), get("client"), get("q"), values.Get("cursor")
	q.filter = Filter{Gateway: q.Gateway, Client: q.Client, Search: q.Search}
	if q.Type != "" {
		if !slices.Contains(attack.Types(), attack.Type(q.Type)) {
			return query{}, &parameterError{"type", "is none of " + strings.Join(typeIDs(), ", ")}
		}
		q.filter.Types = []attack.Type{attack.Type(q.Type)}
	}
	if q.Severity != "" {
		s, err := attack.ParseSeverity(q.Severity)
		if err != nil {
			return query{}, &parameterError{"severity", "is none of critical, error, warning, notice"}
		}
		q.filter.MinSeverity = s
	}
	if err := q.parseTimes(now, get); err != nil {
		return query{}, err
	}
	for name, field := range map[string]*string{"host": &q.filter.Host, "path": &q.filter.PathPrefix,
		"tenant": &q.filter.Tenant, "application": &q.filter.Application} {
		if v := get(name); v != "" {
			*field, q.extra[name] = v, v
		}
	}
	return q, nil
}

func (q *query) parseTimes(now time.Time, get func(string) string) error {
	i := slices.IndexFunc(timeRanges(), func(r timeRange) bool { return r.ID == q.Range })
	if i < 0 {
		return &parameterError{"range", "is none of 15m, 1h, 24h, 7d, 30d; since and until take any time"}
	}
	if i > 0 {
		q.filter.Since = now.Add(-timeRanges()[i].length)
	}
	for name, field := range map[string]*time.Time{"since": &q.filter.Since, "until": &q.filter.Until} {
		v := get(name)
		if v == "" {
			continue
		}
		at, err := time.Parse(time.RFC3339, v)
		if err != nil {
			return &parameterError{name, "is not a time such as 2026-01-31T13:00:00Z"}
		}
		*field, q.extra[name] = at, v
	}
	return nil
}

func typeIDs() []string {
	var ids []string
	for _, t := range attack.Types() {
		ids = append(ids, string(t))
	}
	return ids
}

// values is the query as parameters, without the page.
func (q query) values() url.Values {
	v := url.Values{}
	set := func(name, value string) {
		if value != "" {
			v.Set(name, value)
		}
	}
	set("type", q.Type)
	set("severity", q.Severity)
	set("gateway", q.Gateway)
	set("client", q.Client)
	set("q", q.Search)
	set("range", q.Range)
	for name, value := range q.extra {
		set(name, value)
	}
	return v
}

// href is the URL of the page with these parameters.
func href(path string, v url.Values) string {
	if len(v) == 0 {
		return path
	}
	return path + "?" + v.Encode()
}

// chip is a filter without a control, which can only be removed.
type chip struct{ Name, Value, Shown, Without string }

func (q query) chips() (list []chip) {
	for _, name := range []string{"host", "path", "tenant", "application", "since", "until"} {
		if value, ok := q.extra[name]; ok {
			v := q.values()
			v.Del(name)
			list = append(list, chip{name, value, plain(value, maxValueBytes), href("/attacks", v)})
		}
	}
	return list
}
