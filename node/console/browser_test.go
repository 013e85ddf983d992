package console

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// browser is a headless Chromium with one tab, which collects what the
// browser complains about.
type browser struct {
	ctx context.Context

	mu         sync.Mutex
	complaints []string
}

func openBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		path = "/usr/bin/chromium"
	}
	if _, err := os.Stat(path); err != nil {
		if os.Getenv("REQUIRE_REAL") == "1" {
			t.Fatal("no chromium, and REQUIRE_REAL=1: apt-get install chromium")
		}
		t.Skip("no chromium: apt-get install chromium")
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.Flag("hide-scrollbars", true),
		chromedp.UserDataDir(t.TempDir()), chromedp.Flag("disable-component-update", true))
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	ctx, cancelTab := chromedp.NewContext(allocator)
	t.Cleanup(func() { chromedp.Cancel(ctx); cancelTab() }) // waits for the process
	b := &browser{ctx: ctx}
	err = chromedp.Listen(ctx, func(event any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := event.(type) {
		case *log.EventEntryAdded: // CSP violations come this way
			b.complaints = append(b.complaints, string(e.Entry.Level)+": "+e.Entry.Text+" "+e.Entry.URL)
		case *runtime.EventExceptionThrown:
			b.complaints = append(b.complaints, "exception: "+e.ExceptionDetails.Text)
		case *runtime.EventConsoleAPICalled:
			text := "console." + string(e.Type)
			for _, arg := range e.Args {
				text += " " + string(arg.Value)
			}
			// Leaving a page aborts its refresh, which htmx reports.
			if !strings.Contains(text, "htmx:sendAbort") && !strings.Contains(text, "htmx:afterRequest") {
				b.complaints = append(b.complaints, text)
			}
		case *page.EventJavascriptDialogOpening:
			b.complaints = append(b.complaints, "a dialog: "+e.Message)
		}
	})
	if err != nil {
		t.Fatalf("start chromium: %v", err)
	}
	if _, err := chromedp.Call(ctx, log.Enable, cdp.Empty{}); err != nil {
		t.Fatalf("browser: %v", err)
	}
	b.do(t, chromedp.EmulateViewport(1400, 900))
	return b
}

// do runs steps, for at most half a minute.
func (b *browser) do(t *testing.T, steps ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		t.Fatalf("browser: %v", err)
	}
}

// eventually polls an expression until it is true.
func (b *browser) eventually(t *testing.T, what, expression string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, 15*time.Second)
	defer cancel()
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for {
		// An error may only mean that the page is about to be another one.
		ok, err := chromedp.Run(ctx, chromedp.Evaluate[bool](expression))
		if ok {
			return
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			page, _ := chromedp.Run(b.ctx, chromedp.Evaluate[string](`location.href + "\n" + document.querySelector("main")?.innerText`))
			t.Fatalf("not in time: %s (%v)\n%s", what, err, page)
		}
	}
}

func (b *browser) checkNoComplaints(t *testing.T) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.complaints) > 0 {
		t.Errorf("the browser complains:\n%s", strings.Join(b.complaints, "\n"))
	}
}

// shot writes a screenshot if PERISCOPE_SCREENSHOTS names a directory.
func (b *browser) shot(t *testing.T, name string) {
	t.Helper()
	dir := os.Getenv("PERISCOPE_SCREENSHOTS")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		t.Fatal(err)
	}
}

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
	b := openBrowser(t)

	b.do(t, chromedp.Navigate(server.URL))
	b.eventually(t, "the empty list shows what to try", `document.querySelector("#try").textContent.includes("curl http://localhost:8080/etc/passwd")`)
	b.shot(t, "empty-light")

	id := seed(store, time.Now())
	b.eventually(t, "attacks appear by themselves", `document.querySelectorAll(".attacks tbody tr").length === 9`)
	b.eventually(t, "the list says that it is live", `document.querySelector("#live").dataset.state === "on" && !document.querySelector("#live").hidden`)
	b.shot(t, "list-light")

	b.do(t, chromedp.SetValue("select[name=type]", "sql-injection"), chromedp.Evaluate[chromedp.Void](
		`void document.querySelector("select[name=type]").dispatchEvent(new Event("change", {bubbles: true}))`))
	b.eventually(t, "the filter narrows", `document.querySelectorAll(".attacks tbody tr").length === 1 && document.querySelector(".open").textContent === "SQL injection"`)
	b.eventually(t, "the URL has the filter and no empty ones", `location.search === "?type=sql-injection"`)
	b.do(t, chromedp.NavigateBack())
	b.eventually(t, "the way back works", `location.search === "" && document.querySelectorAll(".attacks tbody tr").length === 9`)
	b.do(t, chromedp.Navigate(server.URL+"/attacks?type=sql-injection"))
	b.eventually(t, "the URL alone gives the same", `document.querySelector("select[name=type]").value === "sql-injection" && document.querySelectorAll(".attacks tbody tr").length === 1`)
	b.do(t, chromedp.Navigate(server.URL+"/attacks?q=nothing-has-this"))
	b.eventually(t, "no match says so", `document.querySelector(".empty h2").textContent === "No attack matches these filters"`)

	b.do(t, chromedp.Navigate(server.URL+"/attacks"), chromedp.Click("#open-"+id))
	b.eventually(t, "the attack opens", `document.querySelector("h1").textContent === "Path traversal"`)
	b.eventually(t, "the request is marked at the exact bytes",
		`[...document.querySelectorAll(".hit .http mark")].slice(0, 2).map(m => m.textContent).join("|") === "../|etc/passwd"`)
	b.shot(t, "detail-light")
	b.checkNoComplaints(t)
	b.gallery(t, store, server.URL, id)
}

// gallery looks at every page in both colour schemes and on a phone.
func (b *browser) gallery(t *testing.T, store *fakeStore, base, id string) {
	for _, p := range []struct{ name, path string }{{"list", "/attacks"}, {"detail", "/attacks/" + id}, {"error", "/attacks/none"}} {
		b.do(t, scheme("dark"), chromedp.EmulateViewport(1400, 900), chromedp.Navigate(base+p.path), chromedp.WaitVisible("main"))
		b.shot(t, p.name+"-dark")
		b.do(t, scheme("light"), chromedp.EmulateViewport(390, 844), chromedp.Navigate(base+p.path), chromedp.WaitVisible("main"))
		b.shot(t, p.name+"-narrow")
		b.eventually(t, p.name+" fits a phone", `document.documentElement.scrollWidth <= 390`)
	}
	b.do(t, chromedp.EmulateViewport(1400, 2400))
	for _, a := range store.attacks {
		b.do(t, chromedp.Navigate(base+"/attacks/"+a.ID), chromedp.WaitVisible("main"))
		b.do(t, chromedp.Evaluate[chromedp.Void](`void document.querySelectorAll("details.hit:first-of-type details").forEach(d => d.open = true)`))
		b.shot(t, "open-"+string(a.Type)+"-"+a.ID[:3])
	}
}
