"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { runs, sources } = data;
const several = runs.length > 1;
const main = document.querySelector("main");
const state = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");

// What a run says gets into the page by `el`, as text, and never as HTML.
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(9).filter((child) => child != null && child !== false));
  return node;
}

function put(key, value) {
  if (value) state.set(key, value); else state.delete(key);
  history.replaceState(null, "", "#" + state);
}

function said(x) {
  if (x == null) return "–";
  if (typeof x === "boolean") return x ? "yes" : "no";
  if (typeof x !== "number") return String(x);
  if (Number.isInteger(x) && Math.abs(x) < 1e6) return String(x);
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(2) : String(+x.toPrecision(4));
}

function signed(x) {
  if (x == null) return "–";
  return (x >= 0.005 ? "+" : x <= -0.005 ? "−" : "") + Math.abs(x).toFixed(2);
}

function section(id, heading, ...children) {
  const more = el("details", { open: true, id }, el("summary", {}, el("h2", {}, heading)), ...children);
  main.append(more);
  document.querySelector("nav").append(el("a", { href: "#" + id, onclick: (event) => {
    event.preventDefault();
    more.open = true;
    more.scrollIntoView();
  } }, heading));
}

function table(rows, attributes = {}) {
  return el("table", attributes, el("tbody", {}, rows.map(([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell))))));
}

// ---- the head and the results

function progress(run) {
  if (run.complete) return `complete, ${run.done} steps`;
  return `not complete: ${run.done} of ${run.steps || "one pass of"} steps`;
}

function duration(seconds) {
  return seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function lined(rows) {
  return rows.map(([words, value]) => [words, value.trim().replace(/ +-> +/, "\u00a0→\u00a0")]);
}

function results() {
  document.getElementById("top").append(runs.map((run) => run.title).join(", "));
  document.getElementById("state").append(...runs.map((run, i) => el("span", { class: "soft" },
    `${i ? " · " : ""}${several ? run.title + ": " : ""}${run.stage}, seed ${run.seed}, ${progress(run)}, ${duration(run.seconds)} of training`)));
  const cards = runs.map((run, i) => el("div", { class: "card" },
    el("h3", {}, several && swatch(`c${i % 6}`), run.title, " ", el("small", {}, run.directory)),
    run.table.length ? table(lined(run.table)) : el("p", { class: "soft" }, `${progress(run)}; the last step's figures are beside the curves`)));
  const parents = runs.flatMap((run) => run.parents.map((parent) => el("div", { class: "card" },
    el("h3", {}, parent.spec, " ", el("small", {}, parent.roles.join(", "))),
    parent.table.length ? table(lined(parent.table)) : el("p", { class: "soft" }, "its results are not here"))));
  const once = new Map(parents.map((card) => [card.textContent, card]));  // several runs have the same
  section("results", "Results", el("div", { class: "results" }, cards, [...once.values()]));
}

function warnings() {
  const found = runs.flatMap((run) => run.warnings.map((warning) => ({ ...warning, run: run.title })));
  section("warnings", `Warnings (${found.length})`, found.length ? found.map((x) => el("div", { class: "card warning" },
    el("h3", {}, x.kind.replaceAll("_", " "), " ", el("small", {}, `${several ? x.run + ", " : ""}step ${x.step}`)), el("p", {}, x.observation),
    el("dl", {}, el("dt", {}, "usually means"), el("dd", {}, x.meaning), el("dt", {}, "to try"), el("dd", {}, x.remedy)))) :
    el("p", { class: "soft" }, "None: no rule of those that look at KL, values, clipping, entropy, lengths and scores holds."));
}

// ---- curves

const W = 420, H = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;
let smoothing = Math.min(Math.max(+state.get("smooth") || 0, 0), 0.98);
const drawn = [];  // of each chart: show(step or null)

function ticks(low, high, log) {
  if (log) {
    const out = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const k of [1, 3]) out.push(k * 10 ** e);
    return out.filter((x) => x >= low && x <= high);
  }
  const rough = (high - low) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((k) => k * unit).find((x) => x >= rough);
  const out = [];
  for (let k = Math.ceil(low / size); k * size <= high * (1 + 1e-9); k++) out.push(+(k * size).toPrecision(12));
  return out;
}

