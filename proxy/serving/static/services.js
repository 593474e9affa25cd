// The page: loads all Services once, follows what changes, and puts keys and panes together. It only reads.

import { HEALTHS, List, el, number } from "./list.js";
import { answer, node, service } from "./panes.js";

const $ = (id) => document.getElementById(id);
const TABS = ["service", "explain", "node"];
const WORDS = { bad: "Failing", warn: "Degraded", note: "Notes", ok: "Working", none: "No rules" };
const SILENCE = 15000;
const RETRY = 3000;
const REFRESH = 2000;

let head = null;
let place = "";
let stream = null;
let heard = 0;
let shown = "";
let refreshed = 0;
let counts = {};

const list = new List({
  viewport: $("viewport"), spacer: $("spacer"), columns: $("columns"), section: $("list"), empty: $("empty"),
  onSelect: (name) => { remember(); tab("service"); showSoon(name); },
  onOpen: () => $("panel-service").focus(),
  onCount: (found) => { counts = found; drawFilters(); },
});

// --- asking ---

async function ask(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" }, credentials: "omit" });
  const found = await response.json();
  if (!response.ok) throw new Error(found.error ?? `the agent answers ${response.status}`);
  return found;
}

async function load() {
  try {
    const found = await ask("data");
    place = `${found.epoch}.${found.revision}`;
    setHead(found.head);
    list.load(found.services);
    list.count(found.traffic);
    performance.mark("rows");
    follow();
    if (shown) show(shown);
  } catch (error) {
    say("gone", "the agent does not answer");
    setTimeout(load, RETRY);
  }
}

function follow() {
  stream?.close();
  heard = performance.now();
  stream = new EventSource(`events?since=${encodeURIComponent(place)}`);
  const on = (name, take) => stream.addEventListener(name, (event) => {
    heard = performance.now();
    place = event.lastEventId || place;
    say("live", "live");
    take(JSON.parse(event.data));
  });
  on("reload", () => { stream.close(); load(); });
  on("head", setHead);
  on("services", ({ services, gone }) => {
    list.update(services, gone);
    if (gone.includes(shown) || services.some((row) => row.s === shown)) show(shown);
  });
  on("traffic", (passed) => {
    list.count(passed);
    if (passed.moved.some(([name]) => name === shown)) renew();
  });
  // Every answer ends, and is asked for again: that is no error unless it goes on.
  stream.addEventListener("error", () => {
    if (stream.readyState === EventSource.CLOSED) again();
  });
}

function again() {
  say("gone", "reconnecting…");
  stream?.close();
  stream = null;
  setTimeout(() => { if (!stream && !document.hidden) follow(); }, RETRY);
}

setInterval(() => {
  if (stream && performance.now() - heard > SILENCE) again();
}, RETRY);

document.addEventListener("visibilitychange", () => {
  if (document.hidden) { stream?.close(); stream = null; say("paused", "paused"); } else if (place) follow();
});

function say(state, words) {
  const live = $("live");
  if (live.dataset.state !== state) { live.dataset.state = state; live.textContent = words; }
}

// --- the head ---

function setHead(found) {
  head = found;
  $("node").textContent = found.node;
  document.title = `${found.node} · Services · sluice`;
  list.traffic(found.counters.on);
  const badge = (health, words, title) => el("li", { class: "badge", "data-h": health, title }, words);
  $("badges").replaceChildren(...[
    badge(null, found.mode, "dataplane"),
    ...found.families.map((each) => badge(
      !each.healthy || each.syncs.failures ? "bad" : each.syncs.driftLeft || each.syncs.refused.length ? "warn" : each.syncs.pending ? "note" : "ok",
      each.family, each.syncs.error || (each.syncs.pending ? "changes are being written" : "the kernel holds what is wanted"),
    )),
    found.synced ? null : badge("warn", "not synced", "Services and EndpointSlices have not all been listed"),
    found.allTroubles ? badge("warn", `${number(found.allTroubles)} trouble${found.allTroubles === 1 ? "" : "s"}`, "see Node") : null,
  ].filter(Boolean));
  drawEmpty();
  if (!$("panel-node").hidden) drawNode();
}

function drawNode() {
  if (!head) return;
  const frontends = head.families.reduce((sum, each) => sum + each.frontends, 0);
  $("panel-node").replaceChildren(...node(head, { all: list.rows.size, frontends }, (name) => list.show(name)));
}

function drawFilters() {
  const { shown: visible, all, matching } = counts;
  const one = (health, words, count) => el(
    "button", {
      type: "button", class: health ? "dot" : null, "data-h": health || null, "aria-pressed": String(list.health === health),
      onclick: () => { list.filter(health); remember(); },
    }, `${words} `, el("b", {}, number(count)),
  );
  const focused = document.activeElement?.parentElement?.id === "filters" ? [...$("filters").children].indexOf(document.activeElement) : -1;
  $("filters").replaceChildren(
    one("", "All", matching ?? 0),
    ...HEALTHS.filter((health) => counts.counts[health] || list.health === health).map((health) => one(health, WORDS[health], counts.counts[health])),
  );
  if (focused >= 0) $("filters").children[Math.min(focused, $("filters").children.length - 1)].focus();
  $("count").textContent = visible === all ? "" : `${number(visible)} of ${number(all)}`;
  drawEmpty();
}

// Without Services it matters whether there are none, or none have been heard of.
function drawEmpty() {
  const none = head?.synced ? "There is no Service. One that comes is shown at once." : "Services have not been listed yet.";
  $("empty").textContent = counts.all ? "No Service is like that." : none;
}

// --- panes ---

