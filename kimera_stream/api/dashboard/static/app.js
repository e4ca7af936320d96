// Puts the page together: the stream in, the lists and figures out.

import { Contradictions, element } from "/dashboard/cards.js";
import { Sparkline } from "/dashboard/charts.js";
import { Stream } from "/dashboard/stream.js";

const byId = (id) => document.getElementById(id);
const ROWS = 150; // statements in the document
const SOURCES = 5000; // geoids whose source is remembered
const STATS_ROWS = 28;

// -- theme ------------------------------------------------------------------------------------------------------------

const saved = { get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* private windows refuse; the choice lasts for this page */ } } };

function theme(name) {
  document.documentElement.dataset.theme = name;
  for (const tile of tiles.values()) tile.line.draw();
}

// -- figures ----------------------------------------------------------------------------------------------------------

const tiles = new Map([
  ["geoids", { line: "--blue", digits: 0 }],
  ["open", { line: "--warm", digits: 0 }],
  ["entropy", { line: "--blue", digits: 3, unit: "bits" }],
  ["temperature", { line: "--amber", digits: 3 }],
  ["activation", { line: "--green", digits: 3 }],
  ["stability", { line: "--green", digits: 3 }],
].map(([name, tile]) => {
  const box = byId(`tile-${name}`);
  return [name, { ...tile, figure: box.querySelector(".figure"), line: new Sparkline(box.querySelector("canvas"), tile.line) }];
}));

function figure(name, value) {
  const tile = tiles.get(name);
  if (!Number.isFinite(value)) return;
  tile.figure.textContent = value.toLocaleString(undefined, { minimumFractionDigits: tile.digits, maximumFractionDigits: tile.digits });
  if (tile.unit) tile.figure.append(element("small", "", tile.unit));
  tile.line.push(value);
}

function showField(data) {
  figure("geoids", data.geoids);
  figure("open", data.open_contradictions);
  for (const name of ["entropy", "temperature", "activation", "stability"]) figure(name, data[name]);
}

// The values of `stats` are shown as they come, nested names joined: the server may add some.
function flatten(value, prefix, rows) {
  for (const [key, inner] of Object.entries(value)) {
    const name = prefix ? `${prefix} ${key}` : key;
    if (inner && typeof inner === "object" && !Array.isArray(inner)) flatten(inner, name, rows);
    else if (typeof inner === "number" || typeof inner === "string") rows.push([name.replaceAll("_", " "), inner]);
  }
  return rows;
}

function showStats(data) {
  const list = byId("stats");
  list.replaceChildren(...flatten(data, "", []).slice(0, STATS_ROWS).flatMap(([name, value]) => [
    element("dt", "", name),
    element("dd", "", typeof value === "number" ? value.toLocaleString(undefined, { maximumFractionDigits: 3 }) : value),
  ]));
}

// -- statements -------------------------------------------------------------------------------------------------------

const sources = new Map();
const waiting = [];
let drawing = false;

function remember(geoid) {
  if (!geoid.originator_agent_id) return;
  const known = sources.has(geoid.id);
  sources.delete(geoid.id);
  sources.set(geoid.id, geoid.originator_agent_id);
  if (sources.size > SOURCES) sources.delete(sources.keys().next().value);
  if (!known) contradictions.sourceKnown(geoid.id);
}

function statement(event) {
  waiting.push(event);
  if (waiting.length > ROWS) waiting.shift();
  if (drawing || contradictions.paused) return;
  drawing = true;
  requestAnimationFrame(drawStatements);
}

function drawStatements() {
  drawing = false;
  const list = byId("statement-list");
  for (const event of waiting.splice(0)) {
    const row = element("li");
    row.append(element("time", "", new Date(event.ts).toLocaleTimeString()));
    if (event.type !== "geoid.created") row.append(element("span", "kind", event.type.slice("geoid.".length)));
    const symbols = Object.entries(event.data.symbolic_state ?? {}).map(([key, value]) => `${key} = ${value}`).join(", ");
    row.append(event.data.text ?? (symbols || event.data.id));
    if (event.data.originator_agent_id) row.append(element("span", "source", event.data.originator_agent_id));
    list.prepend(row);
  }
  while (list.children.length > ROWS) list.lastElementChild.remove();
  byId("statement-empty").hidden = list.children.length > 0;
}

// -- the stream -------------------------------------------------------------------------------------------------------

const contradictions = new Contradictions(byId("contradiction-list"), byId("contradiction-empty"), {
  resolve: (id, decision) => stream.call("resolve", { contradiction_id: id, decision }),
  sourceOf: (id) => sources.get(id),
});

