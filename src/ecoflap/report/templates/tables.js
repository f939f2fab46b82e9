// Tables that sort, filter and can be saved as CSV. Without this script they are plain tables.
"use strict";
(() => {
  const collator = new Intl.Collator("en", { numeric: true });
  const order = ["none", "ascending", "descending"];

  // A cell's value: data-value where it is given ("" is missing), else its text.
  const valueOf = (cell) => (cell.dataset.value ?? cell.textContent.trim());

  function sorter(table, column, numeric, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const text = valueOf(row.cells[column]);
      return { row, key: numeric ? (text === "" ? NaN : Number(text)) : text, place: Number(row.dataset.place) };
    });
    const missing = (key) => (numeric ? Number.isNaN(key) : key === "");
    keyed.sort((a, b) => {
      if (direction === "none") return a.place - b.place;
      if (missing(a.key) || missing(b.key)) return missing(a.key) - missing(b.key) || a.place - b.place;
      const found = numeric ? a.key - b.key : collator.compare(a.key, b.key);
      return sign * found || a.place - b.place;
    });
    table.tBodies[0].append(...keyed.map((item) => item.row));
  }

  function makeSortable(table) {
    [...table.tBodies[0].rows].forEach((row, place) => { row.dataset.place = place; });
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const next = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % order.length];
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", next);
        sorter(table, column, head.dataset.sort === "number", next);
      });
    });
  }

  function makeFilter(tools, table) {
    const text = tools.querySelector("input");
    const tower = tools.querySelector("select");
    const count = tools.querySelector("output");
    const named = (row) => [...row.cells].filter((cell) => !cell.classList.contains("n"));
    const rows = [...table.tBodies[0].rows].map((row) => (
      { row, text: named(row).map((cell) => cell.textContent).join(" ").toLowerCase() }
    ));
    const apply = () => {
      const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const item of rows) {
        const fits = (!tower || tower.value === "" || item.row.dataset.tower === tower.value)
          && words.every((word) => item.text.includes(word));
        item.row.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    text.addEventListener("input", apply);
    if (tower) tower.addEventListener("change", apply);
    apply();
  }

  // A field of CSV. A text that a spreadsheet would take for a formula gets an apostrophe before it.
  function csvField(cell) {
    let value = valueOf(cell);
    if (cell.dataset.value === undefined && /^[=+\-@\t]/.test(value)) value = `'${value}`;
    return /[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  }

  function saveCsv(table, name) {
    const heads = [...table.tHead.rows[0].cells].map((head) => head.dataset.name ?? head.textContent.trim());
    const lines = [heads.map((text) => (/[",]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text)).join(",")];
    for (const row of table.tBodies[0].rows) {
      if (!row.hidden) lines.push([...row.cells].map(csvField).join(","));
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
  for (const tools of document.querySelectorAll(".tools")) {
    const table = document.getElementById(tools.dataset.table);
    makeFilter(tools, table);
    tools.querySelector("button").addEventListener("click", () => saveCsv(table, tools.dataset.table));
    tools.hidden = false;
  }
})();
