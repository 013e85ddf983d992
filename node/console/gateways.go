package console

import (
	"context"
	"net/http"
	"time"
)

// Gateway is what nodes heard from a gateway by one build of its plugin. An
// alias, as Filter is.
type Gateway = struct {
	Gateway string
	Plugin  string // the build's "version+digest", in the gateway's own words
	First   time.Time
	Last    time.Time
	Seen    int64 // exchanges
	Errors  int64 // of the plugin
}

type apiGateway struct {
	Gateway string    `json:"gateway"`
	Plugin  string    `json:"plugin" doc:"Build of the gateway plugin, version+digest, in the gateway's own words."`
	Running bool      `json:"running" doc:"The build that this gateway was heard from last."`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Seen    int64     `json:"seen" doc:"Exchanges that the plugin has seen, mirrored or not."`
	Errors  int64     `json:"errors" doc:"Errors of the plugin; they spoil no user's exchange."`
}

type gatewaysOutput struct {
	Body struct {
		Gateways []apiGateway `json:"gateways" nullable:"false" doc:"By gateway, the build heard from last first."`
	}
}

// gatewayRows marks the build that each gateway was heard from last.
func gatewayRows(list []Gateway) []apiGateway {
	out := make([]apiGateway, len(list))
	for i, g := range list {
		out[i] = apiGateway{g.Gateway, g.Plugin, i == 0 || list[i-1].Gateway != g.Gateway, g.First.UTC(), g.Last.UTC(), g.Seen, g.Errors}
	}
	return out
}

func (c *console) apiGateways(ctx context.Context, _ *struct{}) (*gatewaysOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	list, err := c.cfg.Store.Gateways(ctx)
	if err != nil {
		return nil, c.apiError(ctx, err, "", "")
	}
	out := &gatewaysOutput{}
	out.Body.Gateways = gatewayRows(list)
	return out, nil
}

func (c *console) gateways(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), queryTimeout)
	defer cancel()
	list, err := c.cfg.Store.Gateways(ctx)
	if err != nil {
		c.failStore(w, r, err)
		return
	}
	page := struct{ Gateways []apiGateway }{gatewayRows(list)}
	c.render(w, http.StatusOK, "gateways", "layout", frame{"Gateways", c.cfg.Version, page})
}
