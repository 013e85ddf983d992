package console

import (
	"time"
	"unicode/utf8"

	"github.com/periscope-mesh/periscope/node/attack"
)

// The API's own forms of attack's types: names and meanings are the same, but
// bytes are text with the raw bytes beside it.

type apiAttack struct {
	ID            string          `json:"id"`
	Type          attack.Type     `json:"type" doc:"The type's id."`
	TypeTitle     string          `json:"typeTitle" doc:"The type in words."`
	Severity      string          `json:"severity" enum:"critical,error,warning,notice"`
	Tenant        string          `json:"tenant,omitempty"`
	Application   string          `json:"application,omitempty"`
	Policy        string          `json:"policy"`
	Gateway       string          `json:"gateway"`
	Client        string          `json:"client" doc:"Address of the newest hit's client."`
	Method        string          `json:"method"`
	Host          string          `json:"host"`
	Path          string          `json:"path" doc:"The path with identifiers replaced by {id}, without the query."`
	Location      attack.Location `json:"location"`
	RuleIDs       []int           `json:"ruleIds" nullable:"false" doc:"Rules of all hits, ascending."`
	Payload       string          `json:"payload" doc:"What matched in the newest hit, at most 256 bytes."`
	PayloadBase64 []byte          `json:"payloadBase64,omitempty" doc:"The payload's bytes, where they are not valid UTF-8."`
	Status        int             `json:"status" doc:"The newest hit's response status, 0 if none was seen."`
	First         time.Time       `json:"first"`
	Last          time.Time       `json:"last"`
	HitCount
}

// HitCount is an attack.Count. It is exported, as PageInput is, because huma looks
// only into embedded types that are.
type HitCount struct {
	Hits      int64   `json:"hits" doc:"Hits seen: of the exchanges that were mirrored and analysed."`
	Estimated float64 `json:"estimatedHits" doc:"Estimate of the hits before sampling: the sum of the hits' weights."`
	Error     float64 `json:"estimatedHitsError" doc:"Standard error of the estimate, the root of the sum of w(w-1) over the hits' weights w; 0: nothing was sampled, the count is exact."`
}

func newHitCount(c attack.Count) HitCount { return HitCount{c.Hits, c.Estimated, c.Error()} }

type apiMinute struct {
	Start time.Time `json:"start"`
	HitCount
}

type apiHit struct {
	ID          string          `json:"id"`
	Time        time.Time       `json:"time"`
	Type        attack.Type     `json:"type"`
	TypeTitle   string          `json:"typeTitle"`
	Severity    string          `json:"severity" enum:"critical,error,warning,notice"`
	Score       int             `json:"score" doc:"Anomaly score of the matches that count."`
	Tenant      string          `json:"tenant,omitempty"`
	Application string          `json:"application,omitempty"`
	Policy      string          `json:"policy"`
	PolicyRev   string          `json:"policyRev,omitempty"`
	Gateway     string          `json:"gateway"`
	Client      string          `json:"client"`
	Location    attack.Location `json:"location"`
	Matches     []apiMatch      `json:"matches" nullable:"false"`
	Weight      float64         `json:"weight" doc:"Exchanges that this one stands for."`
	Exchange    apiExchange     `json:"exchange"`
}

type apiMatch struct {
	RuleID   int             `json:"ruleId"`
	Type     attack.Type     `json:"type"`
	Severity string          `json:"severity"`
	Message  string          `json:"message"`
	Tags     []string        `json:"tags,omitempty"`
	Location attack.Location `json:"location"`
	Value    string          `json:"value,omitempty"`
	ValueRaw []byte          `json:"valueBase64,omitempty" doc:"The value's bytes."`
	Start    int             `json:"start" doc:"The matched part begins at this byte of the value,"`
	End      int             `json:"end" doc:"and ends before this one; equal if unknown."`
	Excluded bool            `json:"excluded,omitempty" doc:"Silenced by a policy's exclusion: kept for audit, not scored."`
}