function label(tick) {
  return String(tick).length <= 7 ? String(tick) : tick.toExponential(1);
}

function smooth(values) {
  let mean = 0, weight = 0;
  return values.map((x) => {
    mean = smoothing * mean + (1 - smoothing) * x;
    weight = smoothing * weight + 1 - smoothing;
    return mean / weight;
  });
}

// The last place whose step is not after this one; -1 if there is none.
function upTo(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) { const mid = (low + high) >> 1; if (steps[mid] <= step) low = mid + 1; else high = mid; }
  return low - 1;
}

function swatch(kind, what = "trace") {
  return el("svg", { viewBox: "0 0 18 9", class: "swatch", "aria-hidden": "true" }, what === "point" ?
    el("circle", { cx: 9, cy: 4.5, r: 3, class: `point ${kind}` }) : el("line", { x1: 0, x2: 18, y1: 4.5, y2: 4.5, class: `${what} ${kind}` }));
}

function traces(chart) {
  const out = [];
  runs.forEach((run, r) => {
    const whose = several ? run.title : "";
    Object.entries(chart.lines).forEach(([name, words], s) => {
      const found = run.series[name];
      if (!found || !found.steps.length) return;
      const kind = several ? `c${r % 6} d${s % 4}` : `c${s % 6}`;
      const label = [whose, Object.keys(chart.lines).length > 1 || !several ? words : ""].filter(Boolean).join(" ");
      out.push({ ...found, kind, label, what: "trace" });
    });
    const held = run.heldout[chart.heldout];
    if (held && held.steps.length) out.push({ ...held, kind: several ? `c${r % 6}` : "c3", label: `${whose} held out`.trim(), what: "point" });
  });
  for (const mark of chart.marks) {
    const kind = several ? `c${mark.run % 6}` : `c${[3, 1, 2, 5][out.filter((x) => x.what === "mark").length % 4]}`;
    if (out.some((x) => x.words === mark.words && x.values[0] === mark.value)) continue;  // runs with the same parent
    out.push({ ...mark, kind, label: (several ? runs[mark.run].title + " " : "") + mark.words, what: "mark", steps: [0], values: [mark.value] });
  }
  return out;
}