function tab(name, { focus = false } = {}) {
  for (const each of TABS) {
    const selected = each === name;
    $(`tab-${each}`).setAttribute("aria-selected", String(selected));
    $(`tab-${each}`).tabIndex = selected ? 0 : -1;
    $(`panel-${each}`).hidden = !selected;
  }
  if (name === "node") drawNode();
  if (focus) (name === "explain" ? $("target") : $(`panel-${name}`)).focus();
}

let soon = 0;
function showSoon(name) {
  // While an arrow key is held, only where it stops is asked for.
  clearTimeout(soon);
  soon = setTimeout(() => show(name), 60);
}

let renewing = 0;
function renew() {
  if (renewing) return;
  renewing = setTimeout(() => { renewing = 0; show(shown); }, Math.max(0, refreshed + REFRESH - performance.now()));
}

async function show(name) {
  shown = name;
  refreshed = performance.now();
  const panel = $("panel-service");
  try {
    const found = await ask(`detail?service=${encodeURIComponent(name)}`);
    if (shown !== name) return;
    const top = panel.dataset.service === name ? panel.scrollTop : 0;
    const focused = panel.contains(document.activeElement) && panel !== document.activeElement ? document.activeElement.title : "";
    panel.replaceChildren(...service(found, question, list.rows.get(name), list.at));
    panel.dataset.service = name;
    panel.scrollTop = top;
    if (focused) [...panel.querySelectorAll("[title]")].find((each) => each.title === focused)?.focus();
  } catch (error) {
    if (shown === name) panel.replaceChildren(el("h1", {}, name), el("div", { class: "verdict", "data-h": "bad" }, error.message));
  }
}

function question(target) {
  tab("explain");
  $("target").value = target;
  $("target").focus();
  $("question").requestSubmit();
}

$("question").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [target, from, by] = ["target", "from", "interface"].map((id) => $(id).value.trim());
  const button = $("question").querySelector("button");
  button.disabled = true;
  const words = (value) => (/^[\w.:/[\]-]+$/.test(value) ? value : `'${value.replaceAll("'", "'\\''")}'`);
  const line = ["sluice explain", words(target), from && `--from ${words(from)}`, by && `--interface ${words(by)}`].filter(Boolean).join(" ");
  try {
    const query = new URLSearchParams({ target, from, interface: by });
    $("answer").replaceChildren(...answer(await ask(`explain?${query}`), line));
  } catch (error) {
    $("answer").replaceChildren(el("div", { class: "verdict", "data-h": "bad" }, error.message));
  } finally {
    button.disabled = false;
    remember();
  }
});

// --- keys ---

const typing = (target) => target.matches("input, textarea, select");

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const { key, target } = event;
  const searching = target === $("search");
  if (key === "Escape") {
    if (searching && target.value) { target.value = ""; list.search(""); remember(); } else $("viewport").focus();
    event.preventDefault();
    return;
  }
  if (searching && key === "Enter") { $("viewport").focus(); if (list.place < 0) list.select(0); return; }
  const arrows = ["ArrowDown", "ArrowUp", "PageDown", "PageUp"].includes(key);
  if (typing(target) && !(searching && arrows)) return;
  if (target.getAttribute("role") === "tab" && (key === "ArrowRight" || key === "ArrowLeft")) {
    const next = TABS[(TABS.findIndex((name) => target.id === `tab-${name}`) + (key === "ArrowRight" ? 1 : 2)) % 3];
    tab(next);
    $(`tab-${next}`).focus();
    event.preventDefault();
    return;
  }
  const elsewhere = $("pane").contains(target);
  const shortcuts = {
    "/": () => { $("search").focus(); $("search").select(); },
    "?": () => $("help").showModal(),
    e: () => { if (list.selected) $("target").value = list.selected; tab("explain", { focus: true }); },
    n: () => tab("node", { focus: true }),
    f: () => {
      const known = ["", ...HEALTHS.filter((health) => counts.counts[health])];
      list.filter(known[(known.indexOf(list.health) + 1) % known.length]);
      remember();
    },
  };
  if (!searching && shortcuts[key]) { shortcuts[key](); event.preventDefault(); return; }
  if (!searching && !elsewhere && key === "Enter" && target === $("viewport") && list.place >= 0) {
    list.onOpen(list.selected);
    event.preventDefault();
    return;
  }
  if (!elsewhere && !target.matches("button") && list.move(key)) event.preventDefault();
});

for (const name of TABS) $(`tab-${name}`).addEventListener("click", () => tab(name));
$("keys").addEventListener("click", () => $("help").showModal());
$("search").addEventListener("input", () => { list.search($("search").value); remember(); });

const THEME = "sluice-theme";
const stored = () => { try { return localStorage.getItem(THEME); } catch { return null; } };
function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  try { if (name) localStorage.setItem(THEME, name); } catch { /* it holds until the page is left */ }
}
theme(stored());
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  theme(dark ? "light" : "dark");
});

// --- what the address bar keeps ---

let writing = 0;
function remember() {
  // Browsers limit how often it may change.
  clearTimeout(writing);
  writing = setTimeout(() => {
    const kept = new URLSearchParams();
    if ($("search").value) kept.set("q", $("search").value);
    if (list.health) kept.set("h", list.health);
    if (list.selected) kept.set("s", list.selected);
    history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname);
  }, 250);
}

const kept = new URLSearchParams(location.hash.slice(1));
$("search").value = (kept.get("q") ?? "").slice(0, 200);
list.query = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
if (HEALTHS.includes(kept.get("h"))) list.health = kept.get("h");
list.selected = (kept.get("s") ?? "").slice(0, 300);
shown = list.selected;
tab(shown ? "service" : "node");
if (!shown) $("panel-service").replaceChildren(el("p", { class: "hint" }, "Choose a Service to see its frontends, endpoints and traffic."));
$("viewport").focus({ preventScroll: true });
load();
