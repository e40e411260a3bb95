"use strict";
const config = CONFIG;
const trades = [];  // the views in which a run can be chosen

async function draw(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const { view } = await vegaEmbed(figure.querySelector(".plot"), spec, {
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, config,
    tooltip: { disableDefaultStyle: true, theme: "page" },
  });
  return view;
}

function choose(run, byHand = true) {
  const panel = document.getElementById("chosen");
  const template = document.getElementById(`run-${run}`);
  if (!panel || !template) return;
  panel.dataset.run = run;
  panel.replaceChildren(template.content.cloneNode(true));
  for (const row of document.querySelectorAll(".runs tbody tr")) {
    row.toggleAttribute("aria-current", row.dataset.run === String(run));
  }
  for (const view of trades) view.signal("chosen", Number(run)).runAsync();
  for (const figure of panel.querySelectorAll(".chart")) draw(figure);
  if (byHand) panel.scrollIntoView({ block: "start" });
}

function sort(head) {
  const descending = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = head.closest("table").tBodies[0];
  const key = row => row.cells[head.cellIndex].dataset.value;
  const order = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "") || 0;  // what was not measured comes last
    const numbers = Number(a) - Number(b);
    const difference = Number.isNaN(numbers) ? a.localeCompare(b, "en", { numeric: true }) : numbers;
    return descending ? -difference : difference;
  };
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
}

document.addEventListener("click", event => {
  const head = event.target.closest(".runs thead th");
  if (head) return sort(head);
  const row = event.target.closest(".runs tbody tr");
  if (row) choose(row.dataset.run);
});

(async () => {
  for (const figure of document.querySelectorAll(".charts.three .chart")) {
    const view = await draw(figure);
    if (!document.getElementById("chosen")) continue;
    trades.push(view);
    view.addEventListener("click", (_, item) => { if (item?.datum?.run) choose(item.datum.run); });
  }
  const panel = document.getElementById("chosen");
  if (panel) choose(panel.dataset.run, false);
  else await Promise.all([...document.querySelectorAll(".charts.two .chart")].map(draw));
  document.body.dataset.drawn = "yes";
})();
