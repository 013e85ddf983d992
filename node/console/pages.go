package console

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/periscope-mesh/periscope/node/attack"
)

// frame is what every page has around its content.
type frame struct {
	Title   string
	Version string
	Page    any
}

type listPage struct {
	Query      query
	Types      []attack.Type
	Severities []attack.Severity
	Ranges     []timeRange
	Gateways   []string
	Clients    []string
	Chips      []chip
	Results    results
}

// results is the part of the list that is refreshed.
type results struct {
	Attacks    []attackRow
	Hash       string
	Poll       string // URL to ask for changes; empty on later pages
	Next       string
	First      string // URL of the first page, on later ones
	Filtered   bool
	TryCommand string
}

// attackRow is an attack ready to be shown.
type attackRow struct {
	attack.Attack
	Href      string
	Payload   []run
	Rules     []int // the first few
	MoreRules int
}

const maxRowRules = 2

func newAttackRow(a attack.Attack) attackRow {
	row := attackRow{Attack: a, Href: "/attacks/" + url.PathEscape(a.ID), Rules: a.RuleIDs[:min(len(a.RuleIDs), maxRowRules)]}
	row.MoreRules = len(a.RuleIDs) - len(row.Rules)
	if a.Payload != "" {
		row.Payload = oneLine(runs([]byte(a.Payload), []span{{0, len(a.Payload), false}}, 160))
	}
	return row
}

// oneLine makes line feeds visible, where text is not shown as lines.
func oneLine(list []run) []run {
	for i := range list {
		for j := range list[i].Pieces {
			p := &list[i].Pieces[j]
			p.Text = strings.ReplaceAll(p.Text, "\n", `\n`)
		}
	}
	return list
}

func (c *console) loadPages() error {
	base, err := template.New("").Funcs(c.functions()).ParseFS(files, "templates/layout.html", "templates/parts.html")
	if err != nil {
		return fmt.Errorf("console pages: %w", err)
	}
	c.pages = make(map[string]*template.Template)
	for _, name := range []string{"list", "detail", "gateways", "load", "error"} {
		page, err := base.Clone()
		if err == nil {
			page, err = page.ParseFS(files, "templates/"+name+".html")
		}
		if err != nil {
			return fmt.Errorf("console pages: %w", err)
		}
		c.pages[name] = page
	}
	return nil
}

func (c *console) functions() template.FuncMap {
	return template.FuncMap{
		"asset":  func(name string) string { return "/static/" + name + "?v=" + c.assets[name].version },
		"plain":  plain,
		"number": number,
		"about":  about,
		"ago":    func(t time.Time) string { return ago(c.cfg.Now().Sub(t)) },
		"utc":    func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
		"rfc":    func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
		"where":  where,
		"plural": plural,
		"len64":  func(list any) int64 { return int64(reflect.ValueOf(list).Len()) },
		"i64":    asInt64,
		"hitOf":  func(n int, h hitView) numberedHit { return numberedHit{n, h} },
	}
}

// numberedHit is a hit with its number on the page.
type numberedHit struct {
	N   int
	Hit hitView
}

// asInt64 takes the counts that pages have: int and uint64.
func asInt64(n any) int64 {
	switch n := n.(type) {
	case int:
		return int64(n)
	case uint64:
		return int64(min(n, 1<<62))
	}
	return 0
}

// ago is a length of time in a few letters, as console.js writes it.
func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s ago", max(int(d/time.Second), 0))
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", d/time.Hour)
	}
	return fmt.Sprintf("%d days ago", d/(24*time.Hour))
}

// where is a location in words.
func where(l attack.Location) string {
	words := map[attack.Place]string{
		attack.InPath: "path", attack.InQuery: "query parameter", attack.InHeader: "header", attack.InCookie: "cookie",
		attack.InForm: "form field", attack.InJSON: "JSON", attack.InXML: "XML", attack.InBody: "request body",
		attack.InRequest: "request", attack.InResponse: "response body", attack.InRespHeader: "response header", attack.InMultipart: "multipart part",
	}
	if w, ok := words[l.Place]; ok {
		return w
	}
	return "request"
}

