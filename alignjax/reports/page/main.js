// The page as a whole: its sections, its theme, and what to do for printing.

const THEMES = ["", "light", "dark"]; // "": as the system has it

function applyTheme(name) {
  document.documentElement.style.colorScheme = name || "";
  return `theme: ${name || "auto"}`;
}

function nextTheme() {
  const place = THEMES.indexOf(state.get("theme") || "");
  return THEMES[(place + 1) % THEMES.length];
}

function showThemeButton() {
  const change = (event) => {
    setState("theme", nextTheme());
    event.currentTarget.textContent = applyTheme(state.get("theme"));
  };
  const label = applyTheme(state.get("theme"));
  document.querySelector("nav").append(el("button", { class: "keep", onclick: change }, label));
}

// Print all sections, also those that are closed.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => {
  closed.forEach((details) => { details.open = false; });
});

showHead();
showResults();
showWarnings();
showCurves();
showSamples();
showConfig();
showEnvironment();
showThemeButton();