function draw(chart) {
  const lines = traces(chart);
  const steps = lines.flatMap((x) => [x.steps[0], x.steps.at(-1)]), right = Math.max(1, ...steps);
  let values = lines.flatMap((x) => x.values);
  const log = chart.log && values.some((x) => x > 0);
  if (log) values = values.filter((x) => x > 0);
  const by = log ? Math.log : (x) => x;
  let low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) [low, high] = log ? [low / 2, high * 2] : low ? [Math.min(0, 2 * low), Math.max(0, 2 * low)] : [0, 1];
  else if (!log) { const pad = 0.04 * (high - low); [low, high] = [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad]; }
  const x = (step) => LEFT + (W - LEFT - RIGHT) * step / right;
  const y = (value) => H - BOTTOM - (H - TOP - BOTTOM) * (by(value) - by(low)) / (by(high) - by(low));
  const path = (x0, v) => x0.map((step, i) => (log && !(v[i] > 0)) ? "" : `${x(step).toFixed(1)} ${y(v[i]).toFixed(1)}`).filter(Boolean).join("L");
  const plot = el("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot", role: "img", tabindex: 0,
    "aria-label": `${chart.title}, ${chart.unit}, by step; the arrow keys go through the steps` });
  for (const tick of ticks(low, high, log)) plot.append(el("line", { class: "rule", x1: LEFT, x2: W - RIGHT, y1: y(tick), y2: y(tick) }),
    el("text", { x: LEFT - 5, y: y(tick) + 4, "text-anchor": "end" }, label(tick)));
  for (const tick of ticks(0, right).filter(Number.isInteger)) plot.append(
    el("text", { x: x(tick), y: H - 6, "text-anchor": tick > 0.96 * right ? "end" : "middle" }, said(tick)));
  for (const line of lines) {
    if (line.what === "mark") plot.append(el("line", { class: `mark ${line.kind}`, x1: LEFT, x2: W - RIGHT, y1: y(line.values[0]), y2: y(line.values[0]) }));
    else if (line.what === "point") line.steps.forEach((step, i) => plot.append(el("circle", { class: `point ${line.kind}`, cx: x(step), cy: y(line.values[i]), r: 3 })));
    else {
      if (smoothing) plot.append(el("path", { class: `trace raw ${line.kind}`, d: "M" + path(line.steps, line.values) }));
      if (line.steps.length === 1) plot.append(el("circle", { class: line.kind, cx: x(line.steps[0]), cy: y(line.values[0]), r: 1.5 }));
      plot.append(el("path", { class: `trace ${line.kind}`, d: "M" + path(line.steps, smoothing ? smooth(line.values) : line.values) }));
    }
  }
  const cursor = el("line", { class: "cursor", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  const when = el("small"), figures = lines.map(() => el("b"));
  plot.append(cursor);
  const show = (step) => {
    cursor.setAttribute("visibility", step == null ? "hidden" : "visible");
    if (step != null) { cursor.setAttribute("x1", x(Math.min(step, right))); cursor.setAttribute("x2", x(Math.min(step, right))); }
    when.textContent = step == null ? "" : ` step ${step}`;
    lines.forEach((line, i) => {
      const at = step == null || line.what === "mark" ? line.steps.length - 1 : upTo(line.steps, step);
      figures[i].textContent = at < 0 ? "–" : said(line.values[at]);
    });
  };
  let at = null;
  const move = (step) => { at = step == null ? null : Math.min(Math.max(step, 0), right); drawn.forEach((other) => other(at)); };
  for (const kind of ["pointerdown", "pointermove"]) plot.addEventListener(kind, (event) => {
    const box = plot.getBoundingClientRect();
    move(Math.round(((event.clientX - box.left) * W / box.width - LEFT) / (W - LEFT - RIGHT) * right));
  });
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && move(null));
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key] * (event.shiftKey ? 10 : 1);
    if (by) { move((at ?? right) + by); event.preventDefault(); }
    if (event.key === "Escape") move(null);
  });
  drawn.push(show);
  show(null);
  return el("figure", {}, el("figcaption", {}, el("h4", {}, chart.title, " ", el("small", {}, chart.unit), when),
    el("ul", { class: "legend" }, lines.map((line, i) => el("li", {}, swatch(line.kind, line.what), line.label, " ", figures[i])))), plot);
}

function curves() {
  const grid = el("div", { class: "grid" });
  const all = () => { drawn.length = 0; grid.replaceChildren(...data.charts.map(draw)); };
  all();
  const slide = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: smoothing, oninput: (event) => {
    smoothing = +event.target.value;
    put("smooth", smoothing || "");
    all();
  } });
  const phases = runs.map((run) => [run.title, Object.entries(run.series).filter(([name]) => name.startsWith("timing/phases/"))
    .map(([name, found]) => [name.slice(14), found.values.reduce((a, b) => a + b, 0)])]).filter(([, found]) => found.length);
  section("curves", "Curves", el("div", { class: "bar" }, el("label", {}, "Smoothing", slide),
    el("span", { class: "soft" }, data.charts.length ? "Figures are of the step under the pointer, else of the last." : "No step is written yet.",
      data.charts.some((chart) => chart.heldout) && " Circles: on what is held out; the last one, at the end, of all of it.")),
  grid, phases.map(([title, found]) => {
    const total = found.reduce((sum, [, seconds]) => sum + seconds, 0);
    return el("p", { class: "soft" }, `${several ? title + ": " : ""}Of the time: ${found.sort((a, b) => b[1] - a[1]).map(([name, seconds]) => `${name} ${(100 * seconds / total).toFixed(0)} %`).join(", ")}.`);
  }));
}

// ---- samples

const STRONG = 2;  // nats at which a token's colour is full
let shown = 0, numbers = state.get("numbers") === "1";

