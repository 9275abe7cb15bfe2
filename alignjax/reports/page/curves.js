// The charts. Each has curves over the steps, points of held-out data, and dashed lines.

const WIDTH = 420;
const HEIGHT = 190;
const MARGIN = { left: 46, right: 8, top: 8, bottom: 22 };
const INNER_WIDTH = WIDTH - MARGIN.left - MARGIN.right;
const INNER_HEIGHT = HEIGHT - MARGIN.top - MARGIN.bottom;
const LARGEST_SMOOTHING = 0.98;

let smoothing = Math.min(Math.max(Number(state.get("smooth")) || 0, 0), LARGEST_SMOOTHING);
// Of each chart a function that shows the figures of a step, or of the end if the step is null.
const showStep = [];

function showCurves() {
  const grid = el("div", { class: "grid" });
  const drawAll = () => {
    showStep.length = 0;
    grid.replaceChildren(...data.charts.map(drawChart));
  };
  drawAll();
  const changeSmoothing = (event) => {
    smoothing = Number(event.target.value);
    setState("smooth", smoothing || "");
    drawAll();
  };
  const slider = el("input", {
    type: "range", min: 0, max: LARGEST_SMOOTHING, step: 0.02, value: smoothing,
    oninput: changeSmoothing,
  });
  const bar = el("div", { class: "bar" }, el("label", {}, "Smoothing", slider), curvesNote());
  section("curves", "Curves", bar, grid, runs.map(timeByPhase));
}

function curvesNote() {
  if (!data.charts.length) return soft("span", "No step has been written yet.");
  const circles = data.charts.some((chart) => chart.heldout) &&
    " Circles: on held-out data; the last one, at the end, is on all of it.";
  const figures = "Figures are those of the step under the pointer, or else of the last step.";
  return soft("span", figures, circles);
}

// The share of each phase in a run's time, if it has been measured.
function timeByPhase(run) {
  const name = "timing/phases/";
  const phases = Object.entries(run.series)
    .filter(([metric]) => metric.startsWith(name))
    .map(([metric, curve]) => [metric.slice(name.length), sum(curve.values)])
    .sort((a, b) => b[1] - a[1]);
  if (!phases.length) return null;
  const total = sum(phases.map(([, seconds]) => seconds));
  const shares = phases.map(([phase, seconds]) => `${phase} ${(100 * seconds / total).toFixed(0)} %`);
  return soft("p", `${prefix(run.title)}Share of the time: ${shares.join(", ")}.`);
}

// ---- what a chart shows

// The lines of a chart: {what: "trace", "point" or "mark", kind: its CSS classes, label, steps, values}.
function chartLines(chart) {
  const lines = runs.flatMap((run, number) =>
    [...traces(chart, run, number), ...heldoutPoints(chart, run, number)]);
  const marks = [];
  for (const mark of chart.marks) {
    // Runs with the same parent have the same mark.
    const same = (other) => other.words === mark.words && other.values[0] === mark.value;
    if (!marks.some(same)) marks.push(markLine(mark, marks.length));
  }
  return [...lines, ...marks];
}

// With several runs, a colour is a run and a dash pattern a metric; else a colour is a metric.
function traces(chart, run, number) {
  const names = Object.keys(chart.lines);
  const kind = (place) => several ? `c${number % 6} d${place % 4}` : `c${place % 6}`;
  return names
    .map((name, place) => ({ ...run.series[name], kind: kind(place), name, what: "trace" }))
    .filter((line) => line.steps && line.steps.length)
    .map((line) => {
      const words = names.length > 1 || !several ? chart.lines[line.name] : "";
      return { ...line, label: [several && run.title, words].filter(Boolean).join(" ") };
    });
}

function heldoutPoints(chart, run, number) {
  const curve = run.heldout[chart.heldout];
  if (!curve || !curve.steps.length) return [];
  const kind = several ? `c${number % 6}` : "c3";
  const label = `${several ? run.title : ""} held-out`.trim();
  return [{ ...curve, kind, label, what: "point" }];
}

