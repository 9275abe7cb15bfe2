"use strict";

// The data of the page, its state, and functions that make and format its elements.

const data = JSON.parse(document.getElementById("data").textContent);
const { runs, sources } = data;
const several = runs.length > 1;
const main = document.querySelector("main");

// What the reader has chosen (sort, filter, theme, ...) is in the page's address, behind the #.
const state = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = ["svg", "path", "line", "text", "circle", "g"];
const MISSING = "–";

// Every element of the page is made here. Text of a run gets in as a text node, never as HTML.
function el(tag, attributes = {}, ...children) {
  const isSvg = SVG_TAGS.includes(tag);
  const node = isSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(9).filter((child) => child != null && child !== false));
  return node;
}

function soft(tag, ...children) {
  return el(tag, { class: "soft" }, ...children);
}

function setState(key, value) {
  if (value) state.set(key, value);
  else state.delete(key);
  history.replaceState(null, "", "#" + state);
}

// A section of the page, with a link to it in the navigation.
function section(id, heading, ...children) {
  const summary = el("summary", {}, el("h2", {}, heading));
  const details = el("details", { open: true, id }, summary, ...children);
  main.append(details);
  const open = (event) => {
    event.preventDefault();
    details.open = true;
    details.scrollIntoView();
  };
  document.querySelector("nav").append(el("a", { href: "#" + id, onclick: open }, heading));
}

function table(rows) {
  const lines = rows.map(([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell))));
  return el("table", {}, el("tbody", {}, lines));
}

// "RUN: " where the page shows several runs.
function prefix(title) {
  return several ? `${title}: ` : "";
}

function formatValue(value) {
  if (value == null) return MISSING;
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

// With two digits and a sign, unless it rounds to 0.
function formatSigned(value) {
  if (value == null) return MISSING;
  let sign = "";
  if (value >= 0.005) sign = "+";
  if (value <= -0.005) sign = "−";
  return sign + Math.abs(value).toFixed(2);
}

function formatDuration(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

function unique(values) {
  return [...new Set(values)];
}