function token(text, ratio, say) {
  const words = (text || "◌").replaceAll("\n", "↵\n"), special = /^<\|.*\|>$/.test(text) ? " special" : "";
  const strength = 75 * Math.min(Math.abs(ratio ?? 0) / STRONG, 1);
  const node = el("span", { class: "token" + special, title: `${JSON.stringify(text)} ${signed(ratio)}`, onclick: (event) => {
    document.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
    event.currentTarget.classList.add("chosen");
    say(`${JSON.stringify(text)} ${signed(ratio)} nats`);
  } }, numbers ? el("ruby", {}, words, el("rt", {}, signed(ratio))) : words);
  node.style.background = `color-mix(in srgb, var(--${ratio < 0 ? "less" : "more"}) ${strength.toFixed(1)}%, transparent)`;
  return node;
}

function response(x) {
  const output = el("dd", { class: "soft" });
  const words = x.tokens ? x.tokens.map((text, i) => token(text, x.log_ratio[i], (text) => { output.textContent = text; })) : x.text;
  return el("div", { class: "response" }, el("p", { class: "words" }, words), el("dl", {}, Object.entries(x.figures)
    .filter(([name, value]) => name !== "cut off" || value).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, said(value)))), output));
}

function sample(row, place, by) {
  return el("article", { class: "card sample", "data-place": place }, el("header", {}, el("h3", { class: "words" }, row.prompt || ""),
    el("small", {}, [row.step != null && `step ${row.step}`, by && by !== "step" && `${by} ${said(row.sort[by])}`].filter(Boolean).join(", "))), el("div", { class: "columns" },
  Object.entries(row.sides).map(([name, responses]) => el("div", {}, el("h4", { class: "soft" }, name), responses.map(response)))));
}

function samples() {
  if (!sources.length) return;
  const list = el("div"), count = el("span", { class: "soft", role: "status" }), sort = el("select");
  const scale = el("span", { class: "scale" }, "log p of the policy less that of the reference, a token", el("span", {}, "−2 ", el("i"), " +2 nats"));
  const current = () => sources[Math.min(+state.get("source") || 0, sources.length - 1)];
  const fill = () => {
    const names = [...new Set(current().rows.flatMap((row) => Object.keys(row.sort)))];
    const chosen = names.includes(state.get("sort")) ? state.get("sort") : "";
    sort.replaceChildren(...["", ...names].map((name) => el("option", { value: name, selected: name === chosen }, name || "as they are")));
    const wanted = (state.get("filter") || "").toLowerCase(), down = state.get("order") !== "up";
    const text = (row) => [row.prompt, ...Object.values(row.sides).flat().map((x) => x.text)].join("\n").toLowerCase();
    const found = current().rows.map((row, place) => [row, place]).filter(([row]) => text(row).includes(wanted));
    if (chosen) found.sort(([a], [b]) => (down ? -1 : 1) * ((a.sort[chosen] ?? -1e9) - (b.sort[chosen] ?? -1e9)));
    scale.hidden = figures.hidden = !current().rows.some((row) => Object.values(row.sides).flat().some((x) => x.tokens));
    const total = current().total > current().rows.length ? `${current().rows.length} of ${current().total} kept here` : `${current().total}`;
    count.textContent = wanted ? `${found.length} of ${total}` : total;
    const tokens = current().rows.flatMap((row) => Object.values(row.sides).flat()).reduce((sum, x) => sum + (x.tokens || []).length, 0);
    const more = Math.max(2, Math.min(20, Math.floor(20000 * current().rows.length / tokens)));  // prompts at a time
    shown ||= more;
    list.replaceChildren(...found.slice(0, shown).map(([row, place]) => sample(row, place, chosen)));
    if (found.length > shown) list.append(el("button", { class: "more", onclick: () => { shown += more; fill(); } }, `Show more (${found.length - shown})`));
  };
  const change = (key, value) => { put(key, value); shown = 0; fill(); };
  const from = el("select", { onchange: (event) => change("source", event.target.value) }, sources.map((source, i) =>
    el("option", { value: i, selected: source === current() }, `${several ? runs[source.run].title + ": " : ""}${source.kind}`)));
  sort.addEventListener("change", (event) => change("sort", event.target.value));
  const figures = el("label", {}, el("input", { type: "checkbox", checked: numbers, onchange: (event) => {
    numbers = event.target.checked;
    change("numbers", numbers ? "1" : "");
  } }), "numbers");
  const turn = el("button", { onclick: () => {
    change("order", state.get("order") === "up" ? "" : "up");
    turn.textContent = state.get("order") === "up" ? "lowest first" : "highest first";
  } }, state.get("order") === "up" ? "lowest first" : "highest first");
  section("samples", "Samples", el("div", { class: "bar" }, el("label", {}, "From", from), el("label", {}, "Sort by", sort), turn,
    el("label", {}, "Filter", el("input", { type: "search", value: state.get("filter") || "", oninput: (event) => change("filter", event.target.value) })),
    figures, count), el("div", { class: "bar" }, scale), list);
  fill();
}