function markLine(mark, place) {
  const kind = several ? `c${mark.run % 6}` : `c${[3, 1, 2, 5][place % 4]}`;
  const label = (several ? runs[mark.run].title + " " : "") + mark.words;
  return { ...mark, kind, label, what: "mark", steps: [0], values: [mark.value] };
}

// ---- the scale of a chart

// {x: step -> pixel, y: value -> pixel, last: the last step, low, high, log}
function scaleOf(lines, wantsLog) {
  const last = Math.max(1, ...lines.flatMap((line) => [line.steps[0], line.steps.at(-1)]));
  const values = lines.flatMap((line) => line.values);
  const log = wantsLog && values.some((value) => value > 0);
  const { low, high } = valueRange(log ? values.filter((value) => value > 0) : values, log);
  const by = log ? Math.log : (value) => value;
  const share = (value) => (by(value) - by(low)) / (by(high) - by(low));
  return {
    x: (step) => MARGIN.left + INNER_WIDTH * step / last,
    y: (value) => HEIGHT - MARGIN.bottom - INNER_HEIGHT * share(value),
    last, low, high, log,
  };
}

// The range of an axis: a little more than that of the values, but not below 0 if none of them is.
function valueRange(values, log) {
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const isFlat = high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high));
  if (isFlat && log) return { low: low / 2, high: high * 2 };
  if (isFlat && low) return { low: Math.min(0, 2 * low), high: Math.max(0, 2 * low) };
  if (isFlat) return { low: 0, high: 1 };
  if (log) return { low, high };
  const pad = 0.04 * (high - low);
  return { low: low >= 0 && low - pad < 0 ? 0 : low - pad, high: high + pad };
}

function ticks(low, high, log) {
  return log ? logTicks(low, high) : linearTicks(low, high);
}

function logTicks(low, high) {
  const values = [];
  for (let exponent = Math.floor(Math.log10(low)); exponent <= Math.log10(high); exponent++) {
    values.push(10 ** exponent, 3 * 10 ** exponent);
  }
  return values.filter((value) => value >= low && value <= high);
}

// About five round values.
function linearTicks(low, high) {
  const rough = (high - low) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((step) => step >= rough);
  const values = [];
  for (let number = Math.ceil(low / size); number * size <= high * (1 + 1e-9); number++) {
    values.push(Number((number * size).toPrecision(12)));
  }
  return values;
}

function formatTick(tick) {
  return String(tick).length <= 7 ? String(tick) : tick.toExponential(1);
}

// ---- drawing

function drawChart(chart) {
  const lines = chartLines(chart);
  const scale = scaleOf(lines, chart.log);
  const plot = el("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "plot", role: "img", tabindex: 0,
    "aria-label": `${chart.title}, ${chart.unit}, by step; the arrow keys move through the steps`,
  });
  plot.append(...valueAxis(scale), ...stepAxis(scale));
  plot.append(...lines.flatMap((line) => drawLine(line, scale)));
  const when = el("small");
  const figures = lines.map(() => el("b"));
  addCursor(plot, scale, lines, when, figures);
  const title = el("h4", {}, chart.title, " ", el("small", {}, chart.unit), when);
  const legend = lines.map((line, place) =>
    el("li", {}, swatch(line.kind, line.what), line.label, " ", figures[place]));
  const caption = el("figcaption", {}, title, el("ul", { class: "legend" }, legend));
  return el("figure", {}, caption, plot);
}

function valueAxis(scale) {
  return ticks(scale.low, scale.high, scale.log).flatMap((tick) => {
    const y = scale.y(tick);
    const label = { x: MARGIN.left - 5, y: y + 4, "text-anchor": "end" };
    return [horizontal("rule", y), el("text", label, formatTick(tick))];
  });
}

