"use strict";
// Theme, the table's order and filters, the matrices' arrow keys, and the choice of answers.
(() => {
  const root = document.documentElement;
  const tip = window.qexportTip;
  const by = (id) => document.getElementById(id);

  // Theme: the system's, until the reader chooses. A file:// page may have no storage.
  const theme = by("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("qexport-theme"); } catch { /* then it is not remembered */ }
  function wear() {
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
    theme.setAttribute("aria-pressed", String(chosen ? chosen === "dark" : dark.matches));
  }
  theme.hidden = false;
  theme.addEventListener("click", () => {
    chosen = theme.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    try { localStorage.setItem("qexport-theme", chosen); } catch { /* as above */ }
    wear();
  });
  dark.addEventListener("change", wear);
  wear();

  // The table: a button in each heading sorts; what was not measured goes last either way.
  const table = by("numbers");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator(undefined, { numeric: true });
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sorter";
    button.textContent = head.textContent;
    button.title = head.title;
    head.replaceChildren(button);
    button.addEventListener("click", () => sort(head, index));
  });

  function compare(one, other, numeric) {
    return numeric ? Number(one) - Number(other) : words.compare(one, other);
  }

  function sort(head, index) {
    // ascending, descending, the report's own order
    const turn = { none: "ascending", ascending: "descending", descending: "none" };
    const next = turn[head.getAttribute("aria-sort") || "none"];
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    let rows = original;
    if (next !== "none") {
      head.setAttribute("aria-sort", next);
      const keyed = original.map((row) => [row.cells[index].dataset.order, row]);
      const known = keyed.filter(([key]) => key !== undefined);
      const numeric = known.every(([key]) => key !== "" && Number.isFinite(Number(key)));
      const sign = next === "ascending" ? 1 : -1;
      known.sort(([one], [other]) => sign * compare(one, other, numeric));
      rows = [...known, ...keyed.filter(([key]) => key === undefined)].map(([, row]) => row);
    }
    body.append(...rows);
  }

  const methods = [...document.querySelectorAll("#filters [data-method]")];
  const passing = by("passing");
  function filter() {
    const parts = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(methods.filter((box) => box.checked).map((box) => box.dataset.method));
    let shown = 0;
    for (const row of original) {
      const text = row.textContent.toLowerCase();
      const keep = wanted.has(row.dataset.method) && parts.every((part) => text.includes(part))
        && !(passing?.checked && "fails" in row.dataset);
      row.hidden = !keep;
      shown += keep;
    }
    by("shown").textContent = shown === original.length ? `${shown} rows` : `${shown} of ${original.length} rows`;
  }
  by("filters").hidden = false;
  by("filter").addEventListener("input", filter);
  methods.forEach((box) => box.addEventListener("change", filter));
  passing?.addEventListener("change", filter);
  by("all-columns")?.addEventListener("change", (event) => table.classList.toggle("all", event.target.checked));
  filter();  // a browser may have kept the fields of an earlier visit
  table.classList.toggle("all", Boolean(by("all-columns")?.checked));

  // The matrices: one stop in Tab order each, the arrow keys go from cell to cell.
  for (const grid of document.querySelectorAll("table.grid")) {
    const rows = [...grid.tBodies[0].rows];
    const columns = [...grid.tHead.rows[0].cells];
    let current = grid.querySelector("tbody td:not(.empty)");
    current?.setAttribute("tabindex", "0");

    const show = (cell) => {
      const row = cell.parentElement.cells[0];
      if (cell.dataset.tip) tip.show(cell, "", [["", cell.dataset.tip]]);
      else if (!cell.classList.contains("empty")) {
        tip.show(cell, row.title || row.textContent, [[columns[cell.cellIndex].textContent, `${cell.textContent} %`]]);
      }
    };
    const cellOf = (event) => event.target.closest("tbody td");
    grid.addEventListener("pointerover", (event) => {
      const cell = cellOf(event);
      if (cell) show(cell);
      else tip.hide();
    });
    grid.addEventListener("pointerleave", () => tip.hide());
    grid.addEventListener("focusin", (event) => {
      const cell = cellOf(event);
      if (!cell) return;
      current?.setAttribute("tabindex", "-1");
      current = cell;
      current.setAttribute("tabindex", "0");
      show(cell);
    });
    grid.addEventListener("focusout", () => tip.hide());
    grid.addEventListener("click", (event) => {
      const cell = cellOf(event);
      if (!cell) return;
      cell.setAttribute("tabindex", "0");
      cell.focus({ preventScroll: true });
    });
    grid.addEventListener("keydown", (event) => {
      const cell = cellOf(event);
      const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
      const row = cell ? rows.indexOf(cell.parentElement) : -1;
      if (row < 0) return;
      const [down, along] = steps[event.key] || [0, 0];
      let next = rows[row + down]?.cells[cell.cellIndex + along];
      if (event.key === "Home") next = rows[row].cells[1];
      if (event.key === "End") next = rows[row].cells[rows[row].cells.length - 1];
      if (!next || next.tagName !== "TD" || next === cell) return;
      event.preventDefault();
      next.setAttribute("tabindex", "-1");
      next.focus({ preventScroll: true });
      next.scrollIntoView({ block: "nearest", inline: "nearest" });
      show(next);
    });
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hide(); });
  addEventListener("scroll", () => tip.hide(), { capture: true, passive: true });

  // Answers of one variant, or of all.
  const variant = by("answer-variant");
  if (variant) {
    const answers = [...document.querySelectorAll("#answers [data-variants]")];
    const choose = () => {
      for (const answer of answers) {
        answer.hidden = Boolean(variant.value) && !JSON.parse(answer.dataset.variants).includes(variant.value);
      }
    };
    by("answer-controls").hidden = false;
    variant.addEventListener("change", choose);
    choose();
  }
})();
