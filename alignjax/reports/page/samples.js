// The samples: prompts and responses, with a colour for each token.

const STRONG = 2; // nats at which the colour of a token is full
const TOKENS_AT_A_TIME = 20000;
const LEAST_AT_A_TIME = 2; // prompts
const MOST_AT_A_TIME = 20;
const LOWEST = -1e9; // sorts rows without a value last

let showsNumbers = state.get("numbers") === "1";
let shownRows = 0; // how many rows of the list are shown; 0: not known yet

function showSamples() {
  if (!sources.length) return;
  const parts = {
    list: el("div"),
    count: el("span", { class: "soft", role: "status" }),
    sort: el("select"),
    scale: colourScale(),
    numbers: null,
  };
  const change = (key, value) => {
    setState(key, value);
    shownRows = 0;
    fillSamples(parts);
  };
  parts.sort.addEventListener("change", (event) => change("sort", event.target.value));
  parts.numbers = numbersBox(change);
  const filter = el("input", {
    type: "search", value: state.get("filter") || "",
    oninput: (event) => change("filter", event.target.value),
  });
  const bar = el("div", { class: "bar" },
    el("label", {}, "From", sourceMenu(change)),
    el("label", {}, "Sort by", parts.sort),
    orderButton(change),
    el("label", {}, "Filter", filter),
    parts.numbers,
    parts.count);
  section("samples", "Samples", bar, el("div", { class: "bar" }, parts.scale), parts.list);
  fillSamples(parts);
}

// ---- the controls

function currentSource() {
  return sources[Math.min(Number(state.get("source")) || 0, sources.length - 1)];
}

function sourceMenu(change) {
  const options = sources.map((source, number) => {
    const label = prefix(runs[source.run].title) + source.kind;
    return el("option", { value: number, selected: source === currentSource() }, label);
  });
  return el("select", { onchange: (event) => change("source", event.target.value) }, options);
}

function orderButton(change) {
  const label = () => state.get("order") === "up" ? "lowest first" : "highest first";
  const button = el("button", { onclick: () => {
    change("order", state.get("order") === "up" ? "" : "up");
    button.textContent = label();
  } }, label());
  return button;
}

function numbersBox(change) {
  const box = el("input", { type: "checkbox", checked: showsNumbers, onchange: (event) => {
    showsNumbers = event.target.checked;
    change("numbers", showsNumbers ? "1" : "");
  } });
  return el("label", {}, box, "numbers");
}

function colourScale() {
  const range = el("span", {}, "−2 ", el("i"), " +2 nats");
  return el("span", { class: "scale" }, "log p of the policy minus that of the reference, per token", range);
}

// ---- the list

function fillSamples(parts) {
  const source = currentSource();
  const names = unique(source.rows.flatMap((row) => Object.keys(row.sort)));
  const sortBy = names.includes(state.get("sort")) ? state.get("sort") : "";
  parts.sort.replaceChildren(...["", ...names].map((name) =>
    el("option", { value: name, selected: name === sortBy }, name || "original order")));
  const hasTokens = source.rows.flatMap(allResponses).some((response) => response.tokens);
  parts.scale.hidden = !hasTokens;
  parts.numbers.hidden = !hasTokens;
  const wanted = (state.get("filter") || "").toLowerCase();
  const matching = matchingRows(source, wanted, sortBy);
  parts.count.textContent = countText(source, wanted, matching.length);
  const more = rowsAtATime(source);
  shownRows ||= more;
  parts.list.replaceChildren(...matching.slice(0, shownRows)
    .map(([row, place]) => sampleCard(row, place, sortBy)));
  if (matching.length > shownRows) {
    const showMore = () => {
      shownRows += more;
      fillSamples(parts);
    };
    const label = `Show more (${matching.length - shownRows})`;
    parts.list.append(el("button", { class: "more", onclick: showMore }, label));
  }
}

function allResponses(row) {
  return Object.values(row.sides).flat();
}

// [row, its place in the source] of the rows that contain the text, sorted.
function matchingRows(source, wanted, sortBy) {
  const rows = source.rows.map((row, place) => [row, place])
    .filter(([row]) => rowText(row).includes(wanted));
  if (!sortBy) return rows;
  const direction = state.get("order") === "up" ? 1 : -1;
  const value = ([row]) => row.sort[sortBy] ?? LOWEST;
  return rows.sort((a, b) => direction * (value(a) - value(b)));
}

function rowText(row) {
  const texts = allResponses(row).map((response) => response.text);
  return [row.prompt, ...texts].join("\n").toLowerCase();
}

function countText(source, wanted, matching) {
  const kept = source.rows.length;
  const total = source.total > kept ? `${kept} of ${source.total} are in this report` : `${source.total}`;
  return wanted ? `${matching} of ${total}` : total;
}

// How many prompts to show at a time, so that the page stays fast.
function rowsAtATime(source) {
  const responses = source.rows.flatMap(allResponses);
  const tokens = sum(responses.map((response) => (response.tokens || []).length));
  const rows = Math.floor(TOKENS_AT_A_TIME * source.rows.length / tokens);
  return Math.max(LEAST_AT_A_TIME, Math.min(MOST_AT_A_TIME, rows));
}

// ---- a sample

function sampleCard(row, place, sortBy) {
  const step = row.step != null && `step ${row.step}`;
  const key = sortBy && sortBy !== "step" && `${sortBy} ${formatValue(row.sort[sortBy])}`;
  const header = el("header", {},
    el("h3", { class: "words" }, row.prompt || ""),
    el("small", {}, [step, key].filter(Boolean).join(", ")));
  const columns = Object.entries(row.sides).map(([title, responses]) =>
    el("div", {}, el("h4", { class: "soft" }, title), responses.map(responseBlock)));
  return el("article", { class: "card sample", "data-place": place },
    header, el("div", { class: "columns" }, columns));
}

function responseBlock(response) {
  const output = soft("dd");
  const say = (text) => { output.textContent = text; };
  const words = response.tokens
    ? response.tokens.map((text, place) => tokenSpan(text, response.log_ratio[place], say))
    : response.text;
  const figures = Object.entries(response.figures)
    .filter(([name, value]) => name !== "cut off" || value)
    .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, formatValue(value))));
  return el("div", { class: "response" },
    el("p", { class: "words" }, words), el("dl", {}, figures, output));
}

// A token, coloured by its log ratio; a click shows its text and ratio through `say`.
function tokenSpan(text, ratio, say) {
  const words = (text || "◌").replaceAll("\n", "↵\n");
  const isSpecial = /^<\|.*\|>$/.test(text);
  const description = `${JSON.stringify(text)} ${formatSigned(ratio)}`;
  const choose = (event) => {
    document.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
    event.currentTarget.classList.add("chosen");
    say(`${description} nats`);
  };
  const inner = showsNumbers ? el("ruby", {}, words, el("rt", {}, formatSigned(ratio))) : words;
  const kind = isSpecial ? "token special" : "token";
  const node = el("span", { class: kind, title: description, onclick: choose }, inner);
  const strength = 75 * Math.min(Math.abs(ratio ?? 0) / STRONG, 1);
  const colour = `var(--${ratio < 0 ? "less" : "more"})`;
  node.style.background = `color-mix(in srgb, ${colour} ${strength.toFixed(1)}%, transparent)`;
  return node;
}