const scheme = location.protocol === "https:" ? "wss" : "ws";
const began = Date.now();
const stream = new Stream(
  `${scheme}://${location.host}/v1/stream`,
  [
    { channel: "geoids", rewind: 400 },
    { channel: "contradictions", rewind: 100 },
    { channel: "field", latest: true },
    { channel: "stats", latest: true },
  ],
  {
    state(state, text) {
      byId("connection").dataset.state = state;
      byId("connection-text").textContent = text;
    },
    position(epoch, offset) {
      byId("position").textContent = `${epoch.slice(0, 12)}:${offset}`;
    },
    event(event) {
      if (event.channel === "field") showField(event.data);
      else if (event.channel === "stats") showStats(event.data);
      else if (event.channel === "contradictions") contradictions.put(event.data, event.ts > began);
      else if (event.channel === "geoids") {
        if (event.type !== "geoid.deleted") remember(event.data);
        statement(event);
      }
    },
    async gap(channel) {
      // The log no longer has what was missed: start over from what it has.
      if (channel === "contradictions") contradictions.clear();
      else if (channel === "geoids") byId("statement-list").replaceChildren();
      const page = await stream.call("history", { channel, limit: 60, reverse: true });
      for (const event of page.events.reverse()) stream.handlers.event(event);
    },
    resync() { /* a newer value of a latest channel follows by itself */ },
    token() {
      byId("token-form").hidden = false;
      byId("token-input").focus();
    },
  },
);

// -- controls ---------------------------------------------------------------------------------------------------------

byId("theme-button").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "light" ? "dark" : "light";
  saved.set("kimera-theme", next);
  theme(next);
});
byId("only-open").addEventListener("change", (event) => {
  contradictions.onlyOpen = event.target.checked;
  contradictions.refilter();
});
byId("min-score").addEventListener("input", (event) => {
  contradictions.minScore = Number(event.target.value);
  byId("min-score-text").value = contradictions.minScore.toFixed(2);
  contradictions.refilter();
});
byId("pause").addEventListener("click", (event) => {
  contradictions.paused = !contradictions.paused;
  event.target.setAttribute("aria-pressed", String(contradictions.paused));
  event.target.textContent = contradictions.paused ? "Go on" : "Pause";
  if (!contradictions.paused) {
    contradictions.schedule();
    drawStatements();
  }
});
byId("token-button").addEventListener("click", () => {
  byId("token-form").hidden = !byId("token-form").hidden;
  if (!byId("token-form").hidden) byId("token-input").focus();
});
byId("token-cancel").addEventListener("click", () => { byId("token-form").hidden = true; });
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("token-form").hidden = true;
  stream.start(byId("token-input").value.trim());
});

function tell(...nodes) {
  byId("say-result").replaceChildren(...nodes);
}

byId("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = byId("say-text").value.trim();
  if (!text) return;
  const agent = byId("say-agent").value.trim();
  byId("say-publish").disabled = true;
  try {
    const geoid = agent ? { text, originator_agent_id: agent } : { text };
    const published = await stream.call("publish", { geoid, key: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` });
    const count = published.contradictions.length;
    tell(element("p", count ? "bad" : "good", count
      ? `Published at offset ${published.offset}: contradicts ${count} statement${count > 1 ? "s" : ""}.`
      : `Published at offset ${published.offset}: contradicts nothing.`));
    byId("say-text").value = "";
  } catch (error) {
    tell(element("p", "bad", error.message));
  } finally {
    byId("say-publish").disabled = false;
  }
});
byId("say-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("say").requestSubmit();
});

async function search(relation) {
  const text = byId("say-text").value.trim();
  if (!text) {
    byId("say-text").focus();
    return;
  }
  const headers = { "content-type": "application/json" };
  if (stream.token) headers.authorization = `Bearer ${stream.token}`;
  try {
    const response = await fetch("/v1/search", { method: "POST", headers, body: JSON.stringify({ text, relation, k: 10 }) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail ?? answer.title ?? `HTTP ${response.status}`);
    const hits = answer.items ?? answer;
    if (!hits.length) {
      tell(element("p", "", relation === "related" ? "Nothing related." : "Nothing contradicts it."));
      return;
    }
    const list = element("ol", "hits");
    for (const hit of hits) {
      const row = element("li");
      row.append(element("b", "", hit.score.toFixed(3)), element("span", "", hit.geoid.text ?? hit.geoid.id));
      list.append(row);
    }
    tell(list);
  } catch (error) {
    tell(element("p", "bad", error.message));
  }
}
byId("say-related").addEventListener("click", () => search("related"));
byId("say-contradicts").addEventListener("click", () => search("contradicts"));
window.addEventListener("resize", () => { for (const tile of tiles.values()) tile.line.draw(); });

theme(saved.get("kimera-theme") ?? (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark"));
stream.start(null);