// ---- config and environment

function config() {
  const names = [...new Set([...Object.keys(data.defaults), ...runs.flatMap((run) => Object.keys(run.config))])];
  const row = (name) => {
    const values = runs.map((run) => run.config[name] ?? "–"), usual = data.defaults[name];
    return el("tr", { class: values.some((value) => value !== (usual ?? "–")) && "changed", "data-name": name }, el("th", { scope: "row" }, name),
      values.map((value) => el("td", {}, value)), el("td", { class: "soft" }, usual ?? ""));
  };
  const head = () => el("thead", {}, el("tr", {}, ["field", ...(several ? runs.map((run) => run.title) : ["value"]), "default"].map((x) => el("th", { scope: "col" }, x))));
  const block = (title, fields, open) => fields.length > 0 && el("details", { open, class: "group" }, el("summary", {}, el("h3", {}, title, " ", el("small", {}, fields.length))),
    el("div", { class: "wide" }, el("table", { class: "full" }, head(), el("tbody", {}, fields.map(row)))));
  const differing = names.filter((name) => several && new Set(runs.map((run) => run.config[name])).size > 1);
  const changed = names.filter((name) => runs.some((run) => name in run.config && run.config[name] !== data.defaults[name]));
  const groups = [...new Set(names.map((name) => name.includes(".") ? name.split(".")[0] : ""))].sort();
  const blocks = [block("What differs between the runs", differing, true), block("Not by default", changed, true),
    ...groups.map((group) => block(group || "run", names.filter((name) => (name.includes(".") ? name.split(".")[0] : "") === group), false))].filter(Boolean);
  const search = (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const tr of blocks.flatMap((x) => [...x.querySelectorAll("tbody tr")])) tr.hidden = !tr.textContent.toLowerCase().includes(wanted);
    for (const group of blocks) { group.hidden = !group.querySelector("tbody tr:not([hidden])"); if (wanted) group.open = true; }
  };
  section("config", "Config", el("div", { class: "bar" }, el("label", {}, "Search", el("input", { type: "search", oninput: search }))), ...blocks);
}

function environment() {
  const shown = runs.flatMap((run) => run.environments.map((found, i) => el("div", { class: "card" },
    el("h3", {}, several ? run.title + " " : "", el("small", {}, run.environments.length > 1 ? `${i + 1} of ${run.environments.length}` : "")),
    table(Object.entries(found).flatMap(([name, value]) => name === "packages" ? Object.entries(value) : [[name.replace("_", " "), said(value) || "–"]])))));
  section("environment", "Environment", shown.length ? el("div", { class: "grid" }, shown) : el("p", { class: "soft" }, "Not recorded (the run has no environment.json)."));
}

// ---- the page

function theme(name) {
  document.documentElement.style.colorScheme = name || "";
  return `theme: ${name || "auto"}`;
}

results();
warnings();
curves();
samples();
config();
environment();
const themes = ["", "light", "dark"];
document.querySelector("nav").append(el("button", { class: "keep", onclick: (event) => {
  put("theme", themes[(themes.indexOf(state.get("theme") || "") + 1) % 3]);
  event.currentTarget.textContent = theme(state.get("theme"));
} }, theme(state.get("theme"))));
let closed = [];
addEventListener("beforeprint", () => { closed = [...document.querySelectorAll("details:not([open])")]; closed.forEach((x) => { x.open = true; }); });
addEventListener("afterprint", () => closed.forEach((x) => { x.open = false; }));
