// The three panes beside the list: one Service, the answer to a question, and the node. Values in, elements out.

import { REMEMBERED, bytes, el, number } from "./list.js";

const seconds = (value) => {
  if (value === null || value === undefined) return "never";
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} days`;
};
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const heading = (words, more = "") => el("h2", {}, words, more ? el("span", { class: "more" }, ` ${more}`) : null);
const facts = (pairs) => el("dl", { class: "facts" }, pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
const tile = (value, words) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, words));
const table = (heads, rows) => el(
  "div", { class: "card" },
  el("table", {}, el("thead", {}, el("tr", {}, heads.map(([words, kind]) => el("th", { class: kind, scope: "col" }, words)))), el("tbody", {}, rows)),
);

function command(words) {
  const button = el("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(words); button.textContent = "copied"; } catch { button.textContent = "select it"; }
  } }, "copy");
  return el("div", { class: "command" }, el("code", {}, words), button);
}

// --- one Service ---

const SVG = "http://www.w3.org/2000/svg";
const MASQUERADE = { "": "", nobody: "source kept" };

// What passed in the last minutes, as two lines: to clients above, from clients below it in weight.
export function course(row, now) {
  if (!row || row.history.length < 2) return null;
  const [width, height] = [600, 46];
  const most = Math.max(1, ...row.history.map(([, rateIn, rateOut]) => Math.max(rateIn, rateOut)));
  const line = (which, name) => {
    const made = document.createElementNS(SVG, "polyline");
    const x = (at) => width - ((now - at) / REMEMBERED) * width;
    const points = row.history.map((sample) => `${x(sample[0]).toFixed(1)},${(height - 2 - (sample[which] / most) * (height - 6)).toFixed(1)}`);
    made.setAttribute("points", points.join(" "));
    made.setAttribute("class", name);
    return made;
  };
  const drawn = document.createElementNS(SVG, "svg");
  drawn.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawn.setAttribute("preserveAspectRatio", "none");
  drawn.setAttribute("role", "img");
  drawn.setAttribute("aria-label", `Traffic of the last ${REMEMBERED / 60} minutes, at most ${bytes(most)} per second`);
  drawn.append(line(2, "out"), line(1, "in"));
  return el(
    "figure", { class: "course card" }, drawn,
    el("figcaption", {}, el("span", { class: "in" }, `in ${bytes(row.rateIn)}/s`), el("span", { class: "out" }, `out ${bytes(row.rateOut)}/s`), el("span", {}, `last ${REMEMBERED / 60} minutes, peak ${bytes(most)}/s`)),
  );
}

export function service(found, ask, row, now) {
  const counted = found.traffic !== null;
  const working = { ok: "Works on this node.", none: "No rules on this node." };
  const [space, name] = found.service.split("/");
  return [
    el("h1", {}, el("span", { class: "space" }, `${space}/`), name),
    el("div", { class: "verdict", "data-h": found.health }, el("span", {}, [working[found.health], sentence(found.why)].filter(Boolean).join(" "))),
    counted ? el(
      "div", { class: "tiles" },
      tile(number(found.traffic.open), "open"), tile(number(found.traffic.connections), "connections"),
      tile(bytes(found.traffic.bytesIn), "from clients"), tile(bytes(found.traffic.bytesOut), "to clients"),
    ) : null,
    course(row, now),
    heading("Frontends", found.frontends.length ? "" : "none"),
    found.frontends.length ? table(
      [["frontend"], ["goes to"], ...(counted ? [["open", "number"], ["in / out", "number"]] : [["", "number"]])],
      found.frontends.map((each) => frontend(each, counted, ask)),
    ) : null,
    heading("Endpoints", found.allEndpoints > found.endpoints.length ? `the first ${found.endpoints.length} of ${number(found.allEndpoints)}` : found.endpoints.length ? "" : "none"),
    found.endpoints.length ? table(
      [["endpoint"], ["use"], ...(counted ? [["open", "number"], ["in / out", "number"]] : [])],
      found.endpoints.map((each) => endpoint(each, counted)),
    ) : null,
    found.gone ? el("p", { class: "hint" }, `Backends that are gone had ${plural(found.gone.connections, "connection")}, ${bytes(found.gone.bytesIn)} in and ${bytes(found.gone.bytesOut)} out.`) : null,
    heading("What it asks for"),
    facts(found.facts),
  ].filter(Boolean);
}

const sentence = (words) => (words ? `${words[0].toUpperCase()}${words.slice(1)}${/[.!?]$/.test(words) ? "" : "."}` : "");

function traffic(sums, counted) {
  if (!counted) return [];
  return [
    el("td", { class: "number" }, sums ? number(sums.open) : "–"),
    el("td", { class: "number" }, sums ? `${bytes(sums.bytesIn)} / ${bytes(sums.bytesOut)}` : "–"),
  ];
}

function frontend(each, counted, ask) {
  const host = each.address === null ? "*" : each.address.includes(":") ? `[${each.address}]` : each.address;
  const at = `${host}:${each.port}/${each.protocol}`;
  const port = each.service.split(":").slice(1).join(":");
  const notes = [
    each.policy ? `policy ${each.policy}` : "",
    each.localBackends === null ? "" : `from outside ${plural(each.localBackends.length, "backend")}`,
    each.refusal ? `without backend: ${each.refusal}` : "",
    each.affinitySeconds ? `affinity ${each.affinitySeconds} s` : "",
    each.sourceRanges.length ? `only from ${each.sourceRanges.join(", ")}` : "",
    each.masquerade ? MASQUERADE[each.masquerade] ?? `masqueraded: ${each.masquerade}` : "",
  ].filter(Boolean);
  const question = each.address === null ? each.service : at;
  const asks = el("button", { class: "link", type: "button", title: `Explain a connection to ${question}`, onclick: () => ask(question) }, "explain");
  return el(
    "tr", {},
    el("td", {}, el("div", { class: "mono" }, at), el("div", { class: "under" }, el("span", { class: "tag" }, each.kind), port ? ` ${port}` : "", "  ", asks)),
    el("td", {}, plural(each.backends.length, "backend"), el("div", { class: "under" }, notes.join(" · "))),
    ...(counted ? traffic(each.traffic, true) : [el("td", {})]),
  );
}

function endpoint(each, counted) {
  const reasons = new Map();
  for (const [policy, reason] of [["", each.cluster], ["Local", each.local]]) {
    if (reason) reasons.set(reason.words, { policy: reasons.has(reason.words) ? "" : policy, ...reason });
  }
  const use = each.used ? [] : [...reasons.values()];
  const partly = each.used && reasons.size > 1 ? [...reasons.values()].filter((reason) => reason.words !== "used") : [];
  return el(
    "tr", { class: each.used ? null : "unused" },
    el("td", {}, el("div", { class: "mono" }, each.endpoint), el("div", { class: "under" }, [each.node, each.port.split(":").slice(1).join(":")].filter(Boolean).join(" · "))),
    el(
      "td", {}, each.used ? "used" : "not used",
      [...use, ...partly].map((reason) => el("div", { class: "under" }, reason.policy ? `policy ${reason.policy}: ` : "", reason.words, " ", el("span", { class: "clause" }, reason.clause))),
    ),
    ...traffic(each.traffic, counted),
  );
}

// --- the answer to a question ---

export function answer(found, line) {
  return [
    command(line),
    el("p", { class: "hint" }, `According to ${found.words}.`),
    ...found.problems.map((each) => el("div", { class: "verdict", "data-h": "warn" }, sentence(each))),
    ...found.missing.map((each) => el("div", { class: "verdict", "data-h": "bad" }, sentence(each))),
    ...found.answers.map(one),
    el("details", {}, el("summary", {}, "As sluice explain prints it"), el("pre", { tabindex: "0" }, found.text.join("\n"))),
  ];
}

const ENDS = { reaches: "reaches a backend", rejected: "is rejected", dropped: "is dropped", untouched: "is left alone: no Service is there" };
const ORIGINS = { pod: "a local pod", node: "the node", outside: "outside" };
const whom = ({ origin, packet }) => `${ORIGINS[origin] ?? origin}${packet.source ? ` (${packet.source})` : ""}`;
const ends = (outcome) => ENDS[outcome.is] ?? outcome.is;

function one(each) {
  const certain = [...each.causes].sort((a, b) => Number(b.certain) - Number(a.certain));
  return el(
    "section", { class: "answer" },
    el("h3", {}, each.service || "No Service", " ", el("span", { class: "mono" }, each.frontend), " ", each.kind ? el("span", { class: "tag" }, each.kind) : null),
    el(
      "div", { class: "verdict", "data-h": each.works ? "ok" : "bad" },
      el("span", {}, el("strong", {}, each.works ? "It works. " : "It does not work. "), !each.works && each.outcome.is === "reaches"
        ? `By the rules a connection from ${whom(each)} reaches a backend: see the likely causes.`
        : `From ${whom(each)}, the connection ${ends(each.outcome)}.`),
    ),
    ...each.disagreements.map((words) => el("div", { class: "verdict", "data-h": "warn" }, `The kernel differs: ${words}`)),
    el("ol", { class: "steps" }, each.steps.map((step) => el("li", {}, sentence(step.words), step.clause ? el("span", { class: "clause" }, step.clause) : null))),
    each.outcome.backends?.length ? [heading("Backends"), table(
      [["backend"], ["share"], ["source"]],
      each.outcome.backends.map((share) => {
        const bar = el("i");
        bar.style.width = `${Math.round(share.probability * 100)}%`;
        return el(
          "tr", {}, el("td", {}, el("span", { class: "mono" }, share.backend), share.node ? el("div", { class: "under" }, share.node) : null),
          el("td", {}, `${Math.round(share.probability * 1000) / 10} %`, el("div", { class: "bar", "aria-hidden": "true" }, bar)),
          el("td", {}, share.masqueraded ? "masqueraded" : "kept"),
        );
      }),
    )] : null,
    each.unused.length ? [heading("Endpoints that are not used"), table(
      [["endpoint"], ["why"]],
      each.unused.map((end) => el(
        "tr", { class: "unused" }, el("td", {}, el("span", { class: "mono" }, end.endpoint), end.node ? el("div", { class: "under" }, end.node) : null),
        el("td", {}, end.words, " ", el("span", { class: "clause" }, end.clause)),
      )),
    )] : null,
    certain.length ? [heading(each.works ? "If it fails all the same" : "Likely causes"), el(
      "ul", { class: "plain card" }, certain.map((cause) => el("li", {}, sentence(cause.words), cause.next ? command(cause.next) : null)),
    )] : null,
    each.others.length ? [heading("From elsewhere"), el(
      "ul", { class: "plain card" }, each.others.map((other) => el("li", {}, `From ${whom(other)}, a connection ${ends(other.outcome)}.`)),
    )] : null,
  );
}

// --- the node ---

export function node(head, totals, choose) {
  const { counters } = head;
  const problems = [
    ...(head.synced ? [] : ["Services and EndpointSlices have not all been listed yet."]),
    ...head.families.flatMap((each) => [
      ...(each.healthy ? [] : [`${each.family}: syncs do not keep up.`]),
      ...(each.syncs.error ? [`${each.family}: the last sync failed: ${each.syncs.error}`] : []),
      ...(each.syncs.driftLeft ? [`${each.family}: ${plural(each.syncs.driftLeft, "difference")} left in the kernel.`] : []),
      ...each.syncs.refused.map((label) => `${each.family}: the kernel refused ${label}.`),
    ]),
  ];
  return [
    el("h1", {}, head.node),
    el("div", { class: "verdict", "data-h": problems.length ? "bad" : "ok" }, problems.length ? el("span", {}, problems.join(" ")) : "The kernel holds what is wanted."),
    el("div", { class: "tiles" }, tile(number(totals.all), "Services"), tile(number(head.slices), "EndpointSlices"), tile(number(totals.frontends), "frontends"), tile(number(head.allTroubles), "troubles")),
    heading("Agent"),
    facts([["version", head.version], ["mode", head.mode], ["source", head.source], ["up", seconds(head.uptime)], ["changes to write", number(head.pending)]]),
    ...head.families.flatMap((each) => [
      heading(each.family),
      facts([
        ["dataplane", each.dataplane],
        ["frontends", number(each.frontends)],
        ["syncs", `${number(each.syncs.count)}${each.syncs.failures ? `, ${plural(each.syncs.failures, "failure")} in a row` : ""}`],
        ["last sync", each.syncs.last ? `${seconds(each.syncs.last.ago)} ago, ${each.syncs.last.full ? "full" : "partial"}, ${(each.syncs.last.seconds * 1000).toFixed(1)} ms, ${plural(each.syncs.last.operations, "operation")}` : "none"],
        ["drift", each.syncs.lastDrift ? `${each.syncs.lastDrift.summary}, ${seconds(each.syncs.lastDrift.ago)} ago` : "none seen"],
      ]),
    ]),
    heading("Traffic counters"),
    counters.on
      ? facts([
        ["counting for", seconds(counters.since)], ["open flows seen", `${seconds(counters.looked)} ago`],
        ["events lost", counters.lost ? plural(counters.lost, "time") : "none"],
        ...(counters.uncounted ? [["without counters", `${plural(counters.uncounted, "connection")} from before`]] : []),
        ...counters.problems.map((each) => ["problem", each]),
      ])
      : el("p", { class: "hint" }, "Off. ", el("code", {}, "trafficCounters: true"), " in the SluiceConfiguration, or ", el("code", {}, "--traffic-counters"), ", counts connections, packets and bytes of each Service."),
    heading("Troubles", head.allTroubles > head.troubles.length ? `the first ${head.troubles.length} of ${number(head.allTroubles)}` : head.troubles.length ? "" : "none"),
    head.troubles.length ? el("ul", { class: "plain card" }, head.troubles.map((each) => el(
      "li", {}, each.subject.startsWith("Service ")
        ? el("button", { class: "link", type: "button", onclick: () => choose(each.subject.slice(8)) }, each.subject)
        : el("strong", {}, each.subject),
      ` ${each.reason}`,
    ))) : null,
  ].filter(Boolean);
}
