// The list of Services: found, filtered, sorted, and drawn as far as it can be seen.
//
// Ten thousand rows are never in the document: a pool of elements, as many as fit the window, is moved and filled anew
// while one scrolls. Text goes into text nodes only.

const ROW = 34;
const SPARE = 6;
export const HEALTHS = ["bad", "warn", "note", "ok", "none"];
const WEIGHT = Object.fromEntries(HEALTHS.map((name, place) => [name, place]));

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let place = 0;
  while (count >= 999.5 && place < units.length - 1) { count /= 1000; place += 1; }
  return `${place && count < 9.95 ? count.toFixed(1) : Math.round(count)} ${units[place]}`;
}

const grouped = new Intl.NumberFormat("en-GB");
export const number = (count) => grouped.format(count);

const byName = (a, b) => (a.s < b.s ? -1 : a.s > b.s ? 1 : 0);
const SORTS = {
  name: byName,
  health: (a, b) => WEIGHT[a.h] - WEIGHT[b.h] || byName(a, b),
  frontends: (a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : byName(a, b)),
  endpoints: (a, b) => b.n - a.n || byName(a, b),
  open: (a, b) => b.open - a.open || byName(a, b),
  traffic: (a, b) => b.rate - a.rate || b.total - a.total || byName(a, b),
};
const SHORT = { NodePort: "NP", LoadBalancer: "LB", ExternalIP: "ext" };
const COLUMNS = [
  ["health", "", "Sort by health, the worst first"],
  ["name", "Service", "Sort by name"],
  ["frontends", "Frontends", "Sort by address"],
  ["endpoints", "Ready", "Sort by number of endpoints", "number"],
  ["open", "Open", "Sort by open connections", "number"],
  ["traffic", "In / out per s", "Sort by traffic", "number"],
];

// What is searched of a Service, and what is sorted by.
function index(row) {
  const words = [row.s, row.t, row.h, row.w];
  for (const [port, kind, at] of row.f) words.push(port, kind, at);
  row.text = `${words.join(" ")} ${row.b.join(" ")}`.toLowerCase();
  row.key = row.f.length ? sortable(row.f[0][2]) : "~";
  return row;
}

// Rates of the last minutes, for the pane: those of Services that had any.
export const REMEMBERED = 180;
function record(row, at) {
  if (!row.rate && !row.history.length) return;
  row.history.push([at, row.rateIn, row.rateOut]);
  while (row.history.length && row.history[0][0] < at - REMEMBERED) row.history.shift();
}

const sortable = (at) => at.replace(/\d+/g, (digits) => digits.padStart(5, "0"));

export class List {
  constructor({ viewport, spacer, columns, section, empty, onSelect, onOpen, onCount }) {
    Object.assign(this, { viewport, spacer, columns, section, empty, onSelect, onOpen, onCount });
    this.rows = new Map();
    this.found = [];
    this.query = [];
    this.health = "";
    this.sort = "health";
    this.selected = "";
    this.place = -1;
    this.pool = [];
    this.due = false;
    this.at = 0;
    this.drawHead();
    viewport.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(viewport);
  }

  // --- what there is ---

  load(rows) {
    const before = this.rows;
    this.rows = new Map(rows.map((row) => [row.s, this.carry(index(row), before.get(row.s))]));
    this.narrow();
  }

  update(rows, gone) {
    for (const name of gone) this.rows.delete(name);
    for (const row of rows) this.rows.set(row.s, this.carry(index(row), this.rows.get(row.s)));
    this.narrow();
  }

  carry(row, before) {
    row.traffic = before?.traffic ?? null;
    row.at = before?.at ?? 0;
    row.open = before?.open ?? 0;
    row.rateIn = before?.rateIn ?? 0;
    row.rateOut = before?.rateOut ?? 0;
    row.rate = before?.rate ?? 0;
    row.total = before?.total ?? 0;
    row.history = before?.history ?? [];
    return row;
  }

