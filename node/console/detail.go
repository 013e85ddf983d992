package console

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/periscope-mesh/periscope/node/attack"
)

// How much of each part of a sample is shown.
const (
	maxShownPath   = 4 << 10
	maxShownHeader = 1 << 10
	maxShownBody   = 12 << 10
	maxShownValue  = 400
	maxShownFields = 100
)

type detailPage struct {
	Attack   attackRow
	Score    int // highest of the samples shown
	Chart    *chart
	Rules    []ruleRow
	Hits     []hitView
	Next     string // URL of the page of older samples
	First    string // URL of the newest samples, on later pages
	SameHref map[string]string
}

// ruleRow is a rule that matched in this attack.
type ruleRow struct {
	ID       int
	Message  string
	Severity attack.Severity
	Paranoia string
	Tags     []string // standards' names for the kind of attack
	Samples  int      // of those shown
	Excluded bool     // in all of them
}

type hitView struct {
	attack.Hit
	Open     bool
	Request  messageView
	Response messageView
	Matches  []matchView
	Curl     string
	Notes    []string
	Weighted string
}

type messageView struct {
	Method, Protocol string
	Path             []run
	Fields           []fieldView
	MoreFields       int
	Body             []run
	BodyNote         string
}

type fieldView struct{ Name, Value []run }

type matchView struct {
	attack.Match
	Value []run
	Found bool // it is marked in the request or response shown
}

func (c *console) detail(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	id, cursor := r.PathValue("id"), r.URL.Query().Get("cursor")
	a, err := c.cfg.Store.Attack(ctx, id)
	if err != nil {
		c.failStore(w, r, err)
		return
	}
	hits, next, err := c.cfg.Store.Hits(ctx, id, Page{Limit: hitLimit, Cursor: cursor})
	if err != nil {
		c.failStore(w, r, err)
		return
	}
	minutes, err := c.cfg.Store.Timeline(ctx, id)
	if err != nil {
		c.failStore(w, r, err)
		return
	}
	page := detailPage{Attack: newAttackRow(a), Chart: newChart(minutes), Rules: ruleRows(a, hits), SameHref: map[string]string{
		"client":  href("/attacks", url.Values{"client": {a.Client}}),
		"gateway": href("/attacks", url.Values{"gateway": {a.Gateway}}),
		"host":    href("/attacks", url.Values{"host": {a.Host}}),
	}}
	if next != "" {
		page.Next = href(page.Attack.Href, url.Values{"cursor": {next}})
	}
	if cursor != "" {
		page.First = page.Attack.Href
	}
	for i := range hits {
		v := newHitView(&hits[i])
		v.Open = i == 0
		page.Hits = append(page.Hits, v)
		page.Score = max(page.Score, hits[i].Score)
	}
	c.render(w, http.StatusOK, "detail", "layout", frame{a.Type.Title(), c.cfg.Version, page})
}

// ruleRows lists the attack's rules by id, with what the samples tell of them.
func ruleRows(a attack.Attack, hits []attack.Hit) []ruleRow {
	rows := make(map[int]*ruleRow)
	for _, id := range a.RuleIDs {
		rows[id] = &ruleRow{ID: id}
	}
	for i := range hits {
		seen := make(map[int]bool)
		for j := range hits[i].Matches {
			m := &hits[i].Matches[j]
			row := rows[m.RuleID]
			if row == nil {
				row = &ruleRow{ID: m.RuleID}
				rows[m.RuleID] = row
			}
			if row.Samples == 0 {
				row.Excluded = true
			}
			row.Excluded = row.Excluded && m.Excluded
			if row.Message == "" { // the same in each match
				row.Message, row.Severity = plain(m.Message, maxShownValue), m.Severity
				row.Paranoia, row.Tags = standards(m.Tags)
			}
			if !seen[m.RuleID] {
				row.Samples++
			}
			seen[m.RuleID] = true
		}
	}
	list := make([]ruleRow, 0, len(rows))
	for _, row := range rows {
		list = append(list, *row)
	}
	slices.SortFunc(list, func(a, b ruleRow) int { return a.ID - b.ID })
	return list
}

// standards picks from a rule's tags its paranoia level and its place in
// public lists.
func standards(tags []string) (paranoia string, list []string) {
	for _, tag := range tags {
		low := strings.ToLower(tag)
		switch {
		case strings.HasPrefix(low, "paranoia-level/"):
			paranoia = plain(tag[len("paranoia-level/"):], 8)
		case strings.HasPrefix(low, "capec/"):
			list = appendNew(list, "CAPEC-"+plain(tag[strings.LastIndexByte(tag, '/')+1:], 16))
		case low == "owasp_crs": // every rule has it
		case strings.HasPrefix(low, "owasp"), strings.HasPrefix(low, "pci/"), strings.HasPrefix(low, "cwe"):
			list = appendNew(list, strings.ReplaceAll(plain(tag, 60), "_", " "))
		}
	}
	return paranoia, list
}

func newHitView(h *attack.Hit) hitView {
	x := &h.Exchange
	marks, found := locate(x, h.Matches)
	v := hitView{Hit: *h}
	v.Request = newMessageView(&marks.request, &x.Request)
	v.Request.Method, v.Request.Protocol = plain(x.Method, 40), plain(x.Protocol, 20)
	v.Request.Path = runs([]byte(x.Path), marks.path, maxShownPath)
	v.Response = newMessageView(&marks.response, &x.Response)
	v.Curl, v.Notes = curlCommand(x)
	if h.Weight > 1.01 {
		v.Weighted = number(int64(h.Weight + .5))
	}
	for i := range h.Matches {
		m := &h.Matches[i]
		start, end := m.Start, m.End
		if start < 0 || end > len(m.Value) || start > end {
			start, end = 0, 0
		}
		v.Matches = append(v.Matches, matchView{Match: *m, Found: found[i],
			Value: runs(m.Value, []span{{start, end, m.Excluded}}, maxShownValue)})
	}
	return v
}

func newMessageView(m *markedMessage, from *attack.Message) messageView {
	var v messageView
	for i, f := range m.fields {
		if i >= maxShownFields && len(m.headers[i]) == 0 {
			v.MoreFields++
			continue
		}
		value := runs([]byte(f.Value), m.headers[i], maxShownHeader)
		if f.Value == maskMark {
			value = []run{{Pieces: []piece{{Text: "[masked at the gateway]", Kind: "note"}}}}
		}
		v.Fields = append(v.Fields, fieldView{Name: runs([]byte(f.Name), nil, 200), Value: value})
	}
	if len(from.Body) > 0 {
		v.Body = runs(from.Body, m.body, maxShownBody)
	}
	if kept := uint64(len(from.Body)); from.BodyBytes > kept {
		v.BodyNote = "The body had " + plural(int64(min(from.BodyBytes, 1<<62)), "byte", "bytes") + "; " + plural(int64(kept), "was", "were") + " copied."
	}
	return v
}
