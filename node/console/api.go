package console

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/periscope-mesh/periscope/node/attack"
)

const apiRoot = "/api/v1"

// attacksInput is the query of GET /attacks. The words in the tags are those
// of package attack; a test compares them.
type attacksInput struct {
	Type        []string  `query:"type,explode" maxItems:"12" enum:"path-traversal,sql-injection,xss,command-injection,code-injection,ssrf,file-inclusion,session-fixation,protocol-violation,scanner,data-leakage,other" doc:"Types of attack, any of them; can be given several times."`
	Severity    string    `query:"severity" enum:"critical,error,warning,notice" doc:"Lowest severity."`
	Gateway     string    `query:"gateway" maxLength:"256" doc:"Exact gateway."`
	Client      string    `query:"client" maxLength:"256" doc:"Exact address of the client, without port."`
	Host        string    `query:"host" maxLength:"256" doc:"Exact host."`
	Path        string    `query:"path" maxLength:"256" doc:"Beginning of the path."`
	Tenant      string    `query:"tenant" maxLength:"256" doc:"Exact tenant."`
	Application string    `query:"application" maxLength:"256" doc:"Exact application."`
	Search      string    `query:"q" maxLength:"256" doc:"Text in host, path, payload, client, gateway, location or rule id, in any case."`
	Since       time.Time `query:"since" doc:"Attacks with a hit at or after this time (RFC 3339)." example:"2026-01-31T13:00:00Z"`
	Until       time.Time `query:"until" doc:"Attacks with a hit before this time (RFC 3339)." example:"2026-01-31T14:00:00Z"`
	PageInput
}

// PageInput chooses a page. It is exported, as AttackInput is, because huma
// looks only into embedded types that are.
type PageInput struct {
	Limit  int    `query:"limit" minimum:"1" maximum:"100" default:"50" doc:"Entries of a page."`
	Cursor string `query:"cursor" maxLength:"256" doc:"The page after the one whose next this is."`
}

// AttackInput names an attack.
type AttackInput struct {
	ID string `path:"id" maxLength:"128" doc:"The attack's id."`
}

type hitsInput struct {
	AttackInput
	PageInput
}

type attacksOutput struct {
	Body struct {
		Attacks []apiAttack `json:"attacks" nullable:"false"`
		Next    string      `json:"next,omitempty" doc:"Cursor of the next page; absent on the last one."`
	}
}

type attackOutput struct{ Body apiAttack }

type hitsOutput struct {
	Body struct {
		Hits []apiHit `json:"hits" nullable:"false" doc:"The samples kept, newest first; the attack's hits counts all."`
		Next string   `json:"next,omitempty" doc:"Cursor of the next page; absent on the last one."`
	}
}

type timelineOutput struct {
	Body struct {
		Minutes []apiMinute `json:"minutes" nullable:"false" doc:"Minutes with hits, oldest first."`
	}
}

func (c *console) routeAPI(mux *http.ServeMux) error {
	config := huma.DefaultConfig("Periscope", c.cfg.Version)
	config.Info.Description = "Attacks found in mirrored traffic. Texts come from attackers: escape them. " +
		"Where a text cannot hold the original bytes, a neighbour with the suffix Base64 has them."
	config.OpenAPIPath = ""  // served below: huma's own handler writes a shared variable
	config.DocsPath = ""     // its page would load scripts from elsewhere
	config.SchemasPath = ""  // in the OpenAPI document
	config.CreateHooks = nil // no links to schemas in answers
	config.RejectUnknownQueryParameters = true
	api := humago.New(mux, config)
	register(api, "list-attacks", "/attacks", "List attacks, newest last hit first", c.apiAttacks)
	register(api, "get-attack", "/attacks/{id}", "One attack", c.apiAttack)
	register(api, "list-hits", "/attacks/{id}/hits", "Samples of an attack's hits", c.apiHits)
	register(api, "list-gateways", "/gateways", "Gateways that mirror here, and the plugin builds they were heard from", c.apiGateways)
	register(api, "get-load", "/load", "Load control over the last minutes: shares, demand, capacity, delay, and what was not analysed", c.apiLoad)
	register(api, "get-timeline", "/attacks/{id}/timeline", "An attack's hits by minute", c.apiTimeline)

	asJSON, err := json.MarshalIndent(api.OpenAPI(), "", "  ")
	if err != nil {
		return err
	}
	asYAML, err := api.OpenAPI().YAML()
	if err != nil {
		return err
	}
	mux.HandleFunc("GET "+apiRoot+"/openapi.json", document("application/openapi+json", asJSON))
	mux.HandleFunc("GET "+apiRoot+"/openapi.yaml", document("application/openapi+yaml", asYAML))
	mux.HandleFunc("GET /api/", func(w http.ResponseWriter, r *http.Request) {
		problem(w, http.StatusNotFound, "There is no such resource; see "+apiRoot+"/openapi.json.")
	})
	return nil
}

