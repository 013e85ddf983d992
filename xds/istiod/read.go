package istiod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	maxBodyBytes = 64 << 20
	maxProxies   = 20000 // gateways kept of one istiod
	maxTypes     = 32    // kept of one proxy
	readTimeout  = 10 * time.Second
	maxToken     = 64 << 10
)

// Results of a read: the metric's closed set.
const (
	readOK          = "ok"
	readDenied      = "denied"
	readUnreachable = "unreachable"
	readInvalid     = "invalid"
)

// fault is why something could not be read.
type fault struct {
	result string
	err    error
}

func (f *fault) Error() string { return f.err.Error() }
func (f *fault) Unwrap() error { return f.err }

// fetch asks istiod for one page and gives its body to decode. It tells how
// far istiod's clock seems to be ahead of ours.
func (p *Poller) fetch(ctx context.Context, base, page string, decode func(io.Reader) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	u, err := url.JoinPath(base, page)
	if err != nil {
		return 0, &fault{readInvalid, fmt.Errorf("istiod's address %q: %w", base, err)}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return 0, &fault{readInvalid, fmt.Errorf("istiod's address %q: %w", base, err)}
	}
	if p.token != nil {
		token, err := p.token()
		if err != nil {
			return 0, &fault{readDenied, fmt.Errorf("read the token for istiod: %w", err)}
		}
		if token = strings.TrimSpace(token); token == "" || len(token) > maxToken {
			return 0, &fault{readDenied, fmt.Errorf("the token for istiod has %d bytes", len(token))}
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	start := time.Now()
	res, err := p.client.Do(req)
	if err != nil {
		return 0, &fault{readUnreachable, fmt.Errorf("ask istiod: %w", plain(err))}
	}
	defer res.Body.Close()
	if err := refusal(res.StatusCode); err != nil {
		return 0, err
	}
	var ahead time.Duration
	if date, err := http.ParseTime(res.Header.Get("Date")); err == nil {
		ahead = date.Add(time.Second / 2).Sub(start)
		if ahead.Abs() <= skew { // a header of whole seconds tells nothing finer
			ahead = 0
		}
	}
	body := &io.LimitedReader{R: res.Body, N: p.maxBody + 1}
	if err := decode(body); err != nil {
		if body.N <= 0 {
			err = fmt.Errorf("larger than %d MiB", p.maxBody>>20)
		}
		return 0, &fault{readInvalid, fmt.Errorf("read istiod's /%s: %w", page, plain(err))}
	}
	return ahead, nil
}

// plain drops the URL, which the reading names already.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func refusal(status int) error {
	switch status {
	case http.StatusOK:
		return nil
	case http.StatusUnauthorized:
		return &fault{readDenied, errors.New("istiod demands an identity (HTTP 401): give the control plane a projected service-account token that this istiod accepts")}
	case http.StatusForbidden:
		return &fault{readDenied, errors.New("istiod doesn't let this identity look (HTTP 403): run in its root namespace, or add ours to its DEBUG_ENDPOINT_AUTH_ALLOWED_NAMESPACES")}
	case http.StatusNotFound:
		return &fault{readDenied, errors.New("there is no such page (HTTP 404): is this istiod's monitoring port, and is ENABLE_DEBUG_ON_HTTP on?")}
	}
	return &fault{readInvalid, fmt.Errorf("istiod answers with HTTP %d", status)}
}

// decodeArray goes through an array without holding it whole.
func decodeArray(r io.Reader, element func(*json.Decoder) error) error {
	d := json.NewDecoder(r)
	t, err := d.Token()
	if err != nil {
		return err
	}
	if t == nil { // null: Go's empty slice
		return nil
	}
	if t != json.Delim('[') {
		return errors.New("not a JSON array")
	}
	for d.More() {
		if err := element(d); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}

// decodeConfig gives the versions of wanted resources in a /debug/configz.
func decodeConfig(r io.Reader, wanted map[string]Resource) (map[string]string, error) {
	out := map[string]string{}
	err := decodeArray(r, func(d *json.Decoder) error {
		var o struct {
			Kind     string `json:"kind"`
			Metadata struct {
				Name            string `json:"name"`
				Namespace       string `json:"namespace"`
				ResourceVersion string `json:"resourceVersion"`
			} `json:"metadata"`
		}
		if err := d.Decode(&o); err != nil {
			return err
		}
		key := Key(o.Kind, o.Metadata.Namespace, o.Metadata.Name)
		if want, ok := wanted[key]; ok && out[key] != want.Version { // ours, if another source has one of that name
			out[key] = o.Metadata.ResourceVersion
		}
		return nil
	})
	return out, err
}

// decodeSync gives the gateways of a /debug/syncz: every router, since which
// of them are ours may change later.
func decodeSync(r io.Reader) (map[string]Proxy, error) {
	out := map[string]Proxy{}
	err := decodeArray(r, func(d *json.Decoder) error {
		var o syncStatus
		if err := d.Decode(&o); err != nil {
			return err
		}
		if o.Proxy == "" || o.ProxyType != "" && o.ProxyType != "router" || len(out) >= maxProxies {
			return nil
		}
		// A proxy that reconnects may be listed twice: the newer stream counts.
		if p := o.exchanges(); !p.newest().Before(out[o.Proxy].newest()) {
			out[o.Proxy] = p
		}
		return nil
	})
	return out, err
}

// syncStatus is an element of /debug/syncz.
type syncStatus struct {
	Proxy     string `json:"proxy"`
	ProxyType string `json:"proxy_type"`
	Resources map[string]struct {
		Sent      string    `json:"sent"`
		Acked     string    `json:"acked"`
		SentTime  time.Time `json:"sentTime"`
		LastError string    `json:"lastError"`
	} `json:"resources"`

	// Of istiods that know no resources, and neither times nor errors.
	ClusterSent    string `json:"cluster_sent"`
	ClusterAcked   string `json:"cluster_acked"`
	ListenerSent   string `json:"listener_sent"`
	ListenerAcked  string `json:"listener_acked"`
	ExtensionSent  string `json:"extensionconfig_sent"`
	ExtensionAcked string `json:"extensionconfig_acked"`
}

func (s *syncStatus) exchanges() Proxy {
	out := Proxy{}
	for typeURL, r := range s.Resources {
		if len(out) >= maxTypes {
			break
		}
		out[typeURL] = Exchange{Sent: r.Sent, Acked: r.Acked, SentAt: r.SentTime, Error: clip(r.LastError)}
	}
	if s.Resources == nil {
		out[TypeCluster] = Exchange{Sent: s.ClusterSent, Acked: s.ClusterAcked}
		out[TypeListener] = Exchange{Sent: s.ListenerSent, Acked: s.ListenerAcked}
		out[TypeExtensionConfig] = Exchange{Sent: s.ExtensionSent, Acked: s.ExtensionAcked}
	}
	return out
}