function stepAxis(scale) {
  return ticks(0, scale.last, false).filter(Number.isInteger).map((tick) => {
    const anchor = tick > 0.96 * scale.last ? "end" : "middle";
    const place = { x: scale.x(tick), y: HEIGHT - 6, "text-anchor": anchor };
    return el("text", place, formatValue(tick));
  });
}

function horizontal(kind, y) {
  return el("line", { class: kind, x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y, y2: y });
}

function drawLine(line, scale) {
  if (line.what === "mark") return [horizontal(`mark ${line.kind}`, scale.y(line.values[0]))];
  if (line.what === "point") {
    return line.steps.map((step, place) =>
      circle(`point ${line.kind}`, scale.x(step), scale.y(line.values[place]), 3));
  }
  const shapes = [];
  if (smoothing) shapes.push(drawPath(`trace raw ${line.kind}`, line.steps, line.values, scale));
  if (line.steps.length === 1) {
    shapes.push(circle(line.kind, scale.x(line.steps[0]), scale.y(line.values[0]), 1.5));
  }
  const values = smoothing ? smooth(line.values) : line.values;
  return [...shapes, drawPath(`trace ${line.kind}`, line.steps, values, scale)];
}

function circle(kind, x, y, radius) {
  return el("circle", { class: kind, cx: x, cy: y, r: radius });
}

// A path through the points; a logarithmic axis has no place for values up to 0.
function drawPath(kind, steps, values, scale) {
  const points = steps
    .map((step, place) => [step, values[place]])
    .filter(([, value]) => !scale.log || value > 0)
    .map(([step, value]) => `${scale.x(step).toFixed(1)} ${scale.y(value).toFixed(1)}`);
  return el("path", { class: kind, d: "M" + points.join("L") });
}

// An exponential moving mean without the bias of its start.
function smooth(values) {
  let mean = 0;
  let weight = 0;
  return values.map((value) => {
    mean = smoothing * mean + (1 - smoothing) * value;
    weight = smoothing * weight + 1 - smoothing;
    return mean / weight;
  });
}

function swatch(kind, what) {
  const shape = what === "point"
    ? circle(`point ${kind}`, 9, 4.5, 3)
    : el("line", { x1: 0, x2: 18, y1: 4.5, y2: 4.5, class: `${what} ${kind}` });
  return el("svg", { viewBox: "0 0 18 9", class: "swatch", "aria-hidden": "true" }, shape);
}

// ---- the cursor, which all charts share

function addCursor(plot, scale, lines, when, figures) {
  const cursor = el("line", {
    class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden",
  });
  plot.append(cursor);
  let current = null;
  const show = (step) => {
    cursor.setAttribute("visibility", step == null ? "hidden" : "visible");
    if (step != null) {
      const x = scale.x(Math.min(step, scale.last));
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
    when.textContent = step == null ? "" : ` step ${step}`;
    lines.forEach((line, place) => { figures[place].textContent = figureAt(line, step); });
  };
  const move = (step) => {
    current = step == null ? null : Math.min(Math.max(step, 0), scale.last);
    showStep.forEach((showIn) => showIn(current));
  };
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) * WIDTH / box.width;
    move(Math.round((x - MARGIN.left) / INNER_WIDTH * scale.last));
  };
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && move(null));
  plot.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (direction) {
      move((current ?? scale.last) + direction * (event.shiftKey ? 10 : 1));
      event.preventDefault();
    }
    if (event.key === "Escape") move(null);
  });
  showStep.push(show);
  show(null);
}

// A line's figure at a step, or its last one.
function figureAt(line, step) {
  const last = line.steps.length - 1;
  const place = step == null || line.what === "mark" ? last : lastUpTo(line.steps, step);
  return place < 0 ? MISSING : formatValue(line.values[place]);
}

// The last place whose step is not after this one; -1 if there is none.
function lastUpTo(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
