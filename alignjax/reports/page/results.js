// The head of the page, the results of its runs and of their parents, and the warnings.

function showHead() {
  const head = document.getElementById("top");
  head.append(runs.map((run) => run.title).join(", "));
  const texts = runs.map((run, number) => (number ? " · " : "") + describeRun(run));
  document.getElementById("state").append(...texts.map((text) => soft("span", text)));
}

function describeRun(run) {
  const duration = `${formatDuration(run.seconds)} of training`;
  return `${prefix(run.title)}${run.stage}, seed ${run.seed}, ${progress(run)}, ${duration}`;
}

function progress(run) {
  if (run.complete) return `complete, ${run.done} steps`;
  return `incomplete: ${run.done} of ${run.steps || "one pass of"} steps`;
}

function showResults() {
  const cards = runs.map(runCard);
  const parents = runs.flatMap((run) => run.parents.map(parentCard));
  // Several runs may have the same parent: show it once.
  const distinct = new Map(parents.map((card) => [card.textContent, card]));
  const all = el("div", { class: "results" }, cards, [...distinct.values()]);
  section("results", "Results", all);
}

function runCard(run, number) {
  const mark = several && swatch(`c${number % 6}`, "trace");
  const heading = el("h3", {}, mark, run.title, " ", el("small", {}, run.directory));
  const note = `${progress(run)}; the figures of the last step are next to the curves`;
  return resultCard(heading, run.table, note);
}

function parentCard(parent) {
  const roles = el("small", {}, parent.roles.join(", "));
  const heading = el("h3", {}, parent.spec, " ", roles);
  return resultCard(heading, parent.table, "its results are not available here");
}

function resultCard(heading, rows, note) {
  const results = rows.length ? table(rows.map(withArrow)) : soft("p", note);
  return el("div", { class: "card" }, heading, results);
}

// "before -> after" with an arrow and intervals that stay with their figures.
function withArrow([label, value]) {
  return [label, value.trim().replace(/ +-> +/, "\u00a0→ ").replaceAll(" ± ", "\u00a0±\u00a0")];
}

function showWarnings() {
  const cards = runs.flatMap((run) => run.warnings.map((warning) => warningCard(run, warning)));
  const none = "None: none of the rules on KL, values, clipping, entropy, lengths and scores applies.";
  section("warnings", `Warnings (${cards.length})`, cards.length ? cards : soft("p", none));
}

function warningCard(run, warning) {
  const where = `${several ? run.title + ", " : ""}step ${warning.step}`;
  const heading = el("h3", {}, warning.kind.replaceAll("_", " "), " ", el("small", {}, where));
  const advice = el("dl", {},
    el("dt", {}, "usually means"), el("dd", {}, warning.meaning),
    el("dt", {}, "to try"), el("dd", {}, warning.remedy));
  return el("div", { class: "card warning" }, heading, el("p", {}, warning.observation), advice);
}
