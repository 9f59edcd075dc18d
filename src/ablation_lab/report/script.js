// What the page does beyond showing itself: its tables sort, its details print. Without it nothing is missing.
"use strict";
{
  const texts = new Intl.Collator("en", { numeric: true });
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

  // Heard, not seen: aria-sort alone is read only when a reader comes by.
  const status = document.createElement("p");
  status.className = "status";
  status.setAttribute("role", "status");
  document.body.append(status);

  // A number stands in data-sort, since the text has units, spreads and signs of print; a cell of numbers without one,
  // and a dash, are nothing.
  function key(row, column) {
    const cell = row.cells[column];
    if (cell.dataset.sort) return Number(cell.dataset.sort);
    const text = cell.textContent.trim();
    return cell.matches(".r, .v") || text === "–" ? null : text;
  }

  // Nothing comes last, whichever way.
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "number" ? a - b : texts.compare(a, b));
  }

  function makeSortable(table) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    if (rows.length < 2) return;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (head.classList.contains("a")) return;
      const label = head.textContent;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const way = NEXT[head.getAttribute("aria-sort") ?? "none"];
        for (const other of heads) other.removeAttribute("aria-sort");
        const sorted = rows.map((row) => [key(row, column), row]);
        if (way !== "none") {
          head.setAttribute("aria-sort", way);
          const sign = way === "ascending" ? 1 : -1;
          sorted.sort(([a], [b]) => compare(a, b, sign));
        }
        body.append(...sorted.map(([, row]) => row));
        const name = table.parentElement.getAttribute("aria-label");
        status.textContent = `${name}: ${way === "none" ? "in the original order" : `sorted by ${label}, ${way}`}.`;
      });
    });
  }
  document.querySelectorAll(".scroll > table").forEach(makeSortable);

  // What doesn't scroll needs no stop of the Tab key.
  const regions = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth + 1) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  document.querySelectorAll(".scroll").forEach((region) => regions.observe(region));

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
    opened = [];
  });
}
