// What the pages cannot do without a script: keep relative times right, stop
// refreshing while nobody looks, copy, and keep filter URLs short. All of it is
// comfort; the pages work without.
"use strict";

function ago(seconds) {
  if (seconds < 60) return Math.max(Math.floor(seconds), 0) + " s ago";
  if (seconds < 3600) return Math.floor(seconds / 60) + " min ago";
  if (seconds < 172800) return Math.floor(seconds / 3600) + " h ago";
  return Math.floor(seconds / 86400) + " days ago";
}

function refreshTimes() {
  for (const t of document.querySelectorAll("time[data-ago]")) {
    const text = ago((Date.now() - Date.parse(t.dateTime)) / 1000);
    if (t.textContent !== text) t.textContent = text;
  }
}

function showLive(state) {
  const live = document.getElementById("live");
  const polled = document.querySelector("[data-poll]");
  live.hidden = !polled;
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  document.getElementById("live-text").textContent = { on: "Live", off: "Not connected" }[state];
}

// A page can be up to date in saying that its source is not.
function polledState() {
  return document.querySelector("[data-poll][data-stale]") ? "off" : "on";
}

// Someone who has selected text in the table would lose the selection.
function selecting(element) {
  const s = window.getSelection();
  return s && !s.isCollapsed && element.contains(s.anchorNode);
}

document.addEventListener("htmx:beforeRequest", (e) => {
  const element = e.detail.elt;
  if (element.hasAttribute("data-poll") && (document.hidden || selecting(element))) e.preventDefault();
});

document.addEventListener("htmx:afterRequest", (e) => {
  if (e.detail.elt.hasAttribute("data-poll")) showLive(e.detail.successful ? polledState() : "off");
});

document.addEventListener("htmx:configRequest", (e) => {
  if (e.detail.elt.id !== "filters") return;
  for (const [name, value] of [...e.detail.formData]) {
    if (value === "") e.detail.formData.delete(name);
  }
  // Leaving a field that was typed in says "changed" once more: the same
  // filter again would be one more step on the way back.
  const wanted = new URLSearchParams(e.detail.formData);
  const shown = new URLSearchParams(location.search);
  wanted.sort();
  shown.sort();
  if (wanted.toString() === shown.toString()) {
    htmx.trigger(e.detail.elt, "htmx:abort"); // of another one, taken back meanwhile
    e.preventDefault();
  }
});

// An error page has no list in it: go there as a link would.
document.addEventListener("htmx:beforeSwap", (e) => {
  if (e.detail.elt.id === "filters" && e.detail.xhr.status >= 400) window.location.assign(e.detail.xhr.responseURL);
});

document.addEventListener("htmx:afterSettle", () => { refreshTimes(); showLive(polledState()); });

document.addEventListener("click", async (e) => {
  const button = e.target.closest("button.copy");
  if (!button) return;
  const source = document.querySelector(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    const range = document.createRange();
    range.selectNodeContents(source);
    window.getSelection().removeAllRanges();
    window.getSelection().addRange(range);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});

setInterval(() => { if (!document.hidden) refreshTimes(); }, 1000);
refreshTimes();
showLive(polledState());
