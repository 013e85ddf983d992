package e2e

import (
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/periscope-mesh/periscope/test/browsertest"
)

// What an analyst sees of an attack that came through the gateway: the list
// fills by itself, and the attack's page marks the payload in the request.
func TestBrowserShowsTheAttack(t *testing.T) {
	b := browsertest.Open(t)
	r := newRig(t).up(t)
	b.Do(t, chromedp.Navigate("http://"+r.console))
	b.Eventually(t, "the empty list says what to try", `document.querySelector("#try").textContent.includes("/etc/passwd")`)
	get(t, "http://"+r.http+"/download?file=../../etc/passwd")
	b.Eventually(t, "the attack appears", `document.querySelector(".attacks tbody tr")?.innerText.includes("Path traversal")`)
	b.Eventually(t, "with its client", `document.querySelector(".attacks tbody tr").innerText.includes("127.0.0.1")`)
	b.Do(t, chromedp.Click(".attacks tbody a"))
	b.Eventually(t, "its page opens", `document.querySelector("h1")?.textContent === "Path traversal"`)
	b.Eventually(t, "the payload is marked in the request", `[...document.querySelectorAll(".hit .http mark")].some(m => m.textContent.includes("etc/passwd"))`)
	b.Eventually(t, "CRS rules are named", `/93\d{4}/.test(document.querySelector("main").innerText)`)
	b.CheckNoComplaints(t)
}