// render writes a page or a part of one; nothing is sent before it is whole.
func (c *console) render(w http.ResponseWriter, status int, page, part string, data any) {
	var b bytes.Buffer
	if err := c.pages[page].ExecuteTemplate(&b, part, data); err != nil {
		c.log.Error("render page", "page", page, "error", err)
		http.Error(w, "The page could not be made; the console's log has the reason.", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	w.Write(b.Bytes())
}

// errorPage says what is wrong and what to do.
type errorPage struct {
	Status       int
	Text, Remedy string
}

func (c *console) fail(w http.ResponseWriter, status int, text, remedy string) {
	c.render(w, status, "error", "layout", frame{text, c.cfg.Version, errorPage{status, text, remedy}})
}

// failStore turns an error of the store into a page.
func (c *console) failStore(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.fail(w, http.StatusNotFound, "There is no such attack", "It may have been deleted because of its age, or the link is incomplete.")
	case errors.Is(err, fs.ErrInvalid):
		c.fail(w, http.StatusBadRequest, "This page of the list is gone", "Start at the first page of the Attacks list.")
	default:
		if r.Context().Err() == nil { // else nobody waits for the answer
			c.log.Error("read store", "error", err)
		}
		c.fail(w, http.StatusInternalServerError, "The attacks cannot be read", "The console's log has the reason. Trying again may help.")
	}
}

func (c *console) list(w http.ResponseWriter, r *http.Request) {
	q, err := parseQuery(r.URL.Query(), c.cfg.Now())
	if err != nil {
		c.fail(w, http.StatusBadRequest, "This filter cannot be used", err.Error())
		return
	}
	res, err := c.results(r.Context(), q)
	if err != nil {
		c.failStore(w, r, err)
		return
	}
	page := listPage{Query: q, Types: attack.Types(), Severities: []attack.Severity{attack.Critical, attack.Error, attack.Warning, attack.Notice},
		Ranges: timeRanges(), Chips: q.chips(), Results: res}
	for _, a := range res.Attacks {
		if a.Gateway == plain(a.Gateway, maxValueBytes) { // suggestions cannot show escapes
			page.Gateways = appendNew(page.Gateways, a.Gateway)
		}
		if a.Client == plain(a.Client, maxValueBytes) {
			page.Clients = appendNew(page.Clients, a.Client)
		}
	}
	c.render(w, http.StatusOK, "list", "layout", frame{"Attacks", c.cfg.Version, page})
}

func appendNew(list []string, s string) []string {
	if s == "" || slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// rows answers a page that asks whether its table is still right: 204 if so.
func (c *console) rows(w http.ResponseWriter, r *http.Request) {
	q, err := parseQuery(r.URL.Query(), c.cfg.Now())
	if err != nil {
		c.fail(w, http.StatusBadRequest, "This filter cannot be used", err.Error())
		return
	}
	q.Cursor = "" // later pages do not change under the reader
	res, err := c.results(r.Context(), q)
	switch {
	case err != nil:
		c.failStore(w, r, err)
	case r.URL.Query().Get("v") == res.Hash:
		w.WriteHeader(http.StatusNoContent)
	default:
		c.render(w, http.StatusOK, "list", "results", res)
	}
}

func (c *console) results(ctx context.Context, q query) (results, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	list, next, err := c.cfg.Store.Attacks(ctx, q.filter, Page{Limit: listLimit, Cursor: q.Cursor})
	if err != nil {
		return results{}, err
	}
	res := results{TryCommand: c.cfg.TryCommand, Filtered: len(q.values()) > 0, Hash: hashOf(list, next)}
	for _, a := range list {
		res.Attacks = append(res.Attacks, newAttackRow(a))
	}
	v := q.values()
	if q.Cursor == "" {
		v.Set("v", res.Hash)
		res.Poll = href("/attacks/rows", v)
		v.Del("v")
	} else {
		res.First = href("/attacks", v)
	}
	if next != "" {
		v.Set("cursor", next)
		res.Next = href("/attacks", v)
	}
	return res, nil
}

// hashOf tells two lists apart.
func hashOf(list []attack.Attack, next string) string {
	b, err := json.Marshal(struct {
		List []attack.Attack
		Next string
	}{list, next})
	if err != nil {
		return "" // never equal to an asked one, so the page is always refreshed
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}