  // Rates come from the sums of two looks at open flows, and the time between them.
  count({ moved, at }) {
    if (at === this.at && !moved.length) return;
    this.at = at;
    const touched = new Set();
    for (const [name, connections, open, bytesIn, bytesOut, packetsIn, packetsOut] of moved) {
      const row = this.rows.get(name);
      if (!row) continue;
      touched.add(name);
      const before = row.traffic;
      const seconds = at - row.at;
      if (before && seconds > 0) {
        row.rateIn = Math.max(0, bytesIn - before.bytesIn) / seconds;
        row.rateOut = Math.max(0, bytesOut - before.bytesOut) / seconds;
      }
      row.traffic = { connections, open, bytesIn, bytesOut, packetsIn, packetsOut };
      row.at = at;
      row.open = open;
      row.rate = row.rateIn + row.rateOut;
      record(row, at);
      row.total = bytesIn + bytesOut;
    }
    // Those whose sums stand still have no rate.
    for (const row of this.rows.values()) {
      if (!row.traffic || touched.has(row.s)) continue;
      row.at = at;
      row.rateIn = row.rateOut = row.rate = 0;
      record(row, at);
    }
    if (this.sort === "open" || this.sort === "traffic") this.narrow();
    else this.later();
  }

  // --- what is shown ---

  search(text) {
    this.query = text.toLowerCase().split(/\s+/).filter(Boolean);
    this.viewport.scrollTop = 0;
    this.narrow();
  }

  filter(health) {
    this.health = health;
    this.viewport.scrollTop = 0;
    this.narrow();
  }

  order(sort) {
    this.sort = sort;
    this.drawHead();
    this.viewport.scrollTop = 0;
    this.narrow();
  }

  narrow() {
    performance.mark("narrow");
    const wanted = this.query.filter((word) => word[0] !== "-");
    const unwanted = this.query.filter((word) => word[0] === "-" && word.length > 1).map((word) => word.slice(1));
    const counts = Object.fromEntries(HEALTHS.map((name) => [name, 0]));
    const found = [];
    let all = 0;
    rows: for (const row of this.rows.values()) {
      for (const word of wanted) if (!row.text.includes(word)) continue rows;
      for (const word of unwanted) if (row.text.includes(word)) continue rows;
      counts[row.h] += 1;
      all += 1;
      if (!this.health || row.h === this.health) found.push(row);
    }
    found.sort(SORTS[this.sort]);
    this.found = found;
    this.place = this.selected ? found.findIndex((row) => row.s === this.selected) : -1;
    this.spacer.style.height = `${found.length * ROW}px`;
    this.empty.hidden = found.length > 0;
    this.onCount({ shown: found.length, all: this.rows.size, matching: all, counts });
    this.draw();
    performance.measure("narrow", "narrow");
  }

  select(place, { open = false } = {}) {
    if (!this.found.length) return;
    this.place = Math.max(0, Math.min(this.found.length - 1, place));
    this.selected = this.found[this.place].s;
    const top = this.place * ROW;
    const { scrollTop, clientHeight } = this.viewport;
    if (top < scrollTop) this.viewport.scrollTop = top;
    else if (top + ROW > scrollTop + clientHeight) this.viewport.scrollTop = top + ROW - clientHeight;
    this.draw();
    this.onSelect(this.selected);
    if (open) this.onOpen(this.selected);
  }

  // A Service by its name, also one that search and filter leave out.
  show(name) {
    const place = this.found.findIndex((row) => row.s === name);
    if (place >= 0) this.select(place);
    else { this.selected = name; this.place = -1; this.draw(); this.onSelect(name); }
  }

