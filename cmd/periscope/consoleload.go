package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/periscope-mesh/periscope/localweb"
	"github.com/periscope-mesh/periscope/node/console"
)

// maxLoadBytes bounds the control plane's answer: some 300 KB at the most series.
const maxLoadBytes = 4 << 20

// controlLoad asks a control plane for /debug/loadz.
type controlLoad struct {
	url    string
	client *http.Client
}

// newControlLoad makes the source; none without an address.
func newControlLoad(addr string) (console.LoadSource, error) {
	if addr == "" {
		return nil, nil
	}
	if err := localweb.RequireLoopback("--control-debug", addr); err != nil {
		return nil, err
	}
	return &controlLoad{
		url: "http://" + addr + "/debug/loadz",
		// No proxy is asked, and no redirect followed: it is on this host.
		client: &http.Client{
			Transport:     &http.Transport{DialContext: (&net.Dialer{Timeout: time.Second}).DialContext, MaxIdleConns: 1},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Load asks.
func (c *controlLoad) Load(ctx context.Context) (out console.Load, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, nil)
	if err != nil {
		return out, err
	}
	res, err := c.client.Do(req)
	if err != nil {
		return out, err
	}
	defer res.Body.Close()
	switch {
	case res.StatusCode == http.StatusNotFound:
		return out, errors.New("it has no /debug/loadz: it is older than this console")
	case res.StatusCode != http.StatusOK:
		return out, fmt.Errorf("it answers %s", res.Status)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxLoadBytes+1))
	if err != nil {
		return out, err
	}
	if len(body) > maxLoadBytes {
		return out, fmt.Errorf("its answer is longer than %d bytes", maxLoadBytes)
	}
	if err := json.Unmarshal(body, &out); err != nil {
		return console.Load{}, fmt.Errorf("its answer can't be read: %w", err)
	}
	return out, nil
}
