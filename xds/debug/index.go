package debug

import (
	"bytes"
	"encoding/json"
	"html/template"
	"net/http"
)

const indexPage = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Periscope control plane</title>
<h1>Periscope control plane</h1>
{{with .NotReady}}<p><strong>Not ready:</strong> {{.}}</p>{{end}}
<dl>
{{range .Pages}}<dt><a href="{{.Path}}">{{.Path}}</a></dt><dd>{{.Help}}</dd>
{{end}}</dl>
{{with .Info}}<h2>This process</h2>
<pre>{{.}}</pre>
{{end}}<p>Pages are JSON, compact; add <code>?pretty</code> to read them.</p>
</html>
`

type link struct{ Path, Help string }

// index lists the pages. It is plain HTML: the page may load nothing, styles
// included.
func (h *handler) index(w http.ResponseWriter, r *http.Request) {
	var data struct {
		NotReady string
		Pages    []link
		Info     string
	}
	for _, p := range h.pages {
		data.Pages = append(data.Pages, link{"/debug/" + p.name + "?pretty", p.help})
	}
	data.Pages = append(data.Pages,
		link{"/ready", "200 when configuration is being served"},
		link{"/metrics", "for Prometheus"},
		link{"/version", "of this binary"})
	if h.config.Ready != nil {
		if err := h.config.Ready(); err != nil {
			data.NotReady = err.Error()
		}
	}
	if h.config.Info != nil {
		info, err := json.MarshalIndent(h.config.Info(), "", "  ")
		if err != nil {
			h.fail(w, r, err)
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
		h.fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(out.Bytes()) // the client is gone: nobody to tell
}
