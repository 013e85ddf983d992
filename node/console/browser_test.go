package console

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"

	"github.com/periscope-mesh/periscope/test/browsertest"
)

// scheme is what the user of the browser prefers: light or dark.
func scheme(value string) chromedp.Action[chromedp.Void] {
	return func(ctx context.Context, t *chromedp.Target) (chromedp.Void, error) {
		return cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: value}},
		})
	}
}

// TestJourney is an analyst's way through the pages.
func TestJourney(t *testing.T) {
	store := &fakeStore{}
	server := httptest.NewServer(newHandler(t, store, func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	}))
	defer server.Close()
	b := browsertest.Open(t)

	b.Do(t, chromedp.Navigate(server.URL))
	b.Eventually(t, "the empty list shows what to try", `document.querySelector("#try").textContent.includes("curl http://localhost:8080/etc/passwd")`)
	b.Shot(t, "empty-light")

	id := seed(store, time.Now())
	b.Eventually(t, "attacks appear by themselves", `document.querySelectorAll(".attacks tbody tr").length === 9`)
	b.Eventually(t, "the list says that it is live", `document.querySelector("#live").dataset.state === "on" && !document.querySelector("#live").hidden`)
	b.Shot(t, "list-light")

	b.Do(t, chromedp.SetValue("select[name=type]", "sql-injection"), chromedp.Evaluate[chromedp.Void](
		`void document.querySelector("select[name=type]").dispatchEvent(new Event("change", {bubbles: true}))`))
	b.Eventually(t, "the filter narrows", `document.querySelectorAll(".attacks tbody tr").length === 1 && document.querySelector(".open").textContent === "SQL injection"`)
	b.Eventually(t, "the URL has the filter and no empty ones", `location.search === "?type=sql-injection"`)
	b.Do(t, chromedp.NavigateBack())
	b.Eventually(t, "the way back works", `location.search === "" && document.querySelectorAll(".attacks tbody tr").length === 9`)
	b.Do(t, chromedp.Navigate(server.URL+"/attacks?type=sql-injection"))
	b.Eventually(t, "the URL alone gives the same", `document.querySelector("select[name=type]").value === "sql-injection" && document.querySelectorAll(".attacks tbody tr").length === 1`)
	b.Do(t, chromedp.Navigate(server.URL+"/attacks?q=nothing-has-this"))
	b.Eventually(t, "no match says so", `document.querySelector(".empty h2").textContent === "No attack matches these filters"`)

	b.Do(t, chromedp.Navigate(server.URL+"/attacks"), chromedp.Click("#open-"+id))
	b.Eventually(t, "the attack opens", `document.querySelector("h1").textContent === "Path traversal"`)
	b.Eventually(t, "the request is marked at the exact bytes",
		`[...document.querySelectorAll(".hit .http mark")].slice(0, 2).map(m => m.textContent).join("|") === "../|etc/passwd"`)
	b.Shot(t, "detail-light")

	b.Do(t, chromedp.Navigate(server.URL+"/gateways"))
	b.Eventually(t, "no gateway says so", `document.querySelector(".empty h2").textContent === "No gateway has been heard yet"`)
	store.hear(time.Now())
	b.Do(t, chromedp.Navigate(server.URL+"/gateways"))
	b.Eventually(t, "each gateway is shown with what it runs, and what it ran before", `document.querySelectorAll(".attacks tbody tr").length === 4 &&
		document.querySelector("tbody tr td a").textContent === "istio-ingress/internal" && document.querySelectorAll("tbody .muted.small")[0] !== null && document.body.textContent.includes("0.1.1+5f0c3a9b2d17")`)
	b.Eventually(t, "the page is the current one", `document.querySelector("nav a[aria-current]").textContent === "Gateways"`)
	b.CheckNoComplaints(t)
	gallery(t, b, store, server.URL, id)
}

// gallery looks at every page in both colour schemes and on a phone.
func gallery(t *testing.T, b *browsertest.Browser, store *fakeStore, base, id string) {
	for _, p := range []struct{ name, path string }{{"list", "/attacks"}, {"detail", "/attacks/" + id}, {"gateways", "/gateways"}, {"error", "/attacks/none"}} {
		b.Do(t, scheme("dark"), chromedp.EmulateViewport(1400, 900), chromedp.Navigate(base+p.path), chromedp.WaitVisible("main"))
		b.Shot(t, p.name+"-dark")
		b.Do(t, scheme("light"), chromedp.EmulateViewport(390, 844), chromedp.Navigate(base+p.path), chromedp.WaitVisible("main"))
		b.Shot(t, p.name+"-narrow")
		b.Eventually(t, p.name+" fits a phone", `document.documentElement.scrollWidth <= 390`)
	}
	b.Do(t, chromedp.EmulateViewport(1400, 2400))
	for _, a := range store.attacks {
		b.Do(t, chromedp.Navigate(base+"/attacks/"+a.ID), chromedp.WaitVisible("main"))
		b.Do(t, chromedp.Evaluate[chromedp.Void](`void document.querySelectorAll("details.hit:first-of-type details").forEach(d => d.open = true)`))
		b.Shot(t, "open-"+string(a.Type)+"-"+a.ID[:3])
	}
}
