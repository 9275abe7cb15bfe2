// The configs of the runs, and the environments that they ran in.

function showConfig() {
  const names = unique([
    ...Object.keys(data.defaults),
    ...runs.flatMap((run) => Object.keys(run.config)),
  ]);
  const differing = names.filter((name) =>
    several && unique(runs.map((run) => run.config[name])).length > 1);
  const changed = names.filter((name) =>
    runs.some((run) => name in run.config && run.config[name] !== data.defaults[name]));
  const groups = unique(names.map(groupOf)).sort();
  const blocks = [
    fieldBlock("Differences between the runs", differing, true),
    fieldBlock("Changed from the defaults", changed, true),
    ...groups.map((group) =>
      fieldBlock(group || "run", names.filter((name) => groupOf(name) === group), false)),
  ].filter(Boolean);
  const search = (event) => filterFields(blocks, event.target.value.toLowerCase());
  const box = el("input", { type: "search", oninput: search });
  section("config", "Config",
    el("div", { class: "bar" }, el("label", {}, "Search", box)), ...blocks);
}

// "ppo" of "ppo.kl_coef", "" of "steps".
function groupOf(name) {
  return name.includes(".") ? name.split(".")[0] : "";
}

function fieldBlock(title, names, open) {
  if (!names.length) return null;
  const columns = ["field", ...(several ? runs.map((run) => run.title) : ["value"]), "default"];
  const head = el("tr", {}, columns.map((column) => el("th", { scope: "col" }, column)));
  const fields = el("table", { class: "full" },
    el("thead", {}, head), el("tbody", {}, names.map(fieldRow)));
  const heading = el("h3", {}, title, " ", el("small", {}, names.length));
  return el("details", { open, class: "group" },
    el("summary", {}, heading), el("div", { class: "wide" }, fields));
}

function fieldRow(name) {
  const values = runs.map((run) => run.config[name] ?? MISSING);
  const usual = data.defaults[name];
  const isChanged = values.some((value) => value !== (usual ?? MISSING));
  return el("tr", { class: isChanged && "changed", "data-name": name },
    el("th", { scope: "row" }, name),
    values.map((value) => el("td", {}, value)),
    el("td", { class: "soft" }, usual ?? ""));
}

function filterFields(blocks, wanted) {
  for (const block of blocks) {
    for (const row of block.querySelectorAll("tbody tr")) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
    block.hidden = !block.querySelector("tbody tr:not([hidden])");
    if (wanted) block.open = true;
  }
}

function showEnvironment() {
  const cards = runs.flatMap((run) => run.environments.map((environment, number) =>
    environmentCard(run, environment, number)));
  const none = "Not recorded: the run has no environment.json.";
  section("environment", "Environment",
    cards.length ? el("div", { class: "grid" }, cards) : soft("p", none));
}

// A run that was resumed elsewhere has several environments.
function environmentCard(run, environment, number) {
  const count = run.environments.length;
  const which = count > 1 ? `${number + 1} of ${count}` : "";
  const heading = el("h3", {}, several ? run.title + " " : "", el("small", {}, which));
  const rows = Object.entries(environment).flatMap(([name, value]) =>
    name === "packages" ? Object.entries(value) : [[name.replace("_", " "), formatValue(value) || MISSING]]);
  return el("div", { class: "card" }, heading, table(rows));
}