type apiExchange struct {
	Method     string     `json:"method"`
	Scheme     string     `json:"scheme"`
	Host       string     `json:"host"`
	Path       string     `json:"path" doc:"With the query."`
	PathBase64 []byte     `json:"pathBase64,omitempty" doc:"The path's bytes, where they are not valid UTF-8."`
	Protocol   string     `json:"protocol"`
	TLS        string     `json:"tls,omitempty"`
	SNI        string     `json:"sni,omitempty"`
	Route      string     `json:"route,omitempty"`
	Peer       string     `json:"peer,omitempty"`
	Status     int        `json:"status"`
	DurationNs int64      `json:"durationNs"`
	Flags      string     `json:"responseFlags,omitempty" doc:"Envoy's response flags: how the exchange went wrong."`
	Details    string     `json:"responseDetails,omitempty" doc:"Envoy's words for it."`
	Request    apiMessage `json:"request"`
	Response   apiMessage `json:"response"`
	Truncated  bool       `json:"truncated,omitempty" doc:"A body or header list is incomplete."`
}

type apiMessage struct {
	Headers    []apiField `json:"headers,omitempty"`
	Body       string     `json:"body,omitempty"`
	BodyBase64 []byte     `json:"bodyBase64,omitempty" doc:"The body's bytes, as far as they were copied."`
	BodyBytes  uint64     `json:"bodyBytes" doc:"True length of the body."`
}

type apiField struct {
	Name        string `json:"name"`
	Value       string `json:"value"`
	ValueBase64 []byte `json:"valueBase64,omitempty" doc:"The value's bytes, where they are not valid UTF-8."`
}

// rawUnlessText is the bytes of s if a JSON string would lose some.
func rawUnlessText(s string) []byte {
	if utf8.ValidString(s) {
		return nil
	}
	return []byte(s)
}

func newAPIAttack(a *attack.Attack) apiAttack {
	return apiAttack{
		ID: a.ID, Type: a.Type, TypeTitle: a.Type.Title(), Severity: a.Severity.String(), Tenant: a.Tenant, Application: a.Application,
		Policy: a.Policy, Gateway: a.Gateway, Client: a.Client, Method: a.Method, Host: a.Host, Path: a.Path, Location: a.Location,
		RuleIDs: append([]int{}, a.RuleIDs...), Payload: a.Payload, PayloadBase64: rawUnlessText(a.Payload), Status: a.Status,
		First: a.First.UTC(), Last: a.Last.UTC(), HitCount: newHitCount(a.Count),
	}
}

func newAPIHit(h *attack.Hit) apiHit {
	x := &h.Exchange
	out := apiHit{
		ID: h.ID, Time: h.Time.UTC(), Type: h.Type, TypeTitle: h.Type.Title(), Severity: h.Severity.String(), Score: h.Score,
		Tenant: h.Tenant, Application: h.Application, Policy: h.Policy, PolicyRev: h.PolicyRev, Gateway: h.Gateway, Client: h.Client,
		Location: h.Location, Weight: h.Weight, Matches: make([]apiMatch, len(h.Matches)),
		Exchange: apiExchange{
			Method: x.Method, Scheme: x.Scheme, Host: x.Host, Path: x.Path, PathBase64: rawUnlessText(x.Path), Protocol: x.Protocol,
			TLS: x.TLS, SNI: x.SNI, Route: x.Route, Peer: x.Peer, Status: x.Status, DurationNs: x.Duration.Nanoseconds(), Flags: x.Flags, Details: x.Details,
			Request: newAPIMessage(&x.Request), Response: newAPIMessage(&x.Response), Truncated: x.Truncated,
		},
	}
	for i := range h.Matches {
		m := &h.Matches[i]
		out.Matches[i] = apiMatch{RuleID: m.RuleID, Type: m.Type, Severity: m.Severity.String(), Message: m.Message, Tags: m.Tags,
			Location: m.Location, Value: string(m.Value), ValueRaw: m.Value, Start: m.Start, End: m.End, Excluded: m.Excluded}
	}
	return out
}

func newAPIMessage(m *attack.Message) apiMessage {
	out := apiMessage{Body: string(m.Body), BodyBase64: m.Body, BodyBytes: m.BodyBytes}
	for _, f := range m.Headers {
		out.Headers = append(out.Headers, apiField{f.Name, f.Value, rawUnlessText(f.Value)})
	}
	return out
}