func register[I, O any](api huma.API, id, path, summary string, handler func(context.Context, *I) (*O, error)) {
	huma.Register(api, huma.Operation{
		OperationID: id, Method: http.MethodGet, Path: apiRoot + path, Summary: summary,
		Errors: []int{http.StatusNotFound, http.StatusUnprocessableEntity, http.StatusInternalServerError, http.StatusServiceUnavailable},
	}, handler)
}

func document(contentType string, body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.Write(body)
	}
}

func problem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(huma.ErrorModel{Title: http.StatusText(status), Status: status, Detail: detail})
}

func (c *console) apiAttacks(ctx context.Context, in *attacksInput) (*attacksOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	f := Filter{Tenant: in.Tenant, Application: in.Application, Gateway: in.Gateway, Client: in.Client, Host: in.Host,
		PathPrefix: in.Path, Search: in.Search, Since: in.Since, Until: in.Until}
	for _, t := range in.Type {
		f.Types = append(f.Types, attack.Type(t))
	}
	if in.Severity != "" {
		s, err := attack.ParseSeverity(in.Severity)
		if err != nil {
			return nil, invalid("query.severity", in.Severity, err.Error())
		}
		f.MinSeverity = s
	}
	list, next, err := c.cfg.Store.Attacks(ctx, f, Page{Limit: in.Limit, Cursor: in.Cursor})
	if err != nil {
		return nil, c.apiError(ctx, err, "", in.Cursor)
	}
	out := &attacksOutput{}
	out.Body.Attacks, out.Body.Next = make([]apiAttack, len(list)), next
	for i := range list {
		out.Body.Attacks[i] = newAPIAttack(&list[i])
	}
	return out, nil
}

func (c *console) apiAttack(ctx context.Context, in *AttackInput) (*attackOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	a, err := c.cfg.Store.Attack(ctx, in.ID)
	if err != nil {
		return nil, c.apiError(ctx, err, in.ID, "")
	}
	return &attackOutput{newAPIAttack(&a)}, nil
}

func (c *console) apiHits(ctx context.Context, in *hitsInput) (*hitsOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	if _, err := c.cfg.Store.Attack(ctx, in.ID); err != nil {
		return nil, c.apiError(ctx, err, in.ID, "")
	}
	list, next, err := c.cfg.Store.Hits(ctx, in.ID, Page{Limit: in.Limit, Cursor: in.Cursor})
	if err != nil {
		return nil, c.apiError(ctx, err, in.ID, in.Cursor)
	}
	out := &hitsOutput{}
	out.Body.Hits, out.Body.Next = make([]apiHit, len(list)), next
	for i := range list {
		out.Body.Hits[i] = newAPIHit(&list[i])
	}
	return out, nil
}

func (c *console) apiTimeline(ctx context.Context, in *AttackInput) (*timelineOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	if _, err := c.cfg.Store.Attack(ctx, in.ID); err != nil {
		return nil, c.apiError(ctx, err, in.ID, "")
	}
	list, err := c.cfg.Store.Timeline(ctx, in.ID)
	if err != nil {
		return nil, c.apiError(ctx, err, in.ID, "")
	}
	out := &timelineOutput{}
	out.Body.Minutes = make([]apiMinute, len(list))
	for i, m := range list {
		out.Body.Minutes[i] = apiMinute{m.Start.UTC(), newHitCount(m.Count)}
	}
	return out, nil
}

func (c *console) apiError(ctx context.Context, err error, id, cursor string) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return huma.Error404NotFound("There is no such attack: it may have been deleted because of its age.",
			&huma.ErrorDetail{Message: "unknown id", Location: "path.id", Value: id})
	case errors.Is(err, fs.ErrInvalid):
		return invalid("query.cursor", cursor, "not a cursor of this list: leave it out for the first page, then use the answer's next")
	}
	if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		c.log.Error("read store", "error", err)
	}
	return huma.Error500InternalServerError("The attacks cannot be read; the console's log has the reason.")
}

func invalid(location, value, message string) error {
	return huma.Error422UnprocessableEntity("validation failed", &huma.ErrorDetail{Message: message, Location: location, Value: value})
}
