// Sorting of rows that the server made, by a button in each head that has data-sort. Cells with data-v sort by that number,
// where it is empty last; others by their text. `down` tells of a column, the first time, whether the largest comes first;
// `then` is called with the column and whether it does.
const sorting = (body, heads, {down, then}) => {
  const rows = body ? [...body.rows] : [];
  function sort(column, descending) {
    const cell = (row) => row.cells[column];
    const numeric = rows.length > 0 && "v" in cell(rows[0]).dataset;
    const key = numeric ? (row) => cell(row).dataset.v === "" ? NaN : +cell(row).dataset.v : (row) => cell(row).textContent;
    const keyed = rows.map((row, i) => [key(row), i, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || i - j;       // n/a stays last
      return (a < b ? -1 : a > b ? 1 : 0) * (descending ? -1 : 1) || i - j;
    });
    body.append(...keyed.map(([, , row]) => row));
    heads.forEach((head, i) => { if (i === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending"); else head.removeAttribute("aria-sort"); });
    then(column, descending);
  }
  heads.forEach((head, column) => {
    if (!("sort" in head.dataset)) return;
    const button = element("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sorted = head.getAttribute("aria-sort");
      sort(column, sorted ? sorted === "ascending" : down(column, head));
    });
  });
  return sort;
};