  move(key) {
    const page = Math.max(1, Math.floor(this.viewport.clientHeight / ROW) - 1);
    const last = this.found.length - 1;
    const steps = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -last, End: last };
    if (!(key in steps)) return false;
    const from = this.place < 0 ? (steps[key] > 0 ? -1 : 0) : this.place;
    this.select(key === "End" ? last : key === "Home" ? 0 : from + steps[key]);
    return true;
  }

  // --- drawing ---

  later() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => { this.due = false; this.draw(); });
  }

  drawHead() {
    this.columns.replaceChildren(...COLUMNS.map(([sort, title, words, kind]) => el(
      "button",
      {
        type: "button", class: kind, title: words, "aria-label": words, "aria-pressed": String(this.sort === sort),
        "data-sort": sort, onclick: () => this.order(sort),
      },
      title, this.sort === sort ? (title ? " ▾" : "▾") : title ? "" : "•",
    )));
    this.traffic(this.section.classList.contains("traffic"));
  }

  // Whether there are columns of traffic.
  traffic(on) {
    this.section.classList.toggle("traffic", on);
    for (const button of this.columns.children) {
      if (["open", "traffic"].includes(button.dataset.sort)) button.hidden = !on;
    }
    this.later();
  }

  draw() {
    const { scrollTop, clientHeight } = this.viewport;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - SPARE);
    const last = Math.min(this.found.length, Math.ceil((scrollTop + clientHeight) / ROW) + SPARE);
    while (this.pool.length < last - first) this.pool.push(this.make());
    // A place keeps its element while it is in sight, so that nothing flickers under the pointer.
    const size = this.pool.length || 1;
    const used = new Set();
    for (let place = first; place < last; place += 1) {
      const item = this.pool[place % size];
      used.add(item);
      this.fill(item, this.found[place], place);
    }
    for (const item of this.pool) if (!used.has(item)) item.line.hidden = true;
    this.viewport.setAttribute("aria-activedescendant", this.place >= first && this.place < last ? `row-${this.place}` : "");
  }

  make() {
    const parts = {
      dot: el("span", { class: "dot" }), space: document.createTextNode(""), name: document.createTextNode(""),
      at: document.createTextNode(""), more: document.createTextNode(""), ends: el("span", { class: "number ends" }),
      open: el("span", { class: "number" }), rate: el("span", { class: "number" }),
    };
    const name = el("span", {}, el("span", { class: "space" }, parts.space), el("span", { class: "name" }, parts.name));
    const at = el("span", { class: "at" }, parts.at, el("small", {}, parts.more));
    const line = el("div", { class: "row", role: "option" }, parts.dot, name, at, parts.ends, parts.open, parts.rate);
    const item = { line, cell: name, where: at, ...parts, place: -1 };
    line.addEventListener("mousedown", (event) => { if (event.button === 0) this.select(item.place); });
    line.addEventListener("dblclick", () => this.select(item.place, { open: true }));
    this.spacer.append(line);
    return item;
  }

  fill(item, row, place) {
    const { line } = item;
    item.place = place;
    line.hidden = false;
    line.id = `row-${place}`;
    line.style.transform = `translateY(${place * ROW}px)`;
    line.setAttribute("aria-selected", String(row.s === this.selected));
    line.setAttribute("aria-posinset", place + 1);
    line.setAttribute("aria-setsize", this.found.length);
    const slash = row.s.indexOf("/") + 1;
    item.dot.dataset.h = row.h;
    item.dot.title = row.w || "it works";
    item.space.data = row.s.slice(0, slash);
    item.name.data = row.s.slice(slash);
    item.cell.title = row.s;
    item.at.data = row.f.length ? row.f[0][2] : "–";
    const kinds = [...new Set(row.f.map(([, kind]) => kind))].filter((kind) => kind !== "ClusterIP");
    const others = row.f.length > 1 ? `+${row.f.length - 1}` : "";
    item.more.data = [others, kinds.map((kind) => SHORT[kind] ?? kind).join(" ") || (row.f.length ? "" : row.t)].filter(Boolean).join(" ");
    item.where.title = row.f.map(([port, kind, at]) => `${at}  ${kind}${port ? `  ${port}` : ""}`).slice(0, 12).join("\n");
    item.ends.textContent = row.f.length || row.n ? `${row.r} / ${row.n}` : "";
    item.ends.dataset.h = row.r < row.n || !row.n ? row.h : "";
    item.open.textContent = row.traffic ? number(row.open) : "";
    item.open.classList.toggle("off", !row.open);
    item.rate.textContent = row.traffic ? (row.rate ? `${bytes(row.rateIn)} / ${bytes(row.rateOut)}` : "–") : "";
    item.rate.classList.toggle("off", !row.rate);
  }
}
