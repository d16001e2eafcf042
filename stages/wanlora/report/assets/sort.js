for (const table of document.querySelectorAll("table.sortable")) {
  const value = cell => { const text = cell.dataset.sort ?? cell.textContent.trim();
    const number = Number(text); return text !== "" && !Number.isNaN(number) ? number : text.toLowerCase(); };
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const up = head.dataset.order !== "up"; const body = table.tBodies[0];
    table.querySelectorAll("th").forEach(other => delete other.dataset.order);
    head.dataset.order = up ? "up" : "down";
    const rows = [...body.rows].map(row => [value(row.cells[column]), row]);
    rows.sort(([a], [b]) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1)
      : typeof a === "number" ? -1 : 1);
    body.append(...rows.map(([, row]) => row));
  }));
}
