package debug

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"html/template"
	"net/http"
)

const indexStyle = `
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1rem .35rem 0; border-bottom: 1px solid #8884; }
th { font-weight: 600; white-space: nowrap; }
code, pre, td a { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8884; border-radius: .25rem; }
.fault { padding: .5rem .75rem; border-left: .25rem solid #c33; background: #c331; }
`

const indexPage = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Periscope control plane</title>
<style>` + indexStyle + `</style>
<h1>Periscope control plane</h1>
{{with .NotReady}}<p class="fault"><strong>Not ready:</strong> {{.}}</p>
{{end}}<table>
<thead><tr><th scope="col">Page</th><th scope="col">What it shows</th></tr></thead>
<tbody>
{{range .Pages}}<tr><td><a href="{{.Path}}">{{.Name}}</a></td><td>{{.Help}}</td></tr>
{{end}}</tbody>
</table>
<p>Pages are JSON, compact; add <code>?pretty</code> to read them. Names with
<code>proxyID=</code> need a part of a connection's id, or a gateway's <code>NAME.NAMESPACE</code>.</p>
{{with .Info}}<h2>This process</h2>
<pre>{{.}}</pre>
{{end}}</html>
`

// styleHash is how the content security policy names the one style.
func styleHash() string {
	sum := sha256.Sum256([]byte(indexStyle))
	return "sha256-" + base64.StdEncoding.EncodeToString(sum[:])
}

type link struct{ Name, Path, Help string }

// index lists the pages. It may load nothing, and has no scripts.
func (p *Pages) index(w http.ResponseWriter, r *http.Request) {
	var data struct {
		NotReady string
		Pages    []link
		Info     string
	}
	for _, page := range p.pages {
		path, name := "/debug/"+page.name+"?pretty", page.name
		if page.query != "" {
			path, name = path+"&"+page.query, name+"?"+page.query
		}
		data.Pages = append(data.Pages, link{name, path, page.help})
	}
	data.Pages = append(data.Pages,
		link{"/ready", "/ready", "200 when configuration is being served"},
		link{"/metrics", "/metrics", "for Prometheus"},
		link{"/version", "/version", "of this binary"})
	if p.config.Ready != nil {
		if err := p.config.Ready(); err != nil {
			data.NotReady = err.Error()
		}
	}
	if p.config.Info != nil {
		info, err := json.MarshalIndent(p.config.Info(), "", "  ")
		if err != nil {
			p.fail(w, r, err)
			return
		}
		data.Info = string(info)
	}
	var out bytes.Buffer
	page, err := template.New("index").Parse(indexPage)
	if err == nil {
		err = page.Execute(&out, data)
	}
	if err != nil {
		p.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(out.Bytes()) // the client is gone: nobody to tell
}
